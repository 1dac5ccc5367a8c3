"""`pgpark submit`, `status`, `result`, `cancel`: single tasks, and files of them."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import click
import psycopg
from psycopg.rows import DictRow
from rich.progress import Progress

from pgpark import Client, calls
from pgpark.cli.common import (
    Settings,
    cell,
    database_options,
    json_text,
    load_json,
    messages,
    moment,
    plain,
    print_json,
)
from pgpark.database import require_migrated
from pgpark.errors import BadInputError, UnknownPoolError
from pgpark.models import Message, Part, Submitted

_BATCH = 500
_TOKENS = click.IntRange(0, 2_147_483_647)


@click.command()
@click.argument("pool")
@click.argument("payload", required=False)
@click.option("--file", "file", type=click.File(), help="JSONL file (- for standard input): a task per line.")
@click.option("--skip-bad", is_flag=True, help="With --file: leave out bad lines instead of refusing the whole file.")
@click.option("--priority", default="normal", show_default=True, help="low, normal, high or critical.")
@click.option("--units", type=int, help="Units of the pool that it holds while it runs.  [default: 1]")
@click.option("--prompt-tokens", type=_TOKENS, help="With --max-tokens: units by the pool's cost_model instead.")
@click.option("--max-tokens", type=_TOKENS, help="Tokens that may be generated.")
@click.option("--deadline", help="By when it must have started: 2030-01-31T12:00Z, or +90s, +5m, +2h from now.")
@click.option("--run-at", help="Not before this time; the same forms.")
@click.option("--tenant", help="Whose mailbox the outcome goes to.")
@click.option("--user", help="The user of that tenant.")
@click.option("--session", help="The session of that user.")
@click.option("--key", help="Idempotency key: submitting again with it gets the first task.")
@database_options
def submit(settings: Settings, pool: str, payload: str | None, file: Any, skip_bad: bool, **options: Any) -> int:
    """Submit a task with this PAYLOAD (JSON), or all tasks of a --file.

    A line of the file is an object: {"payload": ..., "units": 8, "priority": "high", "deadline": ..., "tenant": ...,
    "user_id": ..., "session_id": ..., "run_at": ..., "idempotency_key": ...}; only payload is required. Instead of
    units, "prompt_tokens" and "max_tokens" charge by the pool's cost_model. The file is submitted whole or, if a line
    is bad, not at all. Exit 1 if a task was refused.
    """
    if (payload is None) == (file is None):
        raise click.UsageError("give either a PAYLOAD or --file")
    if skip_bad and file is None:
        raise click.UsageError("--skip-bad goes with --file")
    if file is not None:
        lines = _lines(file, skip_bad)
        with settings.connection() as connection:
            submitted = _submit_lines(connection, pool, lines, file.name, skip_bad)
        return _report(settings, submitted)
    assert payload is not None
    value = load_json(payload, "the payload")
    with settings.connection() as connection:
        task = calls.run_on(
            connection,
            calls.submit(
                pool,
                value,
                priority=str(options["priority"]),
                units=options["units"],
                prompt_tokens=options["prompt_tokens"],
                max_tokens=options["max_tokens"],
                deadline=moment(connection, _text(options["deadline"])),
                run_at=moment(connection, _text(options["run_at"])),
                tenant=_text(options["tenant"]),
                user_id=_text(options["user"]),
                session_id=_text(options["session"]),
                idempotency_key=_text(options["key"]),
            ),
        )
    if settings.json:
        print_json(task)
    elif task.accepted:
        click.echo(task.task_id)
    messages.print(f"{task.status}: {task.reason}" if task.reason else task.status)
    return 0 if task.accepted else 1


@click.command()
@click.argument("task_id", type=click.IntRange(min=0), metavar="ID")
@database_options
def status(settings: Settings, task_id: int) -> int:
    """Show where a task is. Exit 1 if there is none of this id."""
    with settings.connection() as connection:
        found = calls.run_on(connection, calls.status(task_id))
    if found is None:
        messages.print(f"no task {task_id} here, or its outcome was taken out of the mailbox")
        return 1
    if settings.json:
        print_json(found)
    else:
        for name, value in found:
            if value is not None:
                click.echo(f"{name:12} {cell(value)}")
    return 0


@click.command()
@click.argument("task_id", type=click.IntRange(min=0), metavar="ID")
@click.option("--wait", is_flag=True, help="Wait until it has ended.")
@click.option("--follow", is_flag=True, help="Print what it emits as it comes, then the result; waits for that.")
@click.option("--timeout", type=float, help="With --wait or --follow: at most this many seconds.")
@database_options
def result(settings: Settings, task_id: int, wait: bool, follow: bool, timeout: float | None) -> int:
    """Print the result of a task as JSON. Exit 1 unless it completed.

    With --follow, partial results that are strings are printed as they are, others as a line of JSON, and progress
    goes to standard error; the result is the last line. With --json, each part is a line of JSON.
    """
    with settings.database() as dsn, Client(dsn) as client:
        client.connection.prepare_threshold = None  # so that it works behind any pooler
        require_migrated(client.connection)
        before = client.run(calls.status(task_id))
        if follow:
            message = _follow(settings, client, task_id, timeout)
        elif wait and before is not None:
            message = client.wait(task_id, timeout)
        else:
            message = client.run(calls.result(task_id))
        now = client.run(calls.status(task_id))
    if message is None:
        messages.print(f"no task {task_id} here" if now is None else f"task {task_id} is {now.status}, no outcome yet")
        return 1
    if settings.json:
        print_json(message)
    else:
        click.echo(json_text(message.payload))
        messages.print(f"{message.status}: {message.reason}" if message.reason else message.status, soft_wrap=True)
    return 0 if message.status == "completed" else 1


def _follow(settings: Settings, client: Client, task_id: int, timeout: float | None) -> Message | None:
    """Prints the parts of a task until it has ended, and returns its outcome, None if there is none in time."""
    attempt = 0
    in_line = False  # text that has not ended its line yet
    outcome = None
    for item in client.stream(task_id, timeout):
        if isinstance(item, Message):
            outcome = item
        elif settings.json:
            print_json(item)
        elif item.kind == "progress":
            messages.print(f"progress: {_progress(item)}", soft_wrap=True)
        else:
            again = attempt not in (0, item.attempt)
            if in_line and (again or not isinstance(item.content, str)):
                click.echo()
                in_line = False
            if again:
                messages.print(f"attempt {item.attempt} begins anew")
            text = _shown(item.content) if isinstance(item.content, str) else json_text(item.content) + "\n"
            click.echo(text, nl=False)  # flushes
            in_line = not text.endswith("\n") if text else in_line
            attempt = item.attempt
    if in_line:
        click.echo()
    return outcome


def _shown(text: str) -> str:
    """As it is, but for what a terminal would obey."""
    return plain(text, keep="\n\r\t") if sys.stdout.isatty() else text


def _progress(part: Part) -> str:
    """Progress as people read it; context.progress makes an object of value and message."""
    content = part.content
    if not isinstance(content, dict) or not content.keys() <= {"value", "message"} or "value" not in content:
        return cell(content)
    value, message = content["value"], content.get("message")
    amount = f"{value:.0%}" if isinstance(value, float) and 0 <= value <= 1 else cell(value)
    return f"{amount} {message}" if message else amount


@click.command()
@click.argument("task_id", type=click.IntRange(min=0), metavar="ID")
@click.option("--reason", default="cancelled", show_default=True, help="What its outcome will say.")
@database_options
def cancel(settings: Settings, task_id: int, reason: str) -> int:
    """Cancel a task: dropped at once, or cancelling while its worker stops it. Exit 1 if finished or unknown."""
    with settings.connection() as connection:
        word = calls.run_on(connection, calls.cancel(task_id, reason))
    if settings.json:
        print_json({"task_id": task_id, "result": word})
    else:
        click.echo(word)
    return 0 if word in {"dropped", "cancelling"} else 1


def _text(value: str | int | None) -> str | None:
    return None if value is None else str(value)


def _lines(file: Any, skip_bad: bool) -> list[tuple[int, Any]]:
    """The tasks of a JSONL file with their line numbers; blank lines are passed over."""
    tasks = []
    try:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                tasks.append((number, load_json(line, f"{file.name} line {number}")))
            except BadInputError as error:
                if not skip_bad:
                    raise BadInputError(f"{error}; nothing was submitted") from error
                messages.print(f"{error}; skipped", soft_wrap=True)
    except UnicodeDecodeError as error:
        raise BadInputError(f"{file.name} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    return tasks


def _submit_lines(
    connection: psycopg.Connection[DictRow], pool: str, lines: list[tuple[int, Any]], file: str, skip_bad: bool
) -> list[tuple[int, Submitted]]:
    """All in one transaction, batch after batch; a bad line is named, and left out or the end of it all."""
    done: list[tuple[int, Submitted]] = []
    hidden = not sys.stderr.isatty()
    with Progress(console=messages, disable=hidden, transient=True) as progress, connection.transaction():
        bar = progress.add_task("submitting", total=len(lines))
        for start in range(0, len(lines), _BATCH):
            batch = lines[start : start + _BATCH]
            while batch:
                try:
                    with connection.transaction():
                        rows = calls.run_on(connection, calls.submit_many(pool, [task for _, task in batch]))
                    done += [(number, row) for (number, _), row in zip(batch, rows, strict=True)]
                    break
                except UnknownPoolError:
                    raise
                except BadInputError as error:
                    place = error.element or _bad_place(connection, pool, batch)
                    number, _ = batch.pop(place - 1)
                    why = str(error).removeprefix(f"element {place}: ")
                    if not skip_bad:
                        raise BadInputError(f"{file} line {number}: {why}; nothing was submitted") from error
                    messages.print(f"{file} line {number}: {why}; skipped", soft_wrap=True)
            progress.advance(bar, _BATCH)
    return done


def _bad_place(connection: psycopg.Connection[DictRow], pool: str, batch: list[tuple[int, Any]]) -> int:
    """Which line of a batch the database cannot take, where it did not say: the first that it refuses alone."""
    for place, (_, task) in enumerate(batch, start=1):
        try:
            with connection.transaction(force_rollback=True):
                calls.run_on(connection, calls.submit_many(pool, [task]))
        except BadInputError:
            return place
    return 1


def _report(settings: Settings, submitted: list[tuple[int, Submitted]]) -> int:
    refused = Counter(str(task.reason) for _, task in submitted if not task.accepted)
    for number, task in submitted:
        if settings.json:
            print_json({"line": number} | task.model_dump())
        elif task.accepted:
            click.echo(task.task_id)
    accepted = len(submitted) - refused.total()
    why = ", ".join(f"{count} {reason}" for reason, count in refused.items())
    messages.print(f"{accepted} accepted" + (f", {refused.total()} refused ({why})" if refused else ""))
    return 1 if refused else 0
