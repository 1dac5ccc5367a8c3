"""`python -m tests.docs.generate` writes docs/reference: the SQL functions, the command line and the config.

Each page has one source: the comments of the functions in a migrated database, the options of the commands, and the
JSON Schema that park_config_schema() makes. Without PGPARK_TEST_DSN it starts an embedded server for the time it takes.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import psycopg
from psycopg.rows import DictRow, dict_row

from pgpark.cli import cli
from pgpark.embedded import EmbeddedServer
from pgpark.migrate import migrate

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
COMMAND = "python -m tests.docs.generate"
_MADE = f"<!-- Made by `{COMMAND}`; change the source, not this page. -->\n\n"

Connection = psycopg.Connection[DictRow]


def pages(connection: Connection) -> dict[str, str]:
    """The text of each generated page, by its name in docs/reference."""
    return {"sql.md": sql_page(connection), "cli.md": cli_page(), "config.md": config_page(connection)}


# -- SQL ------------------------------------------------------------------------------------------------------------

# The files below sql/functions in the order of the page; one that is not named here comes last, under its own name.
_GROUPS = {
    "submit": "Submitting",
    "status": "Following",
    "follow": "Following",
    "parts": "Partial results",
    "cancel": "Cancelling and trying again",
    "retry": "Cancelling and trying again",
    "mailbox": "The mailbox",
    "claim": "Working",
    "finish": "Working",
    "heartbeat": "Working",
    "release": "Working",
    "pool": "Pools",
    "config_schema": "Pools",
    "cost": "Costs",
    "stats": "Looking",
    "explain": "Looking",
    "lot": "Looking",
    "measures": "Looking",
    "audit": "Audit and traces",
    "trace": "Audit and traces",
    "maintain": "Timers",
    "callbacks": "Callbacks",
    "access": "Access",
    "tokens": "Access",
    "doctor": "Installation",
}
_FUNCTIONS = """
select f.oid::regproc::text as full_name, f.proname as name, obj_description(f.oid) as manual, c.kinds,
       pg_get_function_arguments(f.oid) as arguments, pg_get_function_result(f.oid) as result,
       f.provolatile as volatility, y.columns
from pg_proc f
left join pgpark._calls() c on c.name = f.proname
left join lateral (
  select array_agg(format('%s %s', quote_ident(a.attname), format_type(a.atttypid, null)) order by a.attnum) as columns
  from pg_type t
  join pg_attribute a on a.attrelid = t.typrelid and a.attnum > 0 and not a.attisdropped
  where t.oid = f.prorettype and t.typtype = 'c'
) y on true
where f.pronamespace = 'pgpark'::regnamespace and f.proname ~ '^park_'
order by f.proname, f.oid
"""
_INTRODUCTION = """\
# SQL functions

What every language calls. Arguments can be given by name (`units => 8`). The same text is in the database:
`\\df+ pgpark.*` in psql, or

```sql
select proname, obj_description(oid)
from pg_proc
where pronamespace = 'pgpark'::regnamespace and proname ~ '^park_';
```

