"""What a language-model request costs, by either form of cost_model, and submitting by tokens."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.conftest import Database

WHOLE = {"model_vram_gb": 4.5, "kv_per_token_mb": 0.5, "max_batch_tokens": 4096}
# From config.json of meta-llama/Llama-3.1-8B, meta-llama/Llama-3.1-70B and deepseek-ai/DeepSeek-V3 on huggingface.co.
LLAMA_8B = {"num_hidden_layers": 32, "num_key_value_heads": 8, "head_dim": 128}
LLAMA_70B = {"num_hidden_layers": 80, "num_key_value_heads": 8, "head_dim": 128}
DEEPSEEK_V3 = {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
CARD = {"weights_gb": 16, "gpu_vram_total_gb": 24, "gpu_memory_utilization": 0.75}


def units(db: Database, prompt_tokens: int | None, max_tokens: int | None) -> int:
    return int(db.value("select pgpark.park_llm_units('gpu', %s::int, %s::int)", prompt_tokens, max_tokens))


def capacity(db: Database, **cost_model: Any) -> tuple[Any, Any, Any]:
    (row,) = db.rows("select * from pgpark.park_llm_capacity(%s)", Jsonb(cost_model))
    return row["bytes_per_token"], row["max_units"], row["max_tokens"]


def submit_many(db: Database, *tasks: Any) -> list[Any]:
    return db.rows("select * from pgpark.park_submit_many('gpu', %s)", Jsonb(tasks))


# -- weights in every request ----------------------------------------------------------------------------------------


def test_a_request_costs_the_weights_and_its_cache_rounded_up(db: Database) -> None:
    db.pool(cost_model=WHOLE)
    assert units(db, 0, 0) == 5
    assert units(db, 512, 512) == 5  # 4.5 + 0.5
    assert units(db, 512, 513) == 6
    assert units(db, 2_000_000_000, 2_000_000_000) == 7, "4.5 + 4096 tokens at most"


def test_numbers_of_a_config_may_be_written_with_a_point(db: Database) -> None:
    db.pool(cost_model={"model_vram_gb": 1.0, "kv_per_token_mb": 1.0, "max_batch_tokens": 2048.0})
    assert units(db, 1024, 0) == 2


def test_a_request_costs_at_least_one_unit(db: Database) -> None:
    db.pool(cost_model={"model_vram_gb": 0, "kv_per_token_mb": 0, "max_batch_tokens": 1})
    assert units(db, 5, 5) == 1


def test_a_sum_that_is_whole_is_not_rounded_up(db: Database) -> None:
    """0.1 and 0.2 have no exact float, and a third of a GiB no exact quotient."""
    db.pool(cost_model={"model_vram_gb": 0.1, "kv_per_token_mb": 0.3, "max_batch_tokens": 100000})
    assert units(db, 3072, 0) == 1  # 0.1 + 0.9
    assert units(db, 3073, 0) == 2


def test_a_byte_too_many_is_a_unit_more_however_large_the_sum(db: Database) -> None:
    """Numeric division keeps 16 digits: 10^18 + 1 bytes would come out as no more than 10^18."""
    db.pool(cost_model={"model_vram_gb": 10**9, "kv_per_token_mb": 0.000001, "max_batch_tokens": 9})
    assert units(db, 0, 0) == 10**9
    assert units(db, 1, 0) == 10**9 + 1


@pytest.mark.parametrize("tokens", [(-1, 5), (5, -1), (None, 5), (5, None)])
@pytest.mark.parametrize("cost_model", [WHOLE, LLAMA_8B])
def test_impossible_token_counts_are_named(db: Database, tokens: Any, cost_model: Any) -> None:
    db.pool(cost_model=cost_model)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="must be whole numbers of at least 0"):
        units(db, *tokens)


@pytest.mark.parametrize("config", [{}, {"cost_model": None}])
def test_a_pool_without_a_cost_model_says_so(db: Database, config: Any) -> None:
    db.pool(**config)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="pool 'gpu' has no cost_model"):
        units(db, 1, 1)


def test_the_units_of_a_pool_are_the_whole_gib_of_its_card_less_the_overhead(db: Database) -> None:
    db.pool(max_units=None, cost_model=WHOLE | {"gpu_vram_total_gb": 24, "gpu_overhead_gb": 1.5})
    assert db.stats()["max_units"] == 22
    assert db.value("select config -> 'max_units' from pgpark.park_pools()") is None, (
        "the config is kept as it was given"
    )
    assert capacity(db, **WHOLE, gpu_vram_total_gb=24, gpu_overhead_gb=1.5) == (524288, 22, 35840)  # 17.5 GiB / 0.5 MiB


def test_max_units_that_are_given_win_over_the_card(db: Database) -> None:
    db.pool(max_units=20, cost_model=WHOLE | {"gpu_vram_total_gb": 24})
    assert db.stats()["max_units"] == 20


def test_another_card_is_another_capacity(db: Database) -> None:
    db.pool(max_units=None, cost_model=WHOLE | {"gpu_vram_total_gb": 24})
    fits, too_large = db.parked(units=16), db.parked(units=17)
    db.pool(max_units=None, cost_model=WHOLE | {"gpu_vram_total_gb": 16})
    assert db.status(fits)["status"] == "parked"
    assert db.outcome(too_large) == ("dropped", "too_large")


@pytest.mark.parametrize("config", [{}, {"cost_model": WHOLE}, {"cost_model": {}}, {"cost_model": None}])
def test_without_a_card_max_units_are_missing(db: Database, config: Any) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=r"pools\.gpu\.max_units is missing"):
        db.rows("select pgpark.park_put_pool('gpu', %s)", Jsonb(config))


# -- weights once ----------------------------------------------------------------------------------------------------


def test_llama_3_1_8b_caches_131072_bytes_a_token(db: Database) -> None:
    """2 x 32 x 8 x 128 x 2; for instance https://bhabishya.rbind.io/posts/vllm-and-lmcache says 131,072."""
    assert capacity(db, **LLAMA_8B) == (131072, None, None)


