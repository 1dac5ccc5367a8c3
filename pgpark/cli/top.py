"""`pgpark top`: the lot in a terminal, as long as somebody looks."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import click
import psycopg
from psycopg.rows import DictRow
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from pgpark import calls
from pgpark.cli.common import Seconds, Settings, database_options, messages, print_json, results_console
from pgpark.cli.picture import overview, pool_picture
from pgpark.database import connect, require_migrated
from pgpark.errors import DatabaseError, NotGrantedError, NotMigratedError, PgparkError, one_line

_HISTORY_SECS = 5.0
_MOST_TASKS = 200
_WIDTH_IN_A_PIPE = 80
_NO_POOLS = "there are no pools yet; make one: pgpark pool put NAME --max-units N"


@click.command()
@click.argument("pool", required=False)
@click.option("--once", is_flag=True, help="Print one picture and exit.")
@click.option("--every", default=1.0, show_default=True, type=Seconds(0.1), help="Seconds between looks.")
@database_options
def top(settings: Settings, pool: str | None, once: bool, every: float) -> None:
    """Watch a POOL, or all: what runs, drawn to its units, what waits by priority and why, and the last hour.

    Arrows (or j and k) choose another pool, q leaves. Into a pipe, a picture is printed each time.
    """
    with settings.database() as dsn:
        looker = _Looker(dsn, pool)
        try:
            looker.look()
            if settings.json:
                _repeat(looker, once, every, lambda: print_json(looker.as_json()))
            elif once or not sys.stdout.isatty() or results_console().is_dumb_terminal:
                _repeat(looker, once, every, lambda: _print(looker))
            else:
                _watch(looker, every)
        finally:
            looker.close()


@dataclass
class _Looker:
    """What was seen last, and how to see more."""

    dsn: str
    pool: str | None
    lots: list[dict[str, Any]] = field(default_factory=list)
    lot: dict[str, Any] | None = None
    history: list[dict[str, Any]] | None = None
    trouble: str = ""
    _connection: psycopg.Connection[DictRow] | None = None
    _history_at: float = 0.0

    def look(self) -> None:
        """Looks. Raises the errors of pgpark.errors, and connects anew the next time after a connection was lost."""
        try:
            if self._connection is None or self._connection.closed:
                self._connection = connect(self.dsn, prepare=False)
                require_migrated(self._connection)
            self._see(self._connection)
            self.trouble = ""
        except psycopg.Error as error:
            self.close()
            raise DatabaseError(one_line(error)) from error
        except DatabaseError as error:
            if not isinstance(error, (NotGrantedError, NotMigratedError)):
                self.close()
            raise

    def _see(self, connection: psycopg.Connection[DictRow]) -> None:
        self.lots = calls.run_on(connection, calls.lot())["pools"]
        if self.pool is None and len(self.lots) == 1:
            self.pool = self.lots[0]["pool"]
        if self.pool is None:
            return
        lot = calls.run_on(connection, calls.lot(self.pool, _MOST_TASKS))
        changed = self.lot is None or self.lot["pool"] != lot["pool"]
        self.lot = lot
        if changed or time.monotonic() - self._history_at >= _HISTORY_SECS:
            self.history = _last_hour(connection, self.pool)
            self._history_at = time.monotonic()

    def try_again(self) -> None:
        """Looks; what goes wrong with the connection is kept as `trouble`, beside what was seen before."""
        try:
            self.look()
        except NotMigratedError:
            raise
        except DatabaseError as error:
            self.trouble = f"the database cannot be used: {one_line(error)}; trying again"

    def step(self, by: int) -> None:
        """Chooses the pool that is so many further."""
        names = [lot["pool"] for lot in self.lots]
        if names:
            at = names.index(self.pool) if self.pool in names else -1 if by > 0 else 0
            self.pool = names[(at + by) % len(names)]

    def as_json(self) -> dict[str, Any]:
        """What park_lot returned, and the last hour beside it."""
        return {"pools": self.lots} if self.pool is None or self.lot is None else {**self.lot, "history": self.history}

    def picture(self, width: int, bare: bool) -> RenderableType:
        """What was seen, drawn."""
        names = [lot["pool"] for lot in self.lots]
        chosen = names.index(self.pool) if self.pool in names else None
        parts: list[RenderableType] = []
        if not self.lots:
            parts.append(Text(_NO_POOLS))
        if len(self.lots) > 1 and (self.pool is None or not bare):
            parts += [overview(self.lots, width, chosen, bare), Text("")]
        if self.lot is not None and self.pool is not None:
            parts.append(pool_picture(self.lot, self.history, width, bare))
        if self.trouble:
            parts.insert(0, Text(self.trouble, style="" if bare else "bold red"))
        return Group(*parts)

    def close(self) -> None:
        """Closes the connection; the next look makes another."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None


def _last_hour(connection: psycopg.Connection[DictRow], pool: str) -> list[dict[str, Any]] | None:
    """None for who may see its own tasks alone: these are numbers of the pool."""
    try:
        return [step.model_dump(mode="json") for step in calls.run_on(connection, calls.history(pool))]
    except NotGrantedError:
        return None


def _repeat(looker: _Looker, once: bool, every: float, show: Callable[[], None]) -> None:
    while True:
        show()
        sys.stdout.flush()
        if once:
            return
        time.sleep(every)
        looker.try_again()
        if looker.trouble:
            messages.print(looker.trouble)


def _print(looker: _Looker) -> None:
    if not looker.lots:
        messages.print(_NO_POOLS)
        return
    console = results_console()
    terminal = console.is_terminal
    said = os.environ.get("COLUMNS", "")
    width = console.width if terminal else int(said) if said.isdecimal() else _WIDTH_IN_A_PIPE
    console.print(
        looker.picture(width, bare=not terminal or console.no_color or console.is_dumb_terminal), soft_wrap=True
    )


def _watch(looker: _Looker, every: float) -> None:
    console = Console(highlight=False, markup=False)
    with _keys() as pressed, Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            live.update(looker.picture(console.width, console.no_color), refresh=True)
            key = pressed(every)
            if key in ("q", "Q", "\x03"):
                return
            if key in ("\x1b[C", "\x1b[B", "j", "\t"):
                looker.step(1)
            elif key in ("\x1b[D", "\x1b[A", "k"):
                looker.step(-1)
            with contextlib.suppress(_PoolGoneError):
                _again(looker)


class _PoolGoneError(Exception):
    """The pool that was looked at is not there any more."""


def _again(looker: _Looker) -> None:
    try:
        looker.try_again()
    except NotMigratedError:
        raise
    except PgparkError as error:
        looker.trouble = str(error)
        looker.lot = None
        raise _PoolGoneError from error


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """How to wait so many seconds for a key: '' when none was pressed. The terminal is as before afterwards."""
    if not sys.stdin.isatty():

        def slept(secs: float) -> str:
            time.sleep(secs)
            return ""

        yield slept
        return
    import termios
    import tty

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)

    def pressed(secs: float) -> str:
        ready, _, _ = select.select([terminal], [], [], secs)
        return os.read(terminal, 8).decode(errors="replace") if ready else ""

    try:
        yield pressed
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
