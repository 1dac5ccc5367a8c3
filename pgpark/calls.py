"""Each function of the SQL contract, described once: statement, parameters, shape of the result.

A description is run by `Client` or `AsyncClient` (client.py), or inside the caller's own transaction by `run_on`.
Nothing is decided here: that is SQL. Times are sent as they are; None leaves an argument at its default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from psycopg import AsyncConnection, Connection, sql
from psycopg import Error as PsycopgError
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from pgpark.errors import BadInputError, translated
from pgpark.models import (
    Admission,
    AuditEvent,
    Callback,
    CallbacksDue,
    Claimed,
    DeadLetter,
    Explained,
    Finding,
    Finished,
    Followed,
    Grant,
    HistoryStep,
    LlmCapacity,
    Maintained,
    Message,
    Metric,
    Part,
    PlannedChange,
    PoolInfo,
    PoolStats,
    Row,
    Submitted,
    TaskStatus,
    Token,
    TokenScope,
    Trace,
)

T = TypeVar("T")
U = TypeVar("U")
T_co = TypeVar("T_co", covariant=True)
R = TypeVar("R", bound=Row)
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Call(Generic[T_co]):
    """A statement with its parameters, and how to read what it returns."""

    statement: sql.Composed
    parameters: Mapping[str, Any]
    read: Callable[[Rows], T_co]

    def then(self, convert: Callable[[T_co], U]) -> Call[U]:
        """The same call, what it returns being converted."""
        return Call(self.statement, self.parameters, lambda rows: convert(self.read(rows)))


def run_on(connection: Connection[Any], call: Call[T]) -> T:
    """Runs a call on the caller's own connection and in its transaction.

    Raises the errors of pgpark.errors; after one, the transaction is aborted as usual in Postgres.
    """
    try:
        with connection.cursor(row_factory=dict_row) as cursor:
            return call.read(cursor.execute(call.statement, call.parameters).fetchall())
    except PsycopgError as error:
        raise translated(error) from error


async def run_on_async(connection: AsyncConnection[Any], call: Call[T]) -> T:
    """The same on an asyncio connection."""
    try:
        async with connection.cursor(row_factory=dict_row) as cursor:
            await cursor.execute(call.statement, call.parameters)
            return call.read(await cursor.fetchall())
    except PsycopgError as error:
        raise translated(error) from error


def submit(
    pool: str,
    payload: Any,
    *,
    priority: str = "normal",
    units: int | None = None,
    prompt_tokens: int | None = None,
    max_tokens: int | None = None,
    deadline: datetime | str | None = None,
    tenant: str | None = None,
    user_id: str | None = None,
    session_id: str | None = None,
    run_at: datetime | str | None = None,
    idempotency_key: str | None = None,
) -> Call[Submitted]:
    """Submits one task; see park_submit. A refusal is returned, not raised.

    `units` are slices of the pool (default 1). Instead of them, `prompt_tokens` and `max_tokens` charge by the pool's
    cost model: park_llm_units, in the same statement. Raises BadInputError for both, or for one of the tokens alone.
    """
    charged: int | Call[int] | None = units
    if prompt_tokens is not None and max_tokens is not None:
        if units is not None:
            raise BadInputError("give units, or prompt_tokens and max_tokens, not both")
        charged = llm_units(pool, prompt_tokens, max_tokens)
    elif prompt_tokens is not None or max_tokens is not None:
        raise BadInputError("prompt_tokens and max_tokens go together")
    return _call(
        "park_submit",
        _one(Submitted),
        pool=pool,
        payload=Jsonb(payload),
        priority=priority,
        units=charged,
        deadline=deadline,
        tenant=tenant,
        user_id=user_id,
        session_id=session_id,
        run_at=run_at,
        idempotency_key=idempotency_key,
    )


def within_trace(call: Call[T], traceparent: str, tracestate: str | None = None) -> Call[T]:
    """A submit whose tasks carry this W3C trace context. It is set before the function is called, since its first
    argument waits for that, and holds until the transaction ends."""
    first = sql.SQL(
        "case when set_config('pgpark.traceparent', cast({} as text), true) is not null"
        " and set_config('pgpark.tracestate', cast({} as text), true) is not null then cast({} as text) end"
    ).format(*map(sql.Placeholder, ("traceparent", "tracestate", "pool")))
    carried = {"traceparent": traceparent, "tracestate": tracestate or ""}
    return Call(_replaced(call.statement, sql.Placeholder("pool"), first), {**call.parameters, **carried}, call.read)


def _replaced(statement: sql.Composed, part: sql.Composable, by: sql.Composable) -> sql.Composed:
    return sql.Composed(
        [
            by if each == part else _replaced(each, part, by) if isinstance(each, sql.Composed) else each
            for each in statement
        ]
    )


def submit_many(pool: str, tasks: Iterable[Mapping[str, Any]]) -> Call[list[Submitted]]:
    """Submits many tasks, each a mapping with the arguments of `submit` as keys; one row each, in order."""
    return _call("park_submit_many", _many(Submitted), pool=pool, tasks=Jsonb(list(tasks)))


def claim(pool: str, worker: str, max_tasks: int = 1, max_units: int | None = None) -> Call[list[Claimed]]:
    """Starts what fits; see park_claim. `max_units` is the worker's whole capacity."""
    return _call("park_claim", _many(Claimed), pool=pool, worker=worker, max_tasks=max_tasks, max_units=max_units)


