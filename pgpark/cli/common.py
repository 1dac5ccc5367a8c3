"""What the commands share: the options for the database and for output, and how results are printed."""

from __future__ import annotations

import codecs
import contextlib
import functools
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import click
import psycopg
from psycopg.rows import DictRow
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from pgpark.config import load, load_json
from pgpark.database import connect, require_migrated
from pgpark.errors import BadInputError
from pgpark.models import Row
from pgpark.places import HOME, Place

__all__ = ["load_json"]

F = TypeVar("F", bound=Callable[..., Any])

_ANY_WIDTH = 10_000
MOST_UNITS = 1_000_000_000
_POLL_SECS_WITHOUT_LISTEN = 1.0
_POLL_SECS_AS_BACKSTOP = 30.0


class _Output(Console):
    """A console that shows text and obeys none. Its reader may leave, as with `| head`: no error of the command."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(plain(one, keep="\n\t") if isinstance(one, str) else one for one in objects), **options)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_OBEYED_IN_JSON = re.compile("[\x7f-\x9f]")  # json.dumps escapes the others


def plain(text: str, keep: str = "") -> str:
    """Text that a terminal can only show: names and reasons are anybody's, and it would obey an escape sequence.

    keep: control characters that may stay.
    """
    return _OBEYED.sub(lambda found: found[0] if found[0] in keep else "?", text)


def json_text(value: Any, **options: Any) -> str:
    """A value as JSON that a terminal can only show."""
    return _without_control(json.dumps(value, ensure_ascii=False, **options))


def _without_control(text: str) -> str:
    """The same JSON with these characters escaped."""
    return _OBEYED_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


DRAWN_PLAINLY = "pgpark.drawn_plainly"
_PLAINLY = str.maketrans("·…▸▶▕░█▁▂▃▄▅▆▇", ".~>>|-#_.,-=+*")


def _drawn_plainly(error: UnicodeError) -> tuple[str | bytes, int]:
    """For a terminal that cannot show a character: pictures are drawn with others as wide, the rest is escaped."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wanted = error.object[error.start : error.end].translate(_PLAINLY)
    return wanted.encode("ascii", "backslashreplace").decode("ascii"), error.end


codecs.register_error(DRAWN_PLAINLY, _drawn_plainly)

messages = _Output(stderr=True, highlight=False, markup=False)
_RELATIVE = re.compile(r"[+-](\d+(?:\.\d+)?)([smhd]?)")
_UNIT_SECS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Settings:
    """Where the database is, and whether output is for programs."""

    dsn: str | None
    home: Path
    json: bool

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """The DSN of a database; without one given, of the embedded server, started and migrated on demand."""
        with Place(self.dsn, self.home).use() as dsn:
            yield dsn

    @contextlib.contextmanager
    def connection(self) -> Iterator[psycopg.Connection[DictRow]]:
        """A connection to a database that has pgpark. Nothing is prepared, so that commands work behind any pooler."""
        with self.database() as dsn, contextlib.closing(connect(dsn, prepare=False)) as connection:
            require_migrated(connection)
            yield connection


def output_options(command: F) -> F:
    """Adds --home and --json to a command, which gets them as `settings`."""

    @click.option(
        "--home",
        envvar="PGPARK_HOME",
        default=HOME,
        show_default=True,
        type=click.Path(path_type=Path, file_okay=False),
        help="Folder of the embedded Postgres, used when no --dsn is given.",
    )
    @click.option("--json", "as_json", envvar="PGPARK_JSON", is_flag=True, help="Print JSON, one object a line.")
    @functools.wraps(command)
    def wrapper(home: Path, as_json: bool, *args: Any, dsn: str | None = None, **kwargs: Any) -> Any:
        return command(Settings(dsn, home, as_json), *args, **kwargs)

    return cast(F, wrapper)


def dsn_options(command: F) -> F:
    """Adds --dsn to these."""
    dsn = click.option("--dsn", envvar="PGPARK_DSN", help="Postgres to use, as URL or key=value pairs.")
    return dsn(output_options(command))


def database_options(command: F) -> F:
    """Adds --dsn and --pools to these; and --pool, where the command has no such argument, to say whose database.

    With --pools it is the one where the file says that the pool lives.
    """
    argument = next((name for name in ("pool", "name") if name in inspect.signature(command).parameters), None)
    file = click.option(
        "--pools",
        "pools_file",
        envvar="PGPARK_POOLS",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Config file that says where each pool lives.",
    )
    one = click.option("--pool", metavar="NAME", help="With --pools: the database of this pool.")

    @functools.wraps(command)
    def wrapper(settings: Settings, *args: Any, pools_file: Path | None, **kwargs: Any) -> Any:
        pool = kwargs[argument] if argument else kwargs.pop("pool")
        if pools_file is not None:
            settings = _settled(settings, pools_file, pool, "name one of" if argument else "name one with --pool:")
        elif pool is not None and not argument:
            raise click.UsageError("--pool goes with --pools FILE")
        return command(settings, *args, **kwargs)

    optioned = file(dsn_options(cast(F, wrapper)))
    return optioned if argument else one(optioned)


