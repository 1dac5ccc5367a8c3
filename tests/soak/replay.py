"""The ledger again, from the audit: at every snapshot that was written down, what was held and what waited.

What order is provable? Not that of clocks, and not that of sequences: a transaction commits at any time after its last
statement. But Postgres tells which transactions a snapshot sees, and the snapshots of one server form a chain: sets of
ended transactions, each containing the one before (a transaction never becomes unseen again). So the number of
transactions that a snapshot sees puts all snapshots, whoever took them, into their one true order (`Look.completed`);
that they do form a chain is checked too. At each of them the ledger is exactly known: all steps of all transactions
that it sees. What the observer counted in the tables at his snapshots must equal it, or a trigger has missed something.

Two things are checked at each look, for the pool, each worker and each limited tenant.

*Seen*: if a transaction that took more units than it freed became visible since the look before, the units in use fit
the limit; where that was changed between the two looks, the greatest of those in force since. Sound: the last such
transaction fitted the limit in force when it committed, and whatever followed it cannot have taken more. These are true
states of the database, but there may be states between two looks that nobody saw.

*Own*: a claim's look is taken after it summed the units in use, and sees whatever that sum saw. The units held at this
look, and those that the transaction itself has started, must fit the limit that it sees. Sound: after the sum, units in
use can only have become fewer, as long as nobody else starts or changes anything in this pool before the claim commits.

*One after another* is this condition: of two transactions that start tasks in a pool, one is seen by the other's look;
the same for one that starts and one that changes the pool. If it holds, then all transactions that were committed when
a claim committed, and that its look did not see, can only have freed units. So `own` then covers every commit, also
those that nobody saw: invariant 1 is proved for this run, not sampled. After a shrink the limit seen is the new one,
so nothing may start while more is held: units in use never rise while they are above it.

Depth is checked in both ways, with submits in the place of claims. They do not come one after another, so what two of
them that do not see each other make wait together is *seen* only, at the next of the looks (hundreds a second). A
submit and a change that closes or lowers a pool do come one after another. Tasks that come back may do so at any time,
also between the moment when a submit takes its places and its look. So only those tasks count against the depth that
surely waited when it took them: those never started, and those that came back before a snapshot that the client took
before its call and wait since. Against snapshots in general (*seen*), only those never started count. A submit that
makes no more wait than it drops (overflow: drop_lowest) may do so in a pool that is too full.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from tests.soak.audit import GONE, HELD, WAITING, Look, Setting, Step
from tests.soak.findings import Findings

Key = tuple[int, str, str]  # a pool; 'pool', 'worker' or 'tenant'; the name of the worker or tenant

# Of two transactions that do this in a pool, one must see the other; and what to say if not.
TURNS = {
    ("start", "start"): "two claims of a pool at once",
    ("start", "change"): "a claim beside a change of its pool",
    ("insert", "lowering"): "a submit beside a change that closes or lowers its pool",
}


def replay(
    looks: list[Look], workers: Mapping[str, int], before: Mapping[int, Look], findings: Findings
) -> tuple[int, Counter[str]]:
    """Checks capacity, depth and order of all looks; returns the number of starts and what is held at the end.

    before: for tasks, the snapshot that the client took before it submitted them; among `looks`.
    """
    looks.sort(key=Look.completed)  # stable: a transaction's own stay in the order of its statements
    for position, look in enumerate(looks):
        look.position = position
    _check_chain(looks, findings)
    transactions: dict[int, Transaction] = {}
    for look in looks:
        if look.xid:
            transactions.setdefault(look.xid, Transaction(look.xid)).looks.append(look)
    run = Replay(transactions, workers, before, findings)
    coming = sorted(transactions.values(), key=lambda transaction: transaction.xid)
    begun: list[Transaction] = []  # of lesser xid than some look's xmax, not yet seen
    next_ = 0
    for look in looks:
        while next_ < len(coming) and coming[next_].xid < look.xmax:
            begun.append(coming[next_])
            next_ += 1
        if any(look.sees(transaction.xid) for transaction in begun):
            # Of two that moved the same task, the later one has the later last look: it waited for the row.
            gap = sorted((t for t in begun if look.sees(t.xid)), key=lambda t: t.looks[-1].position)
            begun = [t for t in begun if not look.sees(t.xid)]
            run.arrive(gap, look)
        run.check(look)
    if begun or next_ < len(coming):
        findings.add("transactions that the last look does not see", len(begun) + len(coming) - next_)
    return run.starts, Counter({kind: units for (_, kind, _), units in run.ledger.held.items() if units})


@dataclass(slots=True, eq=False)
class Transaction:
    """A transaction that moved tasks or changed pools: all its looks, and what it did up to the one being checked."""

    xid: int
    looks: list[Look] = field(default_factory=list)
    settings: dict[int, Setting] = field(default_factory=dict)
    live: dict[int, Step] = field(default_factory=dict)
    held: Counter[Key] = field(default_factory=Counter)
    inserted: Counter[int] = field(default_factory=Counter)
    dropped: Counter[int] = field(default_factory=Counter)
    first_inserted: int | None = None
    turns: set[tuple[int, str]] = field(default_factory=set)


class Ledger:
    """What is held and what waits, by the steps applied so far."""

    def __init__(self) -> None:
        self.live: dict[int, Step] = {}
        self.held: Counter[Key] = Counter()
        self.untouched: Counter[int] = Counter()  # waiting and never started, by pool
        self.returned: defaultdict[int, dict[int, int]] = defaultdict(dict)  # pool: task: position since when it waits

    def apply(self, step: Step, position: int) -> None:
        before = self.live.get(step.task)
        for key, units in changes(before, step):
            self.held[key] += units
        if before is not None and before.becomes == WAITING and step.becomes != WAITING:
            if before.attempt == 0:
                self.untouched[step.pool] -= 1
            else:
                del self.returned[step.pool][step.task]
        if step.becomes == WAITING and (before is None or before.becomes != WAITING):
            if step.attempt == 0:
                self.untouched[step.pool] += 1
            else:
                self.returned[step.pool][step.task] = position
        if step.becomes == GONE:
            self.live.pop(step.task, None)
        else:
            self.live[step.task] = step

    def waiting_since(self, pool: int, position: int) -> int:
        """Tasks that wait and either were never started, or came back at this position or before."""
        returned = self.returned[pool]
        later = 0
        for since in reversed(returned.values()):  # in the order in which they came back
            if since <= position:
                break
            later += 1
        return self.untouched[pool] + len(returned) - later


class Replay:
    """Goes through the looks in their order."""

    def __init__(
        self,
        transactions: dict[int, Transaction],
        workers: Mapping[str, int],
        before: Mapping[int, Look],
        findings: Findings,
    ) -> None:
        self.transactions, self.workers, self.before, self.findings = transactions, workers, before, findings
        self.ledger = Ledger()
        self.settings: dict[int, Setting] = {}
        self.turns: defaultdict[tuple[int, str], set[int]] = defaultdict(set)
        self.starts = 0

    def arrive(self, gap: list[Transaction], look: Look) -> None:
        """These transactions became visible between the look before and this one."""
        limits = {pool: [setting] for pool, setting in self.settings.items()}
        risen: set[Key] = set()
        grown: set[int] = set()
        swapped: set[int] = set()
        for own in gap:
            for turn in own.turns:
                self.turns[turn].discard(own.xid)
            risen |= {key for key, units in own.held.items() if units > 0}
            grown |= {pool for pool, count in own.inserted.items() if count > own.dropped[pool]}
            swapped |= {pool for pool, count in own.inserted.items() if count and own.dropped[pool]}
            for step in (step for taken in own.looks for step in taken.steps):
                self.ledger.apply(step, look.position)
            for setting in (setting for taken in own.looks for setting in taken.settings):
                limits.setdefault(setting.pool, []).append(setting)
                self.settings[setting.pool] = setting
        for key in risen:
            self._fits("seen", key, self.ledger.held[key], limits[key[0]])
        for pool in grown - swapped:
            depth = max(setting.depth or math.inf for setting in limits[pool])
            if self.ledger.untouched[pool] > depth:
                self.findings.add("depth exceeded, seen", f"pool {pool}: {self.ledger.untouched[pool]} of {depth}")

    def check(self, look: Look) -> None:
        if look.observed is not None:
            self._compare(look)
        if look.xid == 0:
            return
        own = self.transactions[look.xid]
        for setting in look.settings:
            own.settings[setting.pool] = setting
            self._take_turn(own, setting.pool, "change")
            if (now := self.settings.get(setting.pool)) is not None and lowers(now, setting):
                self._take_turn(own, setting.pool, "lowering")
        started = set()
        for step in look.steps:
            before = own.live.get(step.task) or self.ledger.live.get(step.task)
            if (before.becomes if before else GONE) != step.was:
                self.findings.add("a step of a task that was elsewhere", (step, before))
            for key, units in changes(before, step):
                own.held[key] += units
            if step.becomes == HELD:
                started |= set(keys(step))
                self._started(own, step)
            own.inserted[step.pool] += step.was == GONE
            own.dropped[step.pool] += step.was == WAITING and step.becomes == GONE
            if step.was == GONE:
                self._inserted(own, step)
            own.live[step.task] = step
        for key in started:
            self._fits("own", key, self.ledger.held[key] + own.held[key], [self._setting(own, key[0])])
        if look is own.looks[-1]:  # one before may still drop what it made too many
            for pool, count in own.inserted.items():
                self._depth(own, pool, count - own.dropped[pool])

    def _started(self, own: Transaction, step: Step) -> None:
        self.starts += 1
        self._take_turn(own, step.pool, "start")
        if self._setting(own, step.pool).state in ("paused", "disabled"):
            self.findings.add("a start in a paused pool", step)
        if step.late:
            self.findings.add("a start after the deadline", step)

    def _inserted(self, own: Transaction, step: Step) -> None:
        if own.first_inserted is None:
            own.first_inserted = step.task
        self._take_turn(own, step.pool, "insert")
        setting = self._setting(own, step.pool)
        if setting.state in ("draining", "disabled"):
            self.findings.add("accepted by a closed pool", step)
        most = min(setting.max_units, setting.tenant_units(step.tenant or "") or setting.max_units)
        if step.units > most:
            self.findings.add("accepted though too large", step)

    def _depth(self, own: Transaction, pool: int, added: int) -> None:
        depth = self._setting(own, pool).depth
        if depth is None or added <= 0 or own.first_inserted is None:
            return
        since = self.before.get(own.first_inserted)
        waiting = self.ledger.waiting_since(pool, since.position if since else -1)
        if waiting + added > depth:
            self.findings.add("depth exceeded, own", f"pool {pool}: {waiting} waited, {added} added, of {depth}")

    def _take_turn(self, own: Transaction, pool: int, kind: str) -> None:
        if (pool, kind) in own.turns:
            return
        for pair, complaint in TURNS.items():
            if kind in pair:
                others = self.turns[pool, pair[1] if kind == pair[0] else pair[0]] - {own.xid}
                if others:
                    self.findings.add(complaint, f"pool {pool}: transactions {own.xid} and {sorted(others)}")
        own.turns.add((pool, kind))
        self.turns[pool, kind].add(own.xid)

    def _fits(self, how: str, key: Key, held: int, settings: Iterable[Setting]) -> None:
        limit = max(self._limit(key, setting) for setting in settings)
        if held > limit:
            self.findings.add(f"{key[1]} over its units, {how}", f"pool {key[0]} {key[2]}: {held} of {limit}")

    def _limit(self, key: Key, setting: Setting) -> float:
        _, kind, name = key
        if kind == "pool":
            return setting.max_units
        return self.workers[name] if kind == "worker" else setting.tenant_units(name) or math.inf

    def _setting(self, own: Transaction, pool: int) -> Setting:
        return own.settings.get(pool) or self.settings[pool]

    def _compare(self, look: Look) -> None:
        for pool, (used, waiting) in (look.observed or {}).items():
            ours = (self.ledger.held[pool, "pool", ""], self.ledger.waiting_since(pool, look.position))
            if ours != (used, waiting):
                self.findings.add("audit and ledger differ", f"pool {pool}: {ours}, observed {(used, waiting)}")


def keys(step: Step) -> tuple[Key, Key, Key]:
    """Whose units a held task takes."""
    return (step.pool, "pool", ""), (step.pool, "worker", step.worker or ""), (step.pool, "tenant", step.tenant or "")


def changes(before: Step | None, after: Step) -> Iterator[tuple[Key, int]]:
    """What a step does to the units held; before: the one that brought the task where it was."""
    if before is not None and before.becomes == HELD:
        for key in keys(before):
            yield key, -before.units
    if after.becomes == HELD:
        for key in keys(after):
            yield key, after.units


def lowers(before: Setting, after: Setting) -> bool:
    """Whether a change must come after all submits that began before it: it takes something away from them."""
    closed = ("draining", "disabled")
    return (
        after.max_units < before.max_units
        or (after.depth is not None and (before.depth is None or after.depth < before.depth))
        or (after.state in closed and before.state not in closed)
    )


def _check_chain(looks: list[Look], findings: Findings) -> None:
    """Each look sees all that the one before saw; else nothing here has a meaning."""
    for first, second in itertools.pairwise(looks):
        unseen = second.busy | {second.xid} if second.xid else second.busy
        if second.xmax < first.xmax or any(first.sees(xid) for xid in unseen):
            findings.add("snapshots that are no chain", (first, second))
