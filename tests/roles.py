"""Roles of the database with the access that a test grants them, in sessions of their own."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb

from tests.conftest import Database

DENIED = psycopg.errors.InsufficientPrivilege


class Roles:
    """Makes roles and sessions of theirs."""

    def __init__(self, owner: Database, connect: Callable[[], Database]) -> None:
        self._owner = owner
        self._connect = connect
        self.made: list[str] = []

    def make(self, name: str | None = None, *, within: str | None = None) -> str:
        """A login without any rights; `within`: a member of that role."""
        role = name or f"pgpark_test_{uuid.uuid4().hex[:12]}"
        self._owner.connection.execute(sql.SQL("create role {} login").format(sql.Identifier(role)))
        self.made.append(role)
        if within is not None:
            self._owner.connection.execute(
                sql.SQL("grant {} to {}").format(sql.Identifier(within), sql.Identifier(role))
            )
        return role

    def session(self, role: str) -> Database:
        """A session of this role, in which nothing but `reset` could bring the owner back."""
        session = self._connect()
        session.connection.execute(sql.SQL("set session authorization {}").format(sql.Identifier(role)))
        return session

    def granted(self, kind: str, tenants: list[str] | None = None, pools: list[str] | None = None) -> Database:
        """A session of a new role with this access."""
        role = self.make()
        self.grant(role, kind, tenants, pools)
        return self.session(role)

    def grant(self, role: str, kind: str, tenants: list[str] | None = None, pools: list[str] | None = None) -> None:
        self._owner.rows("select pgpark.park_grant(%s, %s, %s, %s)", role, kind, tenants, pools)


@pytest.fixture
def roles(db: Database, connect: Callable[[], Database]) -> Iterator[Roles]:
    made = Roles(db, connect)
    yield made
    for role in made.made:
        db.connection.execute(sql.SQL("drop owned by {} cascade").format(sql.Identifier(role)))
        db.connection.execute(sql.SQL("drop role {}").format(sql.Identifier(role)))


def refused(call: Callable[[], Any], match: str | None = None) -> None:
    with pytest.raises(DENIED, match=match):
        call()


@pytest.fixture
def rival(db: Database) -> dict[str, int]:
    """Tasks of the tenant `rival`, in each state; `done` has an outcome that nobody has taken."""
    db.pool()
    done = db.parked(tenant="rival", payload="of the rival", idempotency_key="k")
    db.claim(max_tasks=1)
    db.rows("select pgpark.park_emit(%s, 1, %s)", done, Jsonb([{"content": "a token"}]))
    db.finish(done, result="a secret")
    running = db.parked(tenant="rival")
    db.claim(max_tasks=1)
    return {"done": done, "running": running, "parked": db.parked(tenant="rival")}
