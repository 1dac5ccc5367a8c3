"""Random histories of a pool for tests/test_model.py: what they are made of, as Hypothesis strategies.

A step means something in any state (`pick` counts tasks of the right kind from the latest), so that Hypothesis can
leave out or simplify each on its own when it makes a failing history short.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from hypothesis import strategies as st

from tests.model_tasks import Draft, Pool, Tenant


@dataclass(frozen=True)
class Step:
    """A method of Sides in tests/test_model.py and its arguments."""

    name: str
    arguments: dict[str, Any]

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={shown(value)}' for name, value in self.arguments.items())})"


@dataclass(frozen=True)
class History:
    pool: Pool
    steps: tuple[Step, ...]

    def __repr__(self) -> str:
        return "\n".join(["  " + shown(self.pool), *(f"  {step}" for step in self.steps)])


def shown(value: Any) -> str:
    """Like repr, without what has its default value."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if not isinstance(value, Draft | Pool):
        return repr(value)
    usual = type(value)()
    given = [f.name for f in fields(value) if getattr(value, f.name) != getattr(usual, f.name)]
    return f"{type(value).__name__}({', '.join(f'{name}={getattr(value, name)!r}' for name in given)})"


# The values that each setting takes. The more often a value stands there, the more often it is taken; the first is what
# a failing history is simplified to.
SETTINGS: dict[str, list[Any]] = {
    "max_units": [8, 10, 10, 5, 3],
    "max_queue_depth": [None, None, 12, 6, 2],
    "max_bypass": [0, 0, 1, 2, 3],
    "default_timeout_secs": [None, None, None, 30],
    "scheduling_slack_secs": [0, 0, 0, 3],
    "lease_secs": [8, 30, 30, 90],
    "run_timeout_secs": [None, None, 20],
    "max_attempts": [1, 2, 3],
    "max_losses": [1, 2, 3],
    "backoff_secs": [0, 8],
    "max_backoff_secs": [300, 10],
    "ttl_secs": [None, None, 40],
    "overflow": ["reject", "drop_lowest"],
    "fairness": ["fifo", "tenant", "tenant"],
}
DRAFT: dict[str, list[Any]] = {
    "units": [1, 1, 1, 2, 2, 3, 3, 4, 5, 7, 9],
    "priority": [1, 1, 1, 0, 2, 3],
    "tenant": [None, "t", "u", "v"],
    "deadline": [None] * 16 + [-1, 0, 5, 5, 20, 20, 60, 60],  # seconds from now
    "run_at": [None] * 16 + [-1, 0, 1, 5, 20],
    "key": [None] * 20 + ["k", "l", "m"],
}
TENANT: dict[str, list[Any]] = {"weight": [1, 2, 0.3], "max_units": [None, None, 2, 4, 8]}
WORKERS = ["a", "b", "c"]
STATUSES, REASONS = ["completed", "completed", "failed", "failed", "dropped"], [None, "because"]


def chosen(values: dict[str, list[Any]]) -> dict[str, st.SearchStrategy[Any]]:
    return {name: st.sampled_from(choices) for name, choices in values.items()}


def one_setting(values: dict[str, list[Any]]) -> st.SearchStrategy[tuple[str, Any]]:
    return st.sampled_from([(name, value) for name, choices in values.items() for value in choices])


picks = st.integers(0, 11)
workers = st.sampled_from(["a", "b", "c"])
limited_names = st.sampled_from(["", "t", "u"])
reasons = st.sampled_from(REASONS)
drafts = st.builds(Draft, **chosen(DRAFT))
ends = st.tuples(picks, st.sampled_from([0, 0, 0, 1, -1]), st.sampled_from(STATUSES), reasons)
pools = st.builds(
    Pool,
    **chosen(SETTINGS),
    tenants=st.dictionaries(limited_names, st.builds(Tenant, **chosen(TENANT)), max_size=2),
)

# By name: how often, and what makes its arguments.
STEPS: dict[str, tuple[int, dict[str, st.SearchStrategy[Any]]]] = {
    "nothing": (1, {}),
    "submit": (6, {"drafts": st.lists(drafts, min_size=1, max_size=5)}),
    "claim": (
        6,
        {
            "worker": workers,
            "max_tasks": st.sampled_from([1, 2, 9]),
            "max_units": st.sampled_from([None, None, 3, 8]),
        },
    ),
    "finish": (4, {"pick": picks, "status": st.sampled_from(STATUSES), "reason": reasons}),
    "finish_many": (1, {"ends": st.lists(ends, min_size=1, max_size=4)}),
    "release": (2, {"pick": picks, "ago": st.sampled_from([0, 0, 0, 1])}),
    "cancel": (2, {"pick": picks, "reason": reasons}),
    "heartbeat": (1, {"worker": workers, "picks": st.lists(picks, max_size=5)}),
    "advance": (3, {"seconds": st.sampled_from([1, 4, 5, 8, 10, 20, 30, 61])}),
    "maintain": (1, {}),
    "prune": (1, {}),
    "change": (2, {"setting": one_setting(SETTINGS)}),
    "change_tenant": (2, {"name": limited_names, "setting": one_setting(TENANT)}),
    "set_state": (1, {"state": st.sampled_from(["active"] * 9 + ["paused", "draining", "disabled"])}),
}


@st.composite
def steps(draw: st.DrawFn) -> Step:
    name = draw(st.sampled_from([name for name, (times, _) in STEPS.items() for _ in range(times)]))
    return Step(name, {key: draw(values) for key, values in STEPS[name][1].items()})


def histories(length: int) -> st.SearchStrategy[History]:
    """Histories of this many steps, some of which are nothing."""
    made = st.lists(steps(), min_size=length, max_size=length)
    return st.builds(lambda pool, all_: History(pool, tuple(s for s in all_ if s.name != "nothing")), pools, made)
