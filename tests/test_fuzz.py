"""A short fuzz, and the proof that it finds what is wrong: each sabotage, by a right check."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgpark import config
from tests.fuzz.documented import EXIT_CODES, SQLSTATES
from tests.fuzz.runner import Plan, fuzz
from tests.test_soak import replace


@pytest.mark.slow
def test_a_fuzz_finds_nothing(dsn: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    report = fuzz(dsn, Plan.of(request.config.getoption("--fuzz-calls")), tmp_path)
    assert not report.findings.counts, str(report)


def test_what_is_documented_was_read() -> None:
    assert {"22023", "42704", "25001", "42501"} <= SQLSTATES
    assert {0, 1, 2, 3, 130, 143} == EXIT_CODES


# What is done wrong: the function, what is right in it, what stands there instead, and the finding.
SABOTAGES = {
    "an argument that is not checked": (
        "_is_bad_worker",
        "coalesce(worker, '') = '' or octet_length(worker) > 255",
        "false",
        r": 23(502|514) ",
    ),
    "a claim that books a unit too much": (
        "_book_start",
        "_book_start.units, now_",
        "_book_start.units + 1, now_",
        "units in use are not those of what runs",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SABOTAGES)
def test_the_fuzz_finds_what_is_done_wrong(name: str, dsn: str, tmp_path: Path) -> None:
    function, right, wrong, finding = SABOTAGES[name]
    with psycopg.connect(dsn, autocommit=True) as connection:
        replace(connection, function, right, wrong)
    report = fuzz(dsn, Plan(statements=600, commands=0, texts=0, rounds=1), tmp_path)
    assert any(re.search(finding, found) for found in report.findings.counts), str(report)


def test_the_fuzz_finds_a_parser_that_raises(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(_text: str, _file: str) -> Any:
        raise KeyError("no")

    monkeypatch.setattr(config, "parse", parse)
    report = fuzz(dsn, Plan(statements=0, commands=300, texts=80, rounds=1), tmp_path)
    found = report.findings.counts.keys()
    assert "a config file in JSON: KeyError: 'no'" in found, str(report)
    assert not any("HungError" in finding for finding in found), str(report)
    assert any(finding.startswith("pgpark ") and "KeyError" in finding for finding in found), str(report)
