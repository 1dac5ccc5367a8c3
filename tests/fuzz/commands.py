"""Every command and every option, found in the click group, so that a new one cannot be forgotten.

Commands run in this process by way of `cli.run`, which the entry point calls; one in a hundred as a process of its own,
`python -m pgpark`. What would not end, or would start programs, is replaced at its outermost call, so that all that
stands before is tried (tests/cli, tests/gateway and tests/test_worker.py try the rest): the loops of `worker`,
`notifier run` and `serve`, the measuring of `bench`, the show of `demo`, the embedded server (its place is taken by the
database of the fuzz), and waiting for more than a moment in `result --wait`, `--follow`, `stats --watch` and `top`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

import click
from hypothesis import strategies as st

from pgpark import cli
from pgpark.client import Client
from tests.fuzz.documented import EXIT_CODES
from tests.fuzz.parsers import ENVIRONMENT, YAML_TEXTS, files, json_files
from tests.fuzz.values import (
    INTS,
    PLAUSIBLE,
    Known,
    Pick,
    drawn,
    json_text,
    names,
    odd_json,
    picks,
    task_documents,
    texts,
)
from tests.soak.findings import Findings

LONGEST_SECS = 60
LONGEST_LINE = 2100
MOMENT = 0.02
OWN_PROCESS = 100  # one in so many

Path_ = tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """The words of a command line. A File among them is written when it is run."""

    path: Path_
    words: tuple[Any, ...]
    stdin: str
    environment: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class File:
    name: str
    text: str


class HungError(BaseException):
    """A command did not end in time; no error that the command line could take for its own."""


def leaves(group: click.Group, path: Path_ = ()) -> list[tuple[Path_, click.Command]]:
    """The commands of a group and of the groups in it, each with the words that lead to it."""
    found = []
    for name, command in group.commands.items():
        inner = (*path, name)
        found += leaves(command, inner) if isinstance(command, click.Group) else [(inner, command)]
    return found


# -- what is drawn ---------------------------------------------------------------------------------------------------

json_lines = st.one_of(
    task_documents.map(lambda tasks: "\n".join(map(json.dumps, tasks))),
    st.lists(odd_json.map(json_text), max_size=3).map("\n".join),
    texts,
)
config_texts = st.one_of(files.map(json_text), json_files, st.sampled_from(YAML_TEXTS), texts)
existing = st.sampled_from(["~nobody", "/", "/nonesuch", "", ".", "/dev/null", "x" * 300, "-", "/proc/self/mem"])
# None of a server elsewhere: a name that is looked up, or a host that does not answer, costs seconds.
odd_dsns = st.sampled_from(
    [
        "", "x", "=", "host=/nonesuch", "postgresql://[", "host='", "postgresql://u:p%zz@/x", "port=99999999 host=/tmp",
        "sslmode=x", "dbname=x host=/", "service=nonesuch", "postgresql:///?host=/nonesuch&x=1",
        "connect_timeout=x host=/tmp",
    ]
)  # fmt: skip
handlers = st.sampled_from(
    [
        "tests.handlers:echo", "nonesuch:f", "tests.handlers:", ":", "", "a:b:c", ".:.",
        "tests.handlers:not_a_function",
    ]
)  # fmt: skip
programs = st.sampled_from(["cat", "nonesuch", "", "'", "cat 'x", "/", "\\"])
assignments = st.sampled_from(
    [
        "max_queue_depth=5", "retry.max_attempts=3", "x", "=", "a.b.c=1", "tenants={}", "queue.type=yaque", "a..b=1",
        "max_units=1e400", "lease_secs=NaN", "tenants.t.weight=2", "mailbox.notifier.base_url=http://x", "retry=",
        "cost_model=" + "[" * 5000, "queue=null",
    ]
)  # fmt: skip
spans = st.sampled_from(
    [
        "+5s", "+90", "+1h", "2030-01-31T12:00Z", "+1e9d", "+99999999999999d", "+", "-5s", "now", "infinity", "epoch",
        "today", "10:00",
    ]
)  # fmt: skip

# By the name of the option or argument, for those that are no plain values.
BY_NAME: dict[str, st.SearchStrategy[Any]] = {
    "pool": names,
    "name": names,
    "payload": st.one_of(PLAUSIBLE["payload"].map(json.dumps), odd_json.map(json_text)),
    "task_id": picks("task_id"),
    "message_ids": picks("message_id"),
    "callback_ids": picks("callback_id"),
    "role": picks("role"),
    "deadline": spans,
    "run_at": spans,
    "since": spans,
    "dsn": odd_dsns,
    "handler": handlers,
    "command": programs,
    "assignments": assignments,
    "file": st.one_of(
        st.builds(
            File,
            st.sampled_from(["tasks.jsonl", "pools.json", "pools.yaml", "pools"]),
            st.one_of(json_lines, config_texts),
        ),
        existing,
    ),
    "config_file": st.one_of(
        st.builds(File, st.sampled_from(["pool.json", "pool.yml", "pool"]), config_texts), existing
    ),
    "pools_file": st.one_of(st.builds(File, st.sampled_from(["pools.json", "pools.yaml"]), config_texts), existing),
    "model": st.one_of(st.builds(File, st.just("config.json"), json_files), existing),
    "home": existing,
}


@cache
def values(parameter: click.Parameter) -> st.SearchStrategy[Any]:
    """What is given for a parameter: by its name, else by its type."""
    kind = parameter.type
    if isinstance(kind, click.Choice):
        right = st.sampled_from(list(kind.choices))
    elif isinstance(kind, click.types.IntParamType):
        right = st.sampled_from([1, 2, 8, 20])
    elif isinstance(kind, click.types.FloatParamType):
        right = st.sampled_from([0.01, 0.5, 1, 2])
    else:
        right = PLAUSIBLE.get(parameter.name or "", texts)
    odd = st.one_of(
        texts, st.sampled_from([*INTS, 2**63, 10**40, "nan", "inf", "-inf", "1e400", "0x1", "1_0", "\udcff"])
    )
    right = BY_NAME.get(parameter.name or "", right)
    return st.one_of(right, right, right, odd)


@st.composite
def commands(draw: st.DrawFn, known: Sequence[tuple[Path_, click.Command]]) -> Command:
    """Command lines: the arguments that a command must have mostly there, each option now and then."""
    path, command = draw(st.sampled_from(known))
    words: list[Any] = []
    environment = []
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            if draw(st.sampled_from([True] * 9 + [False])):
                words += (
                    draw(st.lists(values(parameter), max_size=3))
                    if parameter.nargs == -1
                    else [draw(values(parameter))]
                )
            continue
        assert isinstance(parameter, click.Option)
        likely = parameter.required or parameter.name in {"as_json", "file"}
        if not draw(
            st.sampled_from([likely, likely, False, False, True] if parameter.name != "dsn" else [False] * 9 + [True])
        ):
            continue
        if parameter.is_flag:
            words.append(draw(st.sampled_from([*parameter.opts, *parameter.secondary_opts])))
        elif parameter.envvar and draw(st.sampled_from([False] * 5 + [True])):
            environment.append((str(parameter.envvar), str(draw(values(parameter)))))
        else:
            words += [parameter.opts[0], draw(values(parameter))]
    if draw(st.sampled_from([False] * 20 + [True])):
        words.append(draw(texts))
    return Command(path, tuple(words), draw(json_lines), tuple(environment))


# -- running ---------------------------------------------------------------------------------------------------------


class Shell:
    """Runs commands on a database and judges what they print and exit with."""

    def __init__(self, dsn: str, known: Known, folder: Path, findings: Findings) -> None:
        self.exits: Counter[int] = Counter()
        self._dsn, self._known, self._folder, self._findings = dsn, known, folder, findings

    def run(self, count: int, seed: int) -> None:
        """So many command lines."""
        with self._replaced():
            for number, command in enumerate(drawn(commands(leaves(cli.cli)), count, seed)):
                arguments = [*command.path, *(self._word(word) for word in command.words)]
                stdin = command.stdin.replace("\0", "")
                environment = {name: value.replace("\0", "") for name, value in command.environment}
                # What would go on for long in a process of its own is told no database.
                own = number % OWN_PROCESS == 0 and command.path[0] not in {
                    "worker",
                    "notifier",
                    "bench",
                    "demo",
                    "db",
                    "stats",
                    "result",
                }
                ran = self._in_own_process if own else self._in_this_process
                try:
                    code, out, err = ran(arguments, stdin, environment)
                    wrong = self._judged(arguments, code, out, err)
                    self.exits[code] += 1
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    wrong = f"{type(error).__name__}: {str(error)[:100]}"
                if wrong is not None:
                    variables = "".join(f"{name}={shlex.quote(value)} " for name, value in environment.items())
                    line = f"{variables}pgpark {shlex.join(arguments)!r} <<< {stdin[:200]!r}"
                    self._findings.add(f"pgpark {' '.join(command.path)}: {wrong}", f"{line:.3000} -- seed {seed}")

    def _word(self, word: Any) -> str:
        if isinstance(word, File):
            file = self._folder / word.name
            file.write_text(word.text, encoding="utf-8", errors="surrogatepass")
            return str(file)
        return str(self._known.found(word) if isinstance(word, Pick) else word).replace("\0", "")

    def _in_this_process(self, arguments: list[str], stdin: str, environment: dict[str, str]) -> tuple[int, str, str]:
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace") for _ in range(2))
        given = self._folder / "stdin"
        given.write_text(stdin, encoding="utf-8", errors="replace")
        with (
            given.open(encoding="utf-8") as read,
            mock.patch.dict(os.environ, environment),
            mock.patch.object(sys, "stdin", read),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            _time_limit(),
        ):
            code = cli.run(arguments)
            return code, _printed(out), _printed(err)

    def _in_own_process(self, arguments: list[str], stdin: str, environment: dict[str, str]) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "pgpark", *(word.encode(errors="surrogateescape") for word in arguments)],
            input=stdin.encode(errors="replace"),
            env=os.environ | environment,
            capture_output=True,
            timeout=LONGEST_SECS,
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def _judged(self, arguments: list[str], code: int, out: str, err: str) -> str | None:
        lines = err.splitlines()
        if code not in EXIT_CODES:
            return f"exit code {code}"
        if "Traceback" in out + err:
            return "a traceback"
        if code in {2, 3}:
            if out:
                return f"exit code {code} with something on standard output: {out[:80]!r}"
            if not lines or not lines[-1].startswith(("pgpark", "  ")) or len(lines[-1]) > LONGEST_LINE:
                return f"exit code {code} without one clear line: {err[:80]!r} ... {err[-80:]!r}"
        elif "--json" in arguments and not {"-h", "--help", "--dump-sql"} & set(arguments):
            with contextlib.suppress(ValueError):
                for line in filter(None, out.split("\n")):
                    json.loads(line)
                return None
            return f"something else than JSON with --json: {out[:80]!r}"
        return None

    @contextlib.contextmanager
    def _replaced(self) -> Iterator[None]:
        """Commands use the database of the fuzz, and nothing of the environment; what does not end is replaced."""

        @contextlib.contextmanager
        def use(_server: Any) -> Iterator[str]:
            yield self._dsn

        def interrupted(_secs: float) -> NoReturn:
            raise KeyboardInterrupt

        def briefly(real: Any) -> Any:
            def call(client: Client, task_id: int, timeout: float | None = None) -> Any:
                longer = timeout is None or timeout > MOMENT
                return real(client, task_id, MOMENT if longer else timeout)

            return call

        kept = {name: value for name, value in os.environ.items() if not name.startswith("PGPARK_")}
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                mock.patch.dict(
                    os.environ,
                    kept | ENVIRONMENT | {"PGPARK_DSN": self._dsn, "PGPARK_HOME": str(self._folder)},
                    clear=True,
                )
            )
            for target, replacement in {
                "pgpark.embedded.EmbeddedServer.use": use,
                "pgpark.embedded.EmbeddedServer.keep": lambda _: None,
                "pgpark.embedded.EmbeddedServer.stop": lambda _, force=False: False,
                "pgpark.cli.work.Worker.run": lambda _: True,
                "pgpark.cli.notifier.Notifier.run": lambda _: None,
                "pgpark.gateway.server._Server.run": lambda *_, **__: None,
                "pgpark.cli.show.time": SimpleNamespace(sleep=interrupted),
                "pgpark.cli.top.time": SimpleNamespace(sleep=interrupted, monotonic=time.monotonic),
                "pgpark.cli.audit.time": SimpleNamespace(sleep=interrupted),
                "pgpark.cli.bench.measure": lambda *_: [],
                "pgpark.cli.demo._workers": lambda *_: contextlib.nullcontext({}),
                "pgpark.cli.demo._watch": lambda *_: interrupted(0),
                "pgpark.client.Client.wait": briefly(Client.wait),
                "pgpark.client.Client.stream": briefly(Client.stream),
            }.items():
                stack.enter_context(mock.patch(target, replacement))
            yield


def _printed(stream: io.TextIOWrapper) -> str:
    stream.seek(0)
    return stream.read()


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def hung(_number: int, _frame: FrameType | None) -> NoReturn:
        raise HungError(f"not over after {LONGEST_SECS} seconds")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(LONGEST_SECS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
