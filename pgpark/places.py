"""Where pools live: a database that is given, or the embedded server below a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pgpark.database import connect, where
from pgpark.embedded import EmbeddedServer
from pgpark.migrate import migrate
from pgpark.paths import expanded

HOME = ".pgpark"


@dataclass(frozen=True)
class Place:
    """The database of `dsn`; without one, the embedded server of the folder `home`. As text it has no password."""

    dsn: str | None
    home: Path

    @classmethod
    def of(cls, dsn: str | None = None, home: str | Path | None = None) -> Place:
        """What is given, else PGPARK_DSN and PGPARK_HOME, else the embedded server in .pgpark."""
        return cls(dsn or os.environ.get("PGPARK_DSN") or None, Path(home or os.environ.get("PGPARK_HOME") or HOME))

    @property
    def embedded(self) -> bool:
        """Whether it is an embedded server."""
        return not self.dsn

    @contextlib.contextmanager
    def use(self) -> Iterator[str]:
        """The DSN of the database; an embedded server is started and migrated on demand. Raises DatabaseError."""
        if self.dsn:
            yield self.dsn
            return
        with EmbeddedServer(self.home).use() as dsn:
            with contextlib.closing(connect(dsn)) as connection:
                migrate(connection)
            yield dsn

    def __str__(self) -> str:
        return where(self.dsn) if self.dsn else f"the embedded server in {self.home}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Place) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> str:
        return f"dsn {self.dsn}" if self.dsn else f"home {expanded(self.home).resolve()}"
