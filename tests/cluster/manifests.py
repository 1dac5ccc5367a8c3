"""What `kubectl kustomize` makes of docker/kubernetes/: needs the client, no cluster."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

KUBERNETES = Path(__file__).resolve().parent.parent.parent / "docker" / "kubernetes"
BUILDS = ("base", "example")

Resource = dict[str, Any]


@cache
def built(name: str) -> tuple[Resource, ...]:
    """The resources of a kustomization; skips the test where there is no kubectl."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        assert "PGPARK_TEST_NEEDS_TOOLS" not in os.environ, "kubectl is missing"
        pytest.skip("needs kubectl")
    done = subprocess.run([kubectl, "kustomize", KUBERNETES / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # deprecations
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(name: str, kind: str) -> dict[str, Resource]:
    """The resources of one kind, by name."""
    return {found["metadata"]["name"]: found for found in built(name) if found["kind"] == kind}


def the(name: str, kind: str, which: str) -> Resource:
    """One resource."""
    return of_kind(name, kind)[which]


def templates(name: str) -> Iterator[tuple[str, Resource]]:
    """Every pod template: the name of what makes such pods, and its spec."""
    for found in built(name):
        if "template" in found.get("spec", {}):
            yield found["metadata"]["name"], found["spec"]["template"]["spec"]


def environment(name: str, container: Resource) -> dict[str, str]:
    """The environment of a container: of ConfigMaps as they are, of Secrets a stand-in."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        found |= the(name, "ConfigMap", source["configMapRef"]["name"])["data"]
    for variable in container.get("env", []):
        found[variable["name"]] = variable.get("value", "secret")
    return found
