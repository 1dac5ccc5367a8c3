"""The commands: what they print, what they exit with, and their one line for bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import psycopg
import pytest

from pgpark import cli
from tests.conftest import Database, wait_for
from tests.fuzz.commands import leaves


class Printed:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def rows(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


Pgpark = Callable[..., Printed]


@pytest.fixture
def pgpark(dsn: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Pgpark:
    """Runs a command on the test's database."""
    monkeypatch.setenv("PGPARK_DSN", dsn)

    def run(*arguments: str, stdin: str | None = None) -> Printed:
        if stdin is not None:
            (tmp_path / "stdin").write_text(stdin)
            monkeypatch.setattr("sys.stdin", (tmp_path / "stdin").open())
        capfd.readouterr()
        code = cli.run(arguments)
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return Printed(code, out, err)

    return run


# -- pools -----------------------------------------------------------------------------------------------------------


def test_a_pool_is_made_shown_listed_changed_and_dropped(pgpark: Pgpark) -> None:
    assert pgpark("pool", "put", "gpu", "--max-units", "24").err == "pool gpu created\n"
    assert pgpark("pool", "put", "gpu", "--set", "retry.max_attempts=3", "--set", "resource_kind=gpu_vram").code == 0
    (shown,) = pgpark("pool", "show", "gpu", "--json").rows
    assert shown["config"] == {"max_units": 24, "retry": {"max_attempts": 3}, "resource_kind": "gpu_vram"}
    assert '"max_attempts": 3' in pgpark("pool", "show", "gpu").out
    assert [row["pool"] for row in pgpark("pool", "list", "--json").rows] == ["gpu"]
    assert pgpark("pool", "list").out.split()[:3] == ["pool", "state", "max_units"]
    assert pgpark("pool", "drop", "gpu").err == "pool gpu dropped\n"
    empty = pgpark("pool", "list")
    assert (empty.code, empty.out) == (0, "")


@pytest.mark.parametrize(
    ("command", "state"), [("pause", "paused"), ("drain", "draining"), ("disable", "disabled"), ("resume", "active")]
)
def test_a_pool_changes_its_state(pgpark: Pgpark, db: Database, command: str, state: str) -> None:
    db.pool()
    assert pgpark("pool", command, "gpu").code == 0
    assert db.stats()["state"] == state


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pool.json", '{"max_units": 20, "max_queue_depth": 5}'),
        ("all.json", '{"pools": {"gpu": {"max_units": 20, "max_queue_depth": 5}, "x": {}}}'),
        ("pool.yaml", "max_units: 20\nmax_queue_depth: 5\n"),
        ("all.yml", "pools:\n  gpu: {max_units: 20, max_queue_depth: 5}\n"),
    ],
)
def test_a_pool_is_made_from_a_file(pgpark: Pgpark, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert pgpark("pool", "put", "gpu", "--config", str(tmp_path / name)).code == 0
    assert pgpark("pool", "show", "gpu", "--json").rows[0]["config"] == {"max_units": 20, "max_queue_depth": 5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["put", "gpu"], "pgpark: pools.gpu.max_units is missing"),
        (["put", "GPU", "--max-units", "1"], "pgpark: pool name 'GPU' is not possible. Use 1 to 40 lower-case"),
        (["put", "gpu", "--max-units", "0"], "pgpark: pools.gpu.max_units must be a whole number from 1 to"),
        (["put", "gpu", "--max-units", "x"], "pgpark pool put: Invalid value for '--max-units': 'x' is not a valid"),
        (["put", "gpu", "--set", "nonsense"], "pgpark: --set 'nonsense' must look like KEY=VALUE"),
        (
            ["put", "gpu", "--config", "/nonesuch"],
            "pgpark pool put: Invalid value for '--config': '/nonesuch': No such",
        ),
        (["drop", "nope"], "pgpark: unknown pool 'nope'"),
        (["pause", "nope"], "pgpark: unknown pool 'nope'"),
        (["show", "nope"], "pgpark: unknown pool 'nope'"),
        (["burn", "gpu"], "pgpark pool: No such command 'burn'"),
    ],
)
def test_a_wrong_pool_command_says_what_is_wrong(pgpark: Pgpark, arguments: list[str], message: str) -> None:
    printed = pgpark("pool", *arguments)
    assert (printed.code, printed.out) == (2, "")
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1


