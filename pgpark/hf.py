"""What the files of a Hugging Face model say of its KV cache and weights: `config.json` and the safetensors beside it.

A config of a kind whose cache does not grow by the same number of bytes with each token is refused, not guessed at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import ROUND_UP, Decimal
from pathlib import Path
from typing import Any

from pgpark.errors import BadInputError

# A config of a model that takes images or sound has the language model below one of these.
_NESTED = ("text_config", "llm_config", "language_config")
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "half": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
# Keys of caches of another kind, by how they begin; null, false and 0 mean that the model has none of it.
_OTHER_CACHES = {
    "is_encoder_decoder": "it has a decoder that also caches what its encoder made",
    "cross_attention_layers": "some of its layers attend to images",
    "mamba": "it has state-space layers",
    "ssm": "it has state-space layers",
    "state_size": "it has state-space layers",
    "layers_block_type": "its layers are of several kinds",
    "block_types": "its layers are of several kinds",
    "block_configs": "its layers differ from one another",
    "hybrid": "its layers are of several kinds",
    "attn_layer": "only some of its layers have attention",
    "full_attention_interval": "only some of its layers have full attention",
    "linear_attn_config": "some of its layers have linear attention",
    "linear_num": "some of its layers have linear attention",
    "attention_chunk_size": "some of its layers attend to chunks only",
    "num_kv_shared_layers": "some of its layers share a cache",
    "index_topk": "it also caches an index of its tokens",
    "multi_query": "the name of its KV heads is not the usual one",
    "new_decoder_architecture": "the name of its KV heads is not the usual one",
}
_GIB = 1 << 30


def read_config(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json`: a mapping as it is, or a file, or the folder of the model. Raises BadInputError."""
    if isinstance(source, Mapping):
        return dict(source)
    path = _config_file(source)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise BadInputError(f"{path} must be a JSON object, the config.json of a Hugging Face model")
    return config


def read_weights_gb(source: str | Path) -> Decimal | None:
    """GiB of weights, from `model.safetensors.index.json` or `model.safetensors` beside a config, or None without."""
    folder = _config_file(source).parent
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    total: Any = None
    try:
        if index.is_file():
            total = json.loads(index.read_text(encoding="utf-8"))["metadata"]["total_size"]
        elif single.is_file():
            total = single.stat().st_size
            total = total if total > 4096 else None  # less is a pointer to a file that was not fetched
    except OSError as error:
        raise BadInputError(f"{index}: {error.strerror or error}") from error
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise BadInputError(f"{index} has no metadata.total_size") from error
    if total is None:
        return None
    if isinstance(total, bool) or not isinstance(total, int | float) or not 0 < total < 1e18:
        raise BadInputError(f"{index}: metadata.total_size must be a number of bytes, not {total!r}")
    return (Decimal(int(total)) / _GIB).quantize(Decimal("0.0001"), ROUND_UP)


def cache_shape(config: Mapping[str, Any]) -> dict[str, int]:
    """The keys of a cost model that describe the KV cache, `kv_bytes` included. Raises BadInputError.

    What the config leaves out is taken as transformers does: as many KV heads as heads, and heads that share
    hidden_size evenly. Without a dtype that is known, the cache is taken to have two bytes a number.
    """
    text = next((config[key] for key in _NESTED if isinstance(config.get(key), Mapping)), config)
    _refuse_other_caches(config)
    if text is not config:
        _refuse_other_caches(text)
    dtype = next((c[key] for c in (text, config) for key in ("dtype", "torch_dtype") if c.get(key)), None)
    shape = {
        "num_hidden_layers": _count(text, "num_hidden_layers", "n_layer"),
        "kv_bytes": _DTYPE_BYTES.get(str(dtype).removeprefix("torch."), 2),
    }
    if text.get("kv_lora_rank") is not None:
        return shape | {key: _count(text, key) for key in ("kv_lora_rank", "qk_rope_head_dim")}
    heads = _count(text, "num_attention_heads", "n_head")
    shape["num_key_value_heads"] = _count(text, "num_key_value_heads", "num_kv_heads", default=heads)
    hidden = _count(text, "hidden_size", "n_embd") if text.get("head_dim") is None else 0
    if hidden % heads:
        raise BadInputError(f"config.json: hidden_size {hidden} does not divide by {heads} heads; give head_dim")
    shape["head_dim"] = _count(text, "head_dim", default=hidden // heads)
    if text.get("v_head_dim") not in (None, shape["head_dim"]):
        raise BadInputError(_refusal("its keys and values differ in size (v_head_dim)"))
    return shape


def _config_file(source: str | Path) -> Path:
    path = Path(source)
    return path / "config.json" if path.is_dir() else path


def _count(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    """A whole number above 0 under the first of these names that is there."""
    value = next((config[name] for name in names if config.get(name) is not None), default)
    if value is None:
        raise BadInputError(f"config.json: {names[0]} is missing; it must be the config.json of a Hugging Face model")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadInputError(f"config.json: {names[0]} must be a whole number of at least 1, not {value!r}")
    return value


def _refuse_other_caches(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if not value:
            continue
        for beginning, why in _OTHER_CACHES.items():
            if key.startswith(beginning):
                raise BadInputError(_refusal(f"{why} ({key})"))
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and set(map(str, kinds)) - {"full_attention"}:
        others = ", ".join(sorted(set(map(str, kinds)) - {"full_attention"}))
        raise BadInputError(_refusal(f"some of its layers have {others} (layer_types)"))
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True):
        longest = config.get("max_position_embeddings")
        if not (isinstance(window, int) and isinstance(longest, int) and window >= longest):
            raise BadInputError(_refusal(f"its attention has a window of {window} tokens (sliding_window)"))


def _refusal(why: str) -> str:
    return (
        f"config.json: a cache of this kind is not known here: {why}; where counting every layer in full is an upper"
        " bound that you can live with, write num_hidden_layers, num_key_value_heads and head_dim into cost_model"
    )
