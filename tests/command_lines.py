"""Command lines of pgpark that stand in files (compose.yaml, manifests, READMEs), held against the command line as it
is."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from pgpark.cli import cli


class Command(NamedTuple):
    """A command line of pgpark, where it stands, and the environment that it gets."""

    where: str
    arguments: list[str]
    environment: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.arguments)}"


def scripted(text: str, names: Collection[str] = ("pgpark",)) -> Iterator[list[str]]:
    """The arguments of each pgpark in a shell script, one line of it at a time; variables stand for a number. `names`
    are the words that are pgpark."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        arguments: list[str] | None = None
        for word in [*words, ";"]:
            if set(word) <= set("();<>|&"):
                if arguments is not None:
                    yield arguments
                arguments = None
            elif word in names and arguments is None:
                arguments = []
            elif arguments is not None:
                arguments.append("1" if word.startswith("$") else word)


def in_markdown(path: Path) -> Iterator[str]:
    """The shell blocks of a document."""
    yield from re.findall(r"^```sh\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def parse(command: Command, folder: Path) -> dict[str, Any]:
    """What the real command line makes of the arguments, run in `folder`; raises click.UsageError where it does not
    take them."""
    context = click.Context(cli, info_name="pgpark", auto_envvar_prefix="PGPARK")
    found: click.Command = cli
    arguments = list(command.arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in [name for name in os.environ if name.startswith("PGPARK_")]:
            patch.delenv(name)
        for name, value in command.environment.items():
            patch.setenv(name, value)
        while isinstance(found, click.Group):
            assert arguments and arguments[0] in found.commands, f"no command of {context.command_path}: {arguments}"
            name = arguments.pop(0)
            found = found.commands[name]
            if isinstance(found, click.Group):
                context = click.Context(found, parent=context, info_name=name)
        with found.make_context(name, arguments, parent=context) as context:
            return context.params


def variables(command: click.Command = cli, prefix: str = "PGPARK") -> Iterator[str]:
    """Every variable that an option of a command, or of those below it, is read from."""
    for parameter in command.params:
        yield from [parameter.envvar] if isinstance(parameter.envvar, str) else parameter.envvar or []
        if isinstance(parameter, click.Option):
            yield f"{prefix}_{parameter.name}".upper()
    for name, inner in command.commands.items() if isinstance(command, click.Group) else ():
        yield from variables(inner, f"{prefix}_{name}")