def finish(
    task_id: int, attempt: int, status: str = "completed", result: Any = None, reason: str | None = None
) -> Call[bool]:
    """Ends an attempt; False means that it was fenced off and nothing changed."""
    return _call(
        "park_finish",
        _value("park_finish"),
        task_id=task_id,
        attempt=attempt,
        status=status,
        result=None if result is None else Jsonb(result),
        reason=reason,
    )


def finish_many(outcomes: Sequence[Mapping[str, Any]]) -> Call[list[Finished]]:
    """Ends many attempts; each a mapping with task_id, attempt, and optionally status, result, reason."""
    return _call("park_finish_many", _many(Finished), outcomes=Jsonb(list(outcomes)))


def release(task_id: int, attempt: int) -> Call[bool]:
    """Puts a running task back in its old place; False means that the attempt was fenced off."""
    return _call("park_release", _value("park_release"), task_id=task_id, attempt=attempt)


def emit(task_id: int, attempt: int, parts: Sequence[Mapping[str, Any]], first: int | None = None) -> Call[bool]:
    """Emits parts, each a mapping with content and optionally kind; False means that the attempt was fenced off.

    first: the place of the first of them among all of the attempt, from 1; makes the call safe to repeat.
    """
    return _call(
        "park_emit", _value("park_emit"), task_id=task_id, attempt=attempt, parts=Jsonb(list(parts)), first=first
    )


def emit_many(emissions: Sequence[Mapping[str, Any]]) -> Call[list[Finished]]:
    """Emits for many tasks; each a mapping with task_id, attempt, parts, and optionally first."""
    return _call("park_emit_many", _many(Finished), emissions=Jsonb(list(emissions)))


def parts(task_id: int, after: int = 0, max_parts: int = 1000) -> Call[list[Part]]:
    """What a task has emitted with a number greater than `after`, in order."""
    return _call("park_parts", _many(Part), task_id=task_id, after=after, max_parts=max_parts)


def traces(task_ids: Sequence[int]) -> Call[list[Trace]]:
    """The trace contexts of these live tasks; no row for one without."""
    return _call("park_traces", _many(Trace), task_ids=list(task_ids))


def heartbeat(pool: str, worker: str, task_ids: Sequence[int]) -> Call[list[int]]:
    """Renews the leases of these tasks and returns the ids that the worker should stop."""
    return _call(
        "park_heartbeat",
        lambda rows: [row["park_heartbeat"] for row in rows],
        pool=pool,
        worker=worker,
        task_ids=list(task_ids),
    )


