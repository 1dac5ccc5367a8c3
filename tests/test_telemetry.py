"""Traces: the handler goes on in the trace of its task's submit, wherever it runs."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy.orm import Session

from pgpark import build_pools, build_pools_async
from pgpark.executors import CommandExecutor, Executor
from pgpark.processes import ProcessExecutor
from tests import handlers
from tests.conftest import Database, wait_for
from tests.test_worker import function, run_all

CONFIG = {"pools": {"gpu": {"max_units": 24, "retry": {"max_attempts": 2, "backoff_secs": 0}}}}
ROOT = Path(__file__).parent.parent


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What a program that has set OpenTelemetry up would export."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield exporter
    provider.shutdown()


def of(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


def submitted(dsn: str, payload: Any = None) -> int:
    """A task that was submitted within a span of the program's own."""
    with build_pools(CONFIG, dsn=dsn) as pools, trace.get_tracer("mine").start_as_current_span("request"):
        task = pools["gpu"].submit(payload, units=2, priority="high", tenant="acme").task_id
    assert task is not None
    return task


def traces(*found: list[ReadableSpan]) -> set[int]:
    return {span.context.trace_id for each in found for span in each if span.context is not None}


@pytest.mark.parametrize("handler", ["active_span", "active_span_in_thread"])
def test_the_handler_is_in_the_trace_of_the_submit(db: Database, spans: InMemorySpanExporter, handler: str) -> None:
    task = submitted(db.dsn)
    ((status, _, seen),) = run_all(db, function(getattr(handlers, handler)), [task], name="w1")
    (request,), (sent,), (attempt,) = (of(spans, name) for name in ("request", "submit gpu", "process gpu"))
    assert status == "completed"
    assert len(traces([request, sent, attempt])) == 1
    assert sent.parent is not None
    assert sent.parent.span_id == request.context.span_id
    assert attempt.parent is not None
    assert attempt.parent.span_id == sent.context.span_id
    assert seen == {
        "trace": trace.format_trace_id(attempt.context.trace_id),
        "span": trace.format_span_id(attempt.context.span_id),
    }
    assert (sent.kind, attempt.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    assert sent.attributes is not None
    assert sent.attributes["messaging.message.id"] == str(task)
    assert attempt.attributes is not None
    attributes = dict(attempt.attributes)
    assert 0 <= attributes.pop("pgpark.wait_secs") < 600  # type: ignore[operator]
    assert attributes == {
        "messaging.system": "pgpark",
        "messaging.destination.name": "gpu",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.message.id": str(task),
        "messaging.client.id": "w1",
        "pgpark.attempt": 1,
        "pgpark.priority": "high",
        "pgpark.units": 2,
        "pgpark.tenant": "acme",
        "pgpark.outcome": "completed",
    }


def test_each_attempt_has_a_span_and_a_failed_one_its_error(db: Database, spans: InMemorySpanExporter) -> None:
    task = submitted(db.dsn, payload="that")
    ((status, _, _),) = run_all(db, function(handlers.fail), [task])
    attempts = of(spans, "process gpu")
    assert status == "failed"
    assert [span.attributes["pgpark.attempt"] for span in attempts if span.attributes] == [1, 2]
    assert len(traces(of(spans, "request"), attempts)) == 1
    for span in attempts:
        assert span.attributes is not None
        assert span.attributes["pgpark.outcome"] == "failed"
        assert span.attributes["error.type"] == "ValueError"
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description == "ValueError: cannot do that"
        assert [event.name for event in span.events] == ["exception"]


def test_a_refused_task_and_a_batch_say_so(db: Database, spans: InMemorySpanExporter) -> None:
    with build_pools(CONFIG, dsn=db.dsn) as pools:
        pools["gpu"].submit(1, units=100)
        pools["gpu"].submit_many([{"payload": n} for n in range(3)])
    one, many = of(spans, "submit gpu")
    assert one.attributes is not None
    assert one.attributes["pgpark.refused"] == ("too_large",)
    assert many.attributes is not None
    assert many.attributes["messaging.batch.message_count"] == 3
    parents = [row["traceparent"] for row in db.rows("select traceparent from pgpark.park_traces('{1,2,3,4,5}')")]
    assert len(parents) == 3
    assert {parent.split("-")[2] for parent in parents} == {trace.format_span_id(many.context.span_id)}


def test_asyncio_and_the_callers_own_transactions_carry_it_too(db: Database, spans: InMemorySpanExporter) -> None:
    async def submit() -> None:
        async with build_pools_async(CONFIG, dsn=db.dsn) as pools:
            await pools["gpu"].submit(1)

    asyncio.run(submit())
    engine = sqlalchemy.create_engine(f"postgresql+psycopg2://{_url(db)}")
    with build_pools(CONFIG, dsn=db.dsn) as pools:
        with db.connection.transaction():
            pools["gpu"].on(db.connection).submit(2)
        with Session(engine) as session:
            pools["gpu"].on(session).submit(3)
            session.commit()
    engine.dispose()
    rows = db.rows("select traceparent from pgpark.park_traces(array(select task_id from pgpark.task))")
    carried = {row["traceparent"].split("-")[2] for row in rows}
    assert carried == {trace.format_span_id(span.context.span_id) for span in of(spans, "submit gpu")}
    assert len(carried) == 3


def _url(db: Database) -> str:
    info = db.connection.info
    password = f":{info.password}" if info.password else ""
    return f"{info.user}{password}@/{info.dbname}?host={info.host}&port={info.port}"


def test_a_program_gets_it_as_a_variable(db: Database, spans: InMemorySpanExporter) -> None:
    command: Executor = CommandExecutor(f"{sys.executable} -c 'import os; print(os.environ[\"TRACEPARENT\"])'")
    ((_, _, told),) = run_all(db, command, [submitted(db.dsn)])
    (attempt,) = of(spans, "process gpu")
    version, trace_id, span_id, _ = told.strip().split("-")
    assert version == "00"
    assert trace_id == trace.format_trace_id(attempt.context.trace_id)
    assert span_id == trace.format_span_id(attempt.context.span_id)


def test_a_handler_in_a_process_of_its_own_is_in_it(db: Database, spans: InMemorySpanExporter) -> None:
    with closing(ProcessExecutor("tests.handlers:active_span")) as processes:
        ((_, _, seen),) = run_all(db, processes, [submitted(db.dsn)])
    (attempt,) = of(spans, "process gpu")
    assert seen == {
        "trace": trace.format_trace_id(attempt.context.trace_id),
        "span": trace.format_span_id(attempt.context.span_id),
    }


def test_a_task_that_was_submitted_without_a_trace_begins_one(db: Database, spans: InMemorySpanExporter) -> None:
    db.pool()
    run_all(db, function(handlers.echo), [db.parked()])
    (attempt,) = of(spans, "process gpu")
    assert attempt.parent is None


def test_the_worker_runs_its_tasks_where_their_traces_cannot_be_read(db: Database, spans: InMemorySpanExporter) -> None:
    task = submitted(db.dsn)
    db.connection.execute("drop function pgpark.park_traces")
    assert run_all(db, function(handlers.echo), [task]) == [("completed", None, None)]
    (attempt,) = of(spans, "process gpu")
    assert attempt.parent is None


WORKER = """
import sys, threading
from pgpark import Worker, WorkerSettings
from pgpark.executors import FunctionExecutor
import asyncio
async def main():
    worker = Worker(WorkerSettings(dsn=sys.argv[1], pool="gpu"), FunctionExecutor(handler))
    async def one(): await worker.serve()
    job = asyncio.create_task(one())
    await done.wait()
    worker.stop()
    await job
done = asyncio.Event()
async def handler(payload):
    done.set()
from pgpark import build_pools
with build_pools({"pools": {"gpu": {"max_units": 1}}}, dsn=sys.argv[1]) as pools:
    pools["gpu"].submit({})
asyncio.run(main())
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""


def test_without_opentelemetry_set_up_nothing_of_it_is_imported(db: Database) -> None:
    done = subprocess.run([sys.executable, "-c", WORKER, db.dsn], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def work(db: Database, *options: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pgpark", "worker", "gpu", *options, "--dsn", db.dsn]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("options", [(), ("--processes", "1")])
def test_the_exporter_of_the_environment_gets_the_spans_of_a_worker(db: Database, options: tuple[str, ...]) -> None:
    db.pool()
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    db.rows("select set_config('pgpark.traceparent', %s, false)", parent)
    task = db.parked()
    with work(db, "--handler", "tests.handlers:own_span", *options, OTEL_TRACES_EXPORTER="console") as worker:
        try:
            wait_for(lambda: db.rows("select from pgpark.park_result(%s)", task))
        finally:
            worker.terminate()
            out, err = worker.communicate(timeout=60)
    assert worker.returncode == 0, err
    exported = _objects(out)
    assert {span["context"]["trace_id"] for span in exported} == {"0x0af7651916cd43dd8448eb211c80319c"}
    assert {span["name"] for span in exported} == {"process gpu", "mine"}
    by_name = {span["name"]: span for span in exported}
    assert by_name["process gpu"]["parent_id"] == "0xb7ad6b7169203331"
    assert by_name["mine"]["parent_id"] == by_name["process gpu"]["context"]["span_id"]


def _objects(text: str) -> list[Any]:
    decoder, found = json.JSONDecoder(), []
    text = text.strip()
    while text:
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:].strip()
    return found


def test_an_exporter_that_is_not_there_is_one_line(db: Database) -> None:
    db.pool()
    with work(db, "--handler", "tests.handlers:echo", OTEL_TRACES_EXPORTER="nope") as worker:
        _, err = worker.communicate(timeout=60)
    assert worker.returncode == 2
    assert err == "pgpark: OTEL_TRACES_EXPORTER=nope: there is no exporter of this name installed\n"
