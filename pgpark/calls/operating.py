"""Pools: made, changed, paused, dropped, and kept going."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from psycopg import sql
from psycopg.types.json import Jsonb

from pgpark.calls.call import Call, described, many, one, value_of
from pgpark.models import Finding, LlmCapacity, Maintained, PlannedChange, PoolInfo


def put_pool(name: str, config: Mapping[str, Any]) -> Call[Literal["created", "changed", "unchanged"]]:
    """Creates or changes a pool: `created`, `changed` or `unchanged`."""
    return described("park_put_pool", value_of("park_put_pool"), name=name, config=Jsonb(config))


def change_pool(name: str, changes: Mapping[str, Any]) -> Call[Literal["changed", "unchanged"]]:
    """Changes the settings that `changes` names, an object of config keys; None takes one away."""
    return described("park_change_pool", value_of("park_change_pool"), name=name, changes=Jsonb(changes))


def plan_pool(name: str, config: Mapping[str, Any]) -> Call[list[PlannedChange]]:
    """What put_pool would change, without changing it; raises its errors."""
    return described("park_plan_pool", many(PlannedChange), name=name, config=Jsonb(config))


def drop_pool(name: str, force: bool = False) -> Call[None]:
    """Drops a pool; with live tasks only if forced."""
    return described("park_drop_pool", lambda _rows: None, name=name, force=force)


def set_pool_state(name: str, state: str) -> Call[None]:
    """Sets a pool to active, paused, draining or disabled."""
    return described("park_set_pool_state", lambda _rows: None, name=name, state=state)


def pools(pool: str | None = None) -> Call[list[PoolInfo]]:
    """One pool, or all, with config and settings."""
    return described("park_pools", many(PoolInfo), pool=pool)


def llm_capacity(cost_model: Mapping[str, Any]) -> Call[LlmCapacity]:
    """What a cost model makes of its card: bytes of KV cache per token, units, and tokens that they hold."""
    return described("park_llm_capacity", one(LlmCapacity), cost_model=Jsonb(dict(cost_model)))


def prune(pool: str | None = None) -> Call[int]:
    """Moves expired tasks to the mailbox; returns how many."""
    return described("park_prune", value_of("park_prune"), pool=pool)


def maintain(pool: str | None = None) -> Call[Maintained]:
    """Runs the timers of one pool, or of all. `due_in_secs` is next_due seen from the database's own clock."""
    statement = sql.SQL(
        "select m.*, cast(extract(epoch from m.next_due - pgpark._now()) as float8) as due_in_secs"
        " from pgpark.park_maintain(pool => cast(%(pool)s as text)) m"
    ).format()
    return Call(statement, {"pool": pool}, one(Maintained))


def doctor() -> Call[list[Finding]]:
    """What is wrong with the installation, and the SQL that mends it."""
    return described("park_doctor", many(Finding))
