"""What the server does for one database: WAL, transactions, dead row versions."""

from __future__ import annotations

import time

import psycopg
from peers.base import PeerError, left_on

from pgpark.database import connect


class Meter:
    """What the server did for one database between `start` and `stop`, added up, and its dead row versions."""

    def __init__(self, admin: str, dsn: str) -> None:
        self._dsn = dsn
        self._database = psycopg.conninfo.conninfo_to_dict(dsn)["dbname"]
        self._admin = connect(admin)
        self.wal = self.commits = self.writing = 0
        self._start = (0, 0, 0)

    def start(self) -> None:
        """After a checkpoint."""
        self._settle()
        self._admin.execute("checkpoint")
        self._start = (*self._log(), self._commits())

    def stop(self) -> None:
        """Adds the WAL and the writing transactions since `start`."""
        wal, transactions = self._log()
        self.wal += wal - self._start[0]
        self.writing += transactions - self._start[1]

    def stopped(self, ours: int = 0) -> None:
        """Adds the commits since `start`, once the processes have gone: by then they have reported theirs. ours:
        transactions of our own meanwhile."""
        self._settle()
        self.commits += self._commits() - self._start[2] - ours

    def dead(self) -> int:
        """Row versions that were made and are not alive now. No other session may be at work."""
        self._settle()
        with connect(self._dsn) as connection:
            tables = connection.execute(
                "select c.oid::regclass::text as name, s.n_tup_ins + s.n_tup_upd as made"
                " from pg_class c join pg_stat_all_tables s on s.relid = c.oid"
                " where c.relkind in ('r', 't') and s.schemaname not in ('pg_catalog', 'information_schema')"
                " and s.n_tup_ins + s.n_tup_upd > 0"
            ).fetchall()
            alive = sum(left_on(connection, f"select count(*) from {table['name']}") for table in tables)
            return sum(table["made"] for table in tables) - alive

    def close(self) -> None:
        self._admin.close()

    def _settle(self) -> None:
        """Until no client is connected to the database: those that have gone have reported what they did."""
        until = time.monotonic() + 30
        query = "select from pg_stat_activity where datname = %s and backend_type = 'client backend'"
        while self._admin.execute(query, [self._database]).rowcount:
            if time.monotonic() > until:
                raise PeerError("processes are still connected to the database 30 s after they were ended")
            time.sleep(0.02)

    def _log(self) -> tuple[int, int]:
        """The place in the WAL, and the next transaction id."""
        row = self._admin.execute(
            "select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0') as place,"
            " pg_snapshot_xmax(pg_current_snapshot())::text as next"
        ).fetchone()
        assert row is not None
        return int(row["place"]), int(row["next"])

    def _commits(self) -> int:
        query = "select xact_commit from pg_stat_database where datname = %s"
        row = self._admin.execute(query, [self._database]).fetchone()
        assert row is not None
        return int(row["xact_commit"])
