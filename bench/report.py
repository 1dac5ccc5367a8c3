"""What every bench prints: machine, versions, settings, a table of medians with their spread, and a plot.

rounds = turns(3, variants)                     # variants take turns within a round, beginning with another each
text = heading("throughput", dsn, ["pgmq 1.13"]) + table([["system", "tasks/s"], ["pgmq", spread(rates)]])
publish(out, "throughput", text, data, lambda axes_file: ...)
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pgpark.database import connect

T = TypeVar("T")

SETTINGS = (
    "fsync",
    "synchronous_commit",
    "full_page_writes",
    "data_checksums",
    "wal_sync_method",
    "shared_buffers",
    "max_wal_size",
    "checkpoint_timeout",
    "autovacuum",
    "autovacuum_naptime",
    "jit",
    "max_connections",
)


def turns(rounds: int, variants: Sequence[T]) -> Iterator[tuple[int, T]]:
    """Pairs of round (from 0) and variant: all of them in each round, each round beginning with another one, so that
    none is always the first or always follows the same."""
    for nth in range(rounds):
        shift = nth * len(variants) // rounds
        for variant in [*variants[shift:], *variants[:shift]]:
            yield nth, variant


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    """median (least to greatest); just the value where there is only one."""
    if not values:
        return ""
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} to {max(values):{form}})"


def percentile(values: Sequence[float], share: float) -> float:
    """By nearest rank; share from 0 to 1."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(len(ranked) * share))]


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head. All columns but the first are figures, and stand to the right."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def heading(dsn: str, rounds: int, versions: Sequence[str] = ()) -> str:
    """A paragraph of where and how the figures were made."""
    facts = machine()
    server, settings = server_settings(dsn)
    lines = [
        f"{facts['cores']} cores ({facts['cpu']}), {facts['memory']}, {facts['kernel']}, Python {facts['python']}",
        "; ".join([server, *versions]),
        ", ".join(f"{name} {value}" for name, value in settings.items()),
        "One round." if rounds == 1 else f"Median (least to greatest) of {rounds} rounds.",
    ]
    return "  \n".join(lines) + "\n"


def machine() -> dict[str, str]:
    """Cores, CPU model, memory, kernel and Python of this machine."""
    return {
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "cpu": _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine(),
        "memory": _memory(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def server_settings(dsn: str) -> tuple[str, dict[str, str]]:
    """The server's version, and the settings that matter for speed."""
    with connect(dsn) as connection:
        rows = connection.execute(
            "select name, current_setting(name) as value from pg_settings where name = any (%s)", [list(SETTINGS)]
        ).fetchall()
        found = {row["name"]: row["value"] for row in rows}
        version = connection.info.parameter_status("server_version")
        where = "socket" if (connection.info.host or "/").startswith("/") else "TCP"
    return f"PostgreSQL {version} ({where})", {name: found[name] for name in SETTINGS if name in found}


def publish(out: Path, name: str, text: str, data: Any, plot: Callable[[Path], None]) -> None:
    """Prints the report, and writes NAME.md, NAME.json and, where matplotlib is installed, NAME.png into a folder."""
    print(text, end="")
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text)
    (out / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib"):
        import matplotlib

        matplotlib.use("Agg")
        plot(out / f"{name}.png")
    else:
        progress("no plot: that needs matplotlib; pip install 'pgpark[bench]'")
    progress(f"written to {out}")


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _field(file: Path, name: str) -> str | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def _memory() -> str:
    total = (_field(Path("/proc/meminfo"), "MemTotal") or "0 kB").split()[0]
    return f"{int(total) / 1024**2:.0f} GiB"
