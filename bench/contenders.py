"""Which systems bench/latency.py and bench/horizon.py compare, and in which form.

A contender is a system of bench/peers in one way of using it. For latency it is the way in which its own documents say
that tasks start soonest; for the horizon its way to take many at once.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import psycopg
from peers.absurd import Absurd
from peers.base import Peer
from peers.dbos import Dbos
from peers.graphile_worker import GraphileWorker
from peers.pg_boss import PgBoss
from peers.pgmq import Pgmq
from peers.pgpark import Pgpark, PgparkWorker
from peers.pgqueuer import Pgqueuer
from peers.processes import PeerError
from peers.procrastinate import Procrastinate
from report import progress, server_settings

from pgpark.errors import PgparkError

# What takes tasks; park_next finishes the ones before in the same statement.
CLAIM, SKIP_LOCKED = r"\mpark_(claim|next)\M", "skip locked"


@dataclass(frozen=True)
class Contender:
    """claims: a regular expression for the statements by which it takes tasks (for the horizon). listener: the kind of
    connection on which its worker listens, or would (for latency): asyncio or plain."""

    key: str
    peer: Peer
    claims: str = ""
    listener: str = "asyncio"

    @property
    def name(self) -> str:
        return self.peer.name


HORIZON = [
    Contender("pgpark", PgparkWorker("pgpark worker", batch=100), CLAIM),
    Contender("pgpark-sql", Pgpark("pgpark SQL loop, batch 100", batch=100), CLAIM),
    Contender("pgmq", Pgmq("pgmq, read 100, delete 100", batch=100), r"\mpgmq\.read\("),
    Contender("pgqueuer", Pgqueuer("pgqueuer, batch 100", batch=100), SKIP_LOCKED),
    Contender(
        "graphile_worker",
        GraphileWorker("graphile-worker, local queue", concurrency=24, connections=25, local_queue=500, batch_delay=0),
        SKIP_LOCKED,
    ),
]

# pgqueuer, procrastinate, graphile-worker and pg-boss wake on LISTEN; queues of DBOS and absurd are polled, here every
# 10 ms instead of the second and the quarter of a second that are their defaults. graphile-worker without its local
# queue, so that a job is fetched for whoever runs it; pg-boss with a queue that notifies, which its README calls its
# low-latency delivery. Where a number of tasks at once must be given, it is 8, as in `pgpark worker`.
LATENCY = [
    Contender("pgpark", PgparkWorker("pgpark worker", batch=8)),
    Contender("pgpark-sql", Pgpark("pgpark SQL loop", batch=1), listener="plain"),
    Contender("pgqueuer", Pgqueuer("pgqueuer", batch=8)),
    Contender("procrastinate", Procrastinate("procrastinate", concurrency=8, connections=8)),
    Contender(
        "graphile_worker",
        GraphileWorker("graphile-worker", concurrency=8, connections=9, local_queue=-1, batch_delay=-1),
    ),
    Contender("pg_boss", PgBoss("pg-boss, queue with notify", batch=8, connections=8)),
    Contender("dbos", Dbos("DBOS, poll 10 ms", concurrency=8, poll_secs=0.01, connections=8, threads=8)),
    Contender("absurd", Absurd("absurd, poll 10 ms", batch=8, poll_secs=0.01)),
]
_OF = {"horizon": HORIZON, "latency": LATENCY}


def known(bench: str) -> tuple[str, ...]:
    """The keys that --systems takes."""
    return tuple(contender.key for contender in _OF[bench])


def chosen_of(bench: str) -> Callable[[str], tuple[str, ...]]:
    """What reads --systems: keys with commas between."""

    def read(text: str) -> tuple[str, ...]:
        asked = tuple(text.split(","))
        if unknown := [key for key in asked if key not in known(bench)]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known(bench))}")
        return asked

    return read


def present(bench: str, keys: Sequence[str]) -> list[Contender]:
    """Those asked for that are installed; of the others a line on standard error says what to install."""
    found = []
    for contender in _OF[bench]:
        if contender.key not in keys:
            continue
        if (missing := contender.peer.missing()) is None:
            found.append(contender)
        else:
            progress(f"left out: {missing}")
    return found


class Failures(list[str]):
    """What failed in which round; said at once, and again in the report."""

    @contextlib.contextmanager
    def noted(self, nth: int, name: str) -> Iterator[None]:
        """Notes an error of a system or of the database instead of raising it."""
        try:
            yield
        except (PeerError, PgparkError, psycopg.Error) as error:
            self.append(f"round {nth + 1}, {name}: {str(error).splitlines()[0]}")
            progress(f"failed: {self[-1]}")

    def line(self) -> str:
        return "\nFailed: " + "; ".join(self) + ".\n" if self else ""


def require_durable(dsn: str) -> None:
    """Ends the program where commits would not wait for the disk."""
    _, settings = server_settings(dsn)
    if (settings["fsync"], settings["synchronous_commit"]) != ("on", "on"):
        sys.exit("fsync and synchronous_commit must be on: what is measured is durable work")
