"""What commands print in a terminal: as wide as it is, and nothing that it would obey."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cli.test_commands import Pgpark, pgpark
from tests.cli.test_top import Terminal
from tests.conftest import Database

__all__ = ["pgpark"]  # a fixture

ESCAPE = "\x1b]0;owned\x07"
ONE_CHARACTER_ESCAPE = "\x9b2J"


def printed(dsn: str, *arguments: str) -> str:
    """What a command prints in a terminal of 90 columns, without the colours."""
    terminal = Terminal(*arguments, dsn=dsn)
    try:
        terminal.read_to_the_end()
        return terminal.seen
    finally:
        terminal.close()


def test_a_table_that_is_too_wide_for_the_terminal_is_a_value_a_line(db: Database) -> None:
    db.pool(max_units=24)
    db.pool("cpu", max_units=8)
    lines = [line.rstrip() for line in printed(db.dsn, "stats").splitlines()]
    assert lines[:3] == ["pool                cpu", "state               active", "max_units           8"]
    assert lines[lines.index("") + 1] == "pool                gpu"
    assert "oldest_parked_secs" not in "".join(lines), "nothing is parked"


def test_one_that_fits_is_a_table(db: Database) -> None:
    db.pool(max_units=4)
    task = db.parked(units=4)
    lines = printed(db.dsn, "explain", "gpu").split("\n")
    assert [line.split() for line in lines[:2]] == [["task_id", "position", "why"], [str(task), "0", "may", "start"]]


@pytest.mark.parametrize(
    "show",
    [
        lambda task: ["mailbox", "fetch", f"ten{ESCAPE}ant"],
        lambda task: ["status", str(task)],
        lambda task: ["result", str(task)],
        lambda task: ["result", str(task), "--json"],
        lambda task: ["result", str(task), "--follow"],
        lambda task: ["top", "gpu", "--once"],
        lambda task: ["pool", "put", f"no{ESCAPE}name", "--max-units", "1"],
    ],
)
def test_nothing_that_a_tenant_or_a_worker_says_is_obeyed(db: Database, show: Callable[[int], list[str]]) -> None:
    db.pool(max_units=4)
    said = ESCAPE + ONE_CHARACTER_ESCAPE
    task = db.parked(units=4, tenant=f"ten{ESCAPE}ant", user_id=f"us{said}er", session_id=f"ses{said}sion")
    db.claim(worker=f"wor{said}ker")
    db.value(
        "select pgpark.park_emit(%s, 1, jsonb_build_array(jsonb_build_object('content', %s::text)))",
        task,
        f"part{said}",
    )
    db.value(
        "select pgpark.park_finish(%s, 1, 'failed', to_jsonb(%s::text), %s)", task, f"result{said}", f"rea{said}son"
    )
    seen = printed(db.dsn, *show(task))
    assert seen.strip()
    assert [letter for letter in seen if letter in "\x1b\x07\x9b"] == []


def test_a_result_that_goes_elsewhere_is_as_it_is(pgpark: Pgpark, db: Database) -> None:
    db.pool(max_units=4)
    task = db.parked(units=4)
    db.claim()
    db.value("select pgpark.park_finish(%s, 1, 'completed', to_jsonb(%s::text))", task, f"ü{ONE_CHARACTER_ESCAPE}")
    assert pgpark("result", str(task)).out == '"ü\\u009b2J"\n', "the same JSON"
