"""The short forms of the benches, as commands."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from itertools import product
from pathlib import Path

from tests.conftest import Server

BENCH = Path(__file__).parent.parent / "bench"


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


def read_table(markdown: str) -> list[dict[str, str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.strip().splitlines()]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def percent(cell: str) -> float:
    return float(cell.rstrip("%")) / 100


def mean(cell: str) -> float:
    """Of a cell that shows a mean, or a mean and a percentile."""
    return float(cell.split(" / ")[0])
