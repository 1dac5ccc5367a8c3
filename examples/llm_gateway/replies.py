"""What clients read: errors as OpenAI words them, and what an outcome of pgpark means to a client."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

from pgpark import Message
from pgpark.models import Submitted

DONE = "data: [DONE]\n\n"


class ApiError(Exception):
    """An answer that is an error. The types and codes follow OpenAI's; `retry`: whether its clients should try again by
    themselves (they do after 408, 409, 429 and 5xx unless told not to)."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        retry_after: float | None = None,
        retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = {} if retry_after is None else {"Retry-After": f"{retry_after:g}"}
        if retry is not None:
            self.headers["x-should-retry"] = str(retry).lower()

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """As an answer of its own."""
        return JSONResponse(self.content, self.status, {**self.headers, **(headers or {})})

    def event(self) -> str:
        """Inside a stream that has begun; that ends with it."""
        return event(self.content) + DONE


def event(content: Any) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def refused(task: Submitted, retry_after: float) -> ApiError:
    """What a refusal of park_submit means to a client."""
    if task.reason == "queue_full":
        text = "too many requests wait already; try again later"
        return ApiError(429, "queue_full", text, kind="rate_limit_error", retry_after=retry_after)
    if task.reason == "too_large":
        text = "prompt and max_tokens need more memory than there is in all; ask for less"
        return ApiError(400, "context_length_exceeded", text, param="max_tokens")
    if task.reason == "deadline_expired":
        return _late("it could not start before its deadline")
    if task.reason == "payload_too_large":
        return ApiError(413, "request_too_large", "the request is larger than max_payload_kb of the pool")
    text = f"not accepted: {task.reason}"
    return ApiError(503, str(task.reason), text, kind="server_error", retry_after=retry_after)


def outcome_error(message: Message) -> ApiError | None:
    """What an outcome means to a client; None: it has an answer, which may be the server's own error."""
    if message.status == "completed":
        return None
    if message.status == "expired":
        return _late("no room became free before its deadline, so it was not started")
    if message.status == "failed":
        text = f"the model server could not answer: {message.reason}"
        return ApiError(502, "upstream_failed", text, kind="server_error", retry=False)
    return ApiError(409, "dropped", f"dropped: {message.reason}", kind="server_error", retry=False)


def answer(message: Message, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An outcome as the answer to a request that did not stream. `X-Pgpark-Outcome` says completed, expired, ..."""
    extra = {**(headers or {}), "X-Pgpark-Outcome": message.status}
    if (error := outcome_error(message)) is not None:
        return error.response(extra)
    return JSONResponse(message.payload["body"], message.payload["status"], extra)


def _late(text: str) -> ApiError:
    return ApiError(504, "deadline_expired", text, kind="timeout_error", retry=False)


def interrupted(handle: str, kept: bool) -> ApiError:
    """For a client that has read the beginning of an answer of which there will be another one."""
    rest = f"it is made anew, and will be at GET /v1/pgpark/results/{handle}" if kept else "ask again"
    text = f"the model server broke off in the middle of this answer; {rest}"
    return ApiError(502, "upstream_interrupted", text, kind="server_error", retry=False)
