"""Runs a fuzz in a database of its own, round by round: calls are drawn, made, and then the accounts are audited."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from tests.fuzz import statements
from tests.fuzz.checks import Checks
from tests.fuzz.values import POOLS, drawn
from tests.soak.findings import Findings

ROUND = 2000  # calls


@dataclass(frozen=True)
class Plan:
    """How much is called, and with what seed."""

    statements: int = 0
    commands: int = 0
    parsers: int = 0
    connections: int = 6
    seed: int = 1


@dataclass
class Report:
    """Figures by name, and what was found."""

    figures: dict[str, int] = field(default_factory=dict)
    findings: Findings = field(default_factory=Findings)

    def __str__(self) -> str:
        lines = [f"{name:48}{figure:10,}" for name, figure in self.figures.items()]
        return "\n".join([*lines, "", str(self.findings) or "nothing found"])


def fuzz(dsn: str, plan: Plan, folder: Path, progress: Callable[[str], None] = lambda line: None) -> Report:
    """Runs it in a migrated, empty database; folder: an empty one, for files."""
    report = Report()
    with _role(dsn) as role, contextlib.closing(Checks(dsn)) as checks:
        _call_functions(dsn, role, plan, checks, report, progress)
    return report


def _call_functions(
    dsn: str, role: str, plan: Plan, checks: Checks, report: Report, progress: Callable[[str], None]
) -> None:
    callers = statements.Callers(dsn, role, plan.connections)
    callers.findings = report.findings
    with contextlib.closing(callers), psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        functions = statements.discover(connection)
        for begin in range(0, plan.statements, ROUND):
            seed = plan.seed + begin
            _put_pools(connection, role)
            before = time.monotonic()
            calls = drawn(statements.calls(functions), min(ROUND, plan.statements - begin), seed)
            between = time.monotonic()
            callers.make(calls, seed)
            for wrong in checks.wrongs():
                report.findings.add("the accounts", f"{wrong} -- seed {seed}")
            progress(f"{begin + len(calls):,} statements, {between - before:.1f} s {time.monotonic() - between:.1f} s, {report.findings.counts.total()} findings")
    report.figures |= {
        "calls of functions": plan.statements,
        "answered": callers.answered.total(),
        **{f"refused with {state}": count for state, count in sorted(callers.refused.items())},
        **{f"arguments that Postgres did not read, {state}": count for state, count in sorted(callers.unread.items())},
    }
    for function in functions:
        if function.name not in callers.answered and plan.statements >= ROUND:
            report.findings.add("a function never answered", function.name)


def _put_pools(connection: psycopg.Connection[dict[str, object]], role: str) -> None:
    """Every pool as it should be at the beginning of a round; what is in them stays where it can."""
    for name, config in POOLS.items():
        connection.execute("select pgpark.park_put_pool(%s, %s)", [name, Jsonb(config)])
        connection.execute("select pgpark.park_set_pool_state(%s, 'active')", [name])
    connection.execute("select pgpark.park_grant(%s, 'producer', tenants => '{t,u}')", [role])
    connection.execute("select pgpark.park_grant(%s, 'worker', pools => '{pgmq,fair}')", [role])


@contextlib.contextmanager
def _role(dsn: str) -> Iterator[str]:
    """A login without rights, for as long as it is used."""
    name = f"pgpark_fuzz_{uuid.uuid4().hex[:12]}"
    quoted = sql.Identifier(name)
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("create role {} login").format(quoted))
        try:
            yield name
        finally:
            admin.execute(sql.SQL("drop owned by {}").format(quoted))
            admin.execute(sql.SQL("drop role {}").format(quoted))
