"""The cost of language-model requests in units: the numbers of sql/functions/cost.sql, without a database.

`LlmCostModel` is a pool's `cost_model`. It is for sizing a pool, and for clients that want to know a cost beforehand:
what a task is charged is decided by SQL. How the files of a model are read: hf.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pgpark import hf
from pgpark.errors import BadInputError

_GIB = 1 << 30
_MIB = 1 << 20
_MOST_UNITS = 1_000_000_000  # of a pool
_MOST_INT = 2_147_483_647

_IN_EACH = ("model_vram_gb", "kv_per_token_mb")
_HEADS = ("num_key_value_heads", "head_dim")
_LATENT = ("kv_lora_rank", "qk_rope_head_dim")
_SERVER = ("num_hidden_layers", "weights_gb", "kv_bytes", "block_tokens", "unit_mb", "gpu_memory_utilization")
_ONCE = (*_HEADS, *_LATENT, *_SERVER)


def _number(value: Any) -> Any:
    """Only numbers, as JSON has them, and none that a JSON number of 15 digits would change."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise ValueError(f"must be a number, not {value!r}")
    number = Decimal(str(value))
    if number.is_finite() and number and abs(number) < Decimal("0.000001"):
        raise ValueError("must be 0 or at least 0.000001")
    if number.is_finite() and len(number.normalize().as_tuple().digits) > 15:
        raise ValueError("must have at most 15 digits")
    return value


_Count = Annotated[int, BeforeValidator(_number), Field(ge=1, le=10**9)]
_Amount = Annotated[Decimal, BeforeValidator(_number), Field(ge=0, le=10**9)]
_Size = Annotated[Decimal, BeforeValidator(_number), Field(ge=Decimal("0.001"), le=10**9)]
_Share = Annotated[Decimal, BeforeValidator(_number), Field(ge=Decimal("0.001"), le=1)]