def cancel(task_id: int, reason: str = "cancelled") -> Call[str]:
    """Cancels a task: `dropped`, `cancelling`, `finished` or `unknown`."""
    return _call("park_cancel", _value("park_cancel"), task_id=task_id, reason=reason)


def fetch(
    tenant: str,
    user_id: str | None = None,
    session_id: str | None = None,
    since: datetime | str | None = None,
    max_messages: int = 50,
) -> Call[list[Message]]:
    """Outcomes of a tenant, oldest first; None for user or session means any."""
    return _call(
        "park_fetch",
        _many(Message),
        tenant=tenant,
        user_id=user_id,
        session_id=session_id,
        since=since,
        max_messages=max_messages,
    )


def fetch_of(
    pool: str,
    tenant: str,
    user_id: str | None = None,
    session_id: str | None = None,
    since: datetime | str | None = None,
    max_messages: int = 50,
) -> Call[list[Message]]:
    """Outcomes that a tenant has from one pool, oldest first; None for user or session means any."""
    return _call(
        "park_fetch_of",
        _many(Message),
        pool=pool,
        tenant=tenant,
        user_id=user_id,
        session_id=session_id,
        since=since,
        max_messages=max_messages,
    )


def follow(
    tenant: str,
    bookmark: str | None = None,
    user_id: str | None = None,
    session_id: str | None = None,
    since: datetime | str | None = None,
    pool: str | None = None,
    max_messages: int = 50,
) -> Call[list[Followed]]:
    """Outcomes of a tenant that were not given yet; `bookmark` is that of the last one, None: from the beginning."""
    return _call(
        "park_follow",
        _many(Followed),
        tenant=tenant,
        bookmark=bookmark,
        user_id=user_id,
        session_id=session_id,
        since=since,
        pool=pool,
        max_messages=max_messages,
    )


def ack(message_ids: Sequence[int]) -> Call[int]:
    """Takes messages out of the mailbox; returns how many were there."""
    return _call("park_ack", _value("park_ack"), message_ids=list(message_ids))


def result(task_id: int) -> Call[Message | None]:
    """The outcome of a task, or None while there is none."""
    return _call("park_result", _maybe(Message), task_id=task_id)


def results(task_ids: Sequence[int]) -> Call[list[Message]]:
    """The outcomes of those of these tasks that have one."""
    statement = sql.SQL(
        "select r.* from unnest(cast(%(task_ids)s as bigint[])) w (task_id)"
        " cross join lateral pgpark.park_result(w.task_id) r"
    ).format()
    return Call(statement, {"task_ids": list(task_ids)}, _many(Message))


def status(task_id: int) -> Call[TaskStatus | None]:
    """Where a task is, or None if it is unknown."""
    return _call("park_status", _maybe(TaskStatus), task_id=task_id)


def stats(pool: str | None = None) -> Call[list[PoolStats]]:
    """The numbers of one pool, or of all."""
    return _call("park_stats", _many(PoolStats), pool=pool)


def metrics(pool: str | None = None) -> Call[list[Metric]]:
    """What Prometheus would read of one pool, or of all."""
    return _call("park_metrics", _many(Metric), pool=pool)


def demand(pool: str) -> Call[int]:
    """How many units a pool could use at once: those in use, and those of what is parked."""
    return _call("park_demand", _value("park_demand"), pool=pool)


def explain(pool: str, max_tasks: int = 20) -> Call[list[Explained]]:
    """Why the first waiting tasks of a pool are not running."""
    return _call("park_explain", _many(Explained), pool=pool, max_tasks=max_tasks)


def lot(pool: str | None = None, max_tasks: int = 100) -> Call[dict[str, Any]]:
    """The picture of one pool, or (None) all in a few numbers: the object that park_lot describes."""
    return _call("park_lot", _value("park_lot"), pool=pool, max_tasks=max_tasks)


