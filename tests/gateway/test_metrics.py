"""GET /metrics as Prometheus reads it."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families as parsed

from tests.conftest import Database
from tests.gateway.conftest import Gateway


def samples(client: httpx.Client) -> dict[str, float]:
    """By name and labels."""
    answer = client.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in parsed(answer.text)
        for sample in family.samples
    }


def test_metrics_tell_what_a_pool_does_and_has_done(db: Database, admin: httpx.Client) -> None:
    db.freeze()
    db.pool(max_units=8)
    tasks = [db.parked(units=3, priority=priority) for priority in ("high", "normal", "normal")]
    db.advance(4)
    db.claim()
    db.advance(40)
    db.finish(tasks[0])
    found = samples(admin)
    assert found["pgpark_capacity_units pool=gpu"] == 8
    assert found["pgpark_used_units pool=gpu"] == 3
    assert found["pgpark_demand_units pool=gpu"] == 6
    assert found["pgpark_parked_tasks pool=gpu priority=normal"] == 1
    assert found["pgpark_oldest_parked_seconds pool=gpu"] == 44
    assert found["pgpark_outcomes_total outcome=completed pool=gpu"] == 1
    assert found["pgpark_wait_seconds_bucket le=2.5 pool=gpu"] == 0
    assert found["pgpark_wait_seconds_bucket le=5 pool=gpu"] == 2
    assert found["pgpark_wait_seconds_sum pool=gpu"] == 8
    assert found["pgpark_run_seconds_bucket le=60 pool=gpu"] == found["pgpark_run_seconds_count pool=gpu"] == 1


def test_a_reader_sees_its_pools_alone_and_nobody_without_a_token_anything(db: Database, gateway: Gateway) -> None:
    db.pool("gpu")
    db.pool("cpu")
    found = samples(gateway.client("reader", pools=["cpu"]))
    assert {name.split("pool=")[1].split()[0] for name in found if "pool=" in name} == {"cpu"}
    assert gateway.client(secret="").get("/metrics").status_code == 401


def test_requests_are_counted_by_route(db: Database, admin: httpx.Client) -> None:
    db.pool()
    for path in ("/pools/gpu", "/pools/gpu", "/pools/none", "/nowhere/at/all"):
        admin.get(path)
    found = samples(admin)
    assert found["pgpark_gateway_requests_total method=GET route=/pools/{pool} status=200"] == 2
    assert found["pgpark_gateway_requests_total method=GET route=/pools/{pool} status=404"] == 1
    assert found["pgpark_gateway_requests_total method=GET route=none status=404"] == 1
    assert found["pgpark_gateway_request_seconds_count method=GET route=/pools/{pool}"] == 3
