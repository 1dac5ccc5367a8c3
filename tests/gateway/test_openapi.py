"""The OpenAPI document is right: requests that are made from it, good and bad, are answered as it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.config import GenerationConfig

from tests.conftest import Database
from tests.gateway.conftest import Gateway

# A request that fits the schema may be refused with these: what the pool or the database cannot take is not in it.
EXAMPLES = 20


@pytest.fixture
def schema(db: Database, gateways: Callable[..., Gateway]) -> Any:
    gateway = gateways(max_wait_secs=0.05)
    db.pool(max_queue_depth=50)
    secret = gateway.secret()
    loaded = schemathesis.openapi.from_url(f"{gateway.url}/openapi.json")
    loaded.config.update(headers={"Authorization": f"Bearer {secret}"})
    loaded.config.generation = GenerationConfig(allow_x00=False)
    return loaded


def test_answers_are_as_the_openapi_document_says(schema: Any) -> None:
    problems = []
    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy())
        def answer(case: Any) -> None:
            if "/events" in case.path:
                case.query = {**(case.query or {}), "max_secs": 0}
            case.call_and_validate(timeout=20)

        try:
            answer()
        except BaseException as error:
            problems.append(f"{operation.label}: {error}")
    assert not problems, "\n\n".join(problems)
