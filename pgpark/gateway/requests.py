"""Bodies of requests. Their fields are the arguments of the SQL functions, which have the last word on their values."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from pgpark.models import PartKind, PoolState, Priority

MOST_ELEMENTS = 1000
MOST_ID = 2**53 - 1  # what every JSON library keeps exactly
TEXT = "^[^\\x00]*$"  # Postgres keeps no NUL


def _number(value: Any) -> Any:
    if isinstance(value, (bool, str)):
        raise ValueError("must be a number")
    return value


def _written(value: Any) -> Any:
    if not isinstance(value, str) or "-" not in value:  # seconds of an epoch
        raise ValueError("must be a time such as 2030-01-31T12:00:00Z")
    return value


def _universal(time: datetime) -> datetime:
    try:
        return time.astimezone(timezone.utc)  # Postgres takes no offset of 16 hours or more
    except OverflowError as error:
        raise ValueError("the time is out of range") from error


Number = BeforeValidator(_number)  # and no text that looks like one
Time = Annotated[AwareDatetime, BeforeValidator(_written), AfterValidator(_universal)]
Address = Annotated[str, Field(max_length=255, pattern=TEXT)]
Int = Annotated[int, Field(ge=0, le=2**31 - 1), Number]


# Of a parameter that may be left out: there is no null in an address or a header, so the document names none.
Absent = SkipJsonSchema[None]


class Body(BaseModel):
    """What a client sends: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


# By units, or by tokens.
_CHARGES: list[Any] = [
    {"properties": {"prompt_tokens": {"type": "null"}, "max_tokens": {"type": "null"}}},
    {
        "properties": {
            "units": {"type": "null"},
            "prompt_tokens": {"type": "integer"},
            "max_tokens": {"type": "integer"},
        },
        "required": ["prompt_tokens", "max_tokens"],
    },
]


class NewTask(Body):
    """A task to submit; see park_submit. For units, prompt_tokens and max_tokens may charge by the cost model."""

    model_config = ConfigDict(json_schema_extra={"anyOf": _CHARGES})

    payload: Any
    priority: Priority = "normal"
    units: Annotated[int, Field(ge=1, le=2**31 - 1), Number] | None = None
    prompt_tokens: Int | None = None
    max_tokens: Int | None = None
    deadline: Time | None = None
    tenant: Address | None = None
    user_id: Address | None = None
    session_id: Address | None = None
    run_at: Time | None = None
    idempotency_key: Address | None = None


class NewTasks(Body):
    """Tasks to submit, in order."""

    tasks: Annotated[list[NewTask], Field(min_length=1, max_length=MOST_ELEMENTS)]


WorkerName = Annotated[str, Field(min_length=1, max_length=255, pattern=TEXT)]
Id = Annotated[int, Field(ge=1, le=MOST_ID), Number]
Attempt = Annotated[int, Field(ge=1, le=999_999_999), Number]


class NewClaim(Body):
    """What a worker has room for; see park_claim. wait: seconds to wait for tasks if there are none."""

    worker: WorkerName
    max_tasks: Annotated[int, Field(ge=1, le=MOST_ELEMENTS), Number] = 1
    max_units: Annotated[int, Field(ge=1, le=2**31 - 1), Number] | None = None
    wait: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False), Number] = 0.0


class OutcomeOf(Body):
    """How an attempt ended; see park_finish."""

    task_id: Id
    attempt: Attempt
    status: Literal["completed", "failed", "dropped"] = "completed"
    result: Any = None
    reason: Annotated[str, Field(max_length=10_000, pattern=TEXT)] | None = None


class Outcomes(Body):
    """Attempts that have ended."""

    outcomes: Annotated[list[OutcomeOf], Field(min_length=1, max_length=MOST_ELEMENTS)]


class NewHeartbeat(Body):
    """The tasks whose leases a worker renews."""

    worker: WorkerName
    task_ids: Annotated[list[Id], Field(max_length=10_000)]


class Held(Body):
    """A task that a worker holds."""

    task_id: Id
    attempt: Attempt


class Releases(Body):
    """Tasks that a worker gives back."""

    tasks: Annotated[list[Held], Field(min_length=1, max_length=MOST_ELEMENTS)]


class NewPart(Body):
    """What a task tells while it runs."""

    kind: PartKind = "partial"
    content: Any


class Emission(Held):
    """Parts of one attempt; first: the place of the first of them among all of the attempt, from 1."""

    parts: Annotated[list[NewPart], Field(min_length=1, max_length=MOST_ELEMENTS)]
    first: Annotated[int, Field(ge=1, le=999_999_999), Number] | None = None


class Emissions(Body):
    """Parts of several tasks."""

    emissions: Annotated[list[Emission], Field(min_length=1, max_length=MOST_ELEMENTS)]


class Acknowledged(Body):
    """Messages to take out of the mailbox."""

    message_ids: Annotated[list[Id], Field(min_length=1, max_length=MOST_ELEMENTS)]


class NewState(Body):
    """The state of a pool."""

    state: PoolState
