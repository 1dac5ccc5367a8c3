"""The server that a bench runs on."""

from __future__ import annotations

import contextlib
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
from psycopg import sql

from pgpark.database import connect
from pgpark.embedded import EmbeddedServer


@contextlib.contextmanager
def chosen_server(dsn: str | None) -> Iterator[str]:
    """The DSN that was given, or that of an embedded server of its own for as long as it is used."""
    if dsn:
        yield dsn
        return
    with tempfile.TemporaryDirectory() as home, EmbeddedServer(Path(home)).use() as embedded:
        yield embedded


@contextlib.contextmanager
def new_database(dsn: str) -> Iterator[str]:
    """The DSN of a new, empty database on the server of a DSN; gone afterwards."""
    name = f"pgpark_bench_{uuid.uuid4().hex[:12]}"
    with connect(dsn) as admin:
        admin.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        try:
            yield psycopg.conninfo.make_conninfo(dsn, dbname=name)
        finally:
            admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))