def history(pool: str | None = None, period_secs: float = 3600, step_secs: float = 60) -> Call[list[HistoryStep]]:
    """What a pool (None: each) did lately: a row for each step, the oldest first; see park_history."""
    statement = sql.SQL(
        "select * from pgpark.park_history(pool => cast(%(pool)s as text),"
        " period => make_interval(secs => %(period)s), step => make_interval(secs => %(step)s))"
    ).format()
    parameters = {"pool": pool, "period": float(period_secs), "step": float(step_secs)}
    return Call(statement, parameters, _many(HistoryStep))


def lot_text(pool: str | None = None, max_tasks: int = 100) -> Call[str]:
    """The same as JSON text, just as Postgres writes it."""
    statement = sql.SQL("select cast(park_lot as text) from ({}) picture").format(lot(pool, max_tasks).statement)
    return Call(statement, {"pool": pool, "max_tasks": max_tasks}, _value("park_lot"))


def retry(task_id: int) -> Call[Submitted]:
    """Once more: a task in its backoff parks at once, one that has ended is submitted anew; see park_retry."""
    return _call("park_retry", _one(Submitted), task_id=task_id)


def prune(pool: str | None = None) -> Call[int]:
    """Moves expired tasks to the mailbox; returns how many."""
    return _call("park_prune", _value("park_prune"), pool=pool)


def maintain(pool: str | None = None) -> Call[Maintained]:
    """Runs the timers of one pool, or of all. `due_in_secs` is next_due seen from the database's own clock."""
    statement = sql.SQL(
        "select m.*, cast(extract(epoch from m.next_due - pgpark._now()) as float8) as due_in_secs"
        " from pgpark.park_maintain(pool => cast(%(pool)s as text)) m"
    ).format()
    return Call(statement, {"pool": pool}, _one(Maintained))


def put_pool(name: str, config: Mapping[str, Any]) -> Call[Literal["created", "changed", "unchanged"]]:
    """Creates or changes a pool: `created`, `changed` or `unchanged`."""
    return _call("park_put_pool", _value("park_put_pool"), name=name, config=Jsonb(config))


def change_pool(name: str, changes: Mapping[str, Any]) -> Call[Literal["changed", "unchanged"]]:
    """Changes the settings that `changes` names, an object of config keys; None takes one away."""
    return _call("park_change_pool", _value("park_change_pool"), name=name, changes=Jsonb(changes))


def plan_pool(name: str, config: Mapping[str, Any]) -> Call[list[PlannedChange]]:
    """What put_pool would change, without changing it; raises its errors."""
    return _call("park_plan_pool", _many(PlannedChange), name=name, config=Jsonb(config))


def drop_pool(name: str, force: bool = False) -> Call[None]:
    """Drops a pool; with live tasks only if forced."""
    return _call("park_drop_pool", lambda _rows: None, name=name, force=force)


def set_pool_state(name: str, state: str) -> Call[None]:
    """Sets a pool to active, paused, draining or disabled."""
    return _call("park_set_pool_state", lambda _rows: None, name=name, state=state)


def pools(pool: str | None = None) -> Call[list[PoolInfo]]:
    """One pool, or all, with config and settings."""
    return _call("park_pools", _many(PoolInfo), pool=pool)


def llm_units(pool: str, prompt_tokens: int, max_tokens: int) -> Call[int]:
    """Units of a language-model request by the pool's cost model."""
    return _call(
        "park_llm_units", _value("park_llm_units"), pool=pool, prompt_tokens=prompt_tokens, max_tokens=max_tokens
    )


def llm_capacity(cost_model: Mapping[str, Any]) -> Call[LlmCapacity]:
    """What a cost model makes of its card: bytes of KV cache per token, units, and tokens that they hold."""
    return _call("park_llm_capacity", _one(LlmCapacity), cost_model=Jsonb(dict(cost_model)))


