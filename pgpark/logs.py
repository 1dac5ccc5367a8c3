"""How the processes of pgpark log: lines for people, or JSON objects for programs, to standard error.

A JSON line has `time`, `level`, `logger` and `message`; `pool` and `worker` of the process; `task` and `attempt` where
the line belongs to a task, also when the handler wrote it; `exception`, a text; `trace_id` and `span_id` while a span
is active; and whatever was given as `extra`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import Any

_ORDINARY = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
_task: ContextVar[Mapping[str, Any] | None] = ContextVar("pgpark_task", default=None)
_process: dict[str, Any] = {}  # what each line of this process says


def start_logging(level: int, as_json: bool = False, **said: Any) -> None:
    """Logs to standard error; of the libraries below only what people can use. said: fields of every JSON line."""
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s")
    if as_json:
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())
    _process.update(said)
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def settings() -> str:
    """How this process logs, for `start_like` in another one."""
    root = logging.getLogger()
    as_json = any(isinstance(handler.formatter, JsonFormatter) for handler in root.handlers)
    return json.dumps({"level": root.getEffectiveLevel(), "as_json": as_json, **_process})


def start_like(settings: str) -> None:
    """Logs as the process does whose `settings` these are."""
    start_logging(**json.loads(settings))


def about_task(task_id: int, attempt: int, pool: str | None = None) -> None:
    """From here on this asyncio task, or thread, logs about an attempt; what it starts does so too."""
    _task.set({"task": task_id, "attempt": attempt} | ({} if pool is None else {"pool": pool}))


def fields(task_id: int, attempt: int) -> dict[str, int]:
    """As `extra`, where a line is about an attempt but not of it."""
    return {"task": task_id, "attempt": attempt}


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_process,
            **(_task.get() or {}),
            **_trace(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _ORDINARY and name not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        return _one_line(line)


def _trace() -> dict[str, str]:
    """The active span, of a program that has set up OpenTelemetry."""
    if (trace := sys.modules.get("opentelemetry.trace")) is None:
        return {}
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return {}
    return {"trace_id": trace.format_trace_id(context.trace_id), "span_id": trace.format_span_id(context.span_id)}


def _one_line(line: Mapping[str, Any]) -> str:
    try:
        return json.dumps(line, default=str, allow_nan=False)
    except Exception:  # an extra that is no JSON, or will not be made a text
        return json.dumps(
            {name: value if isinstance(value, str | int) else _shown(value) for name, value in line.items()}
        )


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except Exception as error:  # its own
        return f"<{type(value).__name__}: {type(error).__name__}>"
