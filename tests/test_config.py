"""The config file as text: JSON and YAML, variables, keys given twice, and where its pools live."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from pgpark.config import is_secret, load
from pgpark.errors import BadInputError
from pgpark.places import Place

GIVEN = Place("dbname=given", Path("home"))


def pools(tmp_path: Path, text: str, name: str = "c.json") -> Any:
    (tmp_path / name).write_text(text)
    return load(tmp_path / name).pools


def test_yaml_says_the_same_as_json(tmp_path: Path) -> None:
    expected = {"gpu": {"max_units": 24, "retry": {"max_attempts": 3}}}
    yaml = "pools:\n  gpu:\n    max_units: 24\n    retry: {max_attempts: 3}\n"
    assert pools(tmp_path, json.dumps({"$schema": "./s.json", "pools": expected})) == expected
    assert pools(tmp_path, yaml, "c.yml") == expected
    assert pools(tmp_path, yaml, "config") == expected, "without a suffix that tells"
    assert pools(tmp_path, "\ufeff" + json.dumps({"pools": expected}), "config") == expected


def test_variables_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "TOKEN": "12345",
        "UNITS": "24",
        "HALF": "0.5",
        "YES": "true",
        "EMPTY": "",
        "BIG": "1e999",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("UNSET", raising=False)
    (filled,) = pools(
        tmp_path,
        """{"pools": {"gpu": {"max_units": "${UNITS}", "lease_secs": "${UNSET:-5}", "archive": "${YES}",
             "scheduling_slack_secs": "${HALF}", "max_bypass": "${BIG}", "run_timeout_secs": "1${UNITS}",
             "tenants": {"t": {"max_units": "${UNITS}", "weight": "${EMPTY:-2}"}},
             "queue": {"path": "$${HOME}/${EMPTY}x", "stream": "${UNSET:-a:-b}"},
             "mailbox": {"notifier": {"auth_header": "${TOKEN}", "base_url": "https://h/${TOKEN}$"}}}}}""",
    ).values()
    assert filled == {
        "max_units": 24,
        "lease_secs": 5,
        "archive": True,
        "scheduling_slack_secs": 0.5,
        "max_bypass": "1e999",
        "run_timeout_secs": "124",
        "tenants": {"t": {"max_units": 24, "weight": 2}},
        "queue": {"path": "${HOME}/x", "stream": "a:-b"},
        "mailbox": {"notifier": {"auth_header": "12345", "base_url": "https://h/12345$"}},
    }


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("c.json", "", "c.json is not JSON: Expecting value at column 1"),
        ("c.json", '{"pools": {\n"a": nan}}', "c.json is not JSON: Expecting value at line 2, column 6"),
        ("c.json", '{"pools": {"a": NaN}}', "c.json is not JSON: NaN is no JSON number"),
        ("c.json", '{"pools": {"a": {}, "a": {}}}', "c.json: pools.a is given twice"),
        ("c.json", '{"pools": {"a": {"queue": {"type": "x", "type": "y"}}}}', "c.json: pools.a.queue.type is given tw"),
        ("c.json", '{"pools": {}, "pools": {}}', "c.json: pools is given twice"),
        ("c.json", '{"pool": {"a": {}}}', "c.json: pool is no key of this file (did you mean pools?)"),
        ("c.json", "[]", 'c.json: must be an object such as {"pools"'),
        ("c.json", "{}", 'c.json: must be an object such as {"pools"'),
        ("c.json", '{"$schema": "x"}', "c.json: pools is missing"),
        ("c.json", '{"pools": []}', "c.json: pools must be an object with a pool or more"),
        ("c.json", '{"pools": {"a": ' + "[" * 5000, "c.json is not JSON: "),
        ("c.yaml", "pools:\n  a: {}\n  a: {}\n", "c.yaml line 3: a is given twice"),
        ("c.yaml", "pools:\n  a: {max_units: 1\n", "c.yaml is not YAML: "),
        ("c.yaml", "pools:\n  1: {max_units: 1}\n", "c.yaml: pools: the key 1 must be a text; put it in quotes"),
        ("c.yaml", "pools:\n  ~: {max_units: 1}\n", "c.yaml: pools: the key None must be a text; put it in quotes"),
        ("c.yaml", "a: !!timestamp x", "c.yaml is not YAML: a value is not what its tag says"),
        ("c.yaml", "a: !!int ''", "c.yaml is not YAML: a value is not what its tag says"),
        ("c.yaml", "a: !!bool x", "c.yaml is not YAML: a value is not what its tag says"),
        ("c.yaml", "? ", "c.yaml: the key None must be a text; put it in quotes"),
        ("c.json", '{"a\\n\\nb": 1}', "c.json: a b is no key of this file"),
        ("c.yaml", "pools:\n  a: {max_units: .inf}\n", "c.yaml: pools.a.max_units: inf is no number in JSON"),
        ("c.yaml", "pools:\n  a: {at: 2030-01-01}\n", "c.yaml: pools.a.at: the config of a pool must be made of JSON"),
        (
            "c.yaml",
            "pools: &p\n  a: *p\n",
            "c.yaml: the config of a pool must be made of JSON values; this is nested too",
        ),
        (
            "c.yaml",
            "pools: !!python/object:os.system {}\n",
            "c.yaml is not YAML: a tag, an anchor or an alias that cannot",
        ),
    ],
)
def test_a_wrong_file_is_one_line_with_the_place(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    with pytest.raises(BadInputError) as caught:
        pools(tmp_path, text, name)
    shown = str(caught.value)
    assert shown.removeprefix(f"{tmp_path}/").startswith(complaint)
    assert "\n" not in shown


def test_a_file_that_is_not_there_or_no_text_says_so(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b'{"pools": {"\xe4": {}}}')
    for name, complaint in (("no.json", "No such file"), ("", "Is a directory"), ("latin.json", "is not UTF-8 text")):
        with pytest.raises(BadInputError, match=complaint):
            load(tmp_path / name)


def test_yaml_without_its_extra_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "yaml":
            raise ImportError
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BadInputError, match=r"needs the extra: pip install 'pgpark\[yaml\]'"):
        pools(tmp_path, "pools: {a: {max_units: 1}}", "c.yaml")


def test_yaml_may_merge_what_pools_share(tmp_path: Path) -> None:
    text = "pools:\n  a: &a {max_units: 1, archive: true}\n  b:\n    <<: *a\n    max_units: 2\n"
    assert pools(tmp_path, text, "c.yaml")["b"] == {"max_units": 2, "archive": True}


def test_a_pool_lives_where_its_config_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSWORD", "hunter2")
    text = """{"pools": {"server": {"max_units": 1}, "own": {"database": "host=h password=${PASSWORD} dbname=d"},
        "file": {"queue": {"type": "yaque", "path": "./data/q", "stream": "${NOT_NEEDED}"}},
        "default": {"queue": {"type": "yaque"}}}}"""
    (tmp_path / "c.json").write_text(text)
    config = load(tmp_path / "c.json", only_places=True)  # which needs no other variable
    assert config.place("server", GIVEN) == GIVEN == config.place("default", GIVEN)
    assert config.place("file", GIVEN) == Place(None, tmp_path / "data" / "q")
    assert str(config.place("own", GIVEN)) == "h/d", "without the password"
    with pytest.raises(BadInputError, match="NOT_NEEDED, which is not set"):
        load(tmp_path / "c.json")


def test_secrets_are_known() -> None:
    assert [key for key in ("database", "mailbox.notifier.auth_header", "max_units", "no.such") if is_secret(key)] == [
        "database",
        "mailbox.notifier.auth_header",
    ]