def test_llama_3_1_70b_caches_1_25_gib_for_4096_tokens(db: Database) -> None:
    """2 x 80 x 8 x 128 x 2 = 327,680; https://docs.min.io/memkv/operate/kv-cache-sizing/ has the walk through."""
    assert capacity(db, **LLAMA_70B)[0] == 327680
    db.pool(max_units=100000, cost_model=LLAMA_70B)
    assert units(db, 4096, 0) == 1280  # MiB
    db.pool(max_units=100000, cost_model=LLAMA_70B | {"unit_mb": 256})
    assert units(db, 4000, 96) == 5


def test_deepseek_v3_caches_70272_bytes_a_token(db: Database) -> None:
    """61 x (512 + 64) x 2; 70.272 KB in table 1 of DeepSeek's "Insights into DeepSeek-V3" (arXiv 2505.09343)."""
    assert capacity(db, **DEEPSEEK_V3)[0] == 70272
    assert capacity(db, **DEEPSEEK_V3, kv_bytes=1)[0] == 35136


def test_31232_tokens_of_llama_3_1_8b_fit_a_card_of_23_58_gib(db: Database) -> None:
    """The published inputs are rounded to 0.01 GiB; taken as they are they leave 3.812 GiB, 1951.7 blocks of 2 MiB.

    That is 31,216 tokens in whole blocks, one block less than the published 31,232 (1952 blocks, 3.8125 GiB). Inputs
    that would be printed the same give exactly that.
    """
    card = {"gpu_vram_total_gb": 23.58, "gpu_memory_utilization": 0.9, "gpu_overhead_gb": 0.35}
    assert capacity(db, **LLAMA_8B, **card, weights_gb=17.06) == (131072, 3903, 31216)
    assert capacity(db, **LLAMA_8B, **card, weights_gb=17.0595) == (131072, 3904, 31232)


def test_the_share_of_the_card_is_nine_tenths_and_a_unit_a_mib_unless_told(db: Database) -> None:
    assert capacity(db, **LLAMA_8B, weights_gb=0, gpu_vram_total_gb=10)[1] == 9216
    assert capacity(db, **LLAMA_8B, weights_gb=4, gpu_vram_total_gb=10, unit_mb=1024)[1] == 5


def test_weights_are_charged_to_the_pool_and_the_cache_to_requests(db: Database) -> None:
    db.pool(max_units=None, cost_model=LLAMA_8B | CARD)  # 24 x 0.75 - 16 = 2 GiB
    assert db.stats()["max_units"] == 2048
    assert units(db, 8192, 0) == 1024
    assert (units(db, 0, 0), units(db, 1, 0), units(db, 16, 0), units(db, 17, 0)) == (1, 2, 2, 4)  # blocks of 2 MiB


def test_tokens_come_in_blocks_and_not_more_than_the_context(db: Database) -> None:
    db.pool(cost_model=LLAMA_8B | {"block_tokens": 64, "max_batch_tokens": 100})
    assert [units(db, tokens, 0) for tokens in (1, 64, 65, 100, 5000)] == [8, 8, 16, 16, 16]


