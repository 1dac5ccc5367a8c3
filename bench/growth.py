"""The four questions of bench/scale.py: how cost grows with what is parked, what runs, pools, and connections.

Each is a function that measures on databases of its own and returns a Section. Medians of a turn go into the figures;
the tables show the median of the rounds, and the least and greatest.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from claimers import Order, claimers
from lots import PAYLOAD, Connection, Cost, Databases, Lot, fill, make_pools, settle, timed, top_up
from psycopg.types.json import Jsonb
from report import progress, spread, table, turns

from pgpark import calls
from pgpark.database import connect

POOL = "lot"
Figures = dict[str, dict[str, list[float]]]  # by variant, by what was measured: a figure a round
_COST_COLUMNS = [
    ("claim 1, ms", "claim 1 ms", ".2f"),
    ("in the server", "claim 1 server ms", ".2f"),
    ("its pages", "claim 1 pages", ",.0f"),
    ("its finish, ms", "claim 1 finish ms", ".2f"),
    ("claim 100, ms", "claim 100 ms", ".1f"),
    ("in the server", "claim 100 server ms", ".1f"),
    ("its pages", "claim 100 pages", ",.0f"),
    ("its finish, ms", "claim 100 finish ms", ".1f"),
]


@dataclass(frozen=True)
class Plan:
    """How much of everything. Sizes are numbers of tasks, pools or connections, ascending."""

    rounds: int = 3
    parked: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000, 5_000_000)
    drained: int = 20_000
    running: tuple[int, ...] = (10, 1_000, 10_000)
    pools: tuple[int, ...] = (10, 1_000)
    tasks_of_pools: int = 20_000
    connections: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    seconds: float = 3.0
    claims: int = 20  # of each size, in a turn
    expected: tuple[tuple[int, int], ...] = ((1, 6_000), (100, 40_000))  # batch, and more tasks a second than there are


QUICK = Plan(
    rounds=1,
    parked=(200, 2_000),
    drained=400,
    running=(5, 200),
    pools=(2, 8),
    tasks_of_pools=400,
    connections=(1, 2),
    seconds=0.3,
    claims=3,
)


@dataclass
class Panel:
    """One of the small multiples; a figure in a line is a median of rounds."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    lines: dict[str, list[float]]


@dataclass
class Target:
    """A ratio of two medians, and what it should be: at least the goal, or at most."""

    what: str
    ratio: float
    goal: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.ratio >= self.goal if self.at_least else self.ratio <= self.goal


@dataclass
class Section:
    title: str
    text: str
    table: str
    figures: Figures
    panels: list[Panel]
    targets: list[Target] = field(default_factory=list)


def parked(databases: Databases, plan: Plan) -> Section:
    """With so many parked behind: a claim of 1 and of 100, and a drain."""
    spent = plan.drained + 200 + (plan.claims + 2) * 101  # parked beside, so that `size` are left when a turn ends
    figures = _figures()
    dsns = _filled_up(databases, plan, figures)
    for nth, size in turns(plan.rounds, plan.parked):
        progress(f"parked: round {nth + 1}, {size:,}")
        top_up(dsns[size], POOL, size + spent)
        settle(dsns[size])
        with connect(dsns[size]) as connection:
            lot = Lot(connection, POOL)
            lot.warm_up(100)
            figures[f"{size}"]["drain"].append(lot.drain(plan.drained))
            figures[f"{size}"]["claim 1 pages after the drain"].append(lot.explain(1)[1])
            settle(dsns[size])
            _note(figures[f"{size}"], "claim 1", lot.cost(1, plan.claims))
            _note(figures[f"{size}"], "claim 100", lot.cost(100, plan.claims))

    columns = [
        ("fill, tasks/s", "fill", ",.0f"),
        *_COST_COLUMNS,
        ("claim 1 after the drain, pages", "claim 1 pages after the drain", ",.0f"),
        ("drain, tasks/s", "drain", ",.0f"),
    ]
    many = _nearest(plan.parked, 1_000_000)
    few = _nearest([size for size in plan.parked if size < many] or [many], 10_000)
    pages = ("claim 1 pages", "claim 1 pages after the drain")
    return Section(
        "Parked tasks",
        f"Tasks are taken from the front of a pool with at least so many parked behind: a drain of {plan.drained:,} "
        "tasks by claims of 100, each finished by one park_finish_many; then single claims, each finished at once. "
        "Each size has a database of its own, a copy of the one before filled up by park_submit_many in batches of "
        "10,000. Vacuum analyze and a checkpoint come before the drain and before the claims. Milliseconds are seen "
        "from the client, commit included. In the server, and pages (shared buffers, hit or read): explain (analyze, "
        "buffers) of the claim, rolled back; after the drain, with the dead entries that it left at the front.",
        _table("parked", plan.parked, figures, columns),
        figures,
        [
            Panel("Drain, claim 100 + finish 100", "parked tasks", "tasks/s", plan.parked, _lines(figures, "drain")),
            Panel("Claim", "parked tasks", "ms", plan.parked, _lines(figures, "claim 1 ms", "claim 100 ms")),
            Panel("Pages of a claim of 1", "parked tasks", "pages", plan.parked, _lines(figures, *pages)),
        ],
        [_target(figures, "drain", many, few, "drain with {:,} parked / with {:,}", 0.9, at_least=True)],
    )


