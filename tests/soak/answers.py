"""What the clients were told, against the outcomes that landed in the mailbox and what is left of the tasks.

Every answer that a client got must be true for ever: what was accepted has one outcome, of the attempt whose finish was
accepted, with its result. An outcome is known twice: from the row put into the mailbox (the audit), and as it was found
there at the end, or by the client who took it out.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.soak.audit import GONE, HELD, Look, Outcome
from tests.soak.findings import Findings


@dataclass
class Told:
    """All that the clients were told, by kind."""

    accepted: dict[int, str | None] = field(default_factory=dict)  # task: its idempotency key, with its pool
    before: dict[int, Look] = field(default_factory=dict)  # task: a snapshot from before its submit
    duplicates: list[tuple[int, str | None]] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    undone: set[int] = field(default_factory=set)
    claims: list[tuple[int, int, str]] = field(default_factory=list)
    finishes: list[tuple[int, int, str, str]] = field(default_factory=list)  # accepted; task, attempt, status, token
    ended: list[tuple[int, int, int]] = field(default_factory=list)  # task, attempt, transaction of who ended it
    fenced: int = 0
    releases: int = 0
    cancels: list[tuple[int, str, str]] = field(default_factory=list)
    taken: list[tuple[int, str, str | None, Any]] = field(default_factory=list)  # task, status, reason, payload
    errors: list[str] = field(default_factory=list)

    def snapshots(self) -> list[Look]:
        return list({id(look): look for look in self.before.values()}.values())


def read(folder: Path) -> Told:
    """From the files that clients.py describes."""
    told = Told()
    for path in sorted(folder.glob("*.jsonl")):
        with path.open() as lines:
            for line in lines:
                _take_in(told, *json.loads(line))
    return told


def _take_in(told: Told, kind: str, *what: Any) -> None:
    match kind:
        case "submit":
            pool, snapshot, rows = what
            look = Look.parse(0, snapshot)
            for task, accepted, reason, key in rows:
                key = key and f"{key} of {pool}"
                if reason == "duplicate":
                    told.duplicates.append((task, key))
                elif accepted:
                    told.accepted[task] = key
                    told.before[task] = look
                else:
                    told.refused[str(reason)] += 1
        case "undone":
            told.undone.update(what[0])
        case "claim":
            told.claims += [(task, attempt, what[1]) for task, attempt in what[2]]
        case "finish":
            told.finishes += [tuple(row[:4]) for row in what[0] if row[4]]
            told.ended += [(row[0], row[1], row[5]) for row in what[0] if row[4]]
            told.fenced += sum(not row[4] for row in what[0])
        case "release":
            task, attempt, accepted, xid = what
            told.releases += accepted
            told.ended += [(task, attempt, xid)] * accepted
        case "cancel":
            told.cancels.append(what)
        case "take":
            told.taken += map(tuple, what[0])
        case "error":
            told.errors.append(" ".join(map(str, what)))


def check(
    told: Told, looks: list[Look], posted: list[Outcome], mailbox: list[tuple[Any, ...]], findings: Findings
) -> None:
    """mailbox: (task, status, reason, payload) of each row left in it."""
    outcomes = {outcome.task: outcome for outcome in posted}
    for error in told.errors:
        findings.add("errors", error)
    _check_tasks(told, outcomes, posted, findings)
    _check_mailbox(told, outcomes, mailbox, findings)
    _check_attempts(told, looks, posted, findings)
    _check_finishes(told, looks, outcomes, findings)
    for task, reason, answer in told.cancels:
        status, why = outcomes[task][2:4] if task in outcomes else (None, None)
        fits = {
            "dropped": (status, why) == ("dropped", reason),
            "cancelling": status == "completed" or (status == "dropped" and str(why).startswith("cancel ")),
            "finished": status is not None,
            "unknown": any(task == taken for taken, *_ in told.taken) if answer == "unknown" else False,
        }
        if not fits[answer]:
            findings.add("a cancel whose outcome differs", f"task {task} {reason}: {answer}, then {status} {why}")


def _check_tasks(told: Told, outcomes: dict[int, Outcome], posted: list[Outcome], findings: Findings) -> None:
    """One outcome for each accepted task, none for others; a key belongs to one task until its outcome is taken."""
    for task in told.accepted.keys() - outcomes.keys():
        findings.add("accepted tasks without an outcome", task)
    for task in outcomes.keys() - told.accepted.keys():
        findings.add("outcomes of tasks never accepted", outcomes[task])
    for task, count in Counter(outcome.task for outcome in posted).items():
        if count > 1:
            findings.add("tasks with two outcomes", task)
    for outcome in posted:
        if outcome.early:
            findings.add("expired before the deadline", outcome)
    for task, key in told.duplicates:
        if told.accepted.get(task) != key:
            findings.add("duplicates of a task without that key", f"{task}: {key}, not {told.accepted.get(task)}")
    taken = {task for task, *_ in told.taken}
    for key, count in Counter(key for task, key in told.accepted.items() if task not in taken).items():
        if count > 1 and key is not None:
            findings.add("two tasks of one key", key)


def _check_mailbox(
    told: Told, outcomes: dict[int, Outcome], mailbox: list[tuple[Any, ...]], findings: Findings
) -> None:
    found = mailbox + told.taken
    for task, count in Counter(task for task, *_ in found).items():
        if count > 1:
            findings.add("outcomes found twice", task)
    for row in found:
        if row[0] not in outcomes or outcomes[row[0]][1:5] != row:
            findings.add("mailbox and audit differ", row)
    for task in outcomes.keys() - {task for task, *_ in found}:
        findings.add("outcomes that vanished from the mailbox", task)


def _check_attempts(told: Told, looks: list[Look], posted: list[Outcome], findings: Findings) -> None:
    """Each start was told to one client, and only starts were; an outcome lands when its task leaves the ledger."""
    started: set[tuple[int, int, str | None]] = set()
    left: set[tuple[int, int]] = set()
    for look in looks:
        started.update((step.task, step.attempt, step.worker) for step in look.steps if step.becomes == HELD)
        left.update((look.xid, step.task) for step in look.steps if step.becomes == GONE)
    for attempt, count in Counter((task, attempt) for task, attempt, _ in told.claims).items():
        if count > 1:
            findings.add("attempts claimed twice", attempt)
    for claim in started - set(told.claims):
        findings.add("starts that nobody was told", claim)
    for claim in set(told.claims) - started:
        findings.add("claims of tasks that did not start", claim)
    for pair in left ^ {(outcome.xid, outcome.task) for outcome in posted}:
        findings.add("tasks that ended without their outcome, or it without them", pair)


def _check_finishes(told: Told, looks: list[Look], outcomes: dict[int, Outcome], findings: Findings) -> None:
    """An accepted finish or release ended that attempt, and what it said is what became of the task."""
    ended = {
        (step.task, step.attempt, look.xid) for look in looks for step in look.steps if step.was == HELD != step.becomes
    }
    for end in told.ended:
        if end not in ended:
            findings.add("an accepted finish or release that did not end its attempt", end)
    for attempt, count in Counter(end[:2] for end in told.ended).items():
        if count > 1:
            findings.add("attempts ended twice", attempt)
    for task, number, status, token in told.finishes:
        if task in outcomes and not _follows(outcomes[task], number, status, token):
            findings.add("an accepted finish whose outcome differs", ((number, status, token), outcomes[task]))
    results = {(task, token) for task, _, _, token in told.finishes}
    for outcome in outcomes.values():
        if outcome.status == "completed" and (outcome.task, outcome.payload) not in results:
            findings.add("completed though no finish was accepted", outcome)


def _follows(outcome: Outcome, attempt: int, status: str, token: str) -> bool:
    """Whether this outcome may follow from a finish that was accepted."""
    final = (outcome.attempt, outcome.payload) == (attempt, token)
    if status == "completed":
        return final and outcome.status == "completed"
    if status == "dropped":
        return final and outcome.status == "dropped"
    if final:  # failed for good; or dropped, when it was being cancelled
        return outcome.status in ("failed", "dropped")
    # Retried: another attempt follows, or it ended while it waited for that.
    return outcome.attempt > attempt or (outcome.attempt == attempt and outcome.status in ("expired", "dropped"))