A refusal that a caller must expect (full, late, too large) is returned as a row; what is raised is in
[errors](../errors.md). Functions that change something refuse to run in a transaction that is not READ COMMITTED
(`25001`), and whoever was not granted a function, or not this pool or tenant, gets `42501`. The owner of the schema and
admins may call everything; others what [`pgpark grant`](../security.md#who-may-do-what) gave them.
"""


def sql_page(connection: Connection) -> str:
    """Every public function: its signature, its comment, and who may call it."""
    functions = connection.execute(_FUNCTIONS).fetchall()
    names = {str(function["name"]) for function in functions}
    files = _files_of_functions()
    grouped: dict[str, list[DictRow]] = {title: [] for title in _GROUPS.values()}
    for function in sorted(functions, key=lambda row: _place(files.get(row["name"], ""), row["name"])):
        file = files.get(function["name"], "")
        grouped.setdefault(_GROUPS.get(file, file.strip("_").capitalize()), []).append(function)
    parts = [_MADE + _INTRODUCTION]
    for title, members in grouped.items():
        if members:
            parts += [f"## {title}\n", *(_function(function, names) for function in members)]
    return "\n".join(parts)


def _files_of_functions() -> dict[str, str]:
    """For each public function the file that makes it."""
    made = re.compile(r"^create or replace function pgpark\.(park_\w+)", re.MULTILINE)
    files = sorted((ROOT / "sql" / "functions").glob("*.sql"))
    return {name: file.stem for file in files for name in made.findall(file.read_text())}


def _place(file: str, name: str) -> tuple[int, int]:
    order = list(_GROUPS)
    text = (ROOT / "sql" / "functions" / f"{file}.sql").read_text() if file else ""
    return order.index(file) if file in order else len(order), text.find(f"function pgpark.{name}")


def _function(function: DictRow, names: set[str]) -> str:
    name = function["name"]
    lines = [f"### {name}\n", "```postgresql", _signature(function), "```\n", _manual(function, names)]
    kinds = function["kinds"]
    lines.append(f"\nMay be called by: {', '.join([*kinds, 'admin']) if kinds else 'admin'}.\n")
    return "\n".join(lines)


def _signature(function: DictRow) -> str:
    """The arguments, one a line where they are many, with defaults as people write them; what comes back."""
    given = [part for part in _split(function["arguments"]) if not part.startswith("OUT ")]
    out = [part.removeprefix("OUT ") for part in _split(function["arguments"]) if part.startswith("OUT ")]
    arguments = [_plain(argument) for argument in given]
    result = function["result"]
    if out:
        result = f"one row ({', '.join(map(_plain, out))})"
    elif result.startswith("TABLE("):
        result = f"rows ({', '.join(_plain(part) for part in _split(result[6:-1]))})"
    elif function["columns"]:
        result = (
            f"{'rows' if result.startswith('SETOF') else 'one row'} ({', '.join(map(_plain, function['columns']))})"
        )
    else:
        result = _plain(result.replace("SETOF ", "rows of "))
    text = f"{function['name']}({', '.join(arguments)})"
    if len(text) > 100:
        text = f"{function['name']}(\n  " + ",\n  ".join(arguments) + ")"
    return f"{text}\nreturns {_folded(result)}"


def _split(text: str) -> list[str]:
    """Arguments at their commas, but not at those within brackets or quotes."""
    return [part.strip() for part in re.findall(r"(?:[^,'(]|'[^']*'|\([^)]*\))+", text)]


def _plain(text: str) -> str:
    text = re.sub(r"::[a-z ]+(\[\])?", "", text).replace(" DEFAULT ", " default ").replace("NULL", "null")
    for long, short in (("timestamp with time zone", "timestamptz"), ("integer", "int"), ("boolean", "bool")):
        text = text.replace(long, short)
    return text


def _folded(text: str) -> str:
    lines, line = [], ""
    for word in text.split(" "):
        if len(line) + len(word) > 96:
            lines.append(line.rstrip())
            line = "  "
        line += word + " "
    return "\n".join([*lines, line.rstrip()])


def _manual(function: DictRow, names: set[str]) -> str:
    """A comment as Markdown: what it says of each argument on a line of its own, names in code, functions as links."""
    text = " ".join((function["manual"] or "").split("\n")).strip()
    text, _, errors = text.partition(" Errors: ")
    words = re.findall(r"\w+", f"{function['arguments']} {function['result']} {function['columns']}")
    own = "|".join(sorted({word for word in words if word.islower()}, key=len, reverse=True))
    text = re.sub(rf"(?<=[.)] )((?:{own})(?:, (?:{own}))*):", r"\n- \1:", text)
    text = re.sub(r"(?<=\. )(Returns )", r"\n\n\1", text)
    text = re.sub(r"[<*]", lambda sign: {"<": "&lt;", "*": "\\*"}[sign[0]], text)
    text = re.sub(r"\n\n+", "\n\n", text.replace("\n- ", "\n\n- ", 1))

    def marked(found: re.Match[str]) -> str:
        word = found[0]
        return f"[`{word}`](#{word})" if word in names and word != function["name"] else f"`{word}`"

    text = re.sub(r"\b[a-z]+(?:[_.][a-z]+)*_[a-z]+(?:\.[a-z_]+)*\b", marked, text)
    text = re.sub(rf"^- ((?:`?(?:{own})`?)(?:, `?(?:{own})`?)*):", _listed, text, flags=re.MULTILINE)
    lines = [_wrapped(line) for line in text.split("\n")]
    return "\n".join(lines) + (f"\n\n{_wrapped(f'[Errors](../errors.md#from-sql): {errors}')}" if errors else "")


def _listed(found: re.Match[str]) -> str:
    return "- " + ", ".join(f"`{name.strip('`')}`" for name in found[1].split(", ")) + ":"


def _wrapped(line: str) -> str:
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


# -- the command line -----------------------------------------------------------------------------------------------

_CLI_INTRODUCTION = """\
# Command line

`pgpark COMMAND --help` says the same. Standard output carries results only; what went wrong is one line on standard
error. What the exit codes mean: [errors](../errors.md#from-the-command-line). Every option is also a variable of the
environment, named beside it; an option on the command line wins.
"""


def cli_page() -> str:
    """Every command with its arguments and options."""
    parts = [_MADE + _CLI_INTRODUCTION]
    for path, command in commands():
        if not isinstance(command, click.Group):
            parts.append(_command(path, command))
    return "\n".join(parts)


def commands() -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command and group of the command line that is not hidden, with the words that call it."""

    def walk(path: tuple[str, ...], command: click.Command) -> Iterator[tuple[tuple[str, ...], click.Command]]:
        if path:
            yield path, command
        if isinstance(command, click.Group):
            for name, child in command.commands.items():
                if not child.hidden:
                    yield from walk((*path, name), child)

    yield from walk((), cli)


def _command(path: tuple[str, ...], command: click.Command) -> str:
    context = click.Context(command, info_name=" ".join(("pgpark", *path)))
    usage = " ".join(command.collect_usage_pieces(context))
    text = [f"## pgpark {' '.join(path)}\n", "```text", f"pgpark {' '.join(path)} {usage}", "```\n"]
    text.append(_paragraphs(command.help or "") + "\n")
    prefix = "_".join(("PGPARK", *path)).upper().replace("-", "_")
    options = [param for param in command.params if isinstance(param, click.Option)]
    if options:
        text += ["| option | in the environment | means |", "|---|---|---|"]
        text += [_option(option, prefix, context) for option in options if not option.hidden]
    return "\n".join(text) + "\n"


def _paragraphs(text: str) -> str:
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.replace("\b", "").split("\n\n")]
    return "\n\n".join(_wrapped(_escaped(paragraph)) for paragraph in paragraphs)


def _option(option: click.Option, prefix: str, context: click.Context) -> str:
    names = "/".join((*option.opts, *option.secondary_opts))
    metavar = "" if option.is_flag or option.count else f" {option.make_metavar(context)}"
    variable = option.envvar or f"{prefix}_{str(option.name).upper()}"
    variable = variable if isinstance(variable, str) else variable[0]
    record = option.get_help_record(context)
    means = " ".join(record[1].split()) if record else ""
    code = (names + metavar).replace("|", "\\|")
    return f"| `{code}` | `{variable}` | {_escaped(means)} |"


def _escaped(text: str) -> str:
    return re.sub(r"([<*|\[\]])", r"\\\1", text).replace("\\<", "&lt;")


# -- the config -----------------------------------------------------------------------------------------------------

_CONFIG_INTRODUCTION = """\
# Keys of a pool

The keys of an entry of `pools` in the [config file](../config.md), of `pgpark pool put --set KEY=VALUE` and of
[`park_put_pool`](sql.md#park_put_pool). A pool is changed live: running tasks go on, and what waits keeps its place. A
string `"${NAME}"` stands for a value of any kind, and `null` for a key that is left out. `pgpark config schema` prints
the JSON Schema, which editors understand.
"""


def config_page(connection: Connection) -> str:
    """Every key of a pool, from the schema that the database makes."""
    row = connection.execute("select pgpark.park_config_schema() as schema").fetchone()
    assert row is not None
    schema = row["schema"]
    pool = schema["properties"]["pools"]["additionalProperties"]
    lines = [_MADE + _CONFIG_INTRODUCTION]
    sections = {"": [], **{key: [] for key in _objects(pool)}}
    for key, value, required in _keys(pool, ""):
        section = next((name for name in sections if name and key.startswith(f"{name}.")), "")
        sections[section].append(_key(key, value, required))
    for name, rows in sections.items():
        if name:
            lines.append(f"\n## {name}\n\n{_coded(pool['properties'][name].get('description', ''))}\n")
        lines += ["| key | value | default | means |", "|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _resolved(value: dict[str, Any]) -> dict[str, Any]:
    """A value's schema with that of its first form; the others are a variable and null."""
    if "type" in value or "enum" in value or not value.get("anyOf"):
        return value
    choice = value["anyOf"][0]
    return {**value, **choice}


def _objects(pool: dict[str, Any]) -> list[str]:
    return [key for key, value in pool["properties"].items() if _resolved(value).get("type") == "object"]


def _keys(group: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any], bool]]:
    for name, raw in (group.get("properties") or {}).items():
        value = _resolved(raw)
        if value.get("type") != "object":
            yield prefix + name, value, name in group.get("required", ()) or (not prefix and name == "max_units")
        elif value.get("properties"):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            member = _resolved(value["additionalProperties"])
            yield from _keys(member, f"{prefix}{name}.NAME.")


