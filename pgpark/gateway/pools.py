"""Pools: their numbers and settings, and changing them."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel

from pgpark import calls
from pgpark.gateway.caller import Caller, PoolName
from pgpark.gateway.errors import documented
from pgpark.gateway.requests import NewState
from pgpark.models import PoolInfo, PoolStats

router = APIRouter(tags=["pools"])


class PoolList(BaseModel):
    """The numbers of each pool that the caller may see."""

    pools: list[PoolStats]


class OnePool(BaseModel):
    """A pool: its settings and its numbers."""

    pool: PoolInfo
    stats: PoolStats


class Changed(BaseModel):
    """Whether that changed anything."""

    result: Literal["changed", "unchanged"]


@router.get("/pools", responses=documented())
async def pools(caller: Caller) -> PoolList:
    """The numbers of each pool."""
    return PoolList(pools=await caller.call(calls.stats()))


@router.get("/pools/{pool}", responses=documented())
async def pool(pool: PoolName, caller: Caller) -> OnePool:
    """One pool, its settings with every default filled in, and its numbers."""
    (info,), (stats,) = await caller.call_all(calls.pools(pool), calls.stats(pool))
    return OnePool(pool=info, stats=stats)


@router.post("/pools/{pool}/state", responses=documented())
async def set_state(pool: PoolName, state: NewState, caller: Caller) -> NewState:
    """Sets a pool to active, paused (nothing starts), draining (nothing is accepted) or disabled (neither)."""
    await caller.call(calls.set_pool_state(pool, state.state))
    return state


@router.patch("/pools/{pool}", responses=documented(409))
async def change(pool: PoolName, changes: dict[str, Any], caller: Caller) -> Changed:
    """Changes those settings that the body names, keys as in the config file; null takes one away (RFC 7396)."""
    return Changed(result=await caller.call(calls.change_pool(pool, changes)))
