"""Every fenced block of every document is at least read by what it is written for.

sql runs on a real server in a transaction that is rolled back; python is compiled; json and yaml are parsed, and as a
config file validated; of sh the shell checks the syntax, and each call of pgpark is parsed by the command line itself.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from typing import Any

import click
import pytest
import yaml
from psycopg.types.json import Jsonb

from pgpark.cli import cli
from pgpark.config import load
from tests.conftest import Database
from tests.docs.markdown import Block, blocks, files

# Blocks that cannot be tried, by file and first line, each with its reason. Keep it short.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("docs/operations/postgres.md", "create role park login;"): "makes a database, which no transaction takes back",
    ("docs/operations/containers.md", "create role pgpark_owner   login password 'secret of the migration';"): (
        "makes a database; tests/cluster/test_logins.py runs it"
    ),
}
# What is not tried: pictures of output, signatures, files of other programs that have tests of their own.
UNTRIED = {"", "text", "postgresql"}


def _blocks(*languages: str) -> list[Block]:
    return [
        block
        for file in files()
        for block in blocks(file)
        if block.language in languages and (file, block.text.partition("\n")[0]) not in EXCEPTIONS
    ]


def test_each_block_says_in_a_known_language_what_it_is() -> None:
    known = UNTRIED | {"sh", "sql", "python", "json", "yaml", "js", "go", "toml", "ini", "promql", "html", "dockerfile"}
    unknown = [
        f"{block}: {block.language}" for file in files() for block in blocks(file) if block.language not in known
    ]
    assert not unknown, unknown


def test_each_exception_is_still_there() -> None:
    there = {(file, block.text.partition("\n")[0]) for file in files() for block in blocks(file)}
    assert set(EXCEPTIONS) <= there


# -- sql ------------------------------------------------------------------------------------------------------------

_VALUES = {"outcomes": "'[]'"}


@pytest.mark.parametrize("block", _blocks("sql"), ids=str)
def test_sql_runs(block: Block, db: Database) -> None:
    """In one transaction, which is rolled back; what stands for a value of the reader's gets one."""
    db.pool("gpu")
    db.parked()
    for role in ("web", "gpu1", "grafana", "ops"):
        db.connection.execute(f"do $$ begin create role {role}; exception when duplicate_object then null; end $$")
    text = re.sub(r"(?<![:\w]):(\w+)", lambda name: _VALUES.get(name[1], "1"), block.text)
    text = "\n".join(line for line in text.splitlines() if not line.startswith("\\"))
    with db.connection.transaction(force_rollback=True):
        db.connection.execute(text)


# -- python, json, yaml ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", _blocks("python"), ids=str)
def test_python_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("block", _blocks("json", "yaml"), ids=str)
def test_json_and_yaml_parse_and_configs_are_right(block: Block, db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    value = json.loads(block.text) if block.language == "json" else yaml.safe_load(block.text)
    if isinstance(value, dict) and "pools" in value:
        for name in re.findall(r"\$\{(\w+)\}", block.text):
            monkeypatch.setenv(name, "1")
        config = load(value)
        for name in config.pools:
            db.rows("select * from pgpark.park_plan_pool(%s, %s)", name, Jsonb(config.sql_config(name)))


# -- sh -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", _blocks("sh"), ids=str)
def test_the_shell_understands(block: Block) -> None:
    checked = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


def _calls(block: Block) -> Iterator[list[str]]:
    """The words of each call of pgpark in a block, also within $(...)."""
    text = re.sub(r"<<'?(\w+)'?(.*?\n).*?^\1$", r"\2", block.text, flags=re.MULTILINE | re.DOTALL)  # here documents
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.wordchars += "$%{}@^,:+"
        words: list[str] | None = None
        for word in lexer:
            if set(word) <= set("();<>|&"):
                if words is not None:
                    yield words
                words = None
            elif words is not None:
                words.append(word)
            elif word == "pgpark" or word.endswith("bin/pgpark"):
                words = []
        if words is not None:
            yield words


SHELL_CALLS = [(str(block), call) for block in _blocks("sh") for call in _calls(block)]


def test_calls_of_pgpark_were_found() -> None:
    assert len(SHELL_CALLS) > 25


@pytest.mark.parametrize(
    ("place", "call"), SHELL_CALLS, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_the_command_line_understands(place: str, call: list[str]) -> None:
    del place
    _parse(cli, click.Context(cli, info_name="pgpark"), call)


def _parse(command: click.Command, context: click.Context, words: list[str]) -> None:
    """Raises click.UsageError for a command, an option, a value or a number of arguments that there is not."""
    values, rest, _ = command.make_parser(context).parse_args(list(words))
    if isinstance(command, click.Group):
        assert rest or "help" in values or "version" in values, f"{context.command_path}: which command?"
        if rest:
            child = command.get_command(context, rest[0])
            assert child is not None, f"{context.command_path} has no command {rest[0]}"
            _parse(child, click.Context(child, parent=context, info_name=rest[0]), rest[1:])
        return
    assert not rest, f"{context.command_path}: {rest} is too much"
    for param in command.params:
        value: Any = values.get(param.name or "")
        if isinstance(param, click.Argument) and param.required:
            assert value is not None, f"{context.command_path}: {param.name} is missing"
        if isinstance(value, str) and "$" not in value and not isinstance(param.type, click.File | click.Path):
            param.type_cast_value(context, value)
