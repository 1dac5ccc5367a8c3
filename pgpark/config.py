"""The config file: read, with the variables of the environment filled in. What its keys may hold is checked in SQL.

The file is JSON or YAML with `pools: {NAME: {...}}`. `${NAME}` in a string is the value of a variable of the
environment, `${NAME:-default}` the default where it is unset or empty, `$${` a literal `${`. A string that is nothing
but variables, in the place of a number or of true and false, becomes one: `max_units: ${GPU_UNITS}`.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pgpark.errors import BadInputError, one_line
from pgpark.paths import expanded
from pgpark.places import Place

SCHEMA_FILE = Path(__file__).parent / "scheduler-config.schema.json"
_ALLOWED = ("$schema", "pools")
_PLACING: Mapping[str, Any] = {"database": {}, "queue": {"type": {}, "path": {}}}
_VARIABLE = re.compile(r"\$\$\{|\$\{(?P<inside>[^}]*)(?P<end>\}?)")
_INSIDE = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<or>:-(?P<default>.*))?", re.DOTALL)
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Config:
    """A file that was read: `file` as it is called in messages, `folder` it is in, `pools` by name."""

    file: str
    folder: Path
    pools: Mapping[str, Any]

    def place(self, name: str, given: Place) -> Place:
        """Where a pool lives: its `database`, else the folder of its yaque queue, else the `given` place.

        Raises BadInputError when there is no such pool.
        """
        if name not in self.pools:
            near = _nearest(name, self.pools)
            raise BadInputError(f"{self.file}: there is no pool {name!r}{near}; there are {', '.join(self.pools)}")
        pool = _mapping(self.pools[name])
        queue = _mapping(pool.get("queue"))
        if (dsn := self._text(name, "database", pool.get("database"))) is not None:
            return Place(dsn, given.home)
        if queue.get("type") == "yaque" and (path := self._text(name, "queue.path", queue.get("path"))) is not None:
            return Place(None, (self.folder / expanded(path)).resolve())
        return given

    def places(self, given: Place) -> dict[str, Place]:
        """Where each pool lives."""
        return {name: self.place(name, given) for name in self.pools}

    def sql_config(self, name: str) -> Any:
        """What park_put_pool gets for a pool: all but where it lives."""
        pool = self.pools[name]
        return {key: value for key, value in pool.items() if key != "database"} if isinstance(pool, dict) else pool

    def _text(self, name: str, key: str, value: Any) -> str | None:
        if value is None or (isinstance(value, str) and value and value.isprintable()):
            return value
        raise BadInputError(f"{self.file}: pools.{name}.{key} must be a text on one line")


def load(file: str | Path | Mapping[str, Any], *, only_places: bool = False) -> Config:
    """Reads a config file, or takes its content as a mapping.

    only_places: fill in only what tells where pools live, so that no other variable need be set.
    Raises BadInputError naming the file and the path in it.
    """
    if isinstance(file, Mapping):
        shown, folder, value = "config", Path.cwd(), plain(file, "config")
    else:
        path = expanded(file)
        shown, folder = str(file), path.resolve().parent
        try:
            text = path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise BadInputError(f"{shown}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise BadInputError(f"{shown}: is not UTF-8 text: {error.reason} at byte {error.start}") from error
        value = parse(text, shown)
    pools = _pools(value, shown)
    if only_places:
        pools = {name: _kept(pool, _PLACING) for name, pool in pools.items()}
    return Config(shown, folder, {name: expand(pool, shown, ("pools", name)) for name, pool in pools.items()})


def parse(text: str, file: str) -> Any:
    """The value of a JSON or YAML text: by the suffix of `file`; without a known one JSON, else YAML.

    Raises BadInputError naming the file and the place, also for a key that is given twice.
    """
    suffix = Path(file).suffix.lower()
    if suffix in {".yaml", ".yml"}:
        return plain(_yaml(text, file), file)
    try:
        return plain(load_json(text, file), file)
    except BadInputError:
        if suffix == ".json" or text.lstrip()[:1] in {"{", "[", ""}:
            raise
    return plain(_yaml(text, file), file)


def load_json(text: str, what: str) -> Any:
    """A JSON value. Raises BadInputError naming `what` and the place; a key given twice is found by `plain`."""
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise BadInputError(f"{what} is not JSON: {error.msg} at {line}column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{what} is not JSON: {error}") from error


def plain(value: Any, file: str, path: tuple[str, ...] = ()) -> Any:
    """A copy made of JSON values only. Raises BadInputError with the path of what is none, or was given twice."""
    here = f"{file}: {'.'.join(path)}" if path else file
    if isinstance(value, _Twice):
        raise BadInputError(f"{file}: {'.'.join((*path, value.key))} is given twice")
    try:
        if isinstance(value, Mapping):
            for odd in (key for key in value if not isinstance(key, str)):
                why = " (YAML reads on, off, yes and no so)" if isinstance(odd, bool) else ""
                raise BadInputError(f"{here}: the key {odd!r} must be a text; put it in quotes{why}")
            return {key: plain(inner, file, (*path, key)) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner, file, (*path, str(place))) for place, inner in enumerate(value)]
    except RecursionError as error:
        raise BadInputError(
            f"{file}: the config of a pool must be made of JSON values; this is nested too deep, or holds itself"
        ) from error
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInputError(f"{here}: {value} is no number in JSON")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise BadInputError(f"{here}: the config of a pool must be made of JSON values, not {type(value).__name__}")


def expand(value: Any, file: str, path: tuple[str, ...]) -> Any:
    """A value with the variables of the environment filled in; path: where it is in the file.

    Raises BadInputError naming file, path and variable when one is not set.
    """
    if isinstance(value, dict):
        return {key: expand(inner, file, (*path, key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [expand(inner, file, (*path, str(place))) for place, inner in enumerate(value)]
    if not isinstance(value, str) or "${" not in value:
        return value

    def fill(found: re.Match[str]) -> str:
        return "${" if found["end"] is None else _value_of(found, file, ".".join(path))

    filled = _VARIABLE.sub(fill, value)
    if _VARIABLE.sub(lambda found: "." if found["end"] is None else "", value):
        return filled
    return _as_kind(filled, path)


def schema() -> dict[str, Any]:
    """The JSON Schema of the file, as `pgpark config schema` prints it."""
    made: dict[str, Any] = _schema()
    return made


def is_secret(key: str) -> bool:
    """Whether the value of a setting, such as `mailbox.notifier.auth_header`, must not be shown."""
    return bool(_node(("pools", "", *key.split("."))).get("writeOnly"))


class _Twice(dict[str, Any]):
    """An object of a JSON text in which `key` is given twice."""

    key = ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    keys = [key for key, _ in pairs]
    twice = _Twice(made)
    twice.key = next(key for key in keys if keys.count(key) > 1)
    return twice


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON number")


def _yaml(text: str, file: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise BadInputError(f"{file}: YAML needs the extra: pip install 'pgpark[yaml]'") from error

    class Loader(yaml.SafeLoader):
        """Refuses a key that is given twice, where YAML would take the last."""

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in seen:
                        raise BadInputError(f"{file} line {key.start_mark.line + 1}: {key.value} is given twice")
                    seen.add(key.value)
            super().flatten_mapping(node)

    try:
        return yaml.load(text, Loader)
    except BadInputError:
        raise
    except yaml.MarkedYAMLError as error:  # its own text repeats the line, which may hold a secret
        mark = error.problem_mark
        known = isinstance(error, yaml.scanner.ScannerError | yaml.parser.ParserError)  # others repeat a word of it
        problem = error.problem if known else "a tag, an anchor or an alias that cannot be used"
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise BadInputError(f"{file} is not YAML: {problem}{place}") from error
    except (AttributeError, LookupError, TypeError) as error:  # PyYAML's own, for a text that is not what its tag says
        raise BadInputError(f"{file} is not YAML: a value is not what its tag says") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadInputError(f"{file} is not YAML: {one_line(error)}") from error


def _pools(value: Any, file: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise BadInputError(f'{file}: must be an object such as {{"pools": {{"gpu": {{"max_units": 24}}}}}}')
    for key in value:
        if key not in _ALLOWED:
            raise BadInputError(f"{file}: {key} is no key of this file{_nearest(key, _ALLOWED)}; here belongs: pools")
    pools = value.get("pools")
    if not isinstance(pools, dict) or not pools:
        what = "is missing" if "pools" not in value else "must be an object with a pool or more"
        raise BadInputError(f'{file}: pools {what}, such as {{"pools": {{"gpu": {{"max_units": 24}}}}}}')
    return pools


def _nearest(word: str, others: Any) -> str:
    near = difflib.get_close_matches(word.lower(), others, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _kept(value: Any, wanted: Mapping[str, Any]) -> Any:
    """The wanted parts of a value; all of it where it ends earlier."""
    if not wanted or not isinstance(value, dict):
        return value
    return {key: _kept(value[key], inner) for key, inner in wanted.items() if key in value}


def _value_of(found: re.Match[str], file: str, path: str) -> str:
    if not found["end"]:
        raise BadInputError(f"{file}: {path} has a ${{ without its }}; write $${{ for the two signs themselves")
    inside = _INSIDE.fullmatch(found["inside"])
    if inside is None or "${" in found["inside"]:  # which is not repeated: it may be a secret
        raise BadInputError(
            f"{file}: {path}: a variable must look like ${{NAME}} or ${{NAME:-default}}, none inside another"
        )
    value = os.environ.get(inside["name"])
    if inside["or"] is not None:
        return value or inside["default"]
    if value is None:
        raise BadInputError(f"{file}: {path} needs the variable {inside['name']}, which is not set")
    return value


def _as_kind(text: str, path: tuple[str, ...]) -> Any:
    """A text from variables as the number, true or false that belongs in its place; else, as it is."""
    kinds = {kind.get("type") for kind in _node(path).get("anyOf", ())}
    if kinds & {"integer", "number"} and _NUMBER.fullmatch(text.strip()) and math.isfinite(number := float(text)):
        return int(number) if number.is_integer() else number
    if "boolean" in kinds and text.strip().lower() in {"true", "false"}:
        return text.strip().lower() == "true"
    return text


def _node(path: tuple[str, ...]) -> dict[str, Any]:
    """The place in the schema that describes a path; empty where there is none."""
    node = _schema()
    for key in path:
        objects = [node, *node.get("anyOf", ())]
        inner = next((each["properties"][key] for each in objects if key in each.get("properties", ())), None)
        if inner is None:
            inner = next((each.get("additionalProperties") for each in objects if "additionalProperties" in each), None)
        if not isinstance(inner, dict):
            return {}
        node = inner
    return node


@cache
def _schema() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return made
