"""The server that a bench runs on."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pgpark.embedded import EmbeddedServer


@contextlib.contextmanager
def chosen_server(dsn: str | None) -> Iterator[str]:
    """The DSN that was given, or that of an embedded server of its own for as long as it is used."""
    if dsn:
        yield dsn
        return
    with tempfile.TemporaryDirectory() as home, EmbeddedServer(Path(home)).use() as embedded:
        yield embedded