def test_a_pool_in_use_is_not_dropped(pgpark: Pgpark, db: Database) -> None:
    db.pool()
    db.parked()
    printed = pgpark("pool", "drop", "gpu")
    assert (printed.code, printed.err) == (
        1,
        "pgpark: pool 'gpu' still has 1 live tasks. Drain it first, or force: then each of them is dropped.\n",
    )
    assert pgpark("pool", "drop", "gpu", "--force").code == 0


# -- submitting ------------------------------------------------------------------------------------------------------


def test_submit_prints_the_id_alone_on_standard_output(pgpark: Pgpark, db: Database) -> None:
    db.pool()
    printed = pgpark("submit", "gpu", '{"x": 1}', "--units", "8", "--priority", "high", "--tenant", "t")
    assert (printed.code, printed.err) == (0, "parked\n")
    status = db.status(int(printed.out))
    assert (status["units"], status["priority"]) == (8, "high")
    assert pgpark("submit", "gpu", "5", "--json").rows[0]["status"] == "parked"


def test_times_from_now_go_by_the_databases_clock(pgpark: Pgpark, db: Database) -> None:
    db.pool()
    db.freeze()
    task = int(pgpark("submit", "gpu", "1", "--deadline", "+2m", "--run-at", "+1.5s").out)
    assert (db.status(task)["deadline"], db.status(task)["status"]) == (db.after(120), "delayed")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["gpu", "1", "--units", "25"], 1, "rejected: too_large"),
        (["gpu", "1", "--deadline", "2020-01-01"], 1, "rejected: deadline_expired"),
        (["nope", "1"], 2, "pgpark: unknown pool 'nope'"),
        (["gpu", "{oops"], 2, "pgpark: the payload is not JSON: Expecting property name enclosed in double quotes"),
        (["gpu", "NaN"], 2, "pgpark: the payload is not JSON: NaN is no JSON number"),
        (["gpu", '"\\u0000"'], 2, "pgpark: unsupported Unicode escape sequence"),
        (["gpu", "1", "--units", "0"], 2, "pgpark: units must be at least 1, not 0"),
        (["gpu", "1", "--priority", "urgent"], 2, "pgpark: unknown priority 'urgent'; use low, normal, high, critical"),
        (
            ["gpu", "1", "--deadline", "soon"],
            2,
            'pgpark: invalid input syntax for type timestamp with time zone: "soon"',
        ),
        (["gpu", "1", "--deadline", "+5y"], 2, "pgpark: '+5y' is no time: use 2030-01-31T12:00Z, or +90s"),
        (["gpu", "1", "--deadline", "+99999999999d"], 2, "pgpark: '+99999999999d' is too far away"),
        (["gpu"], 2, "pgpark submit: give either a PAYLOAD or --file"),
        (["gpu", "1", "--units", "99999999999"], 2, "pgpark: "),
    ],
)
def test_a_submit_that_cannot_be_says_why(
    pgpark: Pgpark, db: Database, arguments: list[str], code: int, message: str
) -> None:
    db.pool()
    printed = pgpark("submit", *arguments)
    assert (printed.code, printed.out) == (code, "")
    assert printed.err.startswith(message), printed.err
    assert printed.err.count("\n") == 1


def jsonl(path: Path, *lines: Any) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_a_file_is_submitted_line_by_line(pgpark: Pgpark, db: Database, tmp_path: Path) -> None:
    db.pool(max_units=10)
    file = jsonl(tmp_path / "t.jsonl", {"payload": 1, "units": 2}, "", {"payload": 2, "units": 11}, {"payload": 3})
    printed = pgpark("submit", "gpu", "--file", file)
    assert (printed.code, printed.err) == (1, "2 accepted, 1 refused (1 too_large)\n")
    assert len(printed.out.splitlines()) == 2
    rows = pgpark("submit", "gpu", "--file", file, "--json").rows
    assert [(row["line"], row["accepted"], row["reason"]) for row in rows] == [
        (1, True, None),
        (3, False, "too_large"),
        (4, True, None),
    ]


