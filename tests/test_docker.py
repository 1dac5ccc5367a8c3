"""docker/: what can be held without a Docker engine. The files agree with each other, with the command line as it is,
and with the package; and the services do together what compose.yaml says, run as plain processes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

import click
import pytest
import yaml

from pgpark.cli import cli
from tests.conftest import CONTAINER_IMAGE

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
EXAMPLE = DOCKER / "example"
COMPOSE = DOCKER / "compose.yaml"
IMAGE = "pgpark:local"
_SECS = {"": 1, "s": 1, "m": 60}
_STOP_SECS = 4  # what a worker needs beyond its grace: programs that do not end when asked, and putting tasks back
_TRIAL = 60  # seconds within which a process of the example must have done its part


class Instruction(NamedTuple):
    """An instruction of the Dockerfile and the stage that it is in, counted from 1."""

    stage: int
    name: str
    value: str


class Command(NamedTuple):
    """A command line of pgpark that stands in a file below docker/, and its surroundings."""

    where: str
    arguments: list[str]
    environment: dict[str, str]


def _filled(value: Any) -> Any:
    """A value of compose.yaml as Compose fills it in when none of its variables is set."""
    if isinstance(value, dict):
        return {key: _filled(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"\$\{(\w+):-([^}]*)\}|\$\$", lambda found: found[2] if found[1] else "$", value)
    return value


def _instructions() -> list[Instruction]:
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    found: list[Instruction] = []
    stage = 0
    for line in text.replace("\\\n", " ").splitlines():
        name, _, value = line.strip().partition(" ")
        stage += name == "FROM"
        if name:
            found.append(Instruction(stage, name, value.strip()))
    return found


def _last(name: str) -> str:
    """The value of the last such instruction in the stage that becomes the image."""
    image = max(instruction.stage for instruction in DOCKERFILE)
    return [found.value for found in DOCKERFILE if found.stage == image and found.name == name][-1]


CONFIG: dict[str, Any] = _filled(yaml.safe_load(COMPOSE.read_text()))
SERVICES: dict[str, Any] = CONFIG["services"]
DOCKERFILE = _instructions()
IMAGE_ENV = dict(word.split("=", 1) for word in shlex.split(_last("ENV")))
OURS = {name: service for name, service in SERVICES.items() if service.get("image") == IMAGE}
WORKERS = {name: service for name, service in OURS.items() if service["command"][0] == "worker"}


def _argv(service: dict[str, Any]) -> list[str]:
    """What the container of a service runs."""
    return [*service.get("entrypoint", json.loads(_last("ENTRYPOINT"))), *service["command"]]


def _scripted(text: str) -> Iterator[list[str]]:
    """The arguments of each pgpark in a shell script, one line of it at a time; variables stand for a number."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        arguments: list[str] | None = None
        for word in [*words, ";"]:
            if set(word) <= set("();<>|&"):
                if arguments is not None:
                    yield arguments
                arguments = None
            elif word in {"pgpark", IMAGE} and arguments is None:
                arguments = []
            elif arguments is not None:
                arguments.append("1" if word.startswith("$") else word)


def _commands() -> Iterator[Command]:
    for name, service in OURS.items():
        argv, environment = _argv(service), IMAGE_ENV | service["environment"]
        scripts = [argv[-1]] if argv[0] == "sh" else [shlex.join(argv)]
        for script in scripts:
            for arguments in _scripted(script):
                yield Command(f"compose.yaml: {name}", arguments, environment)
    yield Command("Dockerfile: CMD", [*json.loads(_last("ENTRYPOINT")), *json.loads(_last("CMD"))][1:], IMAGE_ENV)
    health_check = json.loads(_last("HEALTHCHECK").partition("CMD ")[2])
    yield Command("Dockerfile: HEALTHCHECK", health_check[1:], IMAGE_ENV)
    for block in re.findall(r"^```sh\n(.*?)^```", (DOCKER / "README.md").read_text(), re.DOTALL | re.MULTILINE):
        for arguments in _scripted(re.sub(r"docker build .*", "", block)):
            yield Command("README.md", arguments, IMAGE_ENV)


COMMANDS = list(_commands())


def _service(command: Command) -> str:
    return command.where.partition(": ")[2]


