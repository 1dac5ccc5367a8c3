"""`pgpark notifier`, and what it never prints: secrets."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from typing import Any

import pytest

from pgpark import calls, cli
from tests.conftest import Database, wait_for
from tests.delivery import (
    SECRET,
    Loops,
    deliver_until,
    ended,
    letters,
    loops,
    notified,
    outbox,
    receive,
)
from tests.receiver import HANG_UP, NONSENSE, Receiver

__all__ = ["loops", "receive"]  # fixtures


def test_no_log_line_holds_a_secret_or_a_tenant(
    db: Database, receive: Callable[..., Receiver], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)  # also of the libraries below
    answers: list[Any] = [200, 500, 410, HANG_UP, NONSENSE]
    receiver = receive(lambda request: answers[int(request.body["user_id"])])
    notified(db, receiver)
    for user in range(len(answers)):
        ended(db, tenant="whoever", user_id=str(user))
    deliver_until(db, lambda: len(receiver.arrived) == 5 and letters(db) and outbox(db) == 3)
    assert "s3cr3t" not in caplog.text
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("pgpark")]
    assert not [line for line in ours if "whoever" in line]
    said = [line for line in ours if "HTTP 500" in line]
    assert len(said) == 1
    assert f"attempt 1, to 127.0.0.1:{receiver.port}: HTTP 500 Internal Server Error; will be tried again" in said[0]


def test_a_verbose_loop_prints_no_secret(db: Database, receive: Callable[..., Receiver], loops: Loops) -> None:
    receiver = receive(lambda _: 410)
    notified(db, receiver)
    ended(db)
    process = loops.start("-v")
    wait_for(lambda: letters(db))
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=30)
    assert "HTTP 410 Gone; given up; see pgpark notifier list" in printed
    assert "s3cr3t" not in printed
    assert "/mailbox/" not in printed


def test_a_callback_in_hand_does_not_print_its_secret(db: Database, receive: Callable[..., Receiver]) -> None:
    notified(db, receive())
    ended(db)
    (callback,) = calls.run_on(db.connection, calls.callbacks())
    printed = f"{callback} {callback!r} {callback.model_dump()} {callback.model_dump_json()}"
    assert "s3cr3t" not in printed
    assert callback.auth_header is not None
    assert callback.auth_header.get_secret_value() == SECRET


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capfd.readouterr()
    code = cli.run(arguments)
    return code, *capfd.readouterr()


@pytest.fixture
def environment(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPARK_DSN", dsn)


@pytest.mark.usefixtures("environment")
def test_dead_letters_are_listed_and_retried(
    db: Database, receive: Callable[..., Receiver], capfd: pytest.CaptureFixture[str]
) -> None:
    receiver = receive(lambda _: 410)
    notified(db, receiver)
    assert run(capfd, "notifier", "list") == (0, "", "no callback was given up\n")
    task = ended(db, tenant="acme")
    ended(db)
    deliver_until(db, lambda: len(letters(db)) == 2)
    code, out, err = run(capfd, "notifier", "list")
    assert (code, err) == (0, "")
    assert out.splitlines()[1].split()[1:8] == [
        *(str(task), "gpu", "acme", f"{receiver.url}/mailbox/acme", "1", "410", "HTTP")
    ]
    assert run(capfd, "notifier", "list", "--pool", "x", "--json")[1] == ""
    first = letters(db)[0]["callback_id"]
    assert run(capfd, "notifier", "retry", str(first), "99999")[0] == 1
    assert run(capfd, "notifier", "retry", "--all", "--pool", "x")[2] == "0 put back into the outbox\n"
    assert run(capfd, "notifier", "retry", "--all", "--json")[:2] == (0, '{"retried": 1}\n')
    assert outbox(db) == 2


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["retry"], "pgpark notifier retry: give either ids, as pgpark notifier list shows them, or --all"),
        (["retry", "1", "--all"], "pgpark notifier retry: give either ids"),
        (["retry", "x"], "pgpark notifier retry: Invalid value for '[CALLBACK_ID...]': 'x' is not a valid integer"),
        (["run", "--pool", "nope"], "pgpark: unknown pool 'nope'"),
        (["run", "--concurrency", "0"], "pgpark notifier run: Invalid value for '--concurrency'"),
    ],
)
def test_a_wrong_command_says_what_is_wrong(
    capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = run(capfd, "notifier", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(message)


@pytest.mark.usefixtures("environment")
def test_nothing_that_the_command_line_prints_holds_a_secret(
    db: Database, receive: Callable[..., Receiver], capfd: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    receiver = receive(lambda _: 410)
    good, bad, worse = tmp_path / "good.yaml", tmp_path / "bad.yaml", tmp_path / "worse.json"
    config = 'max_units: 4\ndatabase: "postgresql://u:s3cr3t@h/d"\nmailbox:\n  notifier:\n    auth_header: {}\n'
    good.write_text(config.format(f'"{SECRET}"') + f"    base_url: {receiver.url}\n")
    bad.write_text(config.format(f'"{SECRET}'))
    worse.write_text(f'{{"max_units": 4, "mailbox": {{"notifier": {{"auth_headers": "{SECRET}"}}}}}}')
    printed = [run(capfd, "pool", "put", "gpu", "--config", str(file)) for file in (bad, worse, good)]
    assert [code for code, _, _ in printed] == [2, 2, 0]
    assert printed[0][2].startswith(f"pgpark: {bad} is not YAML: found unexpected end of stream at line 6, column 1")
    ended(db)
    deliver_until(db, lambda: letters(db))
    for arguments in (
        ["pool", "show", "gpu"],
        ["pool", "show", "gpu", "--json"],
        ["pool", "list", "--json"],
        ["pool", "put", "gpu", "--set", "max_bypass=1"],
        ["pool", "put", "gpu", "--set", f"mailbox.notifier.auth_heade={SECRET}"],
        ["pool", "put", "gpu", "--set", f"mailbox.notifier.auth_header= {SECRET}"],
        ["pool", "put", "gpu", "--set", f"mailbox.notifier={SECRET}"],
        ["notifier", "list", "--json"],
        ["stats", "--json"],
        ["explain", "gpu"],
        ["pool", "drop", "gpu"],
    ):
        printed.append(run(capfd, *arguments))
    assert "s3cr3t" not in str(printed)
    assert '"auth_header": "(secret)"' in str(printed)
    assert db.value("select count(*) from pgpark.pool_secret") == 0, "the put with --set kept it until the drop"
