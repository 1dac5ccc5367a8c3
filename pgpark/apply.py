"""Brings pools to what a config file says: all of them, or none. What would change is decided in SQL."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import psycopg
from psycopg.rows import DictRow

from pgpark import calls
from pgpark.config import Config, is_secret
from pgpark.database import connect, require_migrated
from pgpark.errors import BadInputError, DatabaseError, one_line
from pgpark.models import PlannedChange
from pgpark.places import Place

Connection: TypeAlias = psycopg.Connection[DictRow]
Result: TypeAlias = Literal["created", "changed", "unchanged"]
HIDDEN = "(secret)"


@dataclasses.dataclass(frozen=True)
class Applied:
    """What became of a pool, or would: where it lives, and the settings that change. Secrets are hidden."""

    pool: str
    place: Place
    result: Result
    changes: tuple[PlannedChange, ...]


def apply(config: Config, given: Place, *, dry_run: bool = False) -> list[Applied]:
    """Creates and changes the pools of a config; pools that it does not name are left alone.

    given: where pools live that do not say so themselves. dry_run: only tell what would be done.
    Raises BadInputError naming file and path, NotMigratedError, DatabaseError; nothing was changed then.
    """
    where = config.places(given)
    with contextlib.ExitStack() as stack:
        dsns = {place: stack.enter_context(served(config, where, place)) for place in ordered(where)}
        return reconcile(config, where, dsns, create=not dry_run, change=not dry_run)


def ordered(where: Mapping[str, Place]) -> list[Place]:
    """Each place of these pools once, in an order that is the same for everybody."""
    return sorted(set(where.values()), key=str)


@contextlib.contextmanager
def served(config: Config, where: Mapping[str, Place], place: Place) -> Iterator[str]:
    """The DSN of a place where pools of the config live, for as long. Raises DatabaseError naming the pools."""
    with contextlib.ExitStack() as stack:
        with _pools_named(config, where, place):
            dsn = stack.enter_context(place.use())
        yield dsn


def reconcile(
    config: Config, where: Mapping[str, Place], dsns: Mapping[Place, str], *, create: bool, change: bool
) -> list[Applied]:
    """Compares every pool with its database; puts those that are not there if `create`, those that are if `change`.

    All pools are checked before the first is put. Each database changes in one transaction; these are committed
    one after the other once everything has succeeded. Raises the errors of `apply`.
    """
    with contextlib.ExitStack() as stack:
        connections = {}
        for place, dsn in dsns.items():
            with _pools_named(config, where, place):
                connections[place] = stack.enter_context(contextlib.closing(connect(dsn, prepare=False)))
                require_migrated(connections[place])
        return _reconcile(config, where, connections, create, change)


def _reconcile(
    config: Config, where: Mapping[str, Place], connections: Mapping[Place, Connection], create: bool, change: bool
) -> list[Applied]:
    databases = _databases(connections)
    for connection in set(databases.values()):
        connection.execute("begin isolation level read committed")
    planned = {name: _planned(config, name, place, databases[place]) for name, place in where.items()}
    for name in sorted(planned):
        if create if planned[name].result == "created" else change:
            with _file_named(config):  # also where no setting differs: the config itself is kept too
                word = calls.run_on(databases[where[name]], calls.put_pool(name, config.sql_config(name)))
            planned[name] = dataclasses.replace(planned[name], result=word)
    _commit(config, databases)
    return list(planned.values())


def _databases(connections: Mapping[Place, Connection]) -> dict[Place, Connection]:
    """For each place the connection to use: one for a database, even if it was named in two ways. Two transactions of
    ours in one database would wait for one another."""
    first: dict[Any, Connection] = {}
    used = {}
    for place, connection in connections.items():
        row = connection.execute("select pg_postmaster_start_time(), current_database()").fetchone()
        assert row is not None
        used[place] = first.setdefault(tuple(row.values()), connection)
    return used


def _planned(config: Config, name: str, place: Place, connection: Connection) -> Applied:
    with _file_named(config):
        changes = calls.run_on(connection, calls.plan_pool(name, config.sql_config(name)))
        there = any(info.name == name for info in calls.run_on(connection, calls.pools()))
    result: Result = "created" if not there else "changed" if changes else "unchanged"
    return Applied(name, place, result, tuple(_hidden(change) for change in changes))


def _hidden(change: PlannedChange) -> PlannedChange:
    if not is_secret(change.key):
        return change
    shown = {side: None if getattr(change, side) is None else HIDDEN for side in ("before", "after")}
    return change.model_copy(update=shown)


@contextlib.contextmanager
def _pools_named(config: Config, where: Mapping[str, Place], place: Place) -> Iterator[None]:
    """Puts the name of the file and of the pools that live there before what is wrong with a database."""
    try:
        yield
    except DatabaseError as error:
        names = ", ".join(name for name in where if where[name] == place)
        raise type(error)(f"{config.file}: {names}: {error}") from error


@contextlib.contextmanager
def _file_named(config: Config) -> Iterator[None]:
    """Puts the name of the file before what is wrong with a pool."""
    try:
        yield
    except BadInputError as error:
        raise type(error)(f"{config.file}: {error}") from error


def _commit(config: Config, databases: Mapping[Place, Connection]) -> None:
    done: list[str] = []
    for connection in set(databases.values()):
        place = next(place for place in databases if databases[place] is connection)
        try:
            connection.execute("commit")
        except psycopg.Error as error:
            kept = f"; {', '.join(done)} is done already" if done else "; nothing was changed"
            raise DatabaseError(f"{config.file}: {place}: cannot commit: {one_line(error)}{kept}") from error
        done.append(str(place))
