"""Who asks, and how: API keys and their tenants, and what a request says to pgpark."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pgpark.models import Priority

OPEN_TENANT = "anyone"
_HANDLE = re.compile(r"([0-9]{1,18})(?:-([0-9a-f]{32}))?")
_HEADERS = {
    "x-pgpark-priority": "priority",
    "x-pgpark-deadline": "deadline_secs",
    "x-pgpark-on-disconnect": "on_disconnect",
    "x-pgpark-user": "user",
    "x-pgpark-session": "session",
    "idempotency-key": "idempotency_key",
}
_PRIORITIES = ("low", "normal", "high", "critical")


class Options(BaseModel):
    """What a request may say to pgpark: in headers, or as `pgpark` in its body (`extra_body` of the OpenAI client)."""

    model_config = ConfigDict(extra="forbid")

    priority: Priority = "normal"
    deadline_secs: float | None = Field(default=None, gt=0, le=86400 * 365)
    on_disconnect: Literal["cancel", "keep"] | None = None
    user: str | None = None
    session: str | None = None
    idempotency_key: str | None = None

    @classmethod
    def of(cls, headers: Mapping[str, str], body: dict[str, Any]) -> Options:
        """Takes `pgpark` out of the body; a header wins. Raises ValueError with one line for people."""
        inside = body.pop("pgpark", None) or {}
        if not isinstance(inside, dict):
            raise ValueError("pgpark must be an object")
        if isinstance(body.get("user"), str):
            inside = {"user": body["user"]} | inside
        given = {option: headers[name] for name, option in _HEADERS.items() if name in headers}
        try:
            return cls.model_validate(inside | given)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ValueError(f"pgpark option {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


@dataclass(frozen=True)
class Caller:
    """An API key: the tenant that it is of, and the highest priority that it may ask for."""

    tenant: str
    key: str
    max_priority: str = "critical"

    def handle(self, task_id: int) -> str:
        """The name of a task for whoever holds this key: nobody else can follow or cancel it while it lives."""
        return f"{task_id}-{self._signature(task_id)}"

    def task_of(self, handle: str) -> tuple[int | None, bool]:
        """The task of a handle, or of a plain id, and whether this key has submitted it."""
        if (found := _HANDLE.fullmatch(handle)) is None:
            return None, False
        task_id, signature = int(found[1]), found[2] or ""
        return task_id, hmac.compare_digest(signature, self._signature(task_id))

    def may_ask_for(self, priority: str) -> bool:
        """Whether a priority is not above what this key may ask for."""
        return _PRIORITIES.index(priority) <= _PRIORITIES.index(self.max_priority)

    def _signature(self, task_id: int) -> str:
        return hmac.new(self.key.encode(), str(task_id).encode(), hashlib.sha256).hexdigest()[:32]


class Keys:
    """The keys of a file, {"sk-1": "acme", "sk-2": {"tenant": "globex", "max_priority": "normal"}}; without a file all
    are the same tenant. Raises ValueError for a file that is wrong."""

    def __init__(self, file: Path | None) -> None:
        self._callers: dict[bytes, Caller] | None = None
        if file is None:
            return
        content = json.loads(file.read_text())
        if not isinstance(content, dict) or not content:
            raise ValueError(f"{file}: must be an object of keys and their tenants")
        self._callers = {}
        for key, value in content.items():
            entry = {"tenant": value} if isinstance(value, str) else value
            if not isinstance(entry, dict) or not isinstance(entry.get("tenant"), str) or entry.keys() - _ENTRY:
                raise ValueError(f"{file}: a key has a tenant, or an object of tenant and max_priority")
            if entry.get("max_priority", "low") not in _PRIORITIES:
                raise ValueError(f"{file}: max_priority is one of {', '.join(_PRIORITIES)}")
            self._callers[_digest(key)] = Caller(key=key, **entry)

    def caller(self, authorization: str | None) -> Caller | None:
        """Whose header this is; None: nobody's that is known."""
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else ""
        if self._callers is None:
            return Caller(OPEN_TENANT, key)
        return self._callers.get(_digest(key))


_ENTRY = {"tenant", "max_priority"}


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