def test_the_tokens_of_a_card_fit_its_units(db: Database) -> None:
    """Also where units are coarse: what is told to fit is then one request that may start."""
    model = LLAMA_8B | CARD | {"unit_mb": 600}
    _, most_units, most_tokens = capacity(db, **model)
    db.pool(max_units=None, cost_model=model)
    assert (most_units, most_tokens) == (3, 14400)
    assert units(db, most_tokens, 0) == 3
    assert units(db, most_tokens + 1, 0) == 4


@pytest.mark.parametrize(
    ("cost_model", "message"),
    [
        (WHOLE | LLAMA_8B, "has keys of two forms: model_vram_gb, kv_per_token_mb charge the weights to every request"),
        (WHOLE | {"unit_mb": 1}, "has keys of two forms: .*, unit_mb charge them once; give one of the two"),
        ({"unit_mb": 1}, "needs num_hidden_layers with num_key_value_heads and head_dim, or"),
        ({"num_hidden_layers": 1, "head_dim": 1}, "needs num_hidden_layers with num_key_value_heads and head_dim, or"),
        (
            {"num_hidden_layers": 1, "kv_lora_rank": 1},
            "needs num_hidden_layers with .* kv_lora_rank and qk_rope_head_dim",
        ),
        (
            LLAMA_8B | DEEPSEEK_V3,
            "has num_key_value_heads, head_dim beside kv_lora_rank, qk_rope_head_dim: a model caches",
        ),
        (LLAMA_8B | {"gpu_vram_total_gb": 24}, "needs weights_gb beside gpu_vram_total_gb"),
        (LLAMA_8B | {"kv_bytes": 16}, "has kv_bytes 16; one cached number takes 1"),
        (
            LLAMA_8B | {"gpu_memory_utilization": 90},
            "has gpu_memory_utilization 90; it is a share, above 0 and at most 1",
        ),
        (LLAMA_8B | {"head_dim": 0}, r"\.head_dim must be a whole number from 1 to"),
        (LLAMA_8B | {"kv_bytes": 0.5}, r"\.kv_bytes must be a whole number from 1 to"),
        (LLAMA_8B | {"unit_mb": 0}, r"\.unit_mb must be a number from 0.001 to"),
        (LLAMA_8B | {"num_layers": 32}, r"\.num_layers is no key of a pool"),
        (WHOLE | {"max_batch_tokens": None}, "needs model_vram_gb, kv_per_token_mb and max_batch_tokens"),
    ],
)
def test_a_model_that_is_of_no_form_is_refused_wherever_it_is_given(
    db: Database, cost_model: Any, message: str
) -> None:
    for statement, value in (
        ("select pgpark.park_put_pool('gpu', %s)", {"max_units": 1, "cost_model": cost_model}),
        ("select * from pgpark.park_llm_capacity(%s)", cost_model),
    ):
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=f"cost_model ?{message}") as refused:
            db.rows(statement, Jsonb(value))
        assert str(refused.value).startswith("pools.gpu.cost_model" if "put_pool" in statement else "cost_model")


@pytest.mark.parametrize(
    ("card", "left"),
    [
        (WHOLE | {"gpu_vram_total_gb": 24, "gpu_overhead_gb": 23.5}, "leaves 0.5 GiB .*, which is 0 units of 1024 MiB"),
        (LLAMA_8B | CARD | {"weights_gb": 18.5}, r"leaves -0.5 GiB .*, which is -512 units of 1 MiB"),
        (LLAMA_8B | CARD | {"gpu_vram_total_gb": 10**9}, "leaves 749999984 GiB .* it must be 1 to 1000000000"),
    ],
)
def test_a_card_without_room_is_refused_with_what_is_left(db: Database, card: Any, left: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=rf"^pools\.gpu\.cost_model {left}"):
        db.pool(max_units=None, cost_model=card)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=f"^cost_model {left}"):
        capacity(db, **card)
    assert db.pool(max_units=3, cost_model=card) == "created", "whoever gives max_units knows better"


@pytest.mark.parametrize("cost_model", ["null", "3", "[]", '"x"', None])
def test_a_capacity_is_of_an_object(db: Database, cost_model: str | None) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=r"^cost_model must be an object, not "):
        db.rows("select * from pgpark.park_llm_capacity(%s::jsonb)", cost_model)


