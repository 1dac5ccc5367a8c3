"""Bodies of requests. Their fields are the arguments of the SQL functions, which have the last word on their values."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from pgpark.models import Priority

MOST_ELEMENTS = 1000
_TEXT = "^[^\\x00]*$"  # Postgres keeps no NUL

Address = Annotated[str, Field(max_length=255, pattern=_TEXT)]
Int = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Body(BaseModel):
    """What a client sends: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class NewTask(Body):
    """A task to submit; see park_submit. For units, prompt_tokens and max_tokens may charge by the cost model."""

    payload: Any
    priority: Priority = "normal"
    units: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    prompt_tokens: Int | None = None
    max_tokens: Int | None = None
    deadline: datetime | None = None
    tenant: Address | None = None
    user_id: Address | None = None
    session_id: Address | None = None
    run_at: datetime | None = None
    idempotency_key: Address | None = None


class NewTasks(Body):
    """Tasks to submit, in order."""

    tasks: Annotated[list[NewTask], Field(min_length=1, max_length=MOST_ELEMENTS)]
