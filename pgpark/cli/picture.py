"""The picture of a pool in a terminal, drawn from park_lot and park_history. Draws; asks nobody, decides nothing.

Without colours everything still reads: segments stand in brackets, and the head is marked.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Group
from rich.text import Text

from pgpark.cli.common import plain

Lot = Mapping[str, Any]

_COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "bright_red", "bright_cyan", "bright_yellow")
_STATES = {"active": "green", "paused": "yellow", "draining": "yellow", "disabled": "red"}
_OUTCOMES = {"failed": "red", "expired": "yellow", "dropped": "bright_black"}
_BARS = "▁▂▃▄▅▆▇█"
_NARROWEST = 24
_LANE_NAME = 9


def pool_picture(lot: Lot, history: Sequence[Mapping[str, Any]] | None, width: int, bare: bool = False) -> Group:
    """One pool, `width` columns wide; bare: without colours. history: steps of the last hour, oldest first."""
    width = max(width, _NARROWEST)
    colours = _Colours(lot, bare)
    parts = [_one(_title(lot, bare), width), *_wrapped(_sentence(lot), width), *_bays(lot, width, colours), Text("")]
    parts += [_lane(lane, lot, width, colours) for lane in lot["parked"]["lanes"]]
    if lot["delayed"]["count"]:
        parts.append(_delayed(lot, width, colours))
    if history:
        parts += [Text(""), *_hour(history, width)]
    parts += [*_tenants(lot, width, colours), *_failures(lot, width), *_workers(lot, width)]
    return Group(*parts)


def overview(lots: Sequence[Lot], width: int, chosen: int | None = None, bare: bool = False) -> Group:
    """A line for each pool; the chosen one is marked."""
    width = max(width, _NARROWEST)
    name_width = min(max((len(lot["pool"]) for lot in lots), default=4), max(8, width // 4))
    bar_width = max(6, width - name_width - 44)
    lines = []
    for number, lot in enumerate(lots):
        colours = _Colours(lot, bare)
        line = Text("▸ " if number == chosen else "  ", style="bold")
        line.append(_cut(lot["pool"], name_width).ljust(name_width + 1), "bold")
        line.append_text(_bar(lot["running"]["tasks"], lot["used_units"], lot["max_units"], bar_width, colours))
        line.append(f" {short(lot['used_units'])}/{short(lot['max_units'])}".ljust(12))
        line.append(f" {_counted(lot['running'])} running, {_counted(lot['parked'])} parked")
        if lot["state"] != "active":
            line.append(f" {lot['state']}", _STATES[lot["state"]])
        elif lot["workers"] is False and lot["parked"]["count"]:
            line.append(" no worker", "red")
        lines.append(_one(line, width))
    return Group(*lines)


class _Colours:
    """A colour for each tenant, the same wherever it is drawn."""

    def __init__(self, lot: Lot, bare: bool) -> None:
        rows = [*lot.get("tenants", ()), *lot["running"]["tasks"]]
        names = sorted({row["tenant"] for row in rows if row["tenant"] is not None})
        self.bare = bare
        self._of = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(names)}

    def of(self, tenant: str | None) -> str:
        return "" if self.bare else self._of.get(tenant or "", "white")

    def on(self, tenant: str | None) -> str:
        return "" if self.bare else f"black on {self.of(tenant)}"


def _title(lot: Lot, bare: bool) -> Text:
    settings = lot["settings"]
    title = Text(plain(lot["pool"]), style="bold")
    title.append(f"  {lot['state']}", "" if bare else _STATES[lot["state"]])
    title.append(f"  {short(lot['used_units'])} of {short(settings['max_units'])} units", "bold")
    title.append(f"  {_counted(lot['running'])} running  {_counted(lot['parked'])} parked")
    if lot["delayed"]["count"]:
        title.append(f"  {_counted(lot['delayed'])} delayed")
    if lot["own"]:
        title.append(f"  only tasks of {plain(', '.join(lot['own']))}", "italic")
    return title


def _sentence(lot: Lot) -> str:
    line = lot["line"]
    head = line.get("head")
    if lot["parked"]["count"] == 0:
        return "none of the first that wait is theirs" if lot["parked"]["more"] else "nothing waits"
    if head and line["why"] == head["why"]:
        who = f"head: task {head['task_id']} needs {_units(head['units'])}, waits for {span(head['secs'])}"
        if head["why"] == "worker capacity":
            return f"{who}; no worker has more than {max(0, line['largest_room'] or 0)} free"
        return f"{who}; {short(line['free_units'])} free"
    return {
        "paused": f"the pool is {lot['state']}: nothing starts",
        "no worker": "no worker has been seen for a minute",
        "tenant limit": "those that wait are at the limit of their tenant",
    }.get(line["why"] or "", "the line moves" if lot["own"] is None else "why they wait is not shown")


def _bays(lot: Lot, width: int, colours: _Colours) -> list[Text]:
    """What runs, each task as wide as its units, the oldest first: ids, and below them units and how long they run."""
    total = max(lot["settings"]["max_units"], lot["used_units"])
    tasks = sorted(lot["running"]["tasks"], key=lambda task: -(task["secs"] or 0))
    labels = ([f"#{task['task_id']}", f"{short(task['units'])}u {tiny(task['secs'])}"] for task in tasks)
    return [_bar(tasks, lot["used_units"], total, width, colours, row) for row in zip(*labels, strict=True)] or [
        _bar([], lot["used_units"], total, width, colours, [])
    ]


def _bar(
    tasks: Sequence[Lot], used: int, total: int, width: int, colours: _Colours, labels: Sequence[str] | None = None
) -> Text:
    """Segments whose ends are rounded from the sum of units before them, so that what is free is drawn exactly."""
    bar = Text()
    units = 0
    for index, task in enumerate(tasks):
        start, end = _cell(units, total, width), _cell(units + task["units"], total, width)
        units += task["units"]
        bar.append(_segment(labels[index] if labels else "", end - start, colours.bare), colours.on(task["tenant"]))
    start, end = _cell(units, total, width), _cell(used, total, width)
    bar.append(_segment("others" if labels is not None else "", end - start, colours.bare), colours.on(None))
    bar.append("·" * (width - end), "" if colours.bare else "bright_black")
    return bar


def _cell(units: int, total: int, width: int) -> int:
    return round(units * width / max(total, 1))


def _segment(label: str, room: int, bare: bool) -> str:
    if room <= 0:
        return ""
    if not bare:
        return (label if len(label) < room else "").ljust(room - 1) + "▕" if room > 1 else "▕"
    if room < 3:
        return "#" * room
    return "[" + (label if len(label) <= room - 2 else "").ljust(room - 2, "=") + "]"


def _lane(lane: Lot, lot: Lot, width: int, colours: _Colours) -> Text:
    """The first parked tasks of a priority, with units and age, until the line is full."""
    line = Text(lane["priority"].ljust(_LANE_NAME), "bold" if lane["count"] else "bright_black" * (not colours.bare))
    line.append(_counted(lane).rjust(5) + " ")
    head = (lot["line"].get("head") or {}).get("task_id")
    left, shown = width - _LANE_NAME - 6, 0
    for task in lane["tasks"]:
        first = task["task_id"] == head
        words = f"{'▶' if first else ''}{short(task['units'])}u {tiny(task['secs'])}"
        more = f" +{lane['count'] - shown}{'+' if lane['more'] else ''}"
        if len(words) + 3 + (len(more) if shown + 1 < lane["count"] else 0) > left:
            break
        line.append(
            f"[{words}]" if colours.bare else f" {words} ", colours.on(task["tenant"]) + (" bold" if first else "")
        )
        line.append(" ")
        left -= len(words) + 3
        shown += 1
    if lane["count"] > shown:
        line.append(f"+{short(lane['count'] - shown)}{'+' if lane['more'] else ''}")
    return _one(line, width)


def _delayed(lot: Lot, width: int, colours: _Colours) -> Text:
    line = Text("delayed".ljust(_LANE_NAME), "bold")
    line.append(_counted(lot["delayed"]).rjust(5) + " ")
    for task in lot["delayed"]["tasks"]:
        words = f"{short(task['units'])}u in {tiny(task['due_secs'])}"
        if line.cell_len + len(words) + 3 > width:
            break
        line.append(
            f"[{words}]" if colours.bare else f" {words} ", "" if colours.bare else f"{colours.of(task['tenant'])}"
        )
        line.append(" ")
    return _one(line, width)


def _hour(history: Sequence[Mapping[str, Any]], width: int) -> list[Text]:
    started = [float(row["started"] or 0) for row in history]
    waits = [row["wait_p50_secs"] for row in history]
    known = [wait for wait in waits if wait is not None]
    lines = [
        ("started", started, f"{short(round(sum(started)))} in the hour, up to {short(round(max(started)))} a minute")
    ]
    if known:
        lines.append(("wait", [wait or 0.0 for wait in waits], f"median of a minute up to {span(max(known))}"))
    made = []
    for name, values, words in lines:
        room = min(len(values), max(10, width - _LANE_NAME - len(words) - 3))
        made.append(
            _one(Text.assemble((name.ljust(_LANE_NAME), "bold"), sparkline(values[-room:]), f"  {words}"), width)
        )
    return made


def sparkline(values: Sequence[float]) -> str:
    """A bar for each value, the highest as high as can be; nothing where there is nothing."""
    most = max(values, default=0)
    return "".join(" " if value <= 0 else _BARS[min(7, int(value / most * 7.999))] for value in values)


def _tenants(lot: Lot, width: int, colours: _Colours) -> list[Text]:
    rows = lot["tenants"][:6]
    if not rows or (len(rows) == 1 and rows[0]["tenant"] is None):
        return []
    total = max(lot["settings"]["max_units"], 1)
    names = [_cut(plain(row["tenant"]) if row["tenant"] is not None else "no tenant", 16) for row in rows]
    name_width = max(map(cell_len, names)) + 1
    made = [Text(""), Text("tenants", "bold")]
    for name, row in zip(names, rows, strict=True):
        words = (
            f" {short(row['running_units'])}{'' if row['max_units'] is None else '/' + short(row['max_units'])} units"
        )
        words += f" {100 * row['running_units'] // total}%" + (
            f", {short(row['parked'])} parked" if row["parked"] else ""
        )
        room = max(5, min(30, width - name_width - len(words) - 2))
        full = min(room, _cell(row["running_units"], total, room))
        line = Text(_padded(name, name_width))
        line.append("█" * full, colours.of(row["tenant"]))
        line.append("░" * (room - full), "" if colours.bare else "bright_black")
        made.append(_one(line.append(words), width))
    return made


def _failures(lot: Lot, width: int) -> list[Text]:
    rows = lot["mailbox"]["failures"][:5]
    if not rows:
        return []
    made = [Text(""), _one(Text("not completed in the last hour", "bold"), width)]
    for row in rows:
        line = Text(f"{short(row['count'])} x".rjust(6) + " ")
        line.append(row["status"], _OUTCOMES[row["status"]])
        reason = "no reason shown" if row["reason"] is None else plain(row["reason"])
        made.append(_one(line.append(f" {span(row['secs'])} ago: {reason}"), width))
    return made


def _workers(lot: Lot, width: int) -> list[Text]:
    if lot["workers"] is None:
        return []
    rows = lot["workers"]["list"][:5]
    made = [Text(""), Text(f"{_counted(lot['workers'])} worker{'' if lot['workers']['count'] == 1 else 's'}", "bold")]
    for row in rows:
        most = "any" if row["max_units"] is None else short(row["max_units"])
        words = (
            f"{short(row['used_units'])} of {most} units in {_tasks(row['running'])}, seen {span(row['seen_secs'])} ago"
        )
        made.append(_one(Text(f"{_cut(plain(row['worker']), max(8, width // 3))}  {words}"), width))
    if not rows:
        made[-1] = _one(
            Text("no worker has been seen for a minute", "bold red" if lot["parked"]["count"] else ""), width
        )
    return made


def span(secs: float | None) -> str:
    """Seconds as people say them."""
    whole = max(0.0, float(secs or 0))
    if whole < 90:
        return f"{whole:.1f} s" if whole < 1 else f"{whole:.0f} s"
    minutes = round(whole / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h" if minutes < 36 * 60 else f"{round(minutes / 1440)} d"


def tiny(secs: float | None) -> str:
    """The same in few characters."""
    whole = max(0.0, float(secs or 0))
    for most, size, letter in ((100, 1, "s"), (6000, 60, "m"), (129600, 3600, "h")):
        if whole < most:
            return f"{int(whole / size)}{letter}"
    return f"{int(whole / 86400)}d"


def short(number: float) -> str:
    """A number in at most five characters or so."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= 10 * size or (number >= size and size > 10**3):
            return f"{number / size:.1f}".rstrip("0").rstrip(".") + letter
    return f"{number:.0f}"


def _counted(counted: Lot) -> str:
    return f"{short(counted['count'])}{'+' if counted['more'] else ''}"


def _units(number: int) -> str:
    return "1 unit" if number == 1 else f"{short(number)} units"


def _tasks(number: int) -> str:
    return "1 task" if number == 1 else f"{short(number)} tasks"


def _cut(text: str, room: int) -> str:
    return text if cell_len(text) <= room else set_cell_size(text, room - 1) + "…"


def _padded(text: str, room: int) -> str:
    """As wide as that on the screen: many scripts have letters that are two columns wide."""
    return text + " " * (room - cell_len(text))


def _one(line: Text, width: int) -> Text:
    line.truncate(width, overflow="ellipsis")
    return line


def _wrapped(text: str, width: int) -> list[Text]:
    return [Text(line) for line in textwrap.wrap(text, width)]
