"""The pieces of Python that read what strangers wrote: config files, JSON on the command line and in files, lines of
parts from a program, the config.json and the index of a model, cost models.

Each takes what is drawn for it; anything but its result or a BadInputError of one line is a finding.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import strategies as st

from pgpark import config, hf
from pgpark.costs import LlmCostModel
from pgpark.errors import BadInputError
from pgpark.parts import PartBuffer, PartPipe
from tests.fuzz.values import (
    JSON_TEXTS,
    changed,
    configs,
    cost_models,
    drawn,
    json_text,
    odd_json,
    part_documents,
    texts,
)
from tests.soak.findings import Findings

ENVIRONMENT = {"FUZZ_UNITS": "24", "FUZZ_EMPTY": "", "FUZZ_TEXT": "a: b\n- ${FUZZ_UNITS}"}

variables = st.sampled_from(
    [
        "${FUZZ_UNITS}", "${FUZZ_UNITS:-1}", "$${FUZZ_UNITS}", "${FUZZ_NONE}", "${FUZZ_NONE:-${FUZZ_UNITS}}", "${",
        "${}", "${a b}", "${FUZZ_EMPTY:-true}", "${FUZZ_TEXT}", "x${FUZZ_UNITS}y", "${FUZZ_NONE:-1e400}", "$${", "${é}",
        "${FUZZ_UNITS",
    ]
)  # fmt: skip
pool_files = st.dictionaries(st.one_of(st.just("gpu"), st.just("gpu"), texts), configs, max_size=2).map(
    lambda pools: {"pools": pools}
)
settings = st.sampled_from(["max_units", "archive", "resource_kind", "database", "x.y"])
filled_files = st.builds(lambda key, text: {"pools": {"gpu": {"max_units": 1, key: text}}}, settings, variables)
files = st.one_of(pool_files, changed(pool_files), filled_files, changed(filled_files))
json_files = st.one_of(files.map(json_text), odd_json.map(json_text), st.sampled_from(JSON_TEXTS))
YAML_TEXTS = [
    "pools: {gpu: {max_units: 24}}", "pools:\n  gpu: &a\n    max_units: 1\n  b: *a", "&a [*a]", "a: 1\na: 2",
    "? [a]\n: 1", "!!python/x y", "pools: {on: {max_units: 1}}", "2020-01-01", "pools:\n\tgpu: 1", "a: !!binary x",
    "- " * 2000, "{" * 3000, "<<: 1", "<<: [*x]", "a: &x {b: 1}\n<<: *x\nb: 2", "%YAML 9.9\n---\na: 1",
    "---\na\n---\nb", "a: .inf", "a: .nan", "a: 0x7", "a: 1_000", "a: 1:30:00", '"\\x00"', "!!set {a}",
    "!!omap [a: 1]", "!!timestamp x", "!!int x", "!!float x", "!!bool x", "!!null x", "a: 9999-99-99", "\x07", "@a",
    "`", "key: [", "!<x> 1", "!!int ''", "!!int '0b'", "!!float '1:'", "a: 2001-12-14t21:59:43.10-99:99", "=", "a: =",
    "? ", "!!merge x: 1", "{[a]: 1}", "{{a: 1}: 1}", "a: 0b",
]  # fmt: skip
yaml_files = st.one_of(
    st.sampled_from(YAML_TEXTS), json_files, texts, st.lists(st.sampled_from(YAML_TEXTS), max_size=3).map("\n".join)
)
lines = st.one_of(
    part_documents.map(lambda parts: json.dumps(parts[0] if parts else {}).encode()),
    changed(part_documents).map(
        lambda parts: json_text(parts[0] if isinstance(parts, list) and parts else parts).encode()
    ),
    odd_json.map(lambda value: json_text(value).encode()),
    st.binary(max_size=20),
    st.sampled_from(
        [
            b"\xff{",
            b"\xef\xbb\xbf{}",
            b'{"content": NaN}',
            b'{"content": "\\ud800"}',
            b'{"content": "' + b"x" * (1 << 20) + b'"}',
        ]
    ),
)
model_files = st.fixed_dictionaries(
    {"num_hidden_layers": st.just(32), "num_attention_heads": st.just(32), "hidden_size": st.just(4096)},
    optional={
        "num_key_value_heads": st.just(8),
        "head_dim": st.just(128),
        "torch_dtype": st.sampled_from(["bfloat16", "x", None]),
        "text_config": st.just({"n_layer": 2, "n_head": 2, "n_embd": 8}),
        "kv_lora_rank": st.just(512),
        "sliding_window": st.just(4096),
        "layer_types": st.just(["full_attention"]),
        "v_head_dim": st.just(64),
        "quantization_config": st.just({}),
    },
)
index_files = st.just({"metadata": {"total_size": 16_000_000_000}})


@dataclass(frozen=True)
class Parser:
    """What is drawn, and what reads it, in an empty folder."""

    drawn: st.SearchStrategy[Any]
    reads: Callable[[Any, Path], object]


def _load(text: str, folder: Path, name: str) -> object:
    file = folder / name
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    loaded = config.load(file)
    return [loaded.sql_config(pool) for pool in loaded.pools]


def _pipe(line: bytes, _folder: Path) -> None:
    pipe = PartPipe(buffer := PartBuffer(), 1)
    try:
        asyncio.run(pipe._emit(line))
    finally:
        pipe.close()
    json.dumps(buffer.batch()).encode()


def _model(texts_: tuple[str, str], folder: Path) -> object:
    (folder / "config.json").write_text(texts_[0], encoding="utf-8", errors="surrogatepass")
    (folder / "model.safetensors.index.json").write_text(texts_[1], encoding="utf-8", errors="surrogatepass")
    return hf.cache_shape(hf.read_config(folder)), hf.read_weights_gb(folder), LlmCostModel.from_hf_config(folder)


def _costs(value: Any, _folder: Path) -> None:
    model = LlmCostModel.from_config(value)
    json.dumps(model.to_config())
    if model.gpu_vram_total_gb is not None:
        model.max_units  # noqa: B018


def odd(documents: st.SearchStrategy[Any]) -> st.SearchStrategy[str]:
    """The text of a document: right, changed in a place, or something else."""
    return st.one_of(documents, changed(documents), changed(documents), odd_json).map(json_text)


PARSERS: dict[str, Parser] = {
    "a config file in JSON": Parser(json_files, lambda text, folder: _load(text, folder, "pools.json")),
    "a config file in YAML": Parser(yaml_files, lambda text, folder: _load(text, folder, "pools.yaml")),
    "a config file without a suffix": Parser(yaml_files, lambda text, folder: _load(text, folder, "pools")),
    "a config as a mapping": Parser(
        files, lambda value, _: config.load(value if isinstance(value, Mapping) else {"pools": value})
    ),
    "JSON of the command line": Parser(
        st.one_of(json_files, texts), lambda text, _: config.load_json(text, "the payload")
    ),
    "a line of parts": Parser(lines, _pipe),
    "a model": Parser(st.tuples(odd(model_files), odd(index_files)), _model),
    "a cost model": Parser(
        st.one_of(cost_models, changed(cost_models)).filter(lambda value: isinstance(value, dict)), _costs
    ),
}


def parse(count: int, seed: int, folder: Path, findings: Findings) -> int:
    """Gives each parser its share of so many texts. Returns how many were refused."""
    log = logging.getLogger("pgpark.worker")
    level = log.level
    log.setLevel(logging.ERROR)  # a bad line of parts is a warning
    try:
        with mock.patch.dict(os.environ, ENVIRONMENT):
            return sum(_parse(name, count // len(PARSERS), seed, folder, findings) for name in PARSERS)
    finally:
        log.setLevel(level)


def _parse(name: str, count: int, seed: int, folder: Path, findings: Findings) -> int:
    refused = 0
    for value in drawn(PARSERS[name].drawn, count, seed):
        try:
            PARSERS[name].reads(value, folder)
        except BadInputError as error:
            refused += 1
            if "\n" in str(error):
                findings.add(f"{name}: more than a line: {str(error)[:100]!r}", f"{value!r:.2000} -- seed {seed}")
        except Exception as error:
            findings.add(f"{name}: {type(error).__name__}: {str(error)[:100]}", f"{value!r:.2000} -- seed {seed}")
    return refused
