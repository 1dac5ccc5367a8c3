"""Each kept release, unpacked, and an empty database of it."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from tests.upgrades.releases import KEPT, Release


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each kept release; two of them for tests that take long."""
    if "release" in metafunc.fixturenames:
        few = metafunc.definition.get_closest_marker("oldest_and_newest") and not metafunc.config.getoption(
            "every_release"
        )
        metafunc.parametrize("release", [KEPT[0], KEPT[-1]] if few else KEPT, indirect=True, scope="session")


@pytest.fixture(scope="session")
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Release:
    return Release.unpacked(request.param, tmp_path_factory.mktemp(f"release-{request.param}"))


@pytest.fixture(scope="session")
def made(release: Release, empty_databases: Callable[..., str]) -> str:
    """The DSN of a database that the release's own `pgpark migrate` made; to be copied."""
    dsn = empty_databases()
    release.python("-m", "pgpark", "migrate", "--dsn", dsn)
    return dsn


def copy_of(dsn: str, empty_databases: Callable[..., str]) -> str:
    """Another database with the same in it; nobody may be connected to the first."""
    return empty_databases(psycopg.conninfo.conninfo_to_dict(dsn)["dbname"])