def _parse(command: Command) -> dict[str, Any]:
    """What the real command line makes of the arguments; raises click.UsageError where it does not take them."""
    context = click.Context(cli, info_name="pgpark", auto_envvar_prefix="PGPARK")
    found: click.Command = cli
    arguments = list(command.arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(EXAMPLE)
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


def _variables(command: click.Command, prefix: str) -> Iterator[str]:
    """Every variable that an option of a command, or of those below it, is read from."""
    for parameter in command.params:
        yield from [parameter.envvar] if isinstance(parameter.envvar, str) else parameter.envvar or []
        if isinstance(parameter, click.Option):
            yield f"{prefix}_{parameter.name}".upper()
    for name, inner in command.commands.items() if isinstance(command, click.Group) else ():
        yield from _variables(inner, f"{prefix}_{name}")


def _secs(duration: str) -> float:
    return sum(float(number) * _SECS[unit] for number, unit in re.findall(r"([\d.]+)([sm]?)", duration))


def _copied() -> list[str]:
    """The paths in the repository that the Dockerfile copies."""
    copies = [shlex.split(found.value) for found in DOCKERFILE if found.name in {"COPY", "ADD"}]
    return [source for words in copies if not words[0].startswith("--from") for source in words[:-1]]


# -- the files agree ------------------------------------------------------------------------------------------------


def test_every_service_runs_a_pinned_image_or_the_one_built_here() -> None:
    assert SERVICES["database"]["image"] == CONTAINER_IMAGE
    assert set(SERVICES) - set(OURS) == {"database"}
    for service in OURS.values():
        context = DOCKER / service["build"]["context"]
        assert context.resolve() == ROOT
        assert (context / service["build"]["dockerfile"]).resolve() == DOCKER / "Dockerfile"


def test_every_dependency_names_a_service_and_a_condition_that_can_come_true() -> None:
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            assert other in SERVICES, f"{name} depends on {other}, which is no service"
            assert how["condition"] in {"service_started", "service_healthy", "service_completed_successfully"}
            if how["condition"] == "service_healthy":
                assert SERVICES[other]["healthcheck"]["test"], f"{other} has no health check"
            if how["condition"] == "service_completed_successfully":
                assert "restart" not in SERVICES[other], f"{other} would start again instead of being complete"


def test_nothing_works_before_the_database_is_healthy_and_migrated() -> None:
    assert SERVICES["migrate"]["depends_on"] == {"database": {"condition": "service_healthy"}}
    for name in (*WORKERS, "submit"):
        assert SERVICES[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}


def test_a_service_that_stays_has_a_health_check_and_one_that_ends_has_none() -> None:
    for name, service in SERVICES.items():
        check = service.get("healthcheck", {"of the image": _last("HEALTHCHECK")} if name in OURS else {})
        assert check.get("disable", False) is ("restart" not in service), f"{name}: {check}"
        assert check


def test_the_health_check_of_the_database_does_not_see_the_server_that_sets_it_up() -> None:
    test = SERVICES["database"]["healthcheck"]["test"]
    assert test[:2] == ["CMD", "pg_isready"]
    assert test[test.index("-h") + 1] == "127.0.0.1"
    assert test[test.index("-U") + 1] == SERVICES["database"]["environment"]["POSTGRES_USER"]
    assert test[test.index("-d") + 1] == SERVICES["database"]["environment"]["POSTGRES_DB"]


def test_the_data_of_the_database_is_in_a_named_volume() -> None:
    volume, _, target = SERVICES["database"]["volumes"][0].partition(":")
    assert volume in CONFIG["volumes"]
    assert target == "/var/lib/postgresql"  # PostgreSQL 18 keeps its data in a folder of its own below this


def test_the_password_and_the_dsn_have_one_place_each() -> None:
    database = SERVICES["database"]["environment"]
    for service in OURS.values():
        given = dict(word.split("=") for word in service["environment"]["PGPARK_DSN"].split())
        assert given == {"host": "database", "user": database["POSTGRES_USER"], "dbname": database["POSTGRES_DB"]}
        assert service["environment"]["PGPASSWORD"] == database["POSTGRES_PASSWORD"]


def test_compose_starts_without_a_variable_being_set() -> None:
    text = re.sub(r"#.*", "", COMPOSE.read_text())
    assert len(re.findall(r"\$\{\w+:-[^}]+\}", text)) == text.replace("$$", "").count("$")


def test_nothing_is_published_beyond_this_machine() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"database"}
    assert all(str(port).startswith("127.0.0.1:") for port in published["database"])


def test_files_that_services_mount_exist() -> None:
    for service in OURS.values():
        for volume in service.get("volumes", []):
            source, target, mode = volume.split(":")
            assert (DOCKER / source).is_dir()
            assert (target, mode) == (service["working_dir"], "ro")


# -- they agree with the command line -------------------------------------------------------------------------------


def test_commands_are_found_in_every_file() -> None:
    places = {command.where for command in COMMANDS}
    assert places == {f"compose.yaml: {name}" for name in OURS} | {
        "Dockerfile: CMD",
        "Dockerfile: HEALTHCHECK",
        "README.md",
    }


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.where}: {shlex.join(command.arguments)}")
def test_pgpark_understands(command: Command) -> None:
    _parse(command)


@pytest.mark.parametrize("file", ["compose.yaml", "Dockerfile", "README.md"])
def test_every_variable_of_ours_is_read_by_an_option(file: str) -> None:
    used = set(re.findall(r"\bPGPARK_\w+", (DOCKER / file).read_text()))
    assert used
    assert used <= set(_variables(cli, "PGPARK"))


def test_there_are_two_workers_of_different_size_that_say_what_they_run() -> None:
    settings = {name: _parse(command) for command in COMMANDS if (name := _service(command)) in WORKERS}
    assert len({values["units"] for values in settings.values()}) == 2
    for name, values in settings.items():
        assert (values["handler"] is None) is not (values["command"] is None), name
        assert values["name"] is None, f"{name} has a name of its own, so it cannot be scaled"


