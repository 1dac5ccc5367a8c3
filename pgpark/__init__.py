"""pgpark: a parking lot for expensive work on Postgres."""

from pgpark import calls
from pgpark.client import AsyncClient, Client
from pgpark.errors import PgparkError
from pgpark.executors import TaskContext
from pgpark.models import Message, Part
from pgpark.worker import Worker, WorkerSettings

__all__ = [
    "AsyncClient",
    "Client",
    "Message",
    "Part",
    "PgparkError",
    "TaskContext",
    "Worker",
    "WorkerSettings",
    "calls",
]
__version__ = "0.1.0"
