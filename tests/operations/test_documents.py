"""What is said of metrics is what is exposed: the document, the dashboard and the alert rules name the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pgpark.measures import BOUNDS
from pgpark.metrics import POOL_FAMILIES, WORKER_FAMILIES, pool_text
from pgpark.models import Metric
from tests.conftest import Database

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "operations"
GATEWAY = {"pgpark_gateway_requests": "counter", "pgpark_gateway_request_seconds": "histogram"}
NAME = re.compile(r"\bpgpark_[a-z_]+")


def families() -> dict[str, str]:
    """Type by name as documents write it."""
    all_ = {name: kind for name, (kind, _) in (POOL_FAMILIES | WORKER_FAMILIES).items()} | GATEWAY
    return {name + ("_total" if kind == "counter" else ""): kind for name, kind in all_.items()}


def sample_names() -> set[str]:
    names = families()
    ends = ("_bucket", "_sum", "_count")
    return set(names) | {name + end for name, kind in names.items() if kind == "histogram" for end in ends}


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return list(group["rules"])


def expressions(board: Any) -> Iterator[str]:
    """Of a dashboard."""
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"]


def promtool(*arguments: str) -> str:
    if shutil.which("promtool") is None:
        (pytest.fail if os.environ.get("PGPARK_TEST_NEEDS_TOOLS") else pytest.skip)("promtool is not installed")
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_is_exposed_is_documented_and_the_other_way_round(db: Database) -> None:
    told = dict(re.findall(r"^\| `(pgpark_\w+)` \| (\w+) \|", (FOLDER / "metrics.md").read_text(), re.MULTILINE))
    assert told == families()
    db.pool()
    rows = [Metric.model_validate(row) for row in db.rows("select * from pgpark.park_metrics()")]
    pools = {name for name in sample_names() if not name.startswith(("pgpark_worker_", "pgpark_gateway_"))}
    assert {row.metric for row in rows} == pools - {"pgpark_wait_seconds", "pgpark_run_seconds"}
    assert b"newer release" not in pool_text(rows)


def test_labels_are_those_documented(db: Database) -> None:
    text = (FOLDER / "metrics.md").read_text()
    told = {
        name: set(re.findall(r"`(\w+)`", labels))
        for name, labels in re.findall(r"^\| `(pgpark_\w+)` \| \w+ \|([^|]*)\|", text, re.MULTILINE)
    }
    db.pool()
    for row in db.rows("select * from pgpark.park_metrics()"):
        name = re.sub("_(bucket|sum|count)$", "", row["metric"])
        assert set(row["labels"]) <= told[name], name
        assert told[name] - {"le"} <= set(row["labels"]), name


def test_workers_count_in_the_buckets_of_the_database(db: Database) -> None:
    assert list(BOUNDS) == db.value("select pgpark._bounds()")


def test_the_dashboard_asks_for_what_there_is() -> None:
    board = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    assert {variable["name"] for variable in board["templating"]["list"]} == {"datasource", "pool"}
    asked = {name for expr in expressions(board) for name in NAME.findall(expr)}
    assert asked <= sample_names()
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in board["panels"]:
        assert panel["type"] == "row" or panel["datasource"]["uid"] == "${datasource}"


def test_prometheus_can_read_each_expression_of_the_dashboard(tmp_path: Path) -> None:
    board = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    rules = [
        {"record": f"panel:{number}", "expr": expr.replace("$__rate_interval", "1m").replace("$pool", ".*")}
        for number, expr in enumerate(expressions(board))
    ]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", str(tmp_path / "rules.yml"))


def test_each_alert_asks_for_what_there_is_and_has_a_runbook() -> None:
    headings = set(re.findall("^### (.*)", (FOLDER / "metrics.md").read_text(), re.MULTILINE))
    assert {rule["alert"] for rule in alerts()} == headings
    for rule in alerts():
        assert set(NAME.findall(rule["expr"])) <= sample_names(), rule["alert"]
        assert rule["annotations"]["runbook"] == f"docs/operations/metrics.md#{rule['alert'].lower()}"


def test_each_alert_fires_when_it_should_and_only_then(tmp_path: Path) -> None:
    cases = Path(__file__).with_name("alerts_test.yml")
    tested = {
        case["alertname"]
        for test in yaml.safe_load(cases.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert tested == {rule["alert"] for rule in alerts()}
    for file in (cases, FOLDER / "alerts.yml"):
        shutil.copy(file, tmp_path)
    assert "SUCCESS" in promtool("check", "rules", str(tmp_path / "alerts.yml"))
    assert "SUCCESS" in promtool("test", "rules", str(tmp_path / "alerts_test.yml"))