def _filled_up(databases: Databases, plan: Plan, figures: Figures) -> dict[int, str]:
    """A database for each size, and how fast it was filled."""
    dsns: dict[int, str] = {}
    for nth, size in enumerate(plan.parked):
        before = plan.parked[nth - 1] if nth else 0
        progress(f"parked: filling up from {before:,} to {size:,}")
        dsns[size] = databases.make(f"parked_{size}", dsns.get(before))
        if not nth:
            make_pools(dsns[size], [POOL])
        figures[f"{size}"]["fill"].append((size - before) / fill(dsns[size], POOL, size - before))
    return dsns


def running(databases: Databases, plan: Plan) -> Section:
    """With so many running: a claim of 1 and of 100."""
    dsns: dict[int, str] = {}
    spent = 2 * (plan.claims + 2) * 101
    for nth, size in enumerate(plan.running):
        before = plan.running[nth - 1] if nth else 0
        progress(f"running: {size:,}")
        dsns[size] = databases.make(f"running_{size}", dsns.get(before))
        if not nth:
            make_pools(dsns[size], [POOL])
        top_up(dsns[size], POOL, size - before + spent)
        with connect(dsns[size]) as connection:
            for done in range(before, size, 100):
                Lot(connection, POOL).claim(min(100, size - done))

    figures = _figures()
    for nth, size in turns(plan.rounds, plan.running):
        progress(f"running: round {nth + 1}, {size:,}")
        top_up(dsns[size], POOL, spent)
        settle(dsns[size])
        with connect(dsns[size]) as connection:
            _renew(connection)
            lot = Lot(connection, POOL)
            _note(figures[f"{size}"], "claim 1", lot.cost(1, plan.claims))
            _note(figures[f"{size}"], "claim 100", lot.cost(100, plan.claims))

    few, many = plan.running[0], plan.running[-1]
    return Section(
        "Running tasks",
        "A claim beside so many running tasks of the same pool, whose leases were renewed once since the vacuum, as "
        "those of living workers are all the time.",
        _table("running", plan.running, figures, _COST_COLUMNS),
        figures,
        [
            Panel(
                "Claim and commit", "running tasks", "ms", plan.running, _lines(figures, "claim 1 ms", "claim 100 ms")
            ),
            Panel("Pages of a claim of 1", "running tasks", "pages", plan.running, _lines(figures, "claim 1 pages")),
        ],
        [
            _target(figures, "claim 1 ms", many, few, "claim of 1 with {:,} running / with {:,}", 2.0),
            _target(figures, "claim 1 server ms", many, few, "the same in the server, without commit", 2.0),
        ],
    )


