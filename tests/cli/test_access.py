"""`pgpark grant`, `revoke`, `grants`, and what the other commands say to a role that may not."""

from __future__ import annotations

import pytest

from tests.cli.test_commands import Pgpark, pgpark
from tests.conftest import Database

__all__ = ["pgpark"]


def test_access_is_granted_listed_and_revoked(db: Database, pgpark: Pgpark, role: str) -> None:
    db.pool()
    assert pgpark("grants").err == "nobody but the owner; see pgpark grant --help\n"
    said = pgpark("grant", role, "--as", "producer", "--tenant", "a", "--tenant", "b", "--pool", "gpu")
    assert (said.code, said.err) == (0, f"{role} is producer, tenants a, b, pools gpu\n")
    assert pgpark("grant", role, "--as", "reader", "--json").rows == [
        {"role": role, "kind": "reader", "tenants": None, "pools": None}
    ]
    assert pgpark("grants", "--json").rows == [
        {"role": role, "kind": "producer", "tenants": ["a", "b"], "pools": ["gpu"]},
        {"role": role, "kind": "reader", "tenants": None, "pools": None},
    ]
    assert pgpark("revoke", role, "--as", "reader").err == f"{role}: revoked\n"
    assert pgpark("revoke", role, "--as", "reader").code == 1
    assert pgpark("revoke", role, "--json").rows == [{"role": role, "revoked": 1}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["grant", "nobody_of_this_name", "--as", "reader"], "unknown role 'nobody_of_this_name'"),
        (["grant", "ROLE", "--as", "king"], "'king' is not one of"),
        (["grant", "ROLE"], "Missing option '--as'"),
        (["grant", "ROLE", "--as", "worker", "--tenant", "a"], "tenants go with producer, not with worker"),
        (["grant", "ROLE", "--as", "worker", "--pool", "typo"], "unknown pool 'typo'"),
        (["revoke", "nobody_of_this_name"], "unknown role 'nobody_of_this_name'"),
    ],
)
def test_a_grant_that_makes_no_sense_is_one_line(pgpark: Pgpark, role: str, arguments: list[str], message: str) -> None:
    said = pgpark(*(role if argument == "ROLE" else argument for argument in arguments))
    assert said.code in (2, 3)
    assert message in said.err
    assert said.err.count("\n") == 1


def test_a_command_that_the_role_may_not_run_says_so_in_one_line(
    db: Database, pgpark: Pgpark, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    db.pool()
    monkeypatch.setenv("PGOPTIONS", f"-c role={role}")
    said = pgpark("stats")
    assert (said.code, said.err.count("\n")) == (3, 1)
    assert "permission denied for schema pgpark; an admin can change that: pgpark grant" in said.err
    monkeypatch.delenv("PGOPTIONS")
    pgpark("grant", role, "--as", "producer", "--tenant", "a")
    monkeypatch.setenv("PGOPTIONS", f"-c role={role}")
    assert pgpark("submit", "gpu", "{}", "--tenant", "a").code == 0
    said = pgpark("submit", "gpu", "{}", "--tenant", "b")
    assert (said.code, said.out) == (3, "")
    assert "may not submit to pool 'gpu' for tenant 'b'. Granted to it: producer of tenants a." in said.err
    assert "may not see numbers of pool 'gpu'" in pgpark("pool", "put", "gpu", "--max-units", "1").err
    assert "permission denied for function park_set_pool_state" in pgpark("pool", "pause", "gpu").err


def test_a_client_and_a_worker_need_no_more_than_their_access(
    db: Database, pgpark: Pgpark, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A producer that waits, follows and acknowledges, with the commands; the worker is another role's."""
    db.pool()
    pgpark("grant", role, "--as", "producer", "--tenant", "a", "--pool", "gpu")
    monkeypatch.setenv("PGOPTIONS", f"-c role={role}")
    task = int(pgpark("submit", "gpu", "{}", "--tenant", "a").out)
    assert pgpark("status", str(task)).code == 0
    db.claim()
    db.finish(task, result="done")
    assert '"done"' in pgpark("result", str(task), "--wait").out
    assert pgpark("mailbox", "fetch", "a", "--ack", "--json").rows[0]["task_id"] == task
    cancelled = pgpark("submit", "gpu", "{}", "--tenant", "a").out.strip()
    assert pgpark("cancel", cancelled).code == 0
