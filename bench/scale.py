"""How the cost of an operation grows: with parked tasks, running tasks, pools, and worker connections.

Run: python bench/scale.py [--sections parked,running,pools,connections] [--rounds 3] [--out FOLDER] [--dsn DSN]
[--quick]; without a DSN on an embedded server of its own, fsync on. It works in databases of its own, dropped at the
end, so the user of the DSN must be allowed to create some; 5,000,000 parked tasks take 5 GB of disk. All of it takes
half an hour on 2 cores; --quick some seconds, with small numbers that say nothing about speed.

Prints a table per section and, at the end, the ratios to the targets; writes scale.md, scale.json with the figure of
every round, and scale.png. Exits with 0 whether or not a target is met.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psycopg
from growth import QUICK, SECTIONS, Panel, Plan, Section, Target
from lots import own_databases
from report import heading, publish
from server import chosen_server

from pgpark.errors import PgparkError, one_line

_COLUMNS = 3


def main() -> int:
    options = _options()
    plan = QUICK if options.quick else Plan()
    plan = dataclasses.replace(plan, rounds=options.rounds or plan.rounds, parked=options.parked or plan.parked)
    try:
        with chosen_server(options.dsn) as dsn:
            head = heading(dsn, plan.rounds)
            with own_databases(dsn) as databases:
                sections = {name: SECTIONS[name](databases, plan) for name in options.sections}
    except (PgparkError, psycopg.Error, RuntimeError) as error:
        sys.stderr.write(f"bench/scale.py: {one_line(error)}\n")
        return 1
    targets = [target for section in sections.values() for target in section.targets]
    data = {
        "plan": dataclasses.asdict(plan),
        "sections": {name: section.figures for name, section in sections.items()},
        "targets": [dataclasses.asdict(target) | {"met": target.met} for target in targets],
    }
    panels = [panel for section in sections.values() for panel in section.panels]
    publish(options.out, "scale", _text(head, list(sections.values()), targets), data, lambda file: _plot(panels, file))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dsn", default=os.environ.get("PGPARK_DSN"), help="a server where databases may be created")
    parser.add_argument("--sections", type=_sections, default=list(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--parked", type=_sizes, help="numbers of parked tasks, ascending: 1000,10000")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true", help="small numbers, one round")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "pgpark-bench")
    return parser.parse_args()


def _sections(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"unknown section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    return names


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or sizes[0] < 1 or any(later <= earlier for earlier, later in itertools.pairwise(sizes)):
        raise argparse.ArgumentTypeError(f"{text!r} is no ascending list of whole numbers, such as 1000,10000")
    return sizes


def _text(head: str, sections: Sequence[Section], targets: Sequence[Target]) -> str:
    parts = [head]
    parts += [f"\n## {section.title}\n\n{section.text}\n\n{section.table}" for section in sections]
    if targets:
        parts.append("\n## Targets\n\n")
    for target in targets:
        goal = f"at {'least' if target.at_least else 'most'} {target.goal:g}"
        parts.append(f"- {target.what}: {target.ratio:.2f}, wanted {goal}: {'met' if target.met else 'missed'}\n")
    return "".join(parts)


def _plot(panels: Sequence[Panel], file: Path) -> None:
    from matplotlib import pyplot

    rows = -(-len(panels) // _COLUMNS)
    figure, grid = pyplot.subplots(rows, _COLUMNS, figsize=(4.2 * _COLUMNS, 3.2 * rows), squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        for name, values in panel.lines.items():
            axes.plot(panel.x, values, marker="o", label=name)
        most = max(max(values) for values in panel.lines.values())
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label, xscale="log", ylim=(0, 1.1 * most))
        axes.set_xticks(panel.x, [_short(size) for size in panel.x])
        axes.set_xticks([], minor=True)
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _short(size: float) -> str:
    """1000000 as 1M."""
    for unit, letter in ((1_000_000, "M"), (1_000, "k")):
        if size >= unit:
            return f"{size / unit:g}{letter}"
    return f"{size:g}"


if __name__ == "__main__":
    sys.exit(main())
