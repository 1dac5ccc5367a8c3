"""LlmCostModel: the same numbers as SQL, and models read from their files; submitting by tokens through the client."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.types.json import Jsonb
from pydantic import ValidationError

from pgpark import Client, calls, cli
from pgpark.costs import LlmCostModel
from pgpark.errors import BadInputError
from tests.conftest import Database

# From config.json of these models on huggingface.co, the keys that matter here.
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
LLAMA_70B = LLAMA_8B | {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "torch_dtype": "bfloat16",
}
QWEN2_7B = LLAMA_8B | {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768}


def model_folder(folder: Path, config: Any, total_size: Any = None, single: int | None = None) -> Path:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if total_size is not None:
        index = {"metadata": {"total_size": total_size}, "weight_map": {}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if single is not None:
        with (folder / "model.safetensors").open("wb") as file:
            file.truncate(single)
    return folder


# -- the same numbers as SQL -----------------------------------------------------------------------------------------


def counts(most: int) -> st.SearchStrategy[int]:
    return st.one_of(st.integers(1, most), st.sampled_from([1, 10**9]))


def amounts(most: int, least: int = 0) -> st.SearchStrategy[Decimal]:
    return (
        st.decimals(least, most, places=3) | st.decimals(least, most, places=6) | st.integers(least, most).map(Decimal)
    )


HEADS = {"num_hidden_layers": counts(130), "num_key_value_heads": counts(64), "head_dim": counts(512)}
LATENT = {"num_hidden_layers": counts(130), "kv_lora_rank": counts(1024), "qk_rope_head_dim": st.integers(0, 256)}
WHOLE = {"model_vram_gb": amounts(200), "kv_per_token_mb": amounts(4), "max_batch_tokens": counts(200000)}
CARD = {"gpu_vram_total_gb": amounts(200), "gpu_overhead_gb": amounts(8)}
SERVER = {
    "weights_gb": amounts(160),
    "kv_bytes": st.sampled_from([1, 2, 4, 8]),
    "block_tokens": st.sampled_from([1, 16, 17, 64, 256]),
    "unit_mb": st.sampled_from([Decimal("0.001"), Decimal("0.3"), Decimal(1), Decimal(7), Decimal(1024)]),
    "gpu_memory_utilization": st.decimals(Decimal("0.001"), 1, places=3),
    "max_batch_tokens": counts(200000),
}
MODELS: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.fixed_dictionaries(WHOLE, optional=CARD),
    st.fixed_dictionaries(HEADS, optional=CARD | SERVER),
    st.fixed_dictionaries(LATENT, optional=CARD | SERVER),
    st.fixed_dictionaries(HEADS | CARD | SERVER),
    st.fixed_dictionaries({}, optional=HEADS | LATENT | WHOLE | CARD | SERVER),  # mostly of no form
)
TOKENS = st.integers(0, 300_000) | st.sampled_from([0, 1, 15, 16, 17, 2**31 - 1])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(model=MODELS, prompt_tokens=TOKENS, max_tokens=TOKENS)
def test_python_and_sql_give_the_same_numbers(
    db: Database, model: dict[str, Any], prompt_tokens: int, max_tokens: int
) -> None:
    """Also the same refusals; and a model survives its way through a pool's config."""
    text = "{" + ", ".join(f'"{name}": {value}' for name, value in model.items()) + "}"
    try:
        mine = LlmCostModel.from_config(model)
    except BadInputError:
        assert refuses(db, "select * from pgpark.park_llm_capacity(%s::jsonb)", text), text
        return
    assert LlmCostModel.from_config(mine.to_config()) == mine
    text = json.dumps(mine.to_config())

    try:
        capacity = (mine.bytes_per_token, mine.max_units, mine.max_tokens)
    except BadInputError:
        assert refuses(db, "select * from pgpark.park_llm_capacity(%s::jsonb)", text), text
    else:
        (row,) = db.rows("select * from pgpark.park_llm_capacity(%s::jsonb)", text)
        assert (row["bytes_per_token"], row["max_units"], row["max_tokens"]) == capacity, text

    db.rows("select pgpark.park_put_pool('gpu', jsonb_build_object('max_units', 1, 'cost_model', %s::jsonb))", text)
    statement = "select pgpark.park_llm_units('gpu', %s, %s)"
    try:
        units = mine.units(prompt_tokens, max_tokens)
    except BadInputError:
        assert refuses(db, statement, prompt_tokens, max_tokens), text
    else:
        assert db.value(statement, prompt_tokens, max_tokens) == units, text