def callbacks(pool: str | None = None, max_callbacks: int = 10) -> Call[list[Callback]]:
    """Takes callbacks of one pool, or of all, that are due, for delivery; see park_callbacks."""
    statement = sql.SQL(
        "select callback_id, task_id, pool, attempt, url, auth_header, timeout_secs, body::text"
        " from pgpark.park_callbacks(max_callbacks => %(max_callbacks)s::int, pool => %(pool)s::text)"
    ).format()
    return Call(statement, {"pool": pool, "max_callbacks": max_callbacks}, _many(Callback))


def callback_done(
    callback_id: int,
    attempt: int,
    http_status: int | None = None,
    error: str | None = None,
    retry_after_secs: float | None = None,
) -> Call[str]:
    """Reports an attempt to deliver a callback: `delivered`, `retry`, `dead` or `unknown`."""
    return _call(
        "park_callback_done",
        _value("park_callback_done"),
        callback_id=callback_id,
        attempt=attempt,
        http_status=http_status,
        error=error,
        retry_after_secs=retry_after_secs,
    )


def callbacks_due() -> Call[list[CallbacksDue]]:
    """When the next callback of each pool is due."""
    statement = sql.SQL(
        "select d.*, extract(epoch from d.due - pgpark._now())::float8 as due_in_secs"
        " from pgpark.park_callbacks_due() d"
    ).format()
    return Call(statement, {}, _many(CallbacksDue))


def dead_letters(pool: str | None = None, max_letters: int = 50) -> Call[list[DeadLetter]]:
    """Callbacks of one pool, or of all, that were given up; oldest first."""
    return _call("park_dead_letters", _many(DeadLetter), pool=pool, max_letters=max_letters)


def retry_callbacks(callback_ids: Sequence[int] | None = None, pool: str | None = None) -> Call[int]:
    """Puts dead letters (None: all) of one pool, or of all, back into the outbox; returns how many."""
    ids = None if callback_ids is None else list(callback_ids)
    return _call("park_retry_callbacks", _value("park_retry_callbacks"), callback_ids=ids, pool=pool)


def grant(role: str, kind: str, tenants: Sequence[str] | None = None, pools: Sequence[str] | None = None) -> Call[None]:
    """Gives a role access of a kind: producer, worker, reader or admin; None for any tenants or pools."""
    return _call(
        "park_grant",
        lambda _rows: None,
        role=role,
        kind=kind,
        tenants=None if tenants is None else list(tenants),
        pools=None if pools is None else list(pools),
    )


def revoke(role: str, kind: str | None = None) -> Call[int]:
    """Takes access of a kind (None: of every kind) from a role; returns how many kinds it had of those."""
    return _call("park_revoke", _value("park_revoke"), role=role, kind=kind)


def grants() -> Call[list[Grant]]:
    """Who may do what."""
    return _call("park_grants", _many(Grant))


def create_token(
    name: str,
    kinds: Sequence[str],
    tenants: Sequence[str] | None = None,
    pools: Sequence[str] | None = None,
    expires_at: datetime | str | None = None,
    requests_per_sec: float | None = None,
    burst: int | None = None,
) -> Call[str]:
    """Makes a token and returns its secret, which is stored nowhere; None: any tenants or pools, no end, no limit."""
    return _call(
        "park_create_token",
        _value("park_create_token"),
        name=name,
        kinds=list(kinds),
        tenants=None if tenants is None else list(tenants),
        pools=None if pools is None else list(pools),
        expires_at=expires_at,
        requests_per_sec=requests_per_sec,
        burst=burst,
    )


def revoke_token(name: str) -> Call[bool]:
    """Makes a token useless; False if there is none of that name."""
    return _call("park_revoke_token", _value("park_revoke_token"), name=name)


def tokens() -> Call[list[Token]]:
    """The tokens that there are, without their secrets."""
    return _call("park_tokens", _many(Token))


