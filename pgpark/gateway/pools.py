"""Pools: their numbers and settings."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel

from pgpark import calls
from pgpark.gateway.caller import Caller, PoolName
from pgpark.gateway.errors import documented
from pgpark.models import PoolInfo, PoolStats

router = APIRouter(tags=["pools"])


class PoolList(BaseModel):
    """The numbers of each pool that the caller may see."""

    pools: list[PoolStats]


class OnePool(BaseModel):
    """A pool: its settings and its numbers."""

    pool: PoolInfo
    stats: PoolStats


@router.get("/pools", responses=documented())
async def pools(caller: Caller) -> PoolList:
    """The numbers of each pool."""
    return PoolList(pools=await caller.call(calls.stats()))


@router.get("/pools/{pool}", responses=documented())
async def pool(pool: PoolName, caller: Caller) -> OnePool:
    """One pool, its settings with every default filled in, and its numbers."""
    (info,), (stats,) = await caller.call_all(calls.pools(pool), calls.stats(pool))
    return OnePool(pool=info, stats=stats)