def test_a_file_of_many_batches_is_read_from_standard_input(pgpark: Pgpark, db: Database) -> None:
    db.pool()
    printed = pgpark("submit", "gpu", "--file", "-", stdin='{"payload": 1}\n' * 1234)
    assert (printed.code, printed.err) == (0, "1234 accepted\n")
    assert db.stats()["parked"] == 1234


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{oops", "is not JSON: Expecting property name enclosed in double quotes"),
        ("[1]", "a task must be a JSON object, not array"),
        ('{"payload": 1, "units": 0}', "units must be at least 1, not 0"),
        ('{"payload": 1, "unit": 8}', "unknown key 'unit'; a task has payload, priority, units, deadline"),
        ('{"units": 8}', "payload is missing"),
        ('{"payload": 1, "deadline": "x"}', "deadline must be a time such as"),
    ],
)
def test_a_bad_line_is_named_by_its_number_and_nothing_is_submitted(
    pgpark: Pgpark, db: Database, tmp_path: Path, bad: str, message: str
) -> None:
    db.pool()
    good = {"payload": 1}
    file = jsonl(tmp_path / "t.jsonl", *[good] * 700, bad, good)
    printed = pgpark("submit", "gpu", "--file", file)
    assert (printed.code, printed.out) == (2, "")
    assert "t.jsonl line 701" in printed.err
    assert message in printed.err
    assert printed.err.endswith("nothing was submitted\n")
    assert printed.err.count("\n") == 1
    assert db.stats()["parked"] == 0

    printed = pgpark("submit", "gpu", "--file", file, "--skip-bad")
    assert printed.code == 0
    assert "line 701" in printed.err and "skipped" in printed.err
    assert db.stats()["parked"] == 701


def test_a_file_that_is_no_text_is_refused(pgpark: Pgpark, db: Database, tmp_path: Path) -> None:
    db.pool()
    (tmp_path / "t").write_bytes(b'{"payload": 1}\n\xff\xfe\n')
    printed = pgpark("submit", "gpu", "--file", str(tmp_path / "t"))
    assert (printed.code, printed.err.count("\n")) == (2, 1)
    assert "is not UTF-8 text" in printed.err


# -- one task --------------------------------------------------------------------------------------------------------


def test_status_result_and_cancel_of_a_task(pgpark: Pgpark, db: Database) -> None:
    db.pool()
    done, waiting = db.parked(), db.parked()
    assert pgpark("status", str(done), "--json").rows[0]["status"] == "parked"
    assert pgpark("status", str(done)).out.splitlines()[0].split() == ["task_id", str(done)]
    printed = pgpark("result", str(done))
    assert (printed.code, printed.out, printed.err) == (1, "", f"task {done} is parked, no outcome yet\n")
    db.claim(max_tasks=1)
    db.finish(done, result={"answer": "é"})
    printed = pgpark("result", str(done))
    assert (printed.code, printed.out, printed.err) == (0, '{"answer": "é"}\n', "completed\n")
    printed = pgpark("cancel", str(waiting), "--reason", "enough")
    assert (printed.code, printed.out) == (0, "dropped\n")
    printed = pgpark("result", str(waiting))
    assert (printed.code, printed.out, printed.err) == (1, "null\n", "dropped: enough\n")
    assert pgpark("cancel", str(waiting)).code == 1
    assert (pgpark("cancel", "999").code, pgpark("status", "999").code, pgpark("result", "999").code) == (1, 1, 1)


@pytest.mark.parametrize("arguments", [["status", "x"], ["result", "-5"], ["cancel", "1.5"]])
def test_an_id_that_is_no_number_is_refused(pgpark: Pgpark, arguments: list[str]) -> None:
    printed = pgpark(*arguments)
    assert (printed.code, printed.err.count("\n")) == (2, 1)


def test_an_id_beyond_all_numbers_is_unknown(pgpark: Pgpark) -> None:
    assert pgpark("status", "9" * 30).code in {1, 2}


def test_result_waits_for_the_outcome(pgpark: Pgpark, db: Database, connect: Callable[[], Database]) -> None:
    db.pool()
    task = db.parked()
    db.claim()
    other = connect()

    def finish_when_waited_for() -> None:
        wait_for(lambda: other.value("select count(*) from pg_stat_activity where query ilike '%%pgpark.mailbox%%'"))
        other.finish(task, result=7)

    threading.Thread(target=finish_when_waited_for).start()
    printed = pgpark("result", str(task), "--wait")
    assert (printed.code, printed.out) == (0, "7\n")
    assert pgpark("result", str(db.parked()), "--wait", "--timeout", "0.1").code == 1


