"""Handlers in processes of their own (--processes): whatever one does, only its own task is harmed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pgpark.errors import BadInputError
from pgpark.processes import ProcessExecutor
from tests.conftest import Database, wait_for
from tests.test_worker import eventually, run_all, working

Handler = Callable[[str], ProcessExecutor]


@pytest.fixture
def processes() -> Iterator[Handler]:
    """Handlers of tests/handlers.py, by name."""
    with contextlib.ExitStack() as opened:

        def load(name: str) -> ProcessExecutor:
            return opened.enter_context(contextlib.closing(ProcessExecutor(f"tests.handlers:{name}")))

        yield load


def test_results_models_and_contexts_are_as_in_the_worker(db: Database, processes: Handler) -> None:
    db.pool()
    good, bad = db.parked(payload={"text": "é", "tokens": 3}, tenant="t"), db.parked(payload={"tokens": "x"})
    outcomes = run_all(db, processes("typed"), [good, bad])
    assert outcomes[0] == ("completed", None, {"text": "ééé", "tenant": "t"})
    assert outcomes[1][1].startswith("payload does not fit Prompt: text: Field required; tokens: ")


def test_reasons_are_as_in_the_worker(db: Database, processes: Handler) -> None:
    db.pool()
    assert run_all(db, processes("fail"), [db.parked(payload="that")]) == [
        ("failed", "ValueError: cannot do that", None)
    ]
    ((status, reason, _),) = run_all(db, processes("not_json"), [db.parked(payload="nan")])
    assert (status, reason.partition(":")[0]) == ("failed", "the result is not JSON")
    ((status, reason, _),) = run_all(db, processes("leave"), [db.parked()])
    assert (status, reason) == ("failed", "SystemExit: 3")


def test_tasks_one_after_another_share_a_process(db: Database, processes: Handler) -> None:
    db.pool()
    tasks = [db.parked(payload=n) for n in range(5)]
    outcomes = run_all(db, processes("own_process"), tasks, concurrency=1)
    assert [payload["payload"] for _, _, payload in outcomes] == list(range(5))
    assert len({payload["process"] for _, _, payload in outcomes}) == 1


@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        ("exit_at_once", "the handler's process exited with 7"),
        ("segfault", "the handler's process was killed by SIGSEGV"),
        ("kill_worker", "the handler's process was killed by SIGKILL, as when memory runs out"),
    ],
)
def test_a_handler_that_dies_takes_only_its_own_task_with_it(
    db: Database, processes: Handler, handler: str, reason: str
) -> None:
    db.pool("gpu")
    db.pool("other")
    doomed = [db.parked() for _ in range(3)]
    beside = db.parked("other", payload={"secs": 0.5})
    executor = processes(handler)

    async def main() -> None:
        async with (
            working(db.dsn, processes("sleep"), pool="other"),
            working(db.dsn, executor, concurrency=2),
        ):
            await eventually(lambda: db.stats()["failed"] == 3 and db.stats("other")["completed"] == 1)

    asyncio.run(main())
    assert [db.outcome(task) for task in doomed] == [("failed", reason)] * 3
    assert db.outcome(beside)[0] == "completed"


def test_a_task_whose_process_died_is_retried_in_another(db: Database, processes: Handler) -> None:
    db.pool(retry={"max_attempts": 2, "backoff_secs": 0})
    task = db.parked(payload="again")
    assert run_all(db, processes("first_crash_then_tell"), [task]) == [("completed", None, "again")]
    assert db.status(task)["attempt"] == 2
    parts = db.rows("select content from pgpark.park_parts(%s)", task)
    assert [part["content"] for part in parts] == ["again"], "those of the attempt that ended"


def test_a_handler_that_blocks_its_loop_holds_up_no_other_task(db: Database, processes: Handler) -> None:
    db.pool()
    slow, quick = db.parked(payload={"secs": 3600}), db.parked(payload={"secs": 0})
    executor = processes("block_the_loop")

    async def main() -> None:
        async with working(db.dsn, executor, concurrency=2):
            await eventually(lambda: db.status(quick)["status"] == "completed")
            assert await asyncio.to_thread(db.value, "select pgpark.park_cancel(%s)", slow) == "cancelling"
            await eventually(lambda: db.status(slow)["finished_at"])

    asyncio.run(main())
    assert db.outcome(slow) == ("dropped", "cancelled")


def test_a_handler_that_never_returns_is_killed_when_the_worker_stops(db: Database, processes: Handler) -> None:
    db.pool()
    task = db.parked()
    executor = processes("never_returns")

    async def main() -> None:
        async with working(db.dsn, executor, grace_secs=0.1):
            await eventually(lambda: db.status(task)["status"] == "running")

    asyncio.run(main())
    assert db.status(task)["status"] == "parked", "it was put back"
    assert not executor._processes


def test_a_plain_handler_is_asked_before_it_is_killed(db: Database, processes: Handler) -> None:
    db.pool()
    task = db.parked()
    executor = processes("wait_for_stop")

    async def main() -> None:
        async with working(db.dsn, executor):
            await eventually(lambda: db.status(task)["status"] == "running")
            await asyncio.to_thread(db.value, "select pgpark.park_cancel(%s)", task)
            await eventually(lambda: db.status(task)["finished_at"], seconds=5)

    asyncio.run(main())
    assert db.outcome(task)[0] == "completed", "it returned an answer, which is kept"


def test_a_handler_that_forks_answers_once(db: Database, processes: Handler) -> None:
    db.pool()
    tasks = [db.parked() for _ in range(4)]
    assert run_all(db, processes("fork"), tasks, concurrency=1) == [("completed", None, "parent")] * 4


def test_a_process_that_is_out_of_step_gets_no_other_task(db: Database, processes: Handler) -> None:
    db.pool()
    tasks = [db.parked(payload=n) for n in (1, 2, 3)]
    (status, reason, _), *others = run_all(db, processes("emit_what_cannot_be_read"), tasks, concurrency=1)
    assert (status, reason.partition(":")[0]) == ("failed", "ValueError")
    assert others == [("completed", None, 2), ("completed", None, 3)]


def test_what_is_emitted_after_the_end_of_a_task_is_in_no_other(db: Database, processes: Handler) -> None:
    db.pool()
    tasks = [db.parked(payload=n) for n in (1, 2)]
    assert [payload for *_, payload in run_all(db, processes("emit_too_late"), tasks, concurrency=1)] == [1, 2]
    assert [db.rows("select content from pgpark.park_parts(%s)", task) for task in tasks] == [[], []]


def test_a_process_that_dies_is_missed_at_once_whatever_it_leaves_behind(db: Database, processes: Handler) -> None:
    db.pool()
    began = time.monotonic()
    outcomes = run_all(db, processes("leave_a_program_behind"), [db.parked()])
    assert outcomes == [("failed", "the handler's process exited with 7", None)]
    assert time.monotonic() - began < 25


def test_a_signal_to_all_processes_of_a_service_is_the_workers_to_heed(db: Database, processes: Handler) -> None:
    db.pool()
    assert run_all(db, processes("terminate_own_process"), [db.parked(payload="on")]) == [("completed", None, "on")]


def test_a_payload_is_read_as_in_the_worker(db: Database, processes: Handler) -> None:
    db.pool()
    task = db.value("select task_id from pgpark.park_submit('gpu', %s::jsonb)", "[" * 300 + "]" * 300)
    deep: Any = []
    for _ in range(299):
        deep = [deep]
    assert run_all(db, processes("length_of_text"), [task]) == [("completed", None, len(repr(deep)))]


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        ("raise RuntimeError('no card left')", "--handler 'moody:run' cannot be imported: RuntimeError: no card left"),
        ("import os; os._exit(4)", "--handler: its process exited with 4 while it was loaded"),
    ],
)
def test_a_worker_whose_handler_cannot_be_loaded_any_more_leaves_its_tasks_to_others(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, complaint: str
) -> None:
    """Its first process goes on with what it has loaded; a second one cannot."""
    db.pool(max_units=3)
    (tmp_path / "moody.py").write_text(
        "import pathlib, time\n"
        "def run(payload):\n"
        "    while not pathlib.Path(payload).exists(): time.sleep(0.02)\n"
        "    return 'done'\n"
    )
    monkeypatch.chdir(tmp_path)
    go_on = tmp_path / "go on"
    first = db.parked(payload=str(go_on))

    async def main(executor: ProcessExecutor) -> list[int]:
        with pytest.raises(BadInputError) as ended:
            async with working(db.dsn, executor, concurrency=3, grace_secs=600.0):
                await eventually(lambda: db.status(first)["status"] == "running")
                (tmp_path / "moody.py").write_text(broken)
                others = [db.parked(payload=str(go_on)) for _ in range(2)]
                await eventually(lambda: all(db.status(task)["attempt"] for task in others))
                go_on.touch()
                await eventually(lambda: {db.status(task)["status"] for task in others} == {"parked"})
        assert str(ended.value) == complaint
        return others

    with contextlib.closing(ProcessExecutor("moody:run")) as executor:
        others = asyncio.run(main(executor))
    assert db.outcome(first) == ("completed", None)
    assert set(db.claimed()) == set(others)


def test_what_it_emits_is_bounded(db: Database, processes: Handler) -> None:
    db.pool()
    task = db.parked(payload=1 << 20)
    ((status, reason, _),) = run_all(db, processes("emit_too_much"), [task])
    assert (status, reason) == ("failed", "BadInputError: a part is too large: 1048578 bytes as JSON, at most 1048576")
    task = db.parked(payload=(1 << 20) - 1000)
    ((status, reason, _),) = run_all(db, processes("emit_too_much"), [task])
    assert (status, reason) == ("failed", "BadInputError: this attempt has emitted 67108864 bytes, more are not kept")


def test_a_handler_that_cannot_be_loaded_is_told_at_once() -> None:
    with pytest.raises(BadInputError, match=r"'tests\.nowhere:x' cannot be imported: ModuleNotFoundError"):
        ProcessExecutor("tests.nowhere:x")
    with pytest.raises(BadInputError, match="its process exited with 3 while it was loaded"):
        ProcessExecutor("tests.exits_at_once_on_import:x")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--exec", "cat", "--processes", "2"), "--processes goes with --handler"),
        (("--handler", "tests.handlers:echo", "--processes", "2", "--concurrency", "3"), "leave out --concurrency"),
        (("--handler", "tests.handlers:nothing", "--processes", "2"), "cannot be imported: AttributeError"),
    ],
)
def test_options_that_do_not_fit_are_refused(dsn: str, options: tuple[str, ...], complaint: str) -> None:
    done = subprocess.run([*WORKER, *options, "--dsn", dsn], capture_output=True, text=True)
    assert done.returncode in (1, 2)
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


WORKER = (sys.executable, "-m", "pgpark", "worker", "gpu")


@pytest.mark.parametrize("handler", ["never_returns", "hold_the_interpreter"])
def test_processes_end_with_their_worker_even_when_it_is_killed(db: Database, handler: str) -> None:
    if handler == "hold_the_interpreter" and sys.platform != "linux":
        pytest.skip("only there does the kernel see to it")
    db.pool()
    tasks = [db.parked() for _ in range(2)]
    options = ("--handler", f"tests.handlers:{handler}", "--processes", "2")
    worker = subprocess.Popen([*WORKER, *options], env=os.environ | {"PGPARK_DSN": db.dsn}, stderr=subprocess.DEVNULL)

    def children() -> list[Any]:
        return psutil.Process(worker.pid).children()

    with worker:
        try:
            wait_for(lambda: all(db.status(task)["status"] == "running" for task in tasks))
            started = wait_for(lambda: len(children()) == 2 and children())
        finally:
            worker.send_signal(signal.SIGKILL)
    wait_for(lambda: not any(process.is_running() and process.status() != "zombie" for process in started))
