"""Submits to and works for DBOS queues: see peers/dbos.py."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import sqlalchemy
import talk
from dbos import DBOS, DBOSClient, DBOSConfig

QUEUE, WORKFLOW = "bench", "bench"
BULK = 1000
VERSION = "bench"


def url() -> sqlalchemy.URL:
    """The database of the PG* variables; its host may be the folder of a socket."""
    where = {"host": os.environ.get("PGHOST", "localhost"), "port": os.environ.get("PGPORT", "5432")}
    return sqlalchemy.URL.create(
        "postgresql+psycopg",
        username=os.environ.get("PGUSER"),
        password=os.environ.get("PGPASSWORD"),
        database=os.environ["PGDATABASE"],
        query=where,
    )


def launch(chosen: dict[str, Any]) -> None:
    config: DBOSConfig = {
        "name": "bench",
        "system_database_url": url().render_as_string(hide_password=False),
        "application_version": VERSION,
        "log_level": "ERROR",
        "sys_db_pool_size": chosen.get("connections", 5),
        "max_executor_threads": chosen.get("threads", 8),
    }
    DBOS(config=config)
    DBOS.launch()


def install() -> None:
    launch({})
    DBOS.destroy()


def submit() -> None:
    payload = talk.options()["payload"]
    address = url().render_as_string(hide_password=False)
    client = DBOSClient(system_database_url=address, system_database_pool_size=1)
    engine = sqlalchemy.create_engine(url())
    options: Any = {"queue_name": QUEUE, "workflow_name": WORKFLOW, "app_version": VERSION}

    def one(count: int) -> None:
        for _ in range(count):
            client.enqueue(options, payload)

    def bulk(count: int) -> None:
        for size in talk.chunks(count, BULK):
            with engine.begin() as connection:
                for _ in range(size):
                    client.enqueue_in_transaction(connection, options, payload)

    talk.serve(one, bulk)


def work() -> None:
    chosen = talk.options()
    handler = talk.handler(chosen)

    if chosen["concurrency"] == 1:

        @DBOS.workflow(name=WORKFLOW)
        def plain(_payload: Any) -> dict[str, bool]:
            handler()
            return {"ok": True}

    else:

        @DBOS.workflow(name=WORKFLOW)
        async def concurrent(_payload: Any) -> dict[str, bool]:
            handler()
            return {"ok": True}

    launch(chosen)
    talk.wait_for_go()
    DBOS.register_queue(QUEUE, worker_concurrency=chosen["concurrency"], polling_interval_sec=chosen["poll_secs"])
    signal.pause()


if __name__ == "__main__":
    {"install": install, "submit": submit, "work": work}[sys.argv[1]]()