def test_a_wait_ends_with_the_deadline_where_no_worker_lives(pgpark: Pgpark, db: Database) -> None:
    db.pool()
    task = db.parked(deadline=db.after(0.5))
    printed = pgpark("result", str(task), "--wait", "--timeout", "20")
    assert (printed.code, printed.err) == (1, "expired: deadline_expired\n")


# -- the mailbox, numbers, timers ------------------------------------------------------------------------------------


def test_the_mailbox_is_fetched_and_acknowledged(pgpark: Pgpark, db: Database) -> None:
    db.pool()
    for number in range(3):
        task = db.parked(tenant="t", user_id="u")
        db.claim()
        db.finish(task, result={"n": number})
    rows = pgpark("mailbox", "fetch", "t", "--user", "u", "--json").rows
    assert [row["payload"]["n"] for row in rows] == [0, 1, 2]
    assert '{"n": 0}' in pgpark("mailbox", "fetch", "t").out
    assert pgpark("mailbox", "ack", str(rows[0]["message_id"])).code == 0
    assert pgpark("mailbox", "ack", str(rows[0]["message_id"])).code == 1
    assert len(pgpark("mailbox", "fetch", "t", "--limit", "1", "--ack", "--json").rows) == 1
    assert len(pgpark("mailbox", "fetch", "t", "--json").rows) == 1
    printed = pgpark("mailbox", "fetch", "nobody")
    assert (printed.code, printed.out, printed.err) == (0, "", "no messages for nobody\n")


def test_stats_maintain_and_explain_tell_the_numbers(pgpark: Pgpark, db: Database) -> None:
    db.pool(max_units=4)
    db.parked(units=4)
    db.claim()
    waiting = db.parked(units=4)
    assert pgpark("stats", "gpu", "--json").rows[0]["used_units"] == 4
    assert pgpark("stats").out.split()[:2] == ["pool", "state"]
    assert pgpark("explain", "gpu", "--json").rows == [{"task_id": waiting, "position": 0, "why": "no units"}]
    assert pgpark("maintain", "--json").rows[0]["expired"] == 0


def test_every_option_can_be_set_in_the_environment(pgpark: Pgpark, db: Database, monkeypatch: Any) -> None:
    db.pool()
    monkeypatch.setenv("PGPARK_SUBMIT_UNITS", "7")
    monkeypatch.setenv("PGPARK_JSON", "1")
    (row,) = pgpark("submit", "gpu", "1").rows
    assert db.status(row["task_id"])["units"] == 7


@pytest.mark.parametrize(
    ("path", "command"), leaves(cli.cli), ids=lambda value: "-".join(value) if isinstance(value, tuple) else ""
)
def test_the_variable_of_an_option_is_its_name(path: tuple[str, ...], command: click.Command) -> None:
    for option in (p for p in command.params if isinstance(p, click.Option)):
        long = next(name for name in option.opts if name.startswith("--"))[2:].replace("-", "_").upper()
        automatic = "_".join(["PGPARK", *path, option.name or ""]).replace("-", "_").upper()
        shared = long in {"DSN", "HOME", "JSON", "POOLS"}
        expected = f"PGPARK_{long}" if shared else "_".join(["PGPARK", *path, long]).replace("-", "_").upper()
        assert (option.envvar or automatic) == expected
        assert option.help, long


# -- the database ----------------------------------------------------------------------------------------------------


def test_migrate_plans_checks_and_does(pgpark: Pgpark, empty_databases: Callable[[], str], monkeypatch: Any) -> None:
    monkeypatch.setenv("PGPARK_DSN", empty_databases())
    assert pgpark("migrate", "--check").code == 1
    planned = pgpark("migrate", "--plan")
    assert planned.code == 0
    assert planned.out.splitlines()[:2] == ["install pgmq", "apply sql/migrations/0001_tables.sql"]
    assert pgpark("migrate", "--check").code == 1, "planning did nothing"
    migrated = pgpark("migrate")
    assert migrated.code == 0
    assert re.fullmatch(r"done: install pgmq, apply \d+ migrations, apply \d+ files of functions\n", migrated.err)
    assert pgpark("migrate").err == "up to date\n"
    assert pgpark("migrate", "--check").code == 0
    assert pgpark("migrate", "--check", "--json").rows == [{"up_to_date": True, "install_pgmq": False, "files": []}]


