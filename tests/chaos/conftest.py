"""How long things are broken, and servers to break."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.chaos.postmaster import Postmaster


@pytest.fixture
def minutes(pytestconfig: pytest.Config) -> float:
    return float(pytestconfig.getoption("--chaos-minutes"))


@pytest.fixture
def new_folder() -> Iterator[Callable[[], Path]]:
    """Makes folders, in memory where there is some; removed after the test."""
    made: list[Path] = []

    def make() -> Path:
        made.append(
            Path(tempfile.mkdtemp(prefix="pgpark-chaos-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        )
        return made[-1]

    yield make
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def ends(new_folder: Callable[[], Path]) -> Iterator[ExitStack]:  # noqa: ARG001
    """What is to be done after the test, before its folders go."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def new_server(new_folder: Callable[[], Path], ends: ExitStack) -> Callable[..., Postmaster]:
    """Makes servers, started; removed after the test."""

    def make(**settings: str) -> Postmaster:
        server = Postmaster(new_folder(), **settings)
        ends.callback(server.remove)
        return server.create().start()

    return make


def required(tool: str) -> str:
    """The path of a program without which a scenario cannot be: CI must have it, others may do without."""
    path = shutil.which(tool)
    if path is None:
        (pytest.fail if os.environ.get("PGPARK_TEST_NEEDS_TOOLS") else pytest.skip)(f"{tool} is not installed")
    return path
