"""What went wrong, as HTTP: {"error": {"code": ..., "message": ..., "hint": ...}}, and how routes document it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import psycopg
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from pgpark.errors import (
    BadInputError,
    ConflictError,
    DatabaseError,
    NotGrantedError,
    NotMigratedError,
    PgparkError,
    PoolInUseError,
    UnknownPoolError,
    UnknownTokenError,
    one_line,
)
from pgpark.gateway.connections import BusyError

log = logging.getLogger("pgpark.gateway")
_LONGEST_TEXT = 1000
_BAD_TEXT = ("22P02", "22P05")  # of JSON, say; what is wrong with it is in the detail
_LATER_SECS = 2.0  # Retry-After where nothing better is known


class Problem(BaseModel):
    """What went wrong: a stable word for programs, one line for people, and what would be right."""

    code: str
    message: str
    hint: str


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: Problem


class GatewayError(Exception):
    """An answer that is an error."""

    def __init__(
        self, status: int, code: str, message: str, hint: str = "", *, retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.code, self.message, self.hint = status, code, message, hint
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(math.ceil(retry_after), 1))

    def response(self, **more: Any) -> JSONResponse:
        """It as a response; `more` goes beside "error"."""
        problem = {"code": self.code, "message": _line(self.message), "hint": _line(self.hint)}
        return JSONResponse({"error": problem} | more, self.status, self.headers)


def unauthorized(message: str = "unknown token") -> GatewayError:
    """There is no token, or none that is known."""
    hint = "Send the header Authorization: Bearer TOKEN; an admin makes one: pgpark token create"
    return GatewayError(401, "unauthorized", message, hint, headers={"WWW-Authenticate": "Bearer"})


def unknown_task(task_id: int) -> GatewayError:
    """There is no such task, or none that the caller may know of."""
    hint = "It may belong to another pool or tenant, or its outcome was acknowledged or purged."
    return GatewayError(404, "unknown_task", f"there is no task {task_id} here", hint)


def from_pgpark(error: PgparkError) -> GatewayError:
    """What an error of pgpark.errors means here."""
    message, hint = str(error), ""
    if isinstance(error.__cause__, psycopg.Error) and error.__cause__.diag.message_primary:
        diag = error.__cause__.diag
        message, hint = diag.message_primary or "", diag.message_hint or ""
        if diag.sqlstate in _BAD_TEXT:
            hint = hint or diag.message_detail or ""
    if isinstance(error, UnknownTokenError):
        return unauthorized()
    if isinstance(error, NotGrantedError):
        return GatewayError(403, "forbidden", message, hint)
    if isinstance(error, UnknownPoolError):
        return GatewayError(404, "unknown_pool", message, hint)
    if isinstance(error, BadInputError):
        return GatewayError(400, "bad_request", message, hint)
    if isinstance(error, PoolInUseError):
        return GatewayError(409, "pool_in_use", message, hint)
    if isinstance(error, BusyError):
        return GatewayError(503, "busy", message, "Try again.", retry_after=_LATER_SECS)
    if isinstance(error, ConflictError):
        return GatewayError(503, "conflict", "another transaction was in the way", "Try again.", retry_after=1)
    if isinstance(error, NotMigratedError):
        return GatewayError(503, "not_ready", "the database has no pgpark yet, or an older one", "Run: pgpark migrate")
    if isinstance(error, DatabaseError):  # its text may name the server
        return GatewayError(
            503, "unavailable", "the database cannot be used now", "Try again.", retry_after=_LATER_SECS
        )
    return GatewayError(500, "internal", message, hint)


def from_status(status: int, headers: Mapping[str, str] | None = None) -> GatewayError:
    """An answer of the framework's own."""
    phrase = HTTPStatus(status).phrase
    hint = "The routes are listed in /openapi.json." if status in (404, 405) else ""
    return GatewayError(status, phrase.lower().replace(" ", "_"), phrase.lower(), hint, headers=headers)


def from_validation(error: RequestValidationError) -> GatewayError:
    """A request that does not fit its schema: the first thing that is wrong."""
    problem = error.errors()[0]
    if isinstance(error.body, bytes):  # so nobody has tried to read it
        return GatewayError(
            400, "bad_request", "the body is not said to be JSON", "Send the header Content-Type: application/json"
        )
    place = ".".join(str(step) for step in problem["loc"])
    if problem["type"] == "json_invalid":
        return GatewayError(400, "bad_request", f"the body is not JSON: {problem['ctx'].get('error', problem['msg'])}")
    return GatewayError(400, "bad_request", f"{place}: {problem['msg']}", "The schema is in /openapi.json.")


def add_handlers(app: FastAPI) -> None:
    """Makes every error of the app an answer of this form."""

    def answer(_request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, GatewayError):
            return error.response()
        if isinstance(error, RequestValidationError):
            return from_validation(error).response()
        if isinstance(error, HTTPException):
            if error.status_code == 400:
                hint = "It must be UTF-8, not compressed, and not nested too deeply."
                return GatewayError(400, "bad_request", "the body cannot be read as JSON", hint).response()
            return from_status(error.status_code, error.headers).response()
        if isinstance(error, PgparkError):
            if isinstance(error, DatabaseError) and not isinstance(error, (NotGrantedError, BusyError)):
                log.warning("%s", one_line(error))
            return from_pgpark(error).response()
        if isinstance(error, RecursionError):
            return GatewayError(400, "bad_request", "the JSON is nested too deeply").response()
        if isinstance(error, UnicodeEncodeError):
            return GatewayError(400, "bad_request", "text must be valid Unicode, without lone surrogates").response()
        log.error("an answer could not be given", exc_info=error)
        return GatewayError(500, "internal", "something went wrong here", "It is in the gateway's log.").response()

    for kind in (GatewayError, RequestValidationError, HTTPException, PgparkError, RecursionError, UnicodeEncodeError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(Exception, answer)


_MEANING = {
    400: "The request is wrong; the message says what.",
    401: "No token, or one that is unknown, revoked or expired.",
    403: "The token may not do that.",
    404: "There is no such thing, or none that the token may know of.",
    408: "The body did not come in time.",
    409: "Refused as things are now; code says why.",
    413: "The body is larger than the gateway or the pool takes.",
    429: "More requests than the token may make.",
    500: "A fault of the gateway.",
    503: "The database cannot be used, or all connections to it are in use.",
}
_RETRY = {"description": "Seconds until it makes sense to try again.", "schema": {"type": "integer", "minimum": 1}}
ALWAYS = (400, 401, 403, 404, 408, 413, 429, 503)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route: those that any route may give, and these."""
    described: dict[int | str, dict[str, Any]] = {}
    for status in sorted({*ALWAYS, *statuses}):
        described[status] = {"model": ErrorBody, "description": _MEANING[status]}
        if status in (429, 503):
            described[status]["headers"] = {"Retry-After": _RETRY}
        if status == 401:
            challenge = {"description": "Bearer", "schema": {"type": "string"}}
            described[status]["headers"] = {"WWW-Authenticate": challenge}
    return described


def _line(text: str) -> str:
    text = " ".join(text.split())
    half = _LONGEST_TEXT // 2
    return text if len(text) <= _LONGEST_TEXT else f"{text[:half]} ... {text[-half:]}"
