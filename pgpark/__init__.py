"""pgpark: a parking lot for expensive work on Postgres."""

from pgpark import calls
from pgpark.client import AsyncClient, Client
from pgpark.costs import LlmCostModel
from pgpark.errors import PgparkError
from pgpark.executors import TaskContext
from pgpark.worker import Worker, WorkerSettings

__all__ = ["AsyncClient", "Client", "LlmCostModel", "PgparkError", "TaskContext", "Worker", "WorkerSettings", "calls"]
__version__ = "0.1.0"