def enter(token_hash: str) -> Call[TokenScope]:
    """Makes the rest of the transaction act for a token, given by the SHA-256 of its secret in hexadecimal digits."""
    return _call("park_enter", _one(TokenScope), token_hash=token_hash)


def admit(token_hash: str) -> Call[Admission]:
    """Counts a request of a token against its limit; in a transaction of its own."""
    return _call("park_admit", _one(Admission), token_hash=token_hash)


def audit(
    pool: str | None = None,
    task_id: int | None = None,
    tenant: str | None = None,
    since: datetime | str | None = None,
    until: datetime | str | None = None,
    event: str | None = None,
    max_events: int = 100,
    before: int | None = None,
) -> Call[list[AuditEvent]]:
    """What happened to tasks, newest first; see park_audit. To read on, `until` and `before` are the `at` and the
    `event_id` of the last row."""
    return _call(
        "park_audit",
        _many(AuditEvent),
        pool=pool,
        task_id=task_id,
        tenant=tenant,
        since=since,
        until=until,
        event=event,
        max_events=max_events,
        before=before,
    )


def doctor() -> Call[list[Finding]]:
    """What is wrong with the installation, and the SQL that mends it."""
    return _call("park_doctor", _many(Finding))


# Arguments whose type Postgres cannot see from the value alone.
_CASTS = {
    "task_id": "bigint",
    "task_ids": "bigint[]",
    "message_ids": "bigint[]",
    "callback_id": "bigint",
    "callback_ids": "bigint[]",
    "tenants": "text[]",
    "kinds": "text[]",
    "expires_at": "timestamptz",
    "requests_per_sec": "float8",
    "burst": "int",
    "pools": "text[]",
    "http_status": "int",
    "retry_after_secs": "float8",
    "max_letters": "int",
    "attempt": "int",
    "parts": "jsonb",
    "emissions": "jsonb",
    "first": "int",
    "after": "int",
    "max_parts": "int",
    "units": "int",
    "max_tasks": "int",
    "max_units": "int",
    "max_messages": "int",
    "prompt_tokens": "int",
    "max_tokens": "int",
    "result": "jsonb",
    "deadline": "timestamptz",
    "run_at": "timestamptz",
    "since": "timestamptz",
    "until": "timestamptz",
    "max_events": "int",
    "before": "bigint",
    "force": "boolean",
    "payload": "jsonb",
    "tasks": "jsonb",
    "outcomes": "jsonb",
    "config": "jsonb",
    "changes": "jsonb",
    "cost_model": "jsonb",
}


def _call(function: str, read: Callable[[Rows], T], **arguments: Any) -> Call[T]:
    """An argument may itself be a call that returns one value; where both have a parameter, it is the same."""
    parameters: dict[str, Any] = {}
    named: list[sql.Composed] = []
    for name, value in arguments.items():
        given: sql.Composable = sql.Placeholder(name)
        if isinstance(value, Call):
            parameters |= value.parameters
            given = sql.SQL("({})").format(value.statement)
        else:
            parameters[name] = value
        kind = sql.SQL(_CASTS.get(name, "text"))
        named.append(sql.SQL("{} => cast({} as {})").format(sql.Identifier(name), given, kind))
    listed = sql.SQL(", ").join(named)
    return Call(sql.SQL("select * from {}({})").format(sql.Identifier("pgpark", function), listed), parameters, read)


def _many(row: type[R]) -> Callable[[Rows], list[R]]:
    return lambda rows: [row.model_validate(values) for values in rows]


def _one(row: type[R]) -> Callable[[Rows], R]:
    return lambda rows: row.model_validate(rows[0])


def _maybe(row: type[R]) -> Callable[[Rows], R | None]:
    return lambda rows: row.model_validate(rows[0]) if rows else None


def _value(column: str) -> Callable[[Rows], Any]:
    return lambda rows: rows[0][column]
