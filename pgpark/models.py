"""The rows that the SQL contract returns, as typed values. No behaviour lives here."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Any, Generic, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, SecretStr
from typing_extensions import TypeVar

ResultT = TypeVar("ResultT", default=Any)

Priority = Literal["low", "normal", "high", "critical"]
Outcome = Literal["completed", "failed", "expired", "dropped"]
PartKind = Literal["partial", "progress"]
Kind = Literal["producer", "worker", "reader", "admin"]
PoolState = Literal["active", "paused", "draining", "disabled"]


class Row(BaseModel):
    """A row of a result set; column names are field names."""

    model_config = ConfigDict(frozen=True)


class Submitted(Row):
    """What became of a submitted task. `task_id` is None if it was refused; `reason` says why."""

    task_id: int | None
    accepted: bool
    status: str | None
    reason: str | None


class SubmittedTask(Submitted):
    """The same with `position`, the parked tasks ahead of it, up to 1000; None unless it is parked."""

    position: int | None


class Claimed(Row):
    """A task that a worker holds: `attempt` goes into finish and release; `units` are held until then."""

    task_id: int
    attempt: int
    payload: Any
    priority: Priority
    units: int
    tenant: str | None
    user_id: str | None
    session_id: str | None
    deadline: datetime | None
    created_at: datetime


class ClaimedRow(NamedTuple):
    """A task as the worker gets it: the columns of Claimed in their order, the payload as JSON text. Cheap to make."""

    task_id: int
    attempt: int
    payload: str
    priority: Priority
    units: int
    tenant: str | None
    user_id: str | None
    session_id: str | None
    deadline: datetime | None
    created_at: datetime


class Trace(Row):
    """The W3C trace context that a task was submitted with."""

    task_id: int
    traceparent: str
    tracestate: str | None


class Finished(Row):
    """Whether an outcome, or an emission, was accepted; False means that the attempt was fenced off."""

    task_id: int
    accepted: bool


class Message(Row, Generic[ResultT]):
    """An outcome in the mailbox; `payload` is the worker's result, None unless it completed."""

    message_id: int
    task_id: int
    pool: str
    tenant: str | None
    user_id: str | None
    session_id: str | None
    status: Outcome
    reason: str | None
    payload: ResultT
    created_at: datetime


class Followed(Message[ResultT]):
    """An outcome as `follow` gives it, and the bookmark to go on from."""

    bookmark: str


class Part(Row):
    """What a task emitted while it ran. Numbers rise; a new `attempt` begins anew."""

    task_id: int
    number: int
    attempt: int
    kind: PartKind
    content: Any
    created_at: datetime


class TaskStatus(Row):
    """Where a task is; `position` counts the parked tasks ahead of it, up to 1000."""

    task_id: int
    pool: str
    status: str
    reason: str | None
    priority: Priority
    units: int
    attempt: int
    worker: str | None
    position: int | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    deadline: datetime | None


class PoolStats(Row):
    """The numbers of a pool; outcomes are counted since it was made."""

    pool: str
    state: PoolState
    max_units: int
    used_units: int
    running: int
    parked: int
    delayed: int
    oldest_parked_secs: float | None
    workers: int
    completed: int
    failed: int
    expired: int
    dropped: int
    retried: int


class Metric(Row):
    """A number of a pool, as Prometheus would read it: labels beside the pool."""

    pool: str
    metric: str
    labels: dict[str, str]
    value: float


class Grant(Row):
    """What a role may do; None for tenants or pools: any."""

    role: str
    kind: Kind
    tenants: list[str] | None
    pools: list[str] | None


class TokenScope(Row):
    """What a token is for; None for tenants or pools: any; None for expires_at: never."""

    name: str
    kinds: list[Kind]
    tenants: list[str] | None
    pools: list[str] | None
    expires_at: datetime | None


class Token(TokenScope):
    """A token as it is listed; None for requests_per_sec: no limit; `used_at` to about a minute."""

    requests_per_sec: float | None
    burst: int | None
    created_at: datetime
    used_at: datetime | None


class Admission(Row):
    """Whether a request of a token may go on; if not, in how many seconds. `limited`: whether the token has a limit."""

    admitted: bool
    retry_after_secs: float
    limited: bool


class PoolInfo(Row):
    """A pool: `config` as it was given, `settings` with every default filled in."""

    name: str
    state: PoolState
    config: dict[str, Any]
    settings: dict[str, Any]
    created_at: datetime


class PlannedChange(Row):
    """A setting that would change; `key` as in `queue.type`."""

    key: str
    before: Any
    after: Any


class LlmCapacity(Row):
    """What a cost model makes of its card; `max_units` and `max_tokens` are None where it does not tell the card.

    `bytes_per_token`: of KV cache; `max_units`: of a pool on that card; `max_tokens`: whose cache these units hold.
    """

    bytes_per_token: Decimal
    max_units: int | None
    max_tokens: int | None


class Maintained(Row):
    """What the timers did, and when the next one is due (None: there is none)."""

    expired: int
    reclaimed: int
    promoted: int
    purged: int
    next_due: datetime | None
    due_in_secs: float | None


class HistoryStep(Row):
    """What a pool did in a step of time that began at `at`; waits and runs in seconds, None where there were none."""

    pool: str
    at: datetime
    started: int
    completed: int
    failed: int
    expired: int
    dropped: int
    retried: int
    lost: int
    wait_mean_secs: float | None
    wait_p50_secs: float | None
    wait_p95_secs: float | None
    run_mean_secs: float | None
    run_p50_secs: float | None
    run_p95_secs: float | None


class Explained(Row):
    """Why a parked or delayed task is not running now."""

    task_id: int
    position: int | None
    why: str


class Callback(Row):
    """An outcome to be posted to `url`: `body` is its JSON text, `auth_header` is hidden when printed; `timeout_secs`
    bounds the whole exchange; `attempt` goes into the report."""

    callback_id: int
    task_id: int
    pool: str
    attempt: int
    url: str
    auth_header: SecretStr | None
    timeout_secs: float
    body: str


class CallbacksDue(Row):
    """A pool with callbacks in the outbox; `due_in_secs` is `due` seen from the database's own clock."""

    pool: str
    due: datetime
    due_in_secs: float


class DeadLetter(Row):
    """A callback that was given up: the last answer and error, when the outcome landed, when it was given up."""

    callback_id: int
    task_id: int
    pool: str
    tenant: str
    url: str | None
    attempts: int
    http_status: int | None
    error: str
    created_at: datetime
    died_at: datetime


class AuditEvent(Row):
    """What happened to a task, in a pool with `audit: true`. `task_id` is None where a submit was rejected."""

    event_id: int
    at: datetime
    event: str
    pool: str
    task_id: int | None
    attempt: int | None
    worker: str | None
    tenant: str | None
    priority: Priority
    units: int
    reason: str | None


class Finding(Row):
    """Something that is wrong: `mend` is the SQL against it (None: there is none); a `disruptive` one ends somebody
    else's session or transaction."""

    problem: str
    subject: str
    detail: str
    mend: str | None
    disruptive: bool