def test_docker_waits_longer_than_a_worker_needs_to_stop() -> None:
    waits = {name: _secs(service["stop_grace_period"]) for name, service in WORKERS.items()}
    waits["CMD"] = 10  # the default of `docker stop`
    for command in COMMANDS:
        if (name := _service(command)) in waits:
            assert waits.pop(name) > _parse(command)["grace"] + _STOP_SECS, name
    assert not waits


def test_the_readme_names_services_that_exist() -> None:
    text = (DOCKER / "README.md").read_text()
    for line in re.findall(r"^docker compose .*", text, re.MULTILINE):
        words = shlex.split(line, comments=True)
        assert (ROOT / words[words.index("-f") + 1]) == COMPOSE
        names = [word.partition("=")[0] for word in words if word.startswith(("worker", "submit", "migrate"))]
        assert set(names) <= set(SERVICES), line
    assert set(re.findall(r"127\.0\.0\.1:(\d+)/", text)) == {SERVICES["database"]["ports"][0].split(":")[1]}


# -- they agree with the package ------------------------------------------------------------------------------------


def test_the_image_runs_as_a_user_who_is_not_root() -> None:
    assert int(_last("USER")) > 0  # a number, so that Kubernetes can tell
    assert f"useradd --uid {_last('USER')} " in _last("RUN")


def test_the_image_stops_on_sigterm_and_shows_its_log_at_once() -> None:
    assert _last("STOPSIGNAL") == "SIGTERM"
    for name in ("ENTRYPOINT", "CMD"):  # not through a shell, which would keep the signal to itself
        assert isinstance(json.loads(_last(name)), list)


def test_the_image_is_built_without_what_only_the_build_needs() -> None:
    stages = [found.value for found in DOCKERFILE if found.name == "FROM"]
    assert stages[0].endswith(" AS build")
    assert stages[0].removesuffix(" AS build") == stages[-1]
    assert not any(found.name == "COPY" for found in DOCKERFILE if found.stage == len(stages))
    assert "--no-index" in _last("RUN")


def test_docker_sees_what_it_copies_and_little_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == set(_copied())
    assert {line for line in lines[1:] if not line.startswith("!")} == {"**/__pycache__", "**/*.pyc"}


def test_what_is_copied_is_enough_to_build_the_wheel(tmp_path: Path) -> None:
    for name in _copied():
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel"], cwd=tmp_path, check=True)
    (wheel,) = (tmp_path / "dist").glob("pgpark-*.whl")
    inside = set(ZipFile(wheel).namelist())
    expected = {f"pgpark/sql/{path.relative_to(ROOT / 'sql').as_posix()}" for path in (ROOT / "sql").rglob("*.sql")}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "pgpark").rglob("*.py")}
    assert expected <= inside


# -- they do what they say ------------------------------------------------------------------------------------------


@contextmanager
def _process(name: str, dsn: str) -> Iterator[subprocess.Popen[str]]:
    """A service as a plain process: its command, its environment and its folder, but the database of the test."""
    service = SERVICES[name]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PGPARK_")}
    environment |= IMAGE_ENV | {key: value for key, value in service["environment"].items() if key != "PGPASSWORD"}
    environment |= {"PGPARK_DSN": dsn, "PATH": path, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        _argv(service),
        cwd=EXAMPLE if "working_dir" in service else DOCKER,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    watchdog = threading.Timer(_TRIAL, process.kill)
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def _complete(name: str, dsn: str) -> str:
    """Runs a service that ends; returns what it printed."""
    with _process(name, dsn) as process:
        output, errors = process.communicate()
    assert process.returncode == 0, f"{name}: {errors}"
    return output


def test_the_services_do_together_what_compose_says(empty_databases: Callable[[], str]) -> None:
    dsn = empty_databases()
    _complete("migrate", dsn)
    with ExitStack() as stack:
        workers = {name: stack.enter_context(_process(name, dsn)) for name in WORKERS}
        for worker in workers.values():
            assert worker.stderr is not None
            assert "waits for tasks of pool example" in worker.stderr.readline()
        results = [json.loads(line) for line in _complete("submit", dsn).splitlines()]
        for worker in workers.values():
            worker.terminate()
        assert [worker.wait(_TRIAL) for worker in workers.values()] == [0, 0]

    tasks = [json.loads(line) for line in (EXAMPLE / "tasks.jsonl").read_text().splitlines()]
    assert [result["words"] for result in results] == [len(task["payload"]["text"].split()) for task in tasks]
    small = int(WORKERS["worker-small"]["environment"]["PGPARK_WORKER_UNITS"])
    for task, result in zip(tasks, results, strict=True):
        assert task.get("units", 1) <= small or result["pid"] == workers["worker-large"].pid


def test_docker_compose_accepts_the_file() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode != 0:
        pytest.skip("needs the client `docker compose`")
    done = subprocess.run([docker, "compose", "-f", COMPOSE, "config", "-q"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
