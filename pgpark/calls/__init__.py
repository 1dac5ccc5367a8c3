"""Each function of the SQL contract, described once: statement, parameters, shape of the result.

A description is run by `Client` or `AsyncClient` (client.py), or inside the caller's own transaction by `run_on`.
Nothing is decided here: that is SQL. Times are sent as they are; None leaves an argument at its default.
"""

from pgpark.calls.call import Call, run_on, run_on_async
from pgpark.calls.collecting import ack, fetch, fetch_of, follow, parts, result, results
from pgpark.calls.delivering import callback_done, callbacks, callbacks_due, dead_letters, retry_callbacks
from pgpark.calls.granting import admit, create_token, enter, grant, grants, revoke, revoke_token, tokens
from pgpark.calls.looking import audit, demand, explain, history, lot, lot_text, metrics, stats
from pgpark.calls.operating import (
    change_pool,
    doctor,
    drop_pool,
    llm_capacity,
    maintain,
    plan_pool,
    pools,
    prune,
    put_pool,
    set_pool_state,
)
from pgpark.calls.submitting import cancel, llm_units, retry, status, submit, submit_many, within_trace
from pgpark.calls.working import claim, emit, emit_many, finish, finish_many, heartbeat, release, traces

__all__ = [
    "Call",
    "ack",
    "admit",
    "audit",
    "callback_done",
    "callbacks",
    "callbacks_due",
    "cancel",
    "change_pool",
    "claim",
    "create_token",
    "dead_letters",
    "demand",
    "doctor",
    "drop_pool",
    "emit",
    "emit_many",
    "enter",
    "explain",
    "fetch",
    "fetch_of",
    "finish",
    "finish_many",
    "follow",
    "grant",
    "grants",
    "heartbeat",
    "history",
    "llm_capacity",
    "llm_units",
    "lot",
    "lot_text",
    "maintain",
    "metrics",
    "parts",
    "plan_pool",
    "pools",
    "prune",
    "put_pool",
    "release",
    "result",
    "results",
    "retry",
    "retry_callbacks",
    "revoke",
    "revoke_token",
    "run_on",
    "run_on_async",
    "set_pool_state",
    "stats",
    "status",
    "submit",
    "submit_many",
    "tokens",
    "traces",
    "within_trace",
]