def _settled(settings: Settings, file: Path, pool: str | None, advice: str) -> Settings:
    """The settings with the database of a pool of this file; of all pools, if none is named and they share one."""
    config = load(file, only_places=True)
    given = Place(settings.dsn, settings.home)
    places = {config.place(name, given) for name in ([pool] if pool is not None else config.pools)}
    if len(places) > 1:
        raise BadInputError(f"{file}: its pools live in {len(places)} databases; {advice} {', '.join(config.pools)}")
    (place,) = places
    return Settings(place.dsn, place.home, settings.json)


class Seconds(click.FloatRange):
    """A number of seconds from `least` to thirty years."""

    def __init__(self, least: float) -> None:
        super().__init__(min=least, max=1e9)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        return number


def poll_options(command: F) -> F:
    """Adds --poll and --poll-secs, as `poll` and `poll_secs`, to a command that waits for work."""
    secs = click.option(
        "--poll-secs",
        type=Seconds(0.01),
        help=f"Seconds between looks (default: {_POLL_SECS_WITHOUT_LISTEN:g} with --poll; else "
        f"{_POLL_SECS_AS_BACKSTOP:g}, as a backstop).",
    )
    poll = click.option("--poll", is_flag=True, help="Do not LISTEN; look for work again and again (behind PgBouncer).")
    return poll(secs(command))


def log_json_option(command: F) -> F:
    """Adds --log-json to a command that logs."""
    return click.option("--log-json", is_flag=True, help="Log a JSON object a line.")(command)


def seconds_between_looks(poll: bool, poll_secs: float | None) -> float:
    """What these options say, or their defaults."""
    return poll_secs or (_POLL_SECS_WITHOUT_LISTEN if poll else _POLL_SECS_AS_BACKSTOP)


def print_json(value: Row | Mapping[str, Any]) -> None:
    """One object on one line."""
    text = value.model_dump_json() if isinstance(value, Row) else json.dumps(value, default=str)
    click.echo(_without_control(text))


def print_rows(settings: Settings, rows: Iterable[Row], columns: Iterable[str], empty: str) -> None:
    """Rows as JSON lines, or as a table of these columns; `empty` is the message when there are none."""
    rows = list(rows)
    if settings.json:
        for row in rows:
            print_json(row)
    elif rows:
        console = results_console()
        console.print(fitting(rows, list(columns), console))
    else:
        messages.print(empty)


def fitting(rows: Sequence[Row], columns: list[str], console: Console) -> RenderableType:
    """A table of these columns; where the terminal is too narrow for it, the values of each row below one another."""
    drawn = table(rows, columns)
    if drawn.__rich_measure__(console, console.options.update(max_width=_ANY_WIDTH)).maximum <= console.width:
        return drawn
    return Text("\n\n").join(_below_one_another(row, columns) for row in rows)


def _below_one_another(row: Row, columns: list[str]) -> Text:
    width = max(map(len, columns)) + 2
    lines = []
    for name in columns:
        if (value := getattr(row, name)) is not None:
            lines.append(Text.assemble((name.ljust(width), "bold"), cell(value)))
    return Text("\n").join(lines)


def table(rows: Iterable[Row], columns: list[str]) -> Table:
    """A table of these columns; numbers to the right."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    lines = [[getattr(row, column) for column in columns] for row in rows]
    for place, column in enumerate(columns):
        numeric = all(isinstance(line[place], int | float) or line[place] is None for line in lines)
        drawn.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for line in lines:
        drawn.add_row(*(cell(value) for value in line))
    return drawn


def cell(value: Any) -> str:
    """A value as people read it."""
    if value is None:
        return ""
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, float):
        return f"{value:.1f}"
    return plain(value if isinstance(value, str) else json_text(value, default=str))


def results_console() -> Console:
    """Standard output; where it is not a terminal, so wide that nothing is folded in a file or a pipe."""
    return _Output(highlight=False, markup=False, width=None if sys.stdout.isatty() else _ANY_WIDTH)


def moment(connection: psycopg.Connection[DictRow], text: str | None) -> str | None:
    """A time for Postgres from `2030-01-31T12:00Z`, or `+90s`, `+5m`, `+2h`, `-1d` by the database's clock."""
    if text is None or not text.startswith(("+", "-")) or text.startswith("-inf"):
        return text
    if (found := _RELATIVE.fullmatch(text)) is None:
        raise BadInputError(f"{text!r} is no time: use 2030-01-31T12:00Z, or +90s, +5m, +2h, +1d from now")
    row = connection.execute("select pgpark._now() as now").fetchone()
    assert row is not None
    now: datetime = row["now"]
    try:
        return (now + timedelta(seconds=float(text[0] + found[1]) * _UNIT_SECS[found[2]])).isoformat()
    except OverflowError as error:
        raise BadInputError(f"{text!r} is too far away") from error
