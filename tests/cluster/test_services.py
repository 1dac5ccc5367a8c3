"""The whole of docker/compose.yaml as plain processes: each service's command, environment and folder as they stand
there, with the database of the test instead of the service `database`, a free port for each that listens, and a
folder for a volume. Prometheus and Grafana are left out."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.compose import DOCKER, EXAMPLE, IMAGE_ENV, ROOT, SERVICES, WORKERS, argv

_TRIAL = 240  # seconds within which a process must have done its part, on a machine that has much else to do
_PORTS = ("PGPARK_WORKER_METRICS_PORT", "PGPARK_SERVE_PORT")


@dataclass
class Whole:
    """What the services have in common: a database, and a folder that is the volume of tokens."""

    dsn: str
    tokens: Path

    @contextmanager
    def process(self, name: str, **changed: str) -> Iterator[subprocess.Popen[str]]:
        """A service as a plain process."""
        service = SERVICES[name]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PGPARK_")}
        environment |= {key: value for key, value in IMAGE_ENV.items() if key not in {"PATH", *_PORTS}}
        environment |= {key: value for key, value in service["environment"].items() if key != "PGPASSWORD"}
        environment |= {"PGPARK_DSN": self.dsn, "PATH": path, "PYTHONPATH": str(ROOT), **changed}
        folder = {"/example": EXAMPLE, "/var/lib/pgpark": self.tokens, None: DOCKER}[service.get("working_dir")]
        process = subprocess.Popen(
            argv(service), cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        watchdog = threading.Timer(_TRIAL, process.kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()
            process.communicate()

    def complete(self, name: str) -> str:
        """Runs a service that ends; returns what it printed."""
        with self.process(name) as process:
            output, errors = process.communicate()
        assert process.returncode == 0, f"{name}: {errors}"
        return output


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _healthy(**ports: str) -> bool:
    """The health check of the image, in the container that listens there."""
    return subprocess.run([sys.executable, DOCKER / "alive.py"], env=ports, capture_output=True).returncode == 0


def _read_until(lines: IO[str] | None, words: str) -> None:
    assert lines is not None
    assert any(words in line for line in lines), f"it ended without {words}"


def _get(port: str, path: str, token: str | None = None) -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_the_services_do_together_what_compose_says(empty_databases: Callable[[], str], tmp_path: Path) -> None:
    whole = Whole(empty_databases(), tmp_path)
    whole.complete("migrate")
    whole.complete("metrics-token")
    token = (tmp_path / "metrics-token").read_text().strip()
    whole.complete("metrics-token")  # the next `up` leaves it as it is
    assert (tmp_path / "metrics-token").read_text().strip() == token

    names = [name for name, worker in WORKERS.items() for _ in range(worker["deploy"].get("replicas", 1))]
    assert len(names) == 3
    with ExitStack() as stack:
        ports = [_free_port() for _ in names]
        workers = [
            stack.enter_context(whole.process(name, PGPARK_WORKER_METRICS_PORT=port))
            for name, port in zip(names, ports, strict=True)
        ]
        at = _free_port()
        gateway = stack.enter_context(whole.process("gateway", PGPARK_SERVE_PORT=at))
        for worker, port in zip(workers, ports, strict=True):
            _read_until(worker.stderr, "waits for tasks of pool example")
            assert _healthy(PGPARK_WORKER_METRICS_PORT=port)
        _read_until(gateway.stdout, "http://")
        assert _healthy(PGPARK_SERVE_PORT=at)

        results = [json.loads(line) for line in whole.complete("submit").splitlines()]

        assert _get(at, "/ready")[0] == 200
        assert _get(at, "/metrics")[0] == 401
        status, metrics = _get(at, "/metrics", token)
        assert status == 200
        assert 'pgpark_capacity_units{pool="example"} 8.0' in metrics
        for port in ports:
            assert "pgpark_worker_" in _get(port, "/metrics")[1]
        assert _get(at, "/")[0] == 200  # the page

        for process in (*workers, gateway):
            process.terminate()
        assert [process.wait(_TRIAL) for process in (*workers, gateway)] == [0] * 4

    tasks = [json.loads(line) for line in (EXAMPLE / "tasks.jsonl").read_text().splitlines()]
    assert [result["words"] for result in results] == [len(task["payload"]["text"].split()) for task in tasks]
    small = int(WORKERS["worker-small"]["environment"]["PGPARK_WORKER_UNITS"])
    (large,) = (worker.pid for name, worker in zip(names, workers, strict=True) if name == "worker-large")
    for task, result in zip(tasks, results, strict=True):
        assert task.get("units", 1) <= small or result["pid"] == large
