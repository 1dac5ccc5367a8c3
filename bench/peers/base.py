"""What every compared system offers to the benches. A new one is a module with a list PEERS, and a program.

    for peer in peers("pgmq", "pgqueuer"):                  # from the package; all of them without arguments
        peer.install(dsn)                                   # unless peer.missing() says why not
        with peer.submitter(dsn) as submitter, peer.worker(dsn, "stamp") as crew:
            crew.go()
            submission = submitter.submit_one_by_one(1)     # .began, .ended; .submit(n) in bulk
            waited = crew.next_stamp() - submission.ended   # nanoseconds

Every task carries PAYLOAD, a JSON object of 200 bytes. Times are nanoseconds of the monotonic clock, which all
processes of a machine share: compare them with `now()`, not with time.time_ns(). How they are talked to: processes.py.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import psycopg

from peers.processes import PROGRAMS, Crew, PeerError, Submission, Submitter, now, run_to_end

__all__ = ["BYTES", "PAYLOAD", "Crew", "Peer", "PeerError", "Submission", "Submitter", "left_on", "now"]

PAYLOAD = {"data": "x" * 189}
BYTES = len(json.dumps(PAYLOAD, separators=(",", ":")))
HERE = Path(__file__).parent
PYTHON = HERE / ".venv" / "bin" / "python"
NODE = HERE / "node_modules" / ".bin" / "node"


class Peer(Protocol):
    """A system in one way of using it. All methods raise PeerError, or psycopg.Error from the database."""

    @property
    def name(self) -> str:
        """As shown in tables: "pgmq, read 100 and delete 100"."""

    @property
    def system(self) -> str:
        """What --systems asks for: "pgmq"."""

    @property
    def single(self) -> bool:
        """Whether this is the form that does one task at a time, on one connection as far as it allows."""

    @property
    def tasks(self) -> int:
        """Most tasks that it can drain in reasonable time."""

    @property
    def workers(self) -> int:
        """Worker processes."""

    @property
    def left_sql(self) -> str:
        """A query for the number of tasks that have not ended."""

    def missing(self) -> str | None:
        """One line that says what to install, or None."""

    def version(self) -> str: ...

    def install(self, dsn: str) -> None:
        """Into an empty database."""

    def submit_one_by_one(self, dsn: str, count: int) -> float:
        """Seconds for `count` tasks in a transaction each, on one connection."""

    def submit_in_bulk(self, dsn: str, count: int) -> float:
        """Seconds for `count` tasks in the fastest way that its documents give."""

    def submitter(self, dsn: str) -> contextlib.AbstractContextManager[Submitter]:
        """A process that submits on demand for as long as the context is open."""

    def left(self, dsn: str) -> int:
        """Tasks that have not ended."""

    def backlog(self, connection: psycopg.Connection[Any]) -> int:
        """The same over an open connection. It counts rows, dead ones on the way: where that would disturb, take what
        was submitted less `Crew.called`, which costs nothing."""

    def worker(self, dsn: str, handler: str, step: int = 100) -> contextlib.AbstractContextManager[Crew]:
        """Worker processes, connected; `go` lets them begin. handler: "count" or "stamp". step: see Crew.called."""


class ProgramPeer:
    """A peer whose submitter and worker are programs: `COMMAND submit OPTIONS`, `COMMAND work OPTIONS`."""

    system = ""
    left_sql = ""

    def __init__(
        self,
        name: str,
        *,
        single: bool = False,
        tasks: int = 40_000,
        workers: int = 1,
        **settings: Any,
    ) -> None:
        self.name = name
        self.single = single
        self.tasks = tasks
        self.workers = workers
        self._settings = settings

    def command(self) -> list[str]:
        raise NotImplementedError

    def missing(self) -> str | None:
        return None

    def version(self) -> str:
        raise NotImplementedError

    def install(self, dsn: str) -> None:
        raise NotImplementedError

    def submit_one_by_one(self, dsn: str, count: int) -> float:
        with self.submitter(dsn) as submitter:
            return submitter.submit_one_by_one(count).seconds

    def submit_in_bulk(self, dsn: str, count: int) -> float:
        with self.submitter(dsn) as submitter:
            return submitter.submit(count).seconds

    @contextlib.contextmanager
    def submitter(self, dsn: str) -> Iterator[Submitter]:
        submitter = Submitter([*self.command(), "submit", self._options()], dsn)
        try:
            yield submitter
        finally:
            submitter.close()

    def left(self, dsn: str) -> int:
        with psycopg.connect(dsn, autocommit=True) as connection:
            return self.backlog(connection)

    def backlog(self, connection: psycopg.Connection[Any]) -> int:
        return left_on(connection, self.left_sql)

    @contextlib.contextmanager
    def worker(self, dsn: str, handler: str, step: int = 100) -> Iterator[Crew]:
        crew = Crew(step)
        try:
            for _ in range(self.workers):
                crew.add([*self.command(), "work", self._options(handler=handler, step=step)], dsn)
            crew.wait_ready()
            yield crew
        finally:
            crew.stop()

    def _options(self, **more: Any) -> str:
        return json.dumps({"payload": PAYLOAD} | self._settings | more)


class PythonPeer(ProgramPeer):
    """A peer whose program runs in bench/peers/.venv, and also has `install`."""

    package = ""
    program = ""

    def command(self) -> list[str]:
        return [str(PYTHON), str(PROGRAMS / self.program)]

    def missing(self) -> str | None:
        return None if self._version() else f"{self.package} is not installed; run: python bench/peers/install.py"

    def version(self) -> str:
        return f"{self.package} {self._version()}"

    def install(self, dsn: str) -> None:
        run_to_end([*self.command(), "install"], dsn)

    def _version(self) -> str | None:
        folder = f"{self.package.replace('-', '_')}-*.dist-info"
        found = next(HERE.glob(f".venv/lib/python*/site-packages/{folder}"), None)
        return found.name.removesuffix(".dist-info").rpartition("-")[2] if found else None


class NodePeer(ProgramPeer):
    """A peer whose program runs on the Node of bench/peers/node_modules, and also has `install`."""

    package = ""
    program = ""

    def command(self) -> list[str]:
        return [str(NODE), str(PROGRAMS / self.program)]

    def missing(self) -> str | None:
        here = NODE.exists() and self._manifest().exists()
        return None if here else f"{self.package} is not installed; run: python bench/peers/install.py"

    def version(self) -> str:
        return f"{self.package} {json.loads(self._manifest().read_text())['version']}"

    def install(self, dsn: str) -> None:
        run_to_end([*self.command(), "install"], dsn)

    def _manifest(self) -> Path:
        return HERE / "node_modules" / self.package / "package.json"


def left_on(connection: psycopg.Connection[Any], query: str) -> int:
    """The number that a query of `left_sql` gives."""
    row = connection.execute(query.encode()).fetchone()
    assert row is not None
    (left,) = row.values() if isinstance(row, dict) else row
    return int(left)
