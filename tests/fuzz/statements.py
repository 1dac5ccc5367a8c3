"""Calls of every public function, on several connections at once.

The functions are those of the catalog, so that a new one cannot be forgotten: it gets arguments by their types, and by
their names where values.py knows these.
"""

from __future__ import annotations

import queue
import re
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import psycopg
from hypothesis import strategies as st
from psycopg import sql
from psycopg.rows import DictRow, dict_row

from tests.fuzz.documented import SQLSTATES
from tests.fuzz.values import DOCUMENTS, ODD, PLAUSIBLE, Known, Pick, Raw, changed, json_text, places
from tests.soak.findings import Findings

LONGEST_CALL = "10s"
LONGEST_MESSAGE = 800
# How often a function is called, where it is not once as often as any other: what keeps tasks moving.
WEIGHTS = {
    "park_submit": 10, "park_submit_many": 4, "park_claim": 8, "park_next": 4, "park_finish": 6, "park_finish_many": 4,
    "park_heartbeat": 2, "park_emit": 3, "park_emit_many": 2, "park_maintain": 2, "park_put_pool": 2,
    "park_callbacks": 2, "park_config_schema": 0.2,
}  # fmt: skip
# Around a call: nothing, a transaction that is rolled back, one that sees the past.
FRAMES = [None] * 17 + ["begin", "begin", "begin isolation level repeatable read"]

_ARGUMENTS = """
    select f.proname, f.provariadic <> 0 as variadic, coalesce(obj_description(f.oid), '') as comment,
           coalesce(f.proargnames[:f.pronargs], '{}') as names, f.pronargs - f.pronargdefaults as required,
           array(select t::regtype::text from unnest(f.proargtypes) as t) as types
    from pg_proc f
    where f.pronamespace = 'pgpark'::regnamespace and f.proname ~ '^park_'
    order by f.oid::regprocedure::text"""


@dataclass(frozen=True)
class Argument:
    name: str
    type: str
    required: bool
    variadic: bool


@dataclass(frozen=True)
class Function:
    """A public function as the catalog has it."""

    name: str
    arguments: tuple[Argument, ...]
    comment: str


@dataclass(frozen=True)
class Call:
    """A function, the arguments that are given, and what stands around it."""

    function: Function
    given: dict[str, Any]
    frame: str | None


def discover(connection: psycopg.Connection[DictRow]) -> list[Function]:
    """Every public function. Fails for one with an argument of a type that values.py has nothing for."""
    functions = []
    for row in connection.execute(_ARGUMENTS):
        assert len(row["names"]) == len(row["types"]), f"{row['proname']} has an argument without a name"
        unknown = set(row["types"]) - ODD.keys()
        assert not unknown, f"{row['proname']} takes {unknown}; give tests/fuzz/values.py odd values of that type"
        last = len(row["names"]) - 1
        functions.append(
            Function(
                row["proname"],
                tuple(
                    Argument(name, type_, place < row["required"], row["variadic"] and place == last)
                    for place, (name, type_) in enumerate(zip(row["names"], row["types"], strict=True))
                ),
                row["comment"],
            )
        )
    return functions


def calls(functions: Sequence[Function]) -> st.SearchStrategy[Call]:
    """Calls of which half are right all over. Of the functions Hypothesis prefers the first."""
    ordered = sorted(functions, key=lambda function: -WEIGHTS.get(function.name, 1))
    weighted = [function for function in ordered for _ in range(round(10 * WEIGHTS.get(function.name, 1)))]
    return _calls(st.sampled_from(weighted))


@st.composite
def _calls(draw: st.DrawFn, functions: st.SearchStrategy[Function]) -> Call:
    function = draw(functions)
    careful = draw(_either)
    place = draw(places)
    given = {}
    for argument in function.arguments:
        if not argument.required and draw(_either):
            continue
        # A pool that is not there hides whatever else is wrong, so that is rare.
        seldom = argument.name in {"pool", "name"}
        if not careful and draw(_one_in_twelve if seldom else _one_in_three):
            given[argument.name] = draw(_odd(argument))
        elif argument.name in {"task_id", "attempt", "callback_id"}:
            given[argument.name] = Pick(argument.name, place)
        else:
            given[argument.name] = draw(PLAUSIBLE.get(argument.name, ODD[argument.type]))
    return Call(function, given, draw(_frames))


_either = st.booleans()
_one_in_three = st.sampled_from([False, False, True])
_one_in_twelve = st.sampled_from([False] * 11 + [True])
_frames = st.sampled_from(FRAMES)


@cache
def _odd(argument: Argument) -> st.SearchStrategy[Any]:
    either = [ODD[argument.type], ODD[argument.type], st.none()]
    if argument.name in DOCUMENTS:
        either += [changed(PLAUSIBLE[argument.name])] * 3
    return st.one_of(either)