def refuses(db: Database, statement: str, *parameters: Any) -> bool:
    try:
        db.rows(statement, *parameters)
    except psycopg.errors.InvalidParameterValue:
        return True
    return False


def test_the_published_figures_come_out() -> None:
    """Sources: tests/sql/test_costs.py, where SQL is held to the same."""
    assert LlmCostModel.from_hf_config(LLAMA_8B).bytes_per_token == 131072
    seventy = LlmCostModel.from_hf_config(LLAMA_70B)
    assert (seventy.bytes_per_token, seventy.units(4096, 0)) == (327680, 1280)
    assert LlmCostModel.from_hf_config(DEEPSEEK_V3).bytes_per_token == 70272
    card = {"gpu_vram_total_gb": 23.58, "gpu_overhead_gb": 0.35}
    assert LlmCostModel.from_hf_config(LLAMA_8B, weights_gb=17.06, **card).max_tokens == 31216
    assert LlmCostModel.from_hf_config(LLAMA_8B, weights_gb=17.0595, **card).max_tokens == 31232


@pytest.mark.parametrize("tokens", [(-1, 0), (0, 2**31), (True, 1), (1.0, 1), ("1", 1)])
def test_token_counts_that_cannot_be_are_named(tokens: Any) -> None:
    model = LlmCostModel(model_vram_gb=1, kv_per_token_mb=1, max_batch_tokens=1)
    with pytest.raises(BadInputError, match="must be whole numbers from 0 to 2147483647, not "):
        model.units(*tokens)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"model_vram_gb": True}, "cost_model.model_vram_gb: must be a number, not True"),
        ({"model_vram_gb": "5"}, "cost_model.model_vram_gb: must be a number, not '5'"),
        ({"weights_gb": float("nan")}, "cost_model.weights_gb: Input should be a finite number"),
        ({"weights_gb": 1.2345678901234567}, "cost_model.weights_gb: must have at most 15 digits"),
        ({"weights_gb": 1e-9}, "cost_model.weights_gb: must be 0 or at least 0.000001"),
        ({"layers": 1}, "cost_model.layers: Extra inputs are not permitted"),
        ({}, "cost_model: needs model_vram_gb, kv_per_token_mb and max_batch_tokens"),
    ],
)
def test_a_wrong_model_is_named_in_one_line(model: Any, message: str) -> None:
    with pytest.raises(BadInputError) as refused:
        LlmCostModel.from_config(model)
    assert str(refused.value) == message
    with pytest.raises(ValidationError):
        LlmCostModel(**model)


