"""Our queues seen by tembo-pgmq-python, a client that knows nothing of pgpark: to it they are ordinary pgmq queues."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from tembo_pgmq_python import PGMQueue

from tests.conftest import Database


class Foreign(PGMQueue):  # type: ignore[misc]  # it carries no types
    """Without `create extension`, which a server with the SQL-only installation cannot do."""

    def _initialize_extensions(self, conn: object = None) -> None:
        pass


@pytest.fixture
def foreign(db: Database) -> Iterator[Foreign]:
    given = psycopg.conninfo.conninfo_to_dict(db.dsn)
    client = Foreign(
        host=str(given.get("host", "localhost")),
        port=str(given.get("port", 5432)),
        database=str(given["dbname"]),
        username=str(given.get("user", "postgres")),
        password=str(given.get("password", "none")),
        pool_size=1,
    )
    yield client
    client.pool.close()


def test_it_lists_our_queues_and_reads_their_metrics(db: Database, foreign: Foreign) -> None:
    db.pool("gpu")
    db.pool("cpu", queue={"type": "postgres_pgmq", "queue_name": "cores"})
    for _ in range(3):
        db.parked("gpu")
    assert sorted(foreign.list_queues()) == ["cores", "gpu", "pgpark_dead_letters", "pgpark_outbox"]
    assert (foreign.metrics("gpu").queue_length, foreign.metrics("cores").queue_length) == (3, 0)


def test_it_cannot_read_or_pop_a_task_past_the_capacity_check(db: Database, foreign: Foreign) -> None:
    db.pool()
    task = db.parked()
    assert foreign.read("gpu") is None
    assert foreign.read_batch("gpu", batch_size=10) == []
    with pytest.raises(IndexError):  # its way to say that there is nothing
        foreign.pop("gpu")
    db.claim()
    assert foreign.read("gpu") is None, "nor a running one"
    assert db.finish(task)


def test_it_finds_finished_tasks_in_the_archive(db: Database, foreign: Foreign) -> None:
    db.pool(archive=True)
    task = db.parked(payload={"prompt": "hi"})
    db.claim()
    db.finish(task)
    assert foreign.metrics("gpu").queue_length == 0
    (row,) = db.rows("select message from pgmq.a_gpu")
    assert row["message"]["payload"] == {"prompt": "hi"}


def test_a_message_that_it_deletes_ends_its_task_and_claiming_goes_on(db: Database, foreign: Foreign) -> None:
    db.pool()
    lost, fine = db.parked(), db.parked()
    foreign.delete("gpu", db.value("select msg_id from pgpark.task where task_id = %s", lost))
    assert db.claimed() == [fine]
    assert db.outcome(lost) == ("dropped", "payload lost")
