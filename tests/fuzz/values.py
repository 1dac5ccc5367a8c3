"""Generated arguments. A plausible one is what a caller would give, by the name of the argument; an odd one is hostile,
by its type. What only the database knows, such as the id of a task, is a `Pick`, looked up when the call is made.
"""

from __future__ import annotations

import copy
import json
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from tests.conftest import BACKENDS

T = TypeVar("T")

# The pools that are there at the beginning of each round. The clock is real, so leases and times are short.
POOLS: dict[str, dict[str, Any]] = {
    **{name: {"max_units": 24, "lease_secs": 2, **backend} for name, backend in BACKENDS.items()},
    "fair": {
        "max_units": 16,
        "fairness": "tenant",
        "tenants": {"t": {"weight": 2, "max_units": 6}, "u": {"max_units": 4}},
        "max_bypass": 2,
        "lease_secs": 1,
        "retry": {"max_attempts": 3, "backoff_secs": 0.1},
    },
    "deep": {
        "max_units": 8,
        "max_queue_depth": 30,
        "overflow": "drop_lowest",
        "run_timeout_secs": 3,
        "archive": True,
        "max_payload_kb": 2,
        "audit": True,
        "scheduling_slack_secs": 0.01,
        "default_timeout_secs": 20,
    },
    "told": {
        "max_units": 12,
        "mailbox": {"ttl_secs": 5, "notifier": {"base_url": "http://127.0.0.1:9/hooks", "max_attempts": 2}},
        "cost_model": {"model_vram_gb": 1, "kv_per_token_mb": 0.5, "max_batch_tokens": 4096, "gpu_vram_total_gb": 24},
    },
}


@dataclass(frozen=True)
class Pick:
    """Something of the database, counted from the latest; the same place of `task_id` and `attempt` is one attempt."""

    kind: str
    place: int = 0


@dataclass(frozen=True)
class Raw:
    """An expression in SQL, or a JSON text that need not be one."""

    text: str


