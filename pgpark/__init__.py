"""pgpark: a parking lot for expensive work on Postgres."""

from pgpark import calls
from pgpark.client import AsyncClient, Client
from pgpark.costs import LlmCostModel
from pgpark.errors import PgparkError
from pgpark.executors import TaskContext
from pgpark.models import Message, Part
from pgpark.pool import AsyncPool, Pool
from pgpark.pools import AsyncPools, Pools, build_pools, build_pools_async
from pgpark.worker import Worker, WorkerSettings

__all__ = [
    "AsyncClient",
    "AsyncPool",
    "AsyncPools",
    "Client",
    "LlmCostModel",
    "Message",
    "Part",
    "PgparkError",
    "Pool",
    "Pools",
    "TaskContext",
    "Worker",
    "WorkerSettings",
    "build_pools",
    "build_pools_async",
    "calls",
]
__version__ = "0.1.0"
