"""Runs a fuzz in a database of its own, round by round: calls are drawn, made, and then the accounts are audited."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.rows import DictRow, dict_row
from psycopg.types.json import Jsonb

from tests.fuzz import statements
from tests.fuzz.checks import Checks
from tests.fuzz.commands import Shell
from tests.fuzz.parsers import parse
from tests.fuzz.statements import Callers
from tests.fuzz.values import POOLS, drawn
from tests.soak.findings import Findings

ENOUGH = 10_000  # calls, for every function to be called and to answer


@dataclass(frozen=True)
class Plan:
    """How many calls there are of each kind, in how many rounds, and where the random ones begin."""

    statements: int
    commands: int
    texts: int
    rounds: int
    connections: int = 6
    seed: int = 1

    @classmethod
    def of(cls, calls: int, connections: int = connections, seed: int = seed) -> Plan:
        """Of so many calls, most are of functions: a command takes as long as twenty."""
        commands, texts = calls * 3 // 100, calls * 12 // 100
        return cls(calls - commands - texts, commands, texts, max(1, calls // 5_000), connections, seed)


@dataclass
class Report:
    """Figures by name, and what was found."""

    figures: dict[str, int] = field(default_factory=dict)
    findings: Findings = field(default_factory=Findings)

    def __str__(self) -> str:
        lines = [f"{name:48}{figure:10,}" for name, figure in self.figures.items()]
        return "\n".join([*lines, "", str(self.findings) or "nothing found"])


def fuzz(dsn: str, plan: Plan, folder: Path, progress: Callable[[str], None] = lambda line: None) -> Report:
    """Runs it in a migrated, empty database, on a server where roles can be made; folder: an empty one, for files."""
    report = Report()
    refused_texts = 0
    with (
        _role(dsn) as role,
        contextlib.closing(Checks(dsn)) as checks,
        contextlib.closing(Callers(dsn, role, plan.connections, report.findings)) as callers,
        psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection,
    ):
        functions = statements.discover(connection)
        shell = Shell(dsn, callers.known, folder, report.findings)
        for round_ in range(plan.rounds):
            seed, before = plan.seed * 1000 + round_, time.monotonic()
            _put_pools(connection, role)
            callers.make(drawn(statements.calls(functions), _share(plan.statements, plan, round_), seed), seed)
            shell.run(_share(plan.commands, plan, round_), seed)
            refused_texts += parse(_share(plan.texts, plan, round_), seed, folder, report.findings)
            for wrong in checks.wrongs():
                report.findings.add(wrong.partition(":")[0], f"{wrong} -- seed {seed}")
            progress(f"round {round_ + 1} of {plan.rounds}: {time.monotonic() - before:.0f} s")
            progress(str(report.findings))
    report.figures = {
        "calls": plan.statements + plan.commands + plan.texts,
        "functions": len(functions),
        "calls of functions": plan.statements,
        "  different ones": callers.different,
        "  answered": callers.answered.total(),
        **{f"  refused with {state}": count for state, count in sorted(callers.refused.items())},
        **{f"  arguments that Postgres refused, {state}": count for state, count in sorted(callers.unread.items())},
        "commands": plan.commands,
        **{f"  exit code {code}": count for code, count in sorted(shell.exits.items())},
        "texts parsed": plan.texts,
        "  refused": refused_texts,
    }
    for function in functions if plan.statements >= ENOUGH else ():
        if function.name not in callers.answered:
            report.findings.add("a function that never answered proves little", function.name)
    return report


def _share(count: int, plan: Plan, round_: int) -> int:
    return count * (round_ + 1) // plan.rounds - count * round_ // plan.rounds


def _put_pools(connection: psycopg.Connection[DictRow], role: str) -> None:
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
