"""The OpenAPI document is right: requests that are made from it, good and bad, are answered as it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.config import GenerationConfig
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.conftest import Database
from tests.gateway.conftest import Gateway

EXAMPLES = 10  # of each operation, good ones and bad ones
# What the config of a pool may be is not in the document, but in that of the config file.
UNDOCUMENTED = {"PATCH /pools/{pool}": [positive_data_acceptance]}


@pytest.fixture
def documented(db: Database, gateways: Callable[..., Gateway]) -> tuple[Any, dict[str, str]]:
    gateway = gateways(max_wait_secs=0.05)
    db.pool("gpu", max_queue_depth=50)
    for _ in range(10):
        db.parked(tenant="a")
    for row in db.claim(max_tasks=5)[:2]:
        db.finish(row["task_id"])
    loaded = schemathesis.openapi.from_url(f"{gateway.url}/openapi.json")
    return loaded, {"Authorization": f"Bearer {gateway.secret()}"}


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_answers_are_as_the_openapi_document_says(documented: tuple[Any, dict[str, str]], mode: GenerationMode) -> None:
    schema, headers = documented
    # What the document cannot say: in a payload NUL cannot be kept, and is refused. In bad requests it is what is bad.
    schema.config.generation = GenerationConfig(allow_x00=mode is GenerationMode.NEGATIVE)
    problems = []
    for result in schema.get_all_operations():
        operation = result.ok()
        if "/events" in operation.path and mode is GenerationMode.NEGATIVE:
            continue  # without a good max_secs it has no end
        try:
            answers_well(operation, mode, headers)()
        except hypothesis.errors.Unsatisfiable:  # there is nothing to get wrong
            continue
        except (AssertionError, FailureGroup) as error:
            problems.append(f"{operation.label}: {error}")
    assert not problems, "\n\n".join(problems)


_REAL = hypothesis.strategies.sampled_from(
    [{"pool": "gpu", "tenant": "a", "task_id": task_id} for task_id in range(1, 12)] + [{}]
)


def answers_well(operation: Any, mode: GenerationMode, headers: dict[str, str]) -> Callable[[], None]:
    """A test of one operation."""

    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode), real=_REAL)
    def answer(case: Any, real: dict[str, Any]) -> None:
        if mode is GenerationMode.POSITIVE:
            known = case.path_parameters or {}
            case.path_parameters = {**known, **{name: real[name] for name in known.keys() & real.keys()}}
        # In an address a list of one is what it holds, and an empty one nothing: then nothing bad is sent.
        hypothesis.assume(not any(isinstance(value, (list, dict)) for value in (case.query or {}).values()))
        if "/events" in operation.path:
            case.query = {**(case.query or {}), "max_secs": 0}
        for task in [case.body, *case.body.get("tasks", [])] if isinstance(case.body, dict) else []:
            if isinstance(task, dict):  # this pool has no cost model
                for key in ("prompt_tokens", "max_tokens"):
                    task.pop(key, None)
        excluded = UNDOCUMENTED.get(operation.label, [])
        case.call_and_validate(timeout=20, headers=headers, excluded_checks=excluded)

    return answer  # type: ignore[no-any-return]
