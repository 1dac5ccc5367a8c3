"""A short soak, and the proof that its checker finds what is wrong: each sabotage of a function, by a right check."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from tests.soak.plan import Plan
from tests.soak.runner import soak


@pytest.mark.slow
def test_a_soak_finds_no_violation(dsn: str, tmp_path: Path) -> None:
    report = soak(dsn, Plan(admissions=15_000), tmp_path)
    assert not report.findings.counts, str(report)
    figures = report.figures
    assert figures["admissions"] >= 15_000
    idle = [name for name in figures if not figures[name] and name not in ("dropped: too_large", "dropped: overflow")]
    assert idle == [], f"these never happened, so this proves little:\n{report}"


SMALL = Plan(admissions=4_000, connections=8, processes=2, units=500, waiting=300, held_open=0.3)

KEEPING = "else 0 end, e.msg_id\n      from ended e\n      join pool p using (pool_id)\n"
LOSING = "else 0 end, e.msg_id from ended e join pool p using (pool_id) where e.task_id % 100 <> 0"

# What is done wrong, and the checks of which one must find it: the function, what is right in it, what stands there
# instead. Those of one group are found by different checks, so they share a run.
Sabotage = tuple[set[str], list[tuple[str, str, str]]]
SABOTAGES: dict[str, dict[str, Sabotage]] = {
    "order and time": {
        "claims of a pool do not wait for one another": (
            {"two claims of a pool at once"},
            [("_lock_pool", "where p.name = _lock_pool.name for no key update", "where p.name = _lock_pool.name")],
        ),
        "a paused pool starts tasks": (
            {"a start in a paused pool"},
            [("_claim", "lot.state in ('paused', 'disabled')", "lot.state = 'disabled'")],
        ),
        "deadlines mean nothing": (
            {"a start after the deadline"},
            [
                ("_front_of_line", "t.deadline > now_", "t.deadline > now_ - interval '1 hour'"),
                ("_pick", "candidate.deadline <= now_", "candidate.deadline <= now_ - interval '1 hour'"),
                ("_expire", "t.deadline <= now_", "t.deadline <= now_ - interval '1 hour'"),
            ],
        ),
        "a finish does not look at the attempt": (
            {"an accepted finish whose outcome differs"},
            [("_conclude", "t.attempt = o.attempt and ", "")],
        ),
    },
    "counts and closing": {
        "submits do not hold the entrance": (
            {"a submit beside a change that closes or lowers its pool", "accepted by a closed pool"},
            [("_enter_pool", "execute 'lock table pgpark.door_' || seen.door || ' in row share mode'", "null")],
        ),
        "what ends gives back more units than it held": (
            {"pool over its units, own", "pool over its units, seen"},
            [("_conclude", "-coalesce(sum(e.units)", "-2 * coalesce(sum(e.units)")],
        ),
        "claims forget what the worker holds": (
            {"worker over its units, own", "worker over its units, seen"},
            [("_free_units", "worker_units - held", "worker_units")],
        ),
        "submits take no places": (
            {"depth exceeded, own"},
            [("_find_places", "granted := pgpark._take_places(lot.pool_id, wanted)", "granted := wanted")],
        ),
        "a tenant's limit means nothing": (
            {"tenant over its units, own", "tenant over its units, seen"},
            [("_pick", "where l.in_line", "where true")],
        ),
        "a claim gives no new attempt": (
            {"attempts claimed twice"},
            [("_claim", "attempt = t.attempt + 1", "attempt = 1")],
        ),
        "an outcome is lost now and then": (
            {"accepted tasks without an outcome"},
            [("_conclude", KEEPING, LOSING)],
        ),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("group", SABOTAGES)
def test_the_checker_finds_what_is_done_wrong(
    group: str, empty_databases: Callable[[str], str], template: str, tmp_path: Path
) -> None:
    """What goes wrong only now and then may not show in a run this short, so each may have three."""
    missed = set(SABOTAGES[group])
    for seed in (1, 2, 3):
        dsn = empty_databases(template)
        with psycopg.connect(dsn, autocommit=True) as connection:
            for _, replacements in SABOTAGES[group].values():
                for function, right, wrong in replacements:
                    replace(connection, function, right, wrong)
        folder = tmp_path / str(seed)
        folder.mkdir()
        report = soak(dsn, dataclasses.replace(SMALL, seed=seed), folder)
        missed -= {name for name in missed if SABOTAGES[group][name][0] & report.findings.counts.keys()}
        if not missed:
            return
    pytest.fail(f"not found: {missed}\n{report}")


def replace(connection: psycopg.Connection[tuple[str]], function: str, right: str, wrong: str) -> None:
    row = connection.execute(
        "select pg_get_functiondef(oid) from pg_proc where pronamespace = 'pgpark'::regnamespace and proname = %s",
        [function],
    ).fetchone()
    assert row is not None and right in row[0], f"{function} has changed; sabotage it in another way"
    connection.execute(row[0].replace(right, wrong).encode())
