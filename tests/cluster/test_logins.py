"""The logins of docs/operations/containers.md are enough for the parts of docker/kubernetes/, and the Job gives them
what they need: its commands run on a database as the owner, who is no superuser; then each part as its own login."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from tests.cluster.manifests import KUBERNETES, the
from tests.compose import ROOT
from tests.conftest import Server

DOCUMENT = ROOT / "docs" / "operations" / "containers.md"


class Cluster:
    """A database with the logins of the document, under names that no other test has."""

    def __init__(self, server: Server) -> None:
        self.unique = f"pgpark_test_{uuid.uuid4().hex[:12]}"
        self._server = server
        (block,) = re.findall(r"<!-- the logins of a cluster -->\n```sql\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
        self._administer(*self.renamed(block).split(";"))

    def renamed(self, text: str) -> str:
        """With the names of this database and its logins."""
        return re.sub(r"(?<!/)\bpgpark(_\w+|(?= owner|;))", rf"{self.unique}\1", text)

    def dsn(self, login: str) -> str:
        conninfo = psycopg.conninfo.conninfo_to_dict(self._server.dsn(self.unique))
        secrets = {"owner": "the migration", "worker": "the workers", "gateway": "the gateway", "reader": "KEDA"}
        return psycopg.conninfo.make_conninfo(
            **conninfo | {"user": f"{self.unique}_{login}", "password": f"secret of {secrets[login]}"}
        )

    def migrated(self) -> None:
        """What the Job does."""
        (container,) = the("base", "Job", "pgpark-migrate")["spec"]["template"]["spec"]["containers"]
        script = self.renamed(container["args"][0].replace("/etc/pgpark/", f"{KUBERNETES}/base/"))
        done = subprocess.run(
            [*container["command"], script],
            env={
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
                "PGPARK_DSN": self.dsn("owner"),
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    def close(self) -> None:
        logins = [f"drop role {self.unique}_{login}" for login in ("owner", "worker", "gateway", "reader")]
        self._administer(f"drop database {self.unique} with (force)", *logins)

    def _administer(self, *statements: str) -> None:
        with psycopg.connect(self._server.admin, autocommit=True) as connection:
            for statement in statements:
                if statement.strip():
                    connection.execute(statement.encode())


@pytest.fixture
def cluster(server: Server) -> Iterator[Cluster]:
    with closing(Cluster(server)) as made:
        yield made


def test_each_part_can_do_its_work_as_its_login_and_no_more(cluster: Cluster) -> None:
    cluster.migrated()

    def ask(login: str, statement: str) -> object:
        with psycopg.connect(cluster.dsn(login), autocommit=True) as connection:
            found = connection.execute(statement.encode()).fetchone()
            return found and found[0]

    secret = str(ask("gateway", "select pgpark.park_create_token('me', '{producer}')"))
    with psycopg.connect(cluster.dsn("gateway")) as connection:  # as the gateway does for a request
        connection.execute("select pgpark.park_enter(encode(sha256(%s::bytea), 'hex'))", [secret])
        row = connection.execute("select task_id from pgpark.park_submit('gpu', '{}', units => 8)").fetchone()
    assert row is not None
    assert ask("reader", "select pgpark.park_demand('gpu')") == 8
    assert ask("worker", "select task_id from pgpark.park_claim('gpu', 'w', max_units => 8)") == row[0]
    assert ask("worker", f"select pgpark.park_finish({row[0]}, 1)") is True
    assert ask("reader", "select pgpark.park_demand('gpu')") == 0
    for login, statement in (
        ("reader", "select pgpark.park_claim('gpu', 'w')"),
        ("reader", "select pgpark.park_submit('gpu', '{}')"),
        ("worker", "select pgpark.park_submit('gpu', '{}')"),
        ("worker", "select pgpark.park_create_token('me too', '{admin}')"),
        ("gateway", "select * from pgpark.task"),
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            ask(login, statement)