class LlmCostModel(BaseModel):
    """A pool's `cost_model`, in one of two forms. `gb` is GiB and `mb` is MiB, as in a pool's config.

    Weights in every request: `model_vram_gb`, `kv_per_token_mb`, `max_batch_tokens`. A unit is a GiB.

    Weights once: `num_hidden_layers` with `num_key_value_heads` and `head_dim`, or (MLA) with `kv_lora_rank` and
    `qk_rope_head_dim`; `kv_bytes` per cached number (2); `block_tokens` of the server's KV blocks (16); `weights_gb`;
    `gpu_memory_utilization`, the share of the card that the server may use (0.9). A unit is `unit_mb` MiB (1).

    Either: `gpu_vram_total_gb` and `gpu_overhead_gb` of the card; `max_batch_tokens`, the most tokens that a request is
    charged for. Raises pydantic's ValidationError; `from_config` raises BadInputError.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model_vram_gb: _Amount | None = None
    kv_per_token_mb: _Amount | None = None
    max_batch_tokens: _Count | None = None
    gpu_vram_total_gb: _Amount | None = None
    gpu_overhead_gb: _Amount | None = None
    weights_gb: _Amount | None = None
    num_hidden_layers: _Count | None = None
    num_key_value_heads: _Count | None = None
    head_dim: _Count | None = None
    kv_lora_rank: _Count | None = None
    qk_rope_head_dim: Annotated[int, BeforeValidator(_number), Field(ge=0, le=10**9)] | None = None
    kv_bytes: Annotated[int, BeforeValidator(_number), Field(ge=1, le=8)] | None = None
    block_tokens: _Count | None = None
    unit_mb: _Size | None = None
    gpu_memory_utilization: _Share | None = None

    @classmethod
    def from_config(cls, cost_model: Mapping[str, Any]) -> LlmCostModel:
        """A model from a pool's `cost_model`. Raises BadInputError naming the first key that is wrong."""
        try:
            return cls.model_validate(dict(cost_model))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(["cost_model", *map(str, first["loc"][:1])])
            raise BadInputError(f"{place}: {first['msg'].removeprefix('Value error, ')}") from error

    @classmethod
    def from_hf_config(
        cls,
        source: str | Path | Mapping[str, Any],
        weights_gb: float | Decimal | None = None,
        **others: float | Decimal | None,
    ) -> LlmCostModel:
        """A model that charges weights once, from the `config.json` of a Hugging Face model.

        `source` is that file, its folder, or what is in it. `weights_gb` (GiB) is by default the size of the
        safetensors beside it, if they are there. `others` are further fields of this class: `gpu_vram_total_gb`, or
        `kv_bytes` for a cache that is kept in fewer bytes than the model. Raises BadInputError for a config that cannot
        be read, lacks a key, or is of a model whose cache does not grow evenly with its tokens (hf.py).
        """
        config = hf.read_config(source)
        if weights_gb is None and not isinstance(source, Mapping):
            weights_gb = hf.read_weights_gb(source)
        given = {name: value for name, value in others.items() if value is not None}
        return cls.from_config(hf.cache_shape(config) | {"weights_gb": weights_gb} | given)

    @model_validator(mode="after")
    def _is_one_form(self) -> LlmCostModel:
        given = {name for name, value in self if value is not None}
        in_each, once = ([name for name in names if name in given] for names in (_IN_EACH, _ONCE))
        heads, latent = ([name for name in names if name in given] for names in (_HEADS, _LATENT))
        if in_each and once:
            raise ValueError(
                f"has keys of two forms: {', '.join(in_each)} charge the weights to every request,"
                f" {', '.join(once)} charge them once; give one of the two"
            )
        if not once:
            if len(in_each) < 2 or self.max_batch_tokens is None:
                raise ValueError("needs model_vram_gb, kv_per_token_mb and max_batch_tokens")
            return self
        if heads and latent:
            raise ValueError(
                f"has {', '.join(heads)} beside {', '.join(latent)}: a model caches keys and values of its heads,"
                " or (MLA) a latent, not both"
            )
        if self.num_hidden_layers is None or len(heads or latent) < 2:
            raise ValueError(
                "needs num_hidden_layers with num_key_value_heads and head_dim,"
                " or (MLA) with kv_lora_rank and qk_rope_head_dim"
            )
        if self.gpu_vram_total_gb is not None and self.weights_gb is None:
            raise ValueError("needs weights_gb beside gpu_vram_total_gb: the weights are charged to the card once")
        return self

    @property
    def bytes_per_token(self) -> Fraction:
        """Bytes of KV cache per token.

        Weights once: 2 (keys and values) x layers x KV heads x head size x bytes (Ainslie et al. 2023, grouped-query
        attention); for MLA, layers x (latent + rotary key) x bytes (DeepSeek-V2, section 2.1). Always whole then.
        """
        if self.num_hidden_layers is None:
            return Fraction(self.kv_per_token_mb or 0) * _MIB
        if self.kv_lora_rank is not None:
            width = self.kv_lora_rank + (self.qk_rope_head_dim or 0)
        else:
            width = 2 * (self.num_key_value_heads or 0) * (self.head_dim or 0)
        return Fraction(width * self.num_hidden_layers * (self.kv_bytes or 2))

    @property
    def unit_bytes(self) -> Fraction:
        """Bytes of one unit: a GiB, or `unit_mb` MiB where the weights are charged once."""
        return Fraction(_GIB) if self.num_hidden_layers is None else Fraction(self.unit_mb or 1) * _MIB

    @property
    def max_units(self) -> int | None:
        """Units of a pool on that card; None without `gpu_vram_total_gb`. Raises BadInputError if it has no room."""
        if self.gpu_vram_total_gb is None:
            return None
        room = Fraction(self.gpu_vram_total_gb)
        if self.num_hidden_layers is not None:
            room = room * Fraction(self.gpu_memory_utilization or Decimal("0.9")) - Fraction(self.weights_gb or 0)
        room -= Fraction(self.gpu_overhead_gb or 0)
        units = math.floor(room * _GIB / self.unit_bytes)
        if not 1 <= units <= _MOST_UNITS:
            raise BadInputError(
                f"cost_model leaves {float(room):g} GiB of gpu_vram_total_gb for requests, which is {units} units of"
                f" {float(self.unit_bytes / _MIB):g} MiB; it must be 1 to {_MOST_UNITS}"
            )
        return units

    @property
    def max_tokens(self) -> int | None:
        """Tokens whose KV cache `max_units` hold at once, beside one copy of the weights; None without these."""
        units, per_block = self.max_units, self.bytes_per_token * self._block
        if units is None or not per_block:
            return None
        return max(0, math.floor((units * self.unit_bytes - self._fixed_bytes) / per_block)) * self._block

    def units(self, prompt_tokens: int, max_tokens: int) -> int:
        """Units of one request, at least 1: park_llm_units. Raises BadInputError for tokens that cannot be."""
        for tokens in (prompt_tokens, max_tokens):
            if isinstance(tokens, bool) or not isinstance(tokens, int) or not 0 <= tokens <= _MOST_INT:
                raise BadInputError(
                    "prompt_tokens and max_tokens must be whole numbers from 0 to"
                    f" {_MOST_INT}, not {prompt_tokens!r} and {max_tokens!r}"
                )
        tokens = prompt_tokens + max_tokens
        if self.max_batch_tokens is not None:
            tokens = min(tokens, self.max_batch_tokens)
        cached = -(-tokens // self._block) * self._block
        units = max(1, math.ceil((self._fixed_bytes + cached * self.bytes_per_token) / self.unit_bytes))
        if units > _MOST_INT:
            raise BadInputError(
                f"{prompt_tokens + max_tokens} tokens would cost {units} units, more than any pool can have"
            )
        return units

    def to_config(self) -> dict[str, int | float]:
        """This model as JSON values for the `cost_model` of a pool's config, without what was left out."""
        return {name: _json_number(value) for name, value in self if value is not None}

    @property
    def _block(self) -> int:
        return 1 if self.num_hidden_layers is None else self.block_tokens or 16

    @property
    def _fixed_bytes(self) -> Fraction:
        return Fraction(self.model_vram_gb or 0) * _GIB if self.num_hidden_layers is None else Fraction(0)


def _json_number(value: int | Decimal) -> int | float:
    return int(value) if value == int(value) else float(value)