class Known:
    """What the calls so far have brought to light. Safe to use from many threads."""

    def __init__(self, role: str) -> None:
        self._role = role
        self._lock = threading.Lock()
        self._attempts: deque[tuple[int, int]] = deque([(0, 1)], maxlen=60)
        self._callbacks: deque[tuple[int, int]] = deque([(0, 1)], maxlen=30)
        self._messages: deque[int] = deque([0], maxlen=60)

    def learn(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Takes what it can use from the rows of a result, by the names of their columns."""
        with self._lock:
            for row in rows:
                task, attempt = row.get("task_id"), row.get("attempt")
                if isinstance(callback := row.get("callback_id"), int):
                    self._callbacks.append((callback, attempt or 1))
                elif isinstance(task, int):
                    self._attempts.append((task, attempt or 1))
                if isinstance(message := row.get("message_id"), int):
                    self._messages.append(message)

    def found(self, pick: Pick) -> int | str:
        with self._lock:
            if pick.kind == "role":
                return self._role
            if pick.kind == "message_id":
                return self._messages[-1 - pick.place % len(self._messages)]
            pairs = self._callbacks if pick.kind.startswith("callback") else self._attempts
            return pairs[-1 - pick.place % len(pairs)][pick.kind.endswith("attempt")]

    def settled(self, value: Any) -> Any:
        """A value, or a document, with its picks filled in."""
        if isinstance(value, Pick):
            return self.found(value)
        if isinstance(value, list):
            return [self.settled(inner) for inner in value]
        if isinstance(value, dict):
            return {key: self.settled(inner) for key, inner in value.items()}
        return value


def drawn(strategy: st.SearchStrategy[T], count: int, seed: int) -> list[T]:
    """So many values of a strategy; the same for the same seed."""
    values: list[T] = []
    while len(values) < count:
        values += _few(strategy, seed)
        seed += 1_000_003
    return values[:count]


def _few(strategy: st.SearchStrategy[T], seed: int) -> list[T]:
    """Values of a fresh start of Hypothesis. Its first two examples are the simplest there are, some are drawn freely,
    and after ten they are mostly copies with parts exchanged, so no more are asked for."""
    batches: list[list[T]] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=10,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(st.lists(strategy, min_size=30, max_size=30))
    def collect(batch: list[T]) -> None:
        batches.append(batch)

    collect()
    return [value for batch in batches[2:] for value in batch]


# -- odd values, by type ---------------------------------------------------------------------------------------------

TEXTS = [
    "", " ", "'", "''; drop schema pgpark cascade; --", "\\", "\\'", "%", "%s", "${HOME}", "$1", '"', "\n", "a\tb\r\n",
    "null", "NULL", "[]", "{}", "{a", "NaN", "infinity", "-1", "0", "1e400", "Ω", "😀", "e\u0301", "\u202egpj",
    "\ufeff", "\ue000", "x" * 40, "x" * 41, "x" * 63, "x" * 64, "ü" * 32, "x" * 255, "x" * 256, "y" * 100_000, "pool",
    "task", "../../etc", ".", "public", "pg_monitor", "pgpark_outbox", "pg_class", "postgres", "mailbox", "gpu.x", "A",
    "-", "--help", "\x01\x7f",
]  # fmt: skip
texts = st.one_of(st.sampled_from(TEXTS), st.sampled_from(TEXTS), st.text(max_size=12)).map(
    lambda text: text.replace("\0", "")
)
INTS = [0, 1, -1, 2, 7, 100, 2**15, -(2**15), 2**31 - 1, 2**31 - 2, -(2**31)]
BIGINTS = [*INTS, 2**31, 2**53, 2**63 - 1, -(2**63)]
DOUBLES = ["0", "-1", "-0.0", "1e-320", "1e308", "-1e308", "NaN", "Infinity", "-Infinity", "86400.5"]
TIMES = [
    "'infinity'", "'-infinity'", "'epoch'", "'4713-01-01 BC'", "'294276-12-31 23:59:59.999999'", "'9999-01-01'",
    "'9998-12-31'", "'0001-01-01'", "now()", "now() - interval '1000 years'", "now() + interval '1 microsecond'",
    "'2026-03-29 02:30 Europe/Berlin'",
]  # fmt: skip
JSON_SCALARS: list[Any] = [
    None, True, False, 0, 1, -1, 0.5, 10**9, 1e9, 0.001, 1e-7, 2**31, 2**63, 10**30, -(10**30), 1e308, 1e-300,
    *TEXTS[:32], "2030-01-31", "epoch", "1", "0001-01-01T00:00:00 BC", "99999999-01-01", [], {}, [[]], [None],
    {"": None}, {"a": {"b": []}}, {"type": 1}, "x" * 300,
]  # fmt: skip
JSON_TEXTS = [
    '{"a": 1, "a": {"b": 2}, "a": null}', "1e400", "-0", "-0.0", "1.0000000000000000000000000000000001", "null", '""',
    "[]", "{}", "[" * 200 + "]" * 200, '{"a":' * 200 + "1" + "}" * 200, '"\\u0000"', '["\\ud800"]', '{"\\u0000": 1}',
    "[1,]", "nan", "", "[" * 9000, '{"max_units": 1e1000}', '{"max_units": 1, "max_units": []}',
    '[{"task_id": 1e30, "attempt": 1}]', '[' + "1," * 5000 + "1]",
]  # fmt: skip
json_scalars = st.one_of(st.sampled_from(JSON_SCALARS), texts)
odd_json = st.one_of(
    json_scalars,
    st.sampled_from(JSON_TEXTS).map(Raw),
    st.lists(json_scalars, max_size=3),
    st.dictionaries(texts, json_scalars, max_size=3),
)


def odd_arrays(elements: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Empty, with nulls, long, and with more dimensions than one."""
    some = st.lists(st.one_of(elements, st.none()), max_size=4)
    return st.one_of(
        some,
        some.filter(bool).map(lambda inner: [inner, inner]),
        some.filter(bool).map(lambda inner: [[inner]]),
        elements.map(lambda element: [element] * (3000 if len(str(element)) < 300 else 3)),
    )


INTERVALS = [
    "null", "'1 hour'", "'1 minute'", "'0'", "'-1 day'", "'61 s'", "'90 min'", "'1 month'", "'2 days'",
    "'178000000 years'", "'1 microsecond'",
]  # fmt: skip

ODD: dict[str, st.SearchStrategy[Any]] = {
    "text": texts,
    "integer": st.sampled_from(INTS),
    "bigint": st.sampled_from(BIGINTS),
    "boolean": st.booleans(),
    "double precision": st.sampled_from(DOUBLES),
    "timestamp with time zone": st.sampled_from(TIMES).map(Raw),
    "interval": st.sampled_from(INTERVALS).map(Raw),
    "jsonb": odd_json,
    "text[]": odd_arrays(texts),
    "bigint[]": odd_arrays(st.sampled_from(BIGINTS)),
}

# -- plausible values, by name ---------------------------------------------------------------------------------------

places = st.sampled_from(range(20))
names = st.sampled_from([*POOLS, *POOLS, *POOLS, "spare", "nope"])
workers = st.sampled_from(["w1", "w2", "w3"])
tenants = st.sampled_from(["t", "u", "v", None])
priorities = st.sampled_from(["low", "normal", "high", "critical"])
statuses = st.sampled_from(["completed", "completed", "failed", "dropped"])
units = st.sampled_from([1, 1, 2, 3, 5, 8])
few = st.sampled_from([1, 3, 10])
keys = st.sampled_from([None, None, "k1", "k2", "k3"])
soon = st.sampled_from([None, None, *(Raw(f"now() + interval '{secs} s'") for secs in (0.05, 1, 5, -1))])
times = st.sampled_from([None, "2030-01-31T12:00:00Z", "2020-01-01"])
kinds = st.sampled_from(["producer", "worker", "reader", "admin"])
payloads = st.sampled_from([{}, {"prompt": "hello"}, [1, 2], "text", 3, None, {"text": "ü" * 600}])


def picks(kind: str) -> st.SearchStrategy[Pick]:
    return st.builds(Pick, st.just(kind), places)


def some(**keys_: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of these keys."""
    return st.fixed_dictionaries({}, optional=keys_)


task_documents = st.lists(
    st.builds(
        lambda required, optional: required | optional,
        st.fixed_dictionaries({"payload": payloads}),
        some(units=units, priority=priorities, tenant=tenants, idempotency_key=keys, deadline=times, run_at=times),
    ),
    max_size=4,
)
part_documents = st.lists(
    st.sampled_from([{"content": "a token"}, {"kind": "progress", "content": {"value": 0.4}}, {"content": [1]}]),
    max_size=4,
)


def attempt_documents(**keys_: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    """Arrays of objects that each name an attempt."""
    return st.lists(
        st.builds(
            lambda place, inner: {"task_id": Pick("task_id", place), "attempt": Pick("attempt", place), **inner},
            places,
            some(**keys_),
        ),
        max_size=4,
    )


emission_documents = attempt_documents(parts=part_documents)
outcome_documents = attempt_documents(status=statuses, result=payloads, reason=st.sampled_from(["because"]))
configs = st.one_of(
    st.sampled_from(list(POOLS.values())),
    st.builds(
        lambda base, changes: {**base, **changes},
        st.sampled_from(list(POOLS.values())),
        some(
            max_units=st.sampled_from([4, 8, 24]),
            max_queue_depth=st.sampled_from([None, 5, 40]),
            fairness=st.sampled_from(["fifo", "tenant"]),
            queue=st.sampled_from([backend.get("queue") for backend in BACKENDS.values()]),
            mailbox=st.sampled_from([backend.get("mailbox") for backend in BACKENDS.values()]),
            archive=st.booleans(),
        ),
    ),
)
cost_models = st.sampled_from(
    [
        POOLS["told"]["cost_model"],
        {"num_hidden_layers": 32, "num_key_value_heads": 8, "head_dim": 128, "weights_gb": 16, "gpu_vram_total_gb": 80},
        {"num_hidden_layers": 27, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "kv_bytes": 1, "unit_mb": 16},
    ]
)


@st.composite
def changed(draw: st.DrawFn, documents: st.SearchStrategy[Any]) -> Any:
    """A document with something odd in one place."""
    root = [copy.deepcopy(draw(documents))]
    everywhere = list(_places(root))
    inside, key = everywhere[draw(_any_place) % len(everywhere)]
    match draw(_changes):
        case "wrap":
            inside[key] = [inside[key]]
        case "remove" if inside is not root:
            del inside[key]
        case "rename" if isinstance(inside, dict):
            inside[draw(texts)] = inside.pop(key)
        case "add" if isinstance(inside[key], dict):
            inside[key][draw(texts)] = draw(json_scalars)
        case _:
            inside[key] = draw(json_scalars)
    return root[0]


_any_place = st.integers(0, 10_000)
_changes = st.sampled_from(["replace", "replace", "replace", "wrap", "remove", "rename", "add"])


def _places(inside: Any) -> Iterable[tuple[Any, Any]]:
    for key in list(inside) if isinstance(inside, dict) else range(len(inside)):
        yield inside, key
        if isinstance(inside[key], dict | list):
            yield from _places(inside[key])


PLAUSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "pool": names,
    "name": names,
    "worker": workers,
    "tenant": tenants,
    "tenants": st.sampled_from([None, ["t"], ["t", "u"]]),
    "pools": st.sampled_from([None, ["pgmq"], ["fair", "deep"]]),
    "user_id": st.sampled_from([None, "a", "b"]),
    "session_id": st.sampled_from([None, "s"]),
    "idempotency_key": keys,
    "period": st.sampled_from(["1 hour", "10 minutes", "2 days"]),
    "step": st.sampled_from(["1 minute", "00:05", "1 day"]),
    "priority": priorities,
    "units": units,
    "max_tasks": few,
    "max_units": st.sampled_from([None, 8, 16]),
    "max_messages": few,
    "max_callbacks": few,
    "max_letters": few,
    "max_parts": few,
    "prompt_tokens": st.sampled_from([0, 100, 4096]),
    "max_tokens": st.sampled_from([0, 100, 4096]),
    "after": st.sampled_from([0, 1, 5]),
    "first": st.sampled_from([None, 1, 2]),
    "deadline": soon,
    "run_at": soon,
    "since": st.sampled_from([None, Raw("now() - interval '5 s'")]),
    "until": st.sampled_from([None, Raw("now()")]),
    "before": st.sampled_from([None, 1, 100]),
    "event": st.sampled_from([None, "submitted", "failed", "rejected"]),
    "max_events": few,
    "status": statuses,
    "state": st.sampled_from(["active", "active", "active", "paused", "draining", "disabled"]),
    "kind": kinds,
    "kinds": st.sampled_from([["reader"], ["producer", "worker"], ["admin"]]),
    "expires_at": st.sampled_from([None, Raw("now() + interval '1 h'"), Raw("now() + interval '1 s'")]),
    "requests_per_sec": st.sampled_from([None, 0.5, 100]),
    "burst": st.sampled_from([None, 1, 20]),
    "token_hash": st.sampled_from([Raw("(select min(hash) from pgpark.token)"), "", None]),
    "role": picks("role"),
    "reason": st.sampled_from([None, "because"]),
    "error": st.sampled_from([None, "no answer"]),
    "http_status": st.sampled_from([None, 200, 410, 429, 500]),
    "retry_after_secs": st.sampled_from([None, "0.5", "30"]),
    "force": st.booleans(),
    "message_ids": st.lists(picks("message_id"), max_size=4),
    "callback_ids": st.one_of(st.none(), st.lists(picks("callback_id"), max_size=3)),
    "task_ids": st.lists(picks("task_id"), max_size=6),
    "payload": payloads,
    "result": payloads,
    "tasks": task_documents,
    "outcomes": outcome_documents,
    "parts": part_documents,
    "emissions": emission_documents,
    "config": configs,
    "cost_model": cost_models,
}
DOCUMENTS = {"tasks", "outcomes", "parts", "emissions", "config", "cost_model", "payload", "result"}


def json_text(value: Any) -> str:
    """A document as it is sent; a Raw one as it stands."""
    return value.text if isinstance(value, Raw) else json.dumps(value, ensure_ascii=False)