# -- from the files of a model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (LLAMA_8B, (32, 8, 128, 2)),
        (QWEN2_7B, (28, 4, 128, 2)),
        (GPT2, (12, 12, 64, 2)),
        (LLAMA_8B | {"num_key_value_heads": None, "torch_dtype": "float32"}, (32, 32, 128, 4)),
        (LLAMA_8B | {"head_dim": 256, "dtype": "torch.float16"}, (32, 8, 256, 2)),
        (LLAMA_8B | {"layer_types": ["full_attention"] * 32, "is_encoder_decoder": False}, (32, 8, 128, 2)),
        (LLAMA_8B | {"sliding_window": 262144}, (32, 8, 128, 2)),
        ({"model_type": "llava", "text_config": LLAMA_8B, "vision_config": {"num_hidden_layers": 24}}, (32, 8, 128, 2)),
        ({"dtype": "float32", "text_config": {**LLAMA_8B, "torch_dtype": None}}, (32, 8, 128, 4)),
    ],
)
def test_a_shape_is_read_from_a_config(config: Any, shape: tuple[int, ...]) -> None:
    model = LlmCostModel.from_hf_config(config)
    assert (model.num_hidden_layers, model.num_key_value_heads, model.head_dim, model.kv_bytes) == shape


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLAMA_8B | {"sliding_window": 4096}, "its attention has a window of 4096 tokens (sliding_window)"),
        (
            LLAMA_8B | {"layer_types": ["full_attention", "sliding_attention"]},
            "some of its layers have sliding_attention",
        ),
        (LLAMA_8B | {"is_encoder_decoder": True}, "(is_encoder_decoder)"),
        (LLAMA_8B | {"mamba_d_state": 16}, "it has state-space layers (mamba_d_state)"),
        (LLAMA_8B | {"full_attention_interval": 4}, "only some of its layers have full attention"),
        (DEEPSEEK_V3 | {"index_topk": 2048}, "it also caches an index of its tokens (index_topk)"),
        ({"text_config": LLAMA_8B | {"attention_chunk_size": 8192}}, "some of its layers attend to chunks only"),
        (LLAMA_8B | {"v_head_dim": 64}, "its keys and values differ in size (v_head_dim)"),
        (GPT2 | {"multi_query": True}, "the name of its KV heads is not the usual one (multi_query)"),
        (LLAMA_8B | {"num_hidden_layers": None}, "num_hidden_layers is missing"),
        (
            LLAMA_8B | {"num_key_value_heads": [8, 4]},
            "num_key_value_heads must be a whole number of at least 1, not [8, 4]",
        ),
        (LLAMA_8B | {"num_attention_heads": 7}, "hidden_size 4096 does not divide by 7 heads"),
        (DEEPSEEK_V3 | {"qk_rope_head_dim": None}, "qk_rope_head_dim is missing"),
        ({}, "num_hidden_layers is missing"),
    ],
)
def test_a_config_that_would_be_charged_wrongly_is_refused(config: Any, message: str) -> None:
    with pytest.raises(BadInputError) as refused:
        LlmCostModel.from_hf_config(config)
    assert message in str(refused.value) and str(refused.value).startswith("config.json: ")


def test_weights_are_the_size_of_the_safetensors_beside_the_config(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, LLAMA_8B, total_size=16060522496)  # that of meta-llama/Llama-3.1-8B: 14.96 GiB
    for source in (folder, folder / "config.json", str(folder)):
        assert LlmCostModel.from_hf_config(source).weights_gb == Decimal("14.9576")
    assert LlmCostModel.from_hf_config(folder, weights_gb=8).weights_gb == 8
    assert LlmCostModel.from_hf_config(folder, kv_bytes=1).bytes_per_token == 65536


def test_weights_in_one_file_are_its_size(tmp_path: Path) -> None:
    assert LlmCostModel.from_hf_config(model_folder(tmp_path, GPT2, single=2**30)).weights_gb == 1


def test_a_pointer_in_place_of_the_weights_is_none(tmp_path: Path) -> None:
    assert LlmCostModel.from_hf_config(model_folder(tmp_path, GPT2, single=133)).weights_gb is None


@pytest.mark.parametrize(
    ("config", "total_size", "message"),
    [
        ("{", None, r"config.json is not JSON: "),
        ("[]", None, r"config.json must be a JSON object"),
        (json.dumps(GPT2), "much", r"metadata.total_size must be a number of bytes, not 'much'"),
        (json.dumps(GPT2), -1, r"metadata.total_size must be a number of bytes, not -1"),
    ],
)
def test_files_that_are_none_say_so(tmp_path: Path, config: str, total_size: Any, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        LlmCostModel.from_hf_config(model_folder(tmp_path, config, total_size))


def test_a_model_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"nowhere: No such file or directory"):
        LlmCostModel.from_hf_config(tmp_path / "nowhere")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    with pytest.raises(BadInputError, match=r"index.json has no metadata.total_size"):
        LlmCostModel.from_hf_config(tmp_path)


# -- submitting by tokens --------------------------------------------------------------------------------------------


def test_a_task_is_charged_by_its_tokens(db: Database) -> None:
    model = LlmCostModel.from_hf_config(LLAMA_8B, weights_gb=15, gpu_vram_total_gb=24)
    with Client(db.dsn) as park:
        park.run(calls.put_pool("gpu", {"cost_model": model.to_config()}))
        task = park.run(calls.submit("gpu", 1, prompt_tokens=1000, max_tokens=24))
        assert db.status(task.task_id or 0)["units"] == model.units(1000, 24) == 128
        refused = park.run(calls.submit("gpu", 1, prompt_tokens=100_000, max_tokens=0))
        assert (refused.accepted, refused.reason) == (False, "too_large")
        assert park.run(calls.llm_capacity(model.to_config())).max_tokens == model.max_tokens == 54064
        with pytest.raises(BadInputError, match="must be whole numbers of at least 0, not -1 and 1"):
            park.run(calls.submit("gpu", 1, prompt_tokens=-1, max_tokens=1))