def _key(key: str, value: dict[str, Any], required: bool) -> str:
    if "enum" in value:
        kind = ", ".join(f"`{choice}`" for choice in value["enum"])
    else:
        kind = {"integer": "whole number", "boolean": "`true`, `false`", "string": "text"}.get(
            value["type"], value["type"]
        )
        if value.get("minimum") is not None:
            kind += f", at least {value['minimum']:g}"
    default = "required" if required else _json(value["default"]) if "default" in value else ""
    means = _coded(value.get("description", ""))
    if examples := value.get("examples"):
        means += f" Example: {_json(examples[0])}"
    return f"| `{key}` | {kind} | {default} | {means} |"


def _coded(text: str) -> str:
    return re.sub(r"\b_?[a-z]+(_[a-z]+)+\b|\b_[a-z]+\b", r"`\g<0>`", text)


def _json(value: Any) -> str:
    return f"`{json.dumps(value, ensure_ascii=False)}`"


# -- running --------------------------------------------------------------------------------------------------------


@contextmanager
def migrated() -> Iterator[Connection]:
    """A connection to a database that has pgpark: of PGPARK_TEST_DSN, else on an embedded server."""
    with tempfile.TemporaryDirectory(prefix="pgpark-docs-") as home:
        if given := os.environ.get("PGPARK_TEST_DSN"):
            name = f"pgpark_docs_{os.getpid()}"
            with psycopg.connect(given, autocommit=True) as admin:
                admin.execute(f"create database {name} template template0")
                try:
                    with _open(psycopg.conninfo.make_conninfo(given, dbname=name)) as connection:
                        yield connection
                finally:
                    admin.execute(f"drop database {name} with (force)")
        else:
            with EmbeddedServer(Path(home)).use() as dsn, _open(dsn) as connection:
                yield connection


@contextmanager
def _open(dsn: str) -> Iterator[Connection]:
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        migrate(connection)
        yield connection


if __name__ == "__main__":
    REFERENCE.mkdir(exist_ok=True)
    with migrated() as database:
        for file, content in pages(database).items():
            (REFERENCE / file).write_text(content)
            sys.stdout.write(f"docs/reference/{file}: {content.count(chr(10))} lines\n")
