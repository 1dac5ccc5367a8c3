"""Metrics in the text format of Prometheus: those of pools, as park_metrics tells them, and a worker's own.

A gateway serves the first (gateway/metrics.py), a worker both (exporter.py). Needs prometheus-client (the extra
`gateway`), which is imported by those who serve metrics alone. What each metric means: docs/operations/metrics.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric as Family

from pgpark.measures import WorkerMeasures

if TYPE_CHECKING:
    from pgpark.models import Metric
    from pgpark.worker import Worker

# By the name of a family: its type, and what it is.
POOL_FAMILIES = {
    "pgpark_pool_state": ("gauge", "1 for the state that the pool is in, 0 for the others."),
    "pgpark_capacity_units": ("gauge", "Units that the pool has (max_units)."),
    "pgpark_used_units": ("gauge", "Units that running tasks hold."),
    "pgpark_demand_units": ("gauge", "Units held, parked for or due, up to a bound."),
    "pgpark_running_tasks": ("gauge", "Tasks that are running or being stopped."),
    "pgpark_parked_tasks": ("gauge", "Parked tasks by priority, up to a bound."),
    "pgpark_delayed_tasks": ("gauge", "Tasks that wait for a time, up to a bound."),
    "pgpark_oldest_parked_seconds": ("gauge", "How long the longest waiting parked task could have started."),
    "pgpark_overdue_seconds": ("gauge", "How late the first of the due timers is."),
    "pgpark_workers": ("gauge", "Workers that claimed or sent a heartbeat lately."),
    "pgpark_callbacks_due": ("gauge", "Callbacks that are due and not under way, up to a bound."),
    "pgpark_started": ("counter", "Attempts that started."),
    "pgpark_outcomes": ("counter", "Tasks that ended, by outcome."),
    "pgpark_retries": ("counter", "Attempts that failed and are followed by another."),
    "pgpark_lost_leases": ("counter", "Leases that lapsed."),
    "pgpark_callbacks": ("counter", "Attempts to deliver callbacks, by what came of them."),
    "pgpark_wait_seconds": ("histogram", "From when a task could start to its start."),
    "pgpark_run_seconds": ("histogram", "From the start of an attempt to its end."),
}
WORKER_FAMILIES = {
    "pgpark_worker_running_tasks": ("gauge", "Tasks in the hands of this worker."),
    "pgpark_worker_held_units": ("gauge", "Units of these tasks."),
    "pgpark_worker_concurrency": ("gauge", "How many tasks it takes at most."),
    "pgpark_worker_connections": ("gauge", "Connections for claims and outcomes that are up, of two."),
    "pgpark_worker_heartbeat_late_seconds": ("gauge", "For how long a heartbeat should have been answered."),
    "pgpark_worker_claimed": ("counter", "Tasks that this worker claimed."),
    "pgpark_worker_outcomes": ("counter", "Attempts that it ended, by how."),
    "pgpark_worker_fenced": ("counter", "Outcomes that came too late: the task was no longer its own."),
    "pgpark_worker_stops": ("counter", "Tasks that the database asked it to stop."),
    "pgpark_worker_heartbeats": ("counter", "Heartbeats, sent or failed."),
    "pgpark_worker_reconnects": ("counter", "Connections that were lost."),
    "pgpark_worker_callbacks": ("counter", "Callbacks that it tried to deliver, by what came of them."),
    "pgpark_worker_handler_seconds": ("histogram", "How long handlers ran."),
}


def pool_text(rows: Iterable[Metric]) -> bytes:
    """The rows of park_metrics as Prometheus reads them."""
    families = {name: Family(name, about, kind) for name, (kind, about) in POOL_FAMILIES.items()}
    ordered = sorted(rows, key=lambda row: (row.pool, float(row.labels.get("le", "inf"))))
    for row in ordered:
        name = _family(row.metric)
        family = families.setdefault(name, Family(name, "Of a newer release.", "unknown"))
        family.add_sample(row.metric, {"pool": row.pool, **row.labels}, row.value)
    return _text(families.values())


def worker_text(worker: Worker) -> bytes:
    """A worker's own as Prometheus reads them."""
    return _text(_worker_families(worker))


def _worker_families(worker: Worker) -> Iterator[Family]:
    """A worker's own."""
    measures, pool = worker.measures, worker.pool
    runs = worker.held()
    values: dict[str, float] = {
        "pgpark_worker_running_tasks": len(runs),
        "pgpark_worker_held_units": sum(runs),
        "pgpark_worker_concurrency": worker.concurrency,
        "pgpark_worker_connections": len(measures.lanes),
        "pgpark_worker_heartbeat_late_seconds": measures.heartbeat_late(),
        "pgpark_worker_claimed": measures.claimed,
        "pgpark_worker_fenced": measures.fenced,
        "pgpark_worker_stops": measures.stops,
        "pgpark_worker_reconnects": measures.reconnects,
    }
    counted = {
        "pgpark_worker_outcomes": ("outcome", measures.outcomes),
        "pgpark_worker_heartbeats": ("result", measures.heartbeats),
        "pgpark_worker_callbacks": ("result", measures.callbacks),
    }
    for name, (kind, about) in WORKER_FAMILIES.items():
        family = Family(name, about, kind)
        sample = f"{name}_total" if kind == "counter" else name
        if name in values:
            family.add_sample(sample, {"pool": pool}, values[name])
        elif name in counted:
            label, counts = counted[name]
            for value, count in counts.copy().items():
                family.add_sample(sample, {"pool": pool, label: value}, count)
        else:
            _add_histogram(family, name, pool, measures)
        yield family


class _Given:
    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[Family]:
        return self._families

    def describe(self) -> list[Family]:
        return []


def _text(families: Iterable[Family]) -> bytes:
    registry = CollectorRegistry()
    registry.register(_Given(families))
    return generate_latest(registry)


def _family(sample: str) -> str:
    for end in ("_total", "_bucket", "_count", "_sum"):
        if (name := sample.removesuffix(end)) != sample and name in POOL_FAMILIES:
            return name
    return sample


def _add_histogram(family: Family, name: str, pool: str, measures: WorkerMeasures) -> None:
    buckets = measures.cumulated()
    for bound, count in buckets.items():
        family.add_sample(f"{name}_bucket", {"pool": pool, "le": bound}, count)
    family.add_sample(f"{name}_count", {"pool": pool}, buckets["+Inf"])
    family.add_sample(f"{name}_sum", {"pool": pool}, measures.handler_secs)