def test_units_are_one_where_nothing_is_said(db: Database) -> None:
    db.pool()
    with Client(db.dsn) as park:
        task = park.run(calls.submit("gpu", 1))
    assert db.status(task.task_id or 0)["units"] == 1


def test_tokens_and_units_exclude_one_another() -> None:
    with pytest.raises(BadInputError, match="give units, or prompt_tokens and max_tokens, not both"):
        calls.submit("gpu", 1, units=1, prompt_tokens=1, max_tokens=1)
    for alone in ({"prompt_tokens": 1}, {"max_tokens": 0}):
        with pytest.raises(BadInputError, match="prompt_tokens and max_tokens go together"):
            calls.submit("gpu", 1, **alone)


def test_json_of_a_pool_is_read_back_as_the_same_model(db: Database) -> None:
    model = LlmCostModel.from_hf_config(DEEPSEEK_V3, weights_gb=642.3, gpu_memory_utilization=0.95)
    db.rows("select pgpark.park_put_pool('gpu', %s)", Jsonb({"max_units": 9, "cost_model": model.to_config()}))
    assert LlmCostModel.from_config(db.value("select config -> 'cost_model' from pgpark.park_pools('gpu')")) == model


@pytest.fixture
def submit(db: Database, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs `pgpark submit gpu`; returns exit code, standard output, standard error."""
    monkeypatch.setenv("PGPARK_DSN", db.dsn)
    db.pool(max_units=2048, cost_model={"num_hidden_layers": 32, "num_key_value_heads": 8, "head_dim": 128})

    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        return cli.run(["submit", "gpu", *arguments]), *capfd.readouterr()

    return run


def test_the_command_submits_by_tokens(submit: Any, db: Database, tmp_path: Path) -> None:
    _, out, _ = submit("1", "--prompt-tokens", "1000", "--max-tokens", "24")
    assert db.status(int(out))["units"] == 128
    (tmp_path / "tasks").write_text(
        '{"payload": 1, "prompt_tokens": 16, "max_tokens": 0}\n{"payload": 2, "units": 3}\n'
        '{"payload": 3, "prompt_tokens": 0, "max_tokens": 20000}\n'
    )
    code, out, err = submit("--file", str(tmp_path / "tasks"))
    assert [db.status(int(task))["units"] for task in out.split()] == [2, 3]
    assert (code, err) == (1, "2 accepted, 1 refused (1 too_large)\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-tokens", "1"], "pgpark: prompt_tokens and max_tokens go together\n"),
        (["--prompt-tokens", "1", "--max-tokens", "1", "--units", "1"], "pgpark: give units, or prompt_tokens and"),
        (
            ["--prompt-tokens", "-1", "--max-tokens", "1"],
            "pgpark submit: Invalid value for '--prompt-tokens': -1 is not",
        ),
        (["--prompt-tokens", "1", "--max-tokens", "2147483648"], "pgpark submit: Invalid value for '--max-tokens'"),
    ],
)
def test_a_submit_by_wrong_tokens_is_one_line(submit: Any, db: Database, arguments: list[str], message: str) -> None:
    code, out, err = submit("1", *arguments)
    assert (code, out) == (2, "") and err.startswith(message) and err.count("\n") == 1
    assert db.stats()["parked"] == 0


def test_a_bad_line_of_tokens_is_named_by_its_number(submit: Any, db: Database, tmp_path: Path) -> None:
    (tmp_path / "tasks").write_text('{"payload": 1}\n\n{"payload": 1, "prompt_tokens": 1}\n')
    code, _, err = submit("--file", str(tmp_path / "tasks"))
    assert (code, db.stats()["parked"]) == (2, 0)
    assert "tasks line 3: prompt_tokens and max_tokens go together, and max_tokens is missing; nothing was" in err
