"""docker/compose.yaml and docker/Dockerfile, read: what each container of the whole would run, and with what."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
EXAMPLE = DOCKER / "example"
COMPOSE = DOCKER / "compose.yaml"
IMAGE = "pgpark:local"
ENTRY = ["tini", "-s", "--"]  # what comes before pgpark in the entry point of the image


class Instruction(NamedTuple):
    """An instruction of the Dockerfile and the stage that it is in, counted from 1."""

    stage: int
    name: str
    value: str


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


def last(name: str) -> str:
    """The value of the last such instruction in the stage that becomes the image."""
    image = max(instruction.stage for instruction in DOCKERFILE)
    return [found.value for found in DOCKERFILE if found.stage == image and found.name == name][-1]


def argv(service: dict[str, Any]) -> list[str]:
    """What the container of a service of ours runs, without what stands before pgpark."""
    entry = service.get("entrypoint", json.loads(last("ENTRYPOINT")))
    return [*(entry[len(ENTRY) :] if entry[: len(ENTRY)] == ENTRY else entry), *service["command"]]


def copied() -> list[str]:
    """The paths in the repository that the Dockerfile copies."""
    copies = [shlex.split(found.value) for found in DOCKERFILE if found.name in {"COPY", "ADD"}]
    return [source for words in copies if not words[0].startswith("--from") for source in words[:-1]]


DOCKERFILE = _instructions()
IMAGE_ENV = dict(word.split("=", 1) for word in shlex.split(last("ENV")))
CONFIG: dict[str, Any] = _filled(yaml.safe_load(COMPOSE.read_text()))
SERVICES: dict[str, Any] = CONFIG["services"]
OURS = {name: service for name, service in SERVICES.items() if service.get("image") == IMAGE}
WORKERS = {name: service for name, service in OURS.items() if service["command"][0] == "worker"}
