"""`pgpark top`: one picture into a pipe, a live one in a terminal."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from rich.cells import cell_len
from rich.console import Console

from pgpark.cli.common import plain
from pgpark.cli.picture import overview, pool_picture, short, span, sparkline, tiny
from tests.cli.test_commands import Pgpark, pgpark
from tests.conftest import Database, Server

__all__ = ["pgpark"]  # a fixture

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def drawn(lot: dict[str, Any], width: int, history: Any = None, bare: bool = True) -> list[str]:
    out = io.StringIO()
    colours = None if bare else "256"
    console = Console(
        file=out, width=width, color_system=colours, force_terminal=not bare, highlight=False, markup=False
    )
    console.print(pool_picture(lot, history, width, bare), soft_wrap=True)
    return out.getvalue().splitlines()


def lot_of(db: Database, pool: str = "gpu") -> dict[str, Any]:
    return dict(db.value("select pgpark.park_lot(%s)", pool))


def test_tasks_are_drawn_to_their_units(db: Database) -> None:
    db.pool(max_units=40)
    wide, narrow = db.parked(units=20), db.parked(units=10)
    db.claim()
    _, _, ids, units, *_ = drawn(lot_of(db), 80)
    assert len(ids) == len(units) == 80
    assert re.fullmatch(rf"\[#{wide}=+\]\[#{narrow}=+\]·{{20}}", ids)
    assert ids.index("][") == 39, "half of the pool"
    assert units.startswith("[20u 0s=")


def test_lanes_show_units_and_age_in_the_order_of_starting_and_mark_the_head(db: Database) -> None:
    db.pool(max_units=4)
    db.freeze()
    db.parked(units=3)
    db.claim()
    head = db.parked(units=2, priority="high")
    db.advance(45)
    db.parked(units=1, priority="low")
    lines = drawn(lot_of(db), 80)
    assert lines[0] == "gpu  active  3 of 4 units  1 running  2 parked"
    assert lines[1] == f"head: task {head} needs 2 units, waits for 45 s; 1 free"
    assert "high         1 [▶2u 45s]" in [line.rstrip() for line in lines]
    assert "low          1 [1u 0s]" in [line.rstrip() for line in lines]


def test_who_sees_its_own_tasks_alone_is_told_nothing_of_the_line(db: Database, role: str) -> None:
    db.pool(max_units=4)
    db.parked(units=4, tenant="acme")
    db.rows("select pgpark.park_grant(%s, 'producer', tenants => '{acme}')", role)
    db.connection.execute(f"set role {role}")
    lot = lot_of(db)
    db.connection.execute("reset role")
    assert drawn(lot, 80)[1] == "why they wait is not shown"
    lot["parked"] |= {"count": 0, "more": True}
    assert drawn(lot, 80)[1] == "none of the first that wait is theirs"


def test_a_lane_that_is_too_long_says_how_many_more(db: Database) -> None:
    db.pool(max_units=4)
    for _ in range(30):
        db.parked(units=4)
    (lane,) = [line for line in drawn(lot_of(db), 40) if line.startswith("normal")]
    assert re.fullmatch(r"normal +30 (\[▶?4u \ds\] )+\+\d+", lane)
    assert len(lane) <= 40


@pytest.mark.parametrize("width", [24, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal(db: Database, width: int) -> None:
    db.pool(max_units=1_000_000, tenants={"t" * 200: {"max_units": 500_000}})
    for number in range(50):
        db.parked(units=1 + 9000 * number, tenant=("t" * 200, None)[number % 2], priority=("low", "high")[number % 2])
    db.claim(worker="w" * 200)
    failing = db.parked()
    db.value("select pgpark.park_cancel(%s, %s)", failing, "r" * 500)
    lot = lot_of(db)
    history = db.rows("select * from pgpark.park_history('gpu')")
    for bare in (True, False):
        lines = [ESCAPES.sub("", line) for line in drawn(lot, width, history, bare)]
        assert [line for line in lines if len(line) > width] == []


def test_names_cannot_give_orders_to_the_terminal(db: Database) -> None:
    db.pool(max_units=4)
    db.parked(tenant="a\x1b[2Jb\nc", units=1)
    db.claim(worker="w\x1b]0;owned\x07")
    failing = db.parked()
    db.value("select pgpark.park_cancel(%s, %s)", failing, "reason\x1b[31m")
    text = "\n".join(drawn(lot_of(db), 80))
    assert "\x1b" not in text and "\x07" not in text
    assert "a?[2Jb?c" in text and "w?]0;owned?" in text


def test_names_in_wide_letters_take_their_columns(db: Database) -> None:
    db.pool(max_units=4)
    for tenant in ("\u65e5\u672c\u8a9e", "b", "\u65e5\u672c" * 20):
        db.parked(tenant=tenant)
    lines = [line for line in drawn(lot_of(db), 60) if " units " in line and "░" in line]
    assert len(lines) == 3
    assert {cell_len(line[: line.index("░")]) for line in lines} == {17}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_cannot_show_it_gets_a_plainer_picture_as_wide(db: Database, encoding: str) -> None:
    db.pool(max_units=4)
    db.parked(tenant="a")
    db.parked(tenant="b", units=4)
    command = [sys.executable, "-m", "pgpark", "top", "gpu", "--once"]
    environment = os.environ | {"PGPARK_DSN": db.dsn, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "COLUMNS": "60"}
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    lines = done.stdout.decode(encoding).splitlines()
    assert "\\" not in done.stdout.decode(encoding)
    assert [line for line in lines if len(line) > 60] == []
    assert any(set(line) <= {".", "·"} and len(line) == 60 for line in lines)


def test_a_terminal_that_can_only_print_gets_a_picture_each_time(db: Database) -> None:
    db.pool(max_units=4)
    terminal = Terminal("top", "gpu", "--every", "0.1", dsn=db.dsn, TERM="dumb")
    try:
        terminal.wait_for("gpu  active  0 of 4 units")
        terminal.seen = ""
        terminal.wait_for("gpu  active  0 of 4 units")
    finally:
        terminal.close()


def test_words_for_numbers() -> None:
    assert [span(secs) for secs in (None, 0.42, 12, 100, 4000, 7200, 200_000)] == [
        *("0.0 s", "0.4 s", "12 s", "2 min", "67 min", "2 h", "2 d"),
    ]
    assert [tiny(secs) for secs in (0.9, 99, 100, 7000, 200_000)] == ["0s", "99s", "1m", "1h", "2d"]
    assert [short(number) for number in (0, 9999, 12_300, 1_000_000)] == ["0", "9999", "12.3k", "1M"]
    assert sparkline([0, 1, 4, 8]) == " ▁▄█"
    assert plain("ü√") == "ü√"


def test_one_picture_goes_into_a_pipe_without_colours(pgpark: Pgpark, db: Database) -> None:
    db.pool(max_units=24)
    db.parked(units=8)
    db.claim()
    printed = pgpark("top", "--once")
    assert printed.code == 0 and printed.err == ""
    assert printed.out.startswith("gpu  active  8 of 24 units  1 running  0 parked\nnothing waits\n[#")
    assert "\x1b" not in printed.out


@pytest.mark.parametrize(("said", "width"), [("40", 40), ("", 80), ("wide", 80), ("-1", 80), ("0", 24)])
def test_a_pipe_is_as_wide_as_columns_says_if_that_says_anything(
    pgpark: Pgpark, db: Database, monkeypatch: pytest.MonkeyPatch, said: str, width: int
) -> None:
    db.pool(max_units=24)
    monkeypatch.setenv("COLUMNS", said)
    printed = pgpark("top", "--once")
    assert (printed.code, printed.err) == (0, "")
    assert printed.out.splitlines()[2] == "·" * width


def test_with_json_it_is_the_lot_and_its_last_hour(pgpark: Pgpark, db: Database) -> None:
    db.pool(max_units=24)
    db.parked(units=8)
    (row,) = pgpark("top", "gpu", "--once", "--json").rows
    assert (row["pool"], row["parked"]["count"], len(row["history"])) == ("gpu", 1, 60)


def test_without_a_pool_all_are_shown(pgpark: Pgpark, db: Database) -> None:
    assert pgpark("top", "--once").err.startswith("there are no pools yet")
    db.pool(max_units=24)
    db.pool("cpu", max_units=8)
    db.rows("select pgpark.park_set_pool_state('cpu', 'paused')")
    lines = pgpark("top", "--once").out.splitlines()
    assert [line.split()[0] for line in lines if line.strip()] == ["cpu", "gpu"]
    assert lines[0].rstrip().endswith("paused")
    width = 30
    console = Console(file=io.StringIO(), width=width, markup=False)
    console.print(overview(db.value("select pgpark.park_lot()")["pools"], width, bare=True))


def test_an_unknown_pool_is_one_line(pgpark: Pgpark, db: Database) -> None:
    db.pool()
    printed = pgpark("top", "nowhere", "--once")
    assert (printed.code, printed.out) == (2, "")
    assert printed.err == "pgpark: unknown pool 'nowhere'. Pools here: gpu\n"


class Terminal:
    """A command in a terminal of its own, and what it has drawn so far."""

    def __init__(self, *arguments: str, dsn: str, **environment: str) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pgpark", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            env=os.environ
            | {"PGPARK_DSN": dsn, "TERM": "xterm-256color", "COLUMNS": "90", "LINES": "40"}
            | environment,
        )
        os.close(theirs)
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < until, f"{text!r} was not drawn: {self.seen[-2000:]!r}"
            if select.select([self._ours], [], [], 0.5)[0]:
                self.seen += ESCAPES.sub("", os.read(self._ours, 65536).decode(errors="replace"))

    def read_to_the_end(self) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone with its last user
            while data := os.read(self._ours, 65536):
                self.seen += ESCAPES.sub("", data.decode(errors="replace"))
        assert self.process.stderr is not None
        self.seen += self.process.stderr.read().decode(errors="replace")

    def press(self, keys: str) -> None:
        self.seen = ""
        os.write(self._ours, keys.encode())

    def leave(self) -> int:
        until = time.monotonic() + 30
        while self.process.poll() is None and time.monotonic() < until:
            if select.select([self._ours], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    os.read(self._ours, 65536)
        return self.process.wait(1)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        os.close(self._ours)


@pytest.fixture
def terminal(db: Database) -> Iterator[Terminal]:
    db.pool("cpu", max_units=8)
    db.pool(max_units=24)
    opened = Terminal("top", "gpu", "--every", "0.1", dsn=db.dsn)
    yield opened
    opened.close()


def test_it_follows_what_happens_and_changes_pools(db: Database, terminal: Terminal) -> None:
    terminal.wait_for("gpu  active  0 of 24 units")
    task = db.parked(units=8)
    db.claim()
    terminal.wait_for(f"#{task}")
    terminal.press("\x1b[C")
    terminal.wait_for("cpu  active  0 of 8 units")
    terminal.press("q")
    assert terminal.leave() == 0


def test_a_lost_database_is_said_and_found_again(db: Database, terminal: Terminal, server: Server) -> None:
    terminal.wait_for("gpu  active")
    refuse, allow = (
        f"alter database {db.connection.info.dbname} allow_connections {word}" for word in ("false", "true")
    )
    with psycopg.connect(server.admin, autocommit=True) as admin:
        admin.execute(refuse.encode())
    db.rows("select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database()"
            " and pid <> pg_backend_pid()")  # fmt: skip
    terminal.wait_for("the database cannot be used")
    with psycopg.connect(server.admin, autocommit=True) as admin:
        admin.execute(allow.encode())
    terminal.seen = ""
    db.parked(units=3)
    terminal.wait_for("1 parked")
    os.kill(terminal.process.pid, signal.SIGINT)
    assert terminal.leave() == 130
