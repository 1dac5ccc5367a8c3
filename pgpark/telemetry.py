"""Traces with OpenTelemetry: a submit's context goes with its task, and the handler goes on in it.

Nothing is imported and nothing done unless the program has set OpenTelemetry up: whoever has a tracer provider has
imported it. Spans have the names and attributes of the semantic conventions for messaging, and ours as `pgpark.*`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeVar

from pgpark import calls
from pgpark.errors import BadInputError, PgparkError, one_line

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

    from pgpark.hands import Run
    from pgpark.lane import Lane
    from pgpark.models import ClaimedRow
    from pgpark.pool import BasePool

log = logging.getLogger("pgpark.telemetry")

T = TypeVar("T")
Carrier = Mapping[str, str]  # traceparent, tracestate

_FLUSH_MILLIS = 5000


def configure() -> None:
    """Sets up what OTEL_TRACES_EXPORTER asks for, where nobody has set anything up (opentelemetry-instrument has).

    The SDK reads the other variables: OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_ENDPOINT, ...
    Raises BadInputError where the SDK or the exporter is not installed.
    """
    named = [name.strip() for name in os.environ.get("OTEL_TRACES_EXPORTER", "").split(",")]
    names = [name for name in named if name not in ("", "none")]
    if not names or tracer() is not None:
        return
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise BadInputError(f"OTEL_TRACES_EXPORTER is set, but {error.name} is not installed") from None
    provider = TracerProvider()
    for name in names:
        found = list(importlib.metadata.entry_points(group="opentelemetry_traces_exporter", name=name))
        if not found:
            raise BadInputError(f"OTEL_TRACES_EXPORTER={name}: there is no exporter of this name installed")
        provider.add_span_processor(BatchSpanProcessor(found[0].load()()))
    trace.set_tracer_provider(provider)


def tracer() -> Tracer | None:
    """Our tracer, if this program has set up OpenTelemetry."""
    trace: Any = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return None
    provider = trace.get_tracer_provider()
    if isinstance(provider, (trace.ProxyTracerProvider, trace.NoOpTracerProvider)):
        return None
    made: Tracer = provider.get_tracer("pgpark")
    return made


def carrier() -> dict[str, str]:
    """The active span as a W3C trace context; empty where there is none."""
    carried: dict[str, str] = {}
    if tracer() is not None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        TraceContextTextMapPropagator().inject(carried)
    return carried


@contextlib.contextmanager
def attached(carried: Carrier) -> Iterator[None]:
    """Goes on in a trace; nothing without the API, or for an empty carrier."""
    if not carried:
        yield
        return
    try:
        from opentelemetry import context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError:
        yield
        return
    token = context.attach(TraceContextTextMapPropagator().extract(dict(carried)))
    try:
        yield
    finally:
        context.detach(token)


def flush() -> None:
    """Exports what has ended, as far as that is possible within a few seconds."""
    trace: Any = sys.modules.get("opentelemetry.trace")
    export = getattr(trace.get_tracer_provider(), "force_flush", None) if trace is not None else None
    if export is not None:
        with contextlib.suppress(Exception):  # whatever an exporter raises
            export(_FLUSH_MILLIS)


# -- submitting ------------------------------------------------------------------------------------------------------


def submit(pool: BasePool[Any, Any], tracing: Tracer, call: calls.Call[T]) -> T:
    """Runs a submit in a span of its own, whose context goes with the tasks."""
    with _submitting(pool.name, tracing) as span:
        answer: T = pool.run(_carrying(call))
        _note_answer(span, answer)
        return answer


async def submit_async(pool: BasePool[Any, Any], tracing: Tracer, call: calls.Call[T]) -> T:
    """The same for asyncio."""
    with _submitting(pool.name, tracing) as span:
        answer: T = await pool.run(_carrying(call))
        _note_answer(span, answer)
        return answer


def _submitting(pool: str, tracing: Tracer) -> contextlib.AbstractContextManager[Span]:
    from opentelemetry.trace import SpanKind

    attributes = _common(pool, "submit", "send")
    return tracing.start_as_current_span(f"submit {pool}", kind=SpanKind.PRODUCER, attributes=attributes)


def _carrying(call: calls.Call[T]) -> calls.Call[T]:
    carried = carrier()
    return calls.within_trace(call, carried["traceparent"], carried.get("tracestate")) if carried else call


def forwarding(call: calls.Call[T], traceparent: str | None, tracestate: str | None) -> calls.Call[T]:
    """A submit for somebody else, in whose trace it is; in that of this program, if it has one active."""
    carried = carrier() or ({"traceparent": traceparent, "tracestate": tracestate or ""} if traceparent else {})
    return calls.within_trace(call, carried["traceparent"], carried.get("tracestate")) if carried else call


def _note_answer(span: Span, answer: Any) -> None:
    rows: Sequence[Any] = answer if isinstance(answer, list) else [answer]
    if isinstance(answer, list):
        span.set_attribute("messaging.batch.message_count", len(rows))
    elif rows[0].task_id is not None:
        span.set_attribute("messaging.message.id", str(rows[0].task_id))
    if refused := sorted({row.reason for row in rows if not row.accepted}):
        span.set_attribute("pgpark.refused", refused)


def _common(pool: str, name: str, kind: str) -> dict[str, str]:
    return {
        "messaging.system": "pgpark",
        "messaging.destination.name": pool,
        "messaging.operation.name": name,
        "messaging.operation.type": kind,
    }


# -- working ---------------------------------------------------------------------------------------------------------


class Attempts:
    """The spans of a worker's attempts, each in the trace of its task's submit."""

    def __init__(self, tracing: Tracer, pool: str, worker: str) -> None:
        self._tracing = tracing
        self._pool = pool
        self._worker = worker

    async def traces(self, lane: Lane, claimed: Sequence[ClaimedRow]) -> dict[int, Carrier]:
        """Where the tasks come from, by id. They are ours already, so they run whatever comes of this."""
        try:
            rows = await lane.run(calls.traces([row.task_id for row in claimed]))
        except PgparkError as error:
            log.warning("traces of %d tasks are not continued: %s", len(claimed), one_line(error))
            return {}
        return {
            row.task_id: {"traceparent": row.traceparent} | ({"tracestate": row.tracestate} if row.tracestate else {})
            for row in rows
        }

    @contextlib.contextmanager
    def span(self, run: Run, row: ClaimedRow, trace: Carrier) -> Iterator[None]:
        """Is active while an attempt runs, and tells at its end what came of it."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        attributes: dict[str, str | int | float] = {
            **_common(self._pool, "process", "process"),
            "messaging.message.id": str(run.task_id),
            "messaging.client.id": self._worker,
            "pgpark.attempt": run.attempt,
            "pgpark.priority": row.priority,
            "pgpark.units": row.units,
            "pgpark.wait_secs": max((datetime.now(timezone.utc) - row.created_at).total_seconds(), 0.0),
        }
        if row.tenant is not None:
            attributes["pgpark.tenant"] = row.tenant
        with (
            attached(trace),
            self._tracing.start_as_current_span(
                f"process {self._pool}", kind=SpanKind.CONSUMER, attributes=attributes
            ) as span,
        ):
            yield
            span.set_attribute(
                "pgpark.outcome", "completed" if run.completed else "failed" if run.outcome else "released"
            )
            if run.outcome and not run.completed:
                span.set_status(Status(StatusCode.ERROR, run.reason))

    def failed(self, error: BaseException) -> None:
        """The active attempt failed with this."""
        from opentelemetry.trace import get_current_span

        cause = error.__cause__ or error  # of a handler in a thread, which is told by its text
        span = get_current_span()
        span.set_attribute("error.type", type(cause).__qualname__)
        span.record_exception(cause)


def attempts(pool: str, worker: str) -> Attempts | None:
    """None where nobody traces."""
    tracing = tracer()
    return None if tracing is None else Attempts(tracing, pool, worker)