def test_a_cost_that_no_pool_could_hold_is_refused(db: Database) -> None:
    db.pool(cost_model={"num_hidden_layers": 10**9, "num_key_value_heads": 10**9, "head_dim": 10**9})
    with pytest.raises(
        psycopg.errors.InvalidParameterValue, match=r"4 tokens would cost 61035156250000000000000 units, more than"
    ):
        units(db, 2, 2)
    db.pool(cost_model={"model_vram_gb": 0, "kv_per_token_mb": 10**9, "max_batch_tokens": 10**9})
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=r"4294967294 tokens would cost .* units, more than"):
        units(db, 2**31 - 1, 2**31 - 1)


# -- submitting by tokens --------------------------------------------------------------------------------------------


def test_a_batch_is_charged_by_its_tokens(db: Database) -> None:
    db.pool(max_units=2048, cost_model=LLAMA_8B)
    rows = submit_many(
        db,
        {"payload": 1, "prompt_tokens": 1000, "max_tokens": 24},
        {"payload": 2, "units": 7},
        {"payload": 3, "prompt_tokens": 0, "max_tokens": 0.0, "units": None},
        {"payload": 4, "prompt_tokens": 20000, "max_tokens": 0},
        {"payload": 5, "prompt_tokens": None, "max_tokens": None, "units": 9},
    )
    assert [row["reason"] for row in rows] == [None, None, None, "too_large", None]
    assert [db.status(row["task_id"])["units"] for row in rows if row["accepted"]] == [128, 7, 1, 9]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"prompt_tokens": 1}, "prompt_tokens and max_tokens go together, and max_tokens is missing"),
        ({"max_tokens": 1, "prompt_tokens": None}, "go together, and prompt_tokens is missing"),
        ({"prompt_tokens": 1, "max_tokens": 1, "units": 1}, "give units, or prompt_tokens and max_tokens, not both"),
        ({"prompt_tokens": -1, "max_tokens": 1}, "prompt_tokens must be a whole number from 0 to 2147483647, not -1"),
        (
            {"prompt_tokens": 1, "max_tokens": 2**31},
            "max_tokens must be a whole number from 0 to 2147483647, not 21474",
        ),
        ({"prompt_tokens": 1, "max_tokens": "1"}, 'max_tokens must be a whole number from 0 to 2147483647, not "1"'),
        ({"prompt_tokens": 1.5, "max_tokens": 1}, "prompt_tokens must be a whole number"),
        ({"prompt_tokens": 1, "max_tokens": 1, "priority": "urgent"}, "unknown priority"),
        ({"prompt_tokens": 1, "max_tokens": 1, "tenant": 3}, "tenant must be a string"),
        ({"prompt_tokens": 1, "max_tokens": 1, "tokens": 3}, "unknown key 'tokens'; a task has .*, prompt_tokens, max"),
    ],
)
def test_a_wrong_element_is_named_by_its_place(db: Database, task: Any, message: str) -> None:
    db.pool(cost_model=LLAMA_8B)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=f"^element 2: .*{message}"):
        submit_many(db, {"payload": 1}, {"payload": 2} | task)
    assert db.stats()["parked"] == 0


def test_tokens_need_a_pool_with_a_cost_model(db: Database) -> None:
    db.pool()
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="pool 'gpu' has no cost_model"):
        submit_many(db, {"payload": 1, "prompt_tokens": 1, "max_tokens": 1})


def test_a_batch_that_costs_more_than_any_pool_names_the_element(db: Database) -> None:
    db.pool(cost_model={"num_hidden_layers": 10**9, "num_key_value_heads": 10**9, "head_dim": 1})
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=r"^element 2: 2 tokens would cost"):
        submit_many(db, {"payload": 1}, {"payload": 1, "prompt_tokens": 1, "max_tokens": 1})


def test_a_batch_of_five_hundred_looks_its_pool_up_as_often_as_a_batch_of_one(db: Database) -> None:
    db.pool(cost_model=LLAMA_8B)

    def lookups(tasks: int) -> int:
        batch = [{"payload": 1, "prompt_tokens": 1, "max_tokens": 1}] * tasks
        with db.connection.transaction():
            before = db.value(_LOOKS)
            submit_many(db, *batch)
            return int(db.value(_LOOKS)) - int(before)

    assert lookups(500) == lookups(1) > 0


_LOOKS = (
    "select coalesce(seq_scan, 0) + coalesce(idx_scan, 0) from pg_stat_xact_user_tables"
    " where schemaname = 'pgpark' and relname = 'pool'"
)