def test_a_database_without_pgpark_is_named(
    pgpark: Pgpark, empty_databases: Callable[[], str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("PGPARK_DSN", empty_databases())
    for command in (["stats"], ["submit", "gpu", "1"], ["pool", "list"], ["worker", "gpu", "--exec", "cat"]):
        printed = pgpark(*command)
        assert (printed.code, printed.out, printed.err.count("\n")) == (3, "", 1)
        assert "has no pgpark yet; run: pgpark migrate" in printed.err


@pytest.mark.parametrize(
    ("dsn", "message"),
    [
        ("host=127.0.0.1 port=1 dbname=x password=hidden", "pgpark: cannot connect to 127.0.0.1/x: "),
        ("postgresql://u:hidden@127.0.0.1:1/x", "pgpark: cannot connect to 127.0.0.1/x: "),
        ("host=x hidden", "pgpark: the DSN cannot be read; use postgresql://user@host/database or key=value pairs"),
        ("postgresql://me:hidden%zz@h/x", "pgpark: the DSN cannot be read; use postgresql://"),
    ],
)
def test_a_server_that_is_not_there_is_named_without_the_password(pgpark: Pgpark, dsn: str, message: str) -> None:
    for command in (["stats"], ["migrate"], ["worker", "gpu", "--exec", "cat"]):
        printed = pgpark(*command, "--dsn", dsn)
        assert (printed.code, printed.err.count("\n")) == (3, 1)
        assert printed.err.startswith(message)
        assert "hidden" not in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpu"], "pgpark worker: give either --handler or --exec"),
        (["gpu", "--handler", "x:y", "--exec", "cat"], "pgpark worker: give either --handler or --exec"),
        (
            ["gpu", "--handler", "nonesuch:f"],
            "pgpark: --handler 'nonesuch:f' cannot be imported: ModuleNotFoundError",
        ),
        (
            ["gpu", "--handler", "tests.handlers:nope"],
            "pgpark: --handler 'tests.handlers:nope' cannot be imported: Att",
        ),
        (
            ["gpu", "--handler", "tests.handlers"],
            "pgpark: --handler 'tests.handlers' must look like package.module",
        ),
        (
            ["gpu", "--handler", "tests.handlers:not_a_function"],
            "pgpark: --handler 'tests.handlers:not_a_function' is",
        ),
        (["gpu", "--handler", "tests.handlers:takes_nothing"], "pgpark: the handler "),
        (["gpu", "--exec", "nonesuch"], "pgpark: --exec: there is no program 'nonesuch'"),
        (["gpu", "--exec", "cat", "--units", "0"], "pgpark worker: Invalid value for '--units': 0 is not in the range"),
        (["nope", "--exec", "cat"], "pgpark: unknown pool 'nope'"),
    ],
)
def test_a_worker_that_cannot_work_says_why(pgpark: Pgpark, db: Database, arguments: list[str], message: str) -> None:
    db.pool()
    printed = pgpark("worker", *arguments)
    assert (printed.code, printed.out) == (2, "")
    assert printed.err.startswith(message), printed.err
    assert printed.err.count("\n") == 1


def test_the_command_line_wins_over_the_environment(pgpark: Pgpark, db: Database, monkeypatch: Any) -> None:
    db.pool()
    monkeypatch.setenv("PGPARK_WORKER_EXEC", "cat")
    monkeypatch.setenv("PGPARK_WORKER_POOL", "nope")
    assert pgpark("worker", "gpu", "--handler", "nonesuch:f").err.startswith("pgpark: --handler 'nonesuch:f' cannot be")
    assert pgpark("worker").err.startswith("pgpark: unknown pool 'nope'"), "and the pool may come from there"


def test_words_in_brackets_are_words(pgpark: Pgpark, db: Database) -> None:
    db.pool()
    assert pgpark("mailbox", "fetch", "[/b][red]x").err == "no messages for [/b][red]x\n"
    task = db.parked()
    db.value("select pgpark.park_cancel(%s, '[/b] no')", task)
    assert pgpark("result", str(task)).err == "dropped: [/b] no\n"