def pools(databases: Databases, plan: Plan) -> Section:
    """With so many pools that share a number of parked tasks: one submit, claim and finish after another."""
    dsns: dict[int, str] = {}
    names = {size: [f"{POOL}_{nth}" for nth in range(size)] for size in plan.pools}
    for size in plan.pools:
        progress(f"pools: making {size:,}, with {plan.tasks_of_pools:,} tasks")
        dsns[size] = databases.make(f"pools_{size}")
        make_pools(dsns[size], names[size])
        for name in names[size]:
            fill(dsns[size], name, plan.tasks_of_pools // size)

    figures = _figures()
    operations = plan.claims * 50
    for nth, size in turns(plan.rounds, plan.pools):
        progress(f"pools: round {nth + 1}, {size:,}")
        settle(dsns[size])
        with connect(dsns[size]) as connection:
            # A lap to warm up: a session reads the catalog rows of each queue that it meets for the first time.
            laps = [*names[size], *(names[size] * (operations // size + 1))[: max(operations, size)]]
            taken = [_submit_claim_finish(Lot(connection, name)) for name in laps][size:]
        for what, secs in zip(("submit ms", "claim ms", "finish ms"), zip(*taken, strict=True), strict=True):
            figures[f"{size}"][what].append(1000 * statistics.median(secs))

    columns = [(f"{what}, ms", f"{what} ms", ".2f") for what in ("submit", "claim", "finish")]
    return Section(
        "Pools",
        f"One connection submits, claims and finishes one task in one pool after another; {plan.tasks_of_pools:,} "
        "tasks are parked in all pools together. Before, it has been in each pool once.",
        _table("pools", plan.pools, figures, columns),
        figures,
        [
            Panel(
                "One submit, claim, finish",
                "pools",
                "ms",
                plan.pools,
                _lines(figures, *(name for _, name, _ in columns)),
            )
        ],
    )


def connections(databases: Databases, plan: Plan) -> Section:
    """So many worker connections, all on one pool or each on its own."""
    dsn = databases.make("connections")
    most = plan.connections[-1]
    make_pools(dsn, [POOL, *(f"{POOL}_{nth}" for nth in range(most))])
    variants = [
        (batch, rate, kind, size)
        for batch, rate in plan.expected
        for kind in ("one pool", "a pool each")
        for size in plan.connections
    ]
    figures = _figures()
    with claimers(most) as crew:
        for nth, (batch, rate, kind, size) in turns(plan.rounds, variants):
            progress(f"connections: round {nth + 1}, {size} on {kind}, batch {batch}")
            shared = kind == "one pool"
            used = [POOL if shared else f"{POOL}_{place}" for place in range(size)]
            needed = int(rate * plan.seconds) + 1_000 * size
            for name in set(used):  # twice its share, since some are faster than others
                top_up(dsn, name, needed if shared or size == 1 else 2 * needed // size)
            settle(dsn)
            tasks = crew.run([Order(dsn, name, batch, plan.seconds) for name in used])
            figures[f"{size}"][f"{kind}, batch {batch}"].append(tasks)

    columns = [(what, what, ",.0f") for what in _lines(figures)]
    panels = [
        Panel(
            f"Batch {batch}",
            "worker connections",
            "tasks/s",
            plan.connections,
            _lines(figures, f"one pool, batch {batch}", f"a pool each, batch {batch}"),
        )
        for batch, _ in plan.expected
    ]
    return Section(
        "Worker connections",
        f"Tasks/s of that many connections together, each a process that claims a batch, finishes it, and so on for "
        f"{plan.seconds:g} s. Every turn begins with vacuum analyze and a checkpoint.",
        _table("connections", plan.connections, figures, columns),
        figures,
        panels,
        [_collapse(figures, plan, batch) for batch, _ in plan.expected],
    )


def _collapse(figures: Figures, plan: Plan, batch: int) -> Target:
    """What is left at the greatest number of connections of what the best number does, on one pool."""
    name = f"one pool, batch {batch}"
    (medians,) = _lines(figures, name).values()
    best = plan.connections[medians.index(max(medians))]
    what = f"{{:,}} connections on one pool / the best number, {{:,}}, batch {batch}"
    return _target(figures, name, plan.connections[-1], best, what, 0.8, at_least=True)


SECTIONS: dict[str, Callable[[Databases, Plan], Section]] = {
    "parked": parked,
    "running": running,
    "pools": pools,
    "connections": connections,
}


def _figures() -> Figures:
    return defaultdict(lambda: defaultdict(list))


def _note(figures: dict[str, list[float]], what: str, cost: Cost) -> None:
    figures[f"{what} ms"].append(cost.claim_ms)
    figures[f"{what} server ms"].append(cost.server_ms)
    figures[f"{what} pages"].append(cost.pages)
    figures[f"{what} finish ms"].append(cost.finish_ms)


def _renew(connection: Connection) -> None:
    rows = connection.execute("select task_id, worker from pgpark.task where state = 'running'").fetchall()
    for start in range(0, len(rows), 100):
        ids = [row["task_id"] for row in rows[start : start + 100]]
        stop = calls.run_on(connection, calls.heartbeat(POOL, rows[0]["worker"], ids))
        if stop:
            raise RuntimeError(f"{len(stop)} of the tasks that stand for running ones were lost")


def _submit_claim_finish(lot: Lot) -> tuple[float, float, float]:
    """Seconds of each, for one task."""
    statement = "select * from pgpark.park_submit(%s, %s)"
    submitting, _ = timed(lambda: lot.connection.execute(statement, [lot.pool, Jsonb(PAYLOAD)]).fetchone())
    claiming, held = timed(lambda: lot.claim(1))
    finishing, _ = timed(lambda: lot.finish(held))
    return submitting, claiming, finishing


def _table(what: str, sizes: Sequence[int], figures: Figures, columns: Sequence[tuple[str, str, str]]) -> str:
    rows = [[what, *(head for head, _, _ in columns)]]
    rows += [[f"{size:,}", *(spread(figures[f"{size}"][name], form) for _, name, form in columns)] for size in sizes]
    return table(rows)


def _lines(figures: Figures, *names: str) -> dict[str, list[float]]:
    """The medians of these measurements, or of all that there are, variant by variant in ascending order."""
    by_size = [figures[size] for size in sorted(figures, key=int)]
    return {name: [statistics.median(one[name]) for one in by_size] for name in names or by_size[0]}


def _target(
    figures: Figures, name: str, over: int, under: int, what: str, goal: float, *, at_least: bool = False
) -> Target:
    ratio = statistics.median(figures[f"{over}"][name]) / statistics.median(figures[f"{under}"][name])
    return Target(what.format(over, under), ratio, goal, at_least)


def _nearest(sizes: Sequence[int], wanted: int) -> int:
    return min(sizes, key=lambda size: abs(size - wanted))