def written(call: Call, known: Known) -> str:
    """The statement of a call. Picks are looked up now."""
    arguments = []
    for argument in call.function.arguments:
        if argument.name in call.given:
            value = known.settled(call.given[argument.name])
            variadic = "variadic " if argument.variadic else ""
            arguments.append(f"{variadic}{argument.name} => {_literal(value, argument.type)}")
    if "callback_id" in call.given and isinstance(call.given.get("attempt"), Pick):
        attempt = known.found(Pick("callback_attempt", call.given["attempt"].place))
        arguments = [f"attempt => {attempt}" if a.startswith("attempt =>") else a for a in arguments]
    return f"select * from pgpark.{call.function.name}({', '.join(arguments)})"


def _literal(value: Any, type_: str) -> str:
    if isinstance(value, Raw) and type_ != "jsonb":
        return f"({value.text})::{type_}"
    if type_ == "jsonb":
        value = json_text(value)
    elif isinstance(value, list):
        value = _array(value)
    return f"{sql.Literal(None if value is None else str(value)).as_string(None)}::{type_}"


def _array(value: list[Any]) -> str:
    """The text form of an array, of any dimensions."""

    def element(inner: Any) -> str:
        if inner is None:
            return "NULL"
        return '"' + str(inner).replace("\\", "\\\\").replace('"', '\\"') + '"'

    return "{" + ",".join(_array(inner) if isinstance(inner, list) else element(inner) for inner in value) + "}"


class Callers:
    """Connections that make calls, a thread each. The last acts as a role that has what it was granted."""

    def __init__(self, dsn: str, role: str, connections: int, findings: Findings) -> None:
        self.known = Known(role)
        self.answered: Counter[str] = Counter()  # calls by function, without those that raised
        self.refused: Counter[str] = Counter()  # by SQLSTATE
        self.unread: Counter[str] = Counter()  # by SQLSTATE, of arguments that Postgres could not read
        self._made: set[int] = set()
        self._findings = findings
        self._lock = threading.Lock()
        self._connections = [_connect(dsn) for _ in range(connections)]
        self._connections[-1].execute(sql.SQL("set role {}").format(sql.Identifier(role)))

    def make(self, calls_: Sequence[Call], seed: int) -> None:
        """Makes these calls, on all connections at once, some of them as the role."""
        self._made.update(hash(repr((call.function.name, call.given))) for call in calls_)
        by_owner: queue.SimpleQueue[Call] = queue.SimpleQueue()
        by_role: queue.SimpleQueue[Call] = queue.SimpleQueue()
        for number, call in enumerate(calls_):
            (by_owner if number % 8 else by_role).put(call)
        threads = [
            threading.Thread(target=self._work, args=(connection, waiting, seed))
            for connection, waiting in zip(
                self._connections, [*[by_owner] * (len(self._connections) - 1), by_role], strict=True
            )
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    @property
    def different(self) -> int:
        """How many of the calls were different ones."""
        return len(self._made)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def _work(self, connection: psycopg.Connection[DictRow], waiting: queue.SimpleQueue[Call], seed: int) -> None:
        while not connection.closed:
            try:
                call = waiting.get_nowait()
            except queue.Empty:
                return
            statement = written(call, self.known)
            try:
                if call.frame is not None:
                    connection.execute(call.frame.encode())
                rows = connection.execute(statement.encode()).fetchall()
            except psycopg.Error as error:
                finding = self._judged(call.function, error)
            else:
                finding = None
                with self._lock:
                    self.answered[call.function.name] += 1
                if call.frame is None:
                    self.known.learn(rows)
            if finding is not None:
                with self._lock:
                    self._findings.add(
                        finding, f"{call.frame + '; ' if call.frame else ''}{statement[:3000]};  -- seed {seed}"
                    )
            if call.frame is not None and not connection.closed:
                connection.execute("rollback")

    def _judged(self, function: Function, error: psycopg.Error) -> str | None:
        """What is wrong with an error; None: it is one of those that are documented."""
        state, message, context = (
            error.sqlstate or "",
            error.diag.message_primary or str(error),
            error.diag.context or "",
        )
        inside = "function" in context
        with self._lock:
            (self.refused if inside or state == "42501" else self.unread)[state or "no SQLSTATE"] += 1
        found = f"{function.name}: {state} {_shape(message)}"
        if not inside:
            return None if state == "42501" or state.startswith(("22", "54")) else f"{found} (outside)"
        if state in {"40P01", "55P03"}:
            return None if state in function.comment else found
        if state not in SQLSTATES or not context.splitlines()[0].endswith("at RAISE"):
            return f"{found} in: {context.splitlines()[0]}"
        if state != "42501" and state not in function.comment:
            return f"{found}: its comment does not tell"
        if len(message) > LONGEST_MESSAGE or "\n" in message:
            return f"{found}: {len(message)} letters are not one clear line"
        return None


def _shape(message: str) -> str:
    """An error without what differs from call to call."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|-?\d+", "...", message[:300].replace("\n", " "))[:160]


def _connect(dsn: str) -> psycopg.Connection[DictRow]:
    connection = psycopg.connect(dsn, autocommit=True, row_factory=dict_row, prepare_threshold=None)
    connection.execute(f"set statement_timeout = '{LONGEST_CALL}'".encode())
    connection.execute("set client_min_messages = 'error'")
    return connection