def test_a_role_without_rights_is_told_so(pgpark: Pgpark, db: Database, dsn: str) -> None:
    role = f"poor_{uuid.uuid4().hex[:12]}"
    db.connection.execute(f"create role {role} login")
    try:
        poor = psycopg.conninfo.make_conninfo(dsn, user=role)
        for command in (["stats"], ["migrate"], ["submit", "gpu", "1"], ["worker", "gpu", "--exec", "cat"]):
            printed = pgpark(*command, "--dsn", poor)
            assert (printed.code, printed.err) == (
                3,
                "pgpark: permission denied for schema pgpark; an admin can change that: pgpark grant\n",
            )
    finally:
        db.connection.execute(f"drop role {role}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bin.json", b"\xff\xfe", "pgpark: UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff"),
        (
            "date.yaml",
            b"max_units: 2020-01-01",
            "pgpark: {file}: max_units: the config of a pool must be made of JSON values",
        ),
        ("loop.yaml", b"&a [*a]", "pgpark: {file}: the config of a pool must be made of JSON values"),
        ("list.json", b"[1]", "pgpark: {file}: the config of a pool must be an object with max_units"),
        ("other.json", b'{"pools": {"x": {}}}', "pgpark: {file}: there is no pool 'gpu' below pools, only x"),
        ("two.json", b'{\n"max_units" 5}', "pgpark: {file} is not JSON: Expecting ':' delimiter at line 2, column 13"),
    ],
)
def test_a_config_file_that_is_none_says_why(
    pgpark: Pgpark, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    printed = pgpark("pool", "put", "gpu", "--config", str(tmp_path / name))
    assert (printed.code, printed.err.count("\n")) == (2, 1)
    assert printed.err.startswith(message.format(file=tmp_path / name)), printed.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["stats", "--watch", "--interval", "nan"],
        ["stats", "--watch", "--interval", "1e300"],
        ["worker", "gpu", "--exec", "cat", "--grace", "nan"],
        ["worker", "gpu", "--exec", "cat", "--units", "99999999999"],
        ["worker", "gpu", "--handler", "tests.exits_on_import:f"],
        ["migrate", "--plan", "--check"],
        ["submit", "gpu", "1", "--skip-bad"],
        ["submit", "gpu", "1", "--tenant", "\udcff"],
        ["pool", "put", "gpu", "--set", "x=" + "[" * 100000],
        ["notifier", "retry", "y" * 100000],
        ["apply", "y" * 100000],
        ["apply", "~nobody_of_this_name/pools.json"],
        ["stats", "--pools", "~nobody_of_this_name/pools.json"],
        ["db", "url", "--home", "~nobody_of_this_name"],
        ["pool", "show", "a\nb" + "y" * 100000],
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_nonsense_is_one_line_and_exit_2(pgpark: Pgpark, db: Database, arguments: list[str]) -> None:
    db.pool()
    printed = pgpark(*arguments)
    assert (printed.code, printed.out, printed.err.count("\n")) == (2, "", 1), printed.err
    assert len(printed.err) < 2100


def test_a_line_that_the_database_cannot_store_is_named_too(pgpark: Pgpark, db: Database, tmp_path: Path) -> None:
    db.pool()
    file = jsonl(tmp_path / "t.jsonl", {"payload": 1}, {"payload": "a\0b"}, {"payload": 2})
    printed = pgpark("submit", "gpu", "--file", file)
    assert printed.code == 2
    assert "t.jsonl line 2: unsupported Unicode escape sequence" in printed.err
    assert pgpark("submit", "gpu", "--file", file, "--skip-bad").code == 0
    assert db.stats()["parked"] == 2


def test_a_reader_that_leaves_is_no_error(db: Database, dsn: str) -> None:
    db.pool()
    for _ in range(3):
        db.parked(tenant="t")
    db.claim()
    db.rows(
        "select from pgpark.park_finish_many((select jsonb_agg(jsonb_build_object('task_id', task_id, 'attempt', 1,"
        " 'result', repeat('x', 100000))) from pgpark.task))"
    )
    script = f"{sys.executable} -m pgpark mailbox fetch t --ack --json | head -c 10; echo ${{PIPESTATUS[0]}}"
    environment = os.environ | {"PGPARK_DSN": dsn}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("0\n")
    assert done.stderr == ""
    assert db.value("select count(*) from pgpark.park_fetch('t')") == 3, "what was not read is not taken out"


def test_help_tells_the_exit_codes(pgpark: Pgpark) -> None:
    printed = pgpark("--help")
    assert printed.code == 0
    assert "Exit codes: 0 done" in " ".join(printed.out.split())
