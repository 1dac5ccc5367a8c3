"""`pgpark gpu`, with an nvidia-smi of our own on the PATH that prints what real ones do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pgpark import Client, calls, cli
from tests.conftest import Database

RTX_4090 = "0, NVIDIA GeForce RTX 4090, 24564, 24080, 1, 550.90.07\n"
H100S = (
    "0, NVIDIA H100 80GB HBM3, 81559, 81007, 0, 570.124.06\n1, NVIDIA H100 80GB HBM3, 81559, 12007, 69000, 570.124.06\n"
)
OLD_DRIVER = "0, Tesla T4, 15109, 15106, 3, 450.51.05\n"  # what the driver keeps is in used
DGX_SPARK = "0, NVIDIA GB10, [N/A], [N/A], [N/A], 580.95.05\n"
LIST = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-11111111-2222-3333-4444-555555555555)\n"
MIG_LIST = (
    "GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-11111111-2222-3333-4444-555555555555)\n"
    "  MIG 3g.20gb     Device  0: (UUID: MIG-aaaaaaaa-2222-3333-4444-555555555555)\n"
    "  MIG 1g.5gb      Device  1: (UUID: MIG-bbbbbbbb-2222-3333-4444-555555555555)\n"
    "GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-cccccccc-2222-3333-4444-555555555555)\n"
)
A100S = (
    "0, NVIDIA A100-SXM4-40GB, 40960, [Insufficient Permissions], [Insufficient Permissions], 535.183.01\n"
    "1, NVIDIA A100-SXM4-40GB, 40960, 40326, 0, 535.183.01\n"
)
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA"
    " driver is installed and running.\n\n"
)
LLAMA_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
}

Printed = tuple[int, str, str]


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Printed]:
    """Runs `pgpark gpu` where nvidia-smi prints this (None: there is none)."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def run(printed: str | None, *arguments: str, listed: str = LIST, code: int = 0, body: str = "") -> Printed:
        if printed is not None:
            script = (
                f"#!{sys.executable}\nimport sys, time\n{body}\n"
                f"sys.stdout.write({listed!r} if sys.argv[1:] == ['-L'] else {printed!r})\n"
                "asked = ['--query-gpu=index,name,memory.total,memory.free,memory.used,driver_version',"
                " '--format=csv,noheader,nounits']\n"
                f"sys.exit({code} if sys.argv[1:] in (['-L'], asked) else 'asked for something else')\n"
            )
            (folder / "nvidia-smi").write_text(script)
            (folder / "nvidia-smi").chmod(0o755)
        capfd.readouterr()
        code = cli.run(["gpu", *arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    (folder / "model.safetensors.index.json").write_text('{"metadata": {"total_size": 16060522496}}')
    return folder


def pools(out: str) -> Any:
    return json.loads(out[out.index("{") :])["pools"]


def test_a_card_is_shown_with_a_pool_of_its_gib(gpus: Callable[..., Printed]) -> None:
    code, out, err = gpus(RTX_4090)
    heading, card = out.splitlines()[:2]
    assert heading.split() == ["index", "name", "total_mb", "free_mb", "used_mb", "mig", "driver"]
    assert card.split() == ["0", "NVIDIA", "GeForce", "RTX", "4090", "24564", "24080", "1", "0", "550.90.07"]
    assert pools(out) == {"gpu0": {"max_units": 21, "resource_kind": "gpu_vram"}}  # 24081 / 1024 x 0.9 = 21.16
    assert (code, err) == (0, "")


def test_what_the_driver_keeps_is_nobodys(gpus: Callable[..., Printed]) -> None:
    """Of 24564 MiB programs can have 24081, free and used together; an old driver counts its own as used."""
    assert pools(gpus(RTX_4090, "--utilization", "1")[1])["gpu0"]["max_units"] == 23
    assert pools(gpus(OLD_DRIVER, "--utilization", "1")[1])["gpu0"]["max_units"] == 14
    assert pools(gpus(RTX_4090, "--utilization", "1", "--overhead-gb", "1.6")[1])["gpu0"]["max_units"] == 21


def test_with_a_model_the_pool_is_charged_by_tokens(gpus: Callable[..., Printed], model: Path, db: Database) -> None:
    code, out, _ = gpus(RTX_4090, "--config", "--model", str(model), "--overhead-gb", "0.35")
    config = json.loads(out)["pools"]["gpu0"]
    assert config == {
        "max_units": 5997,  # floor((24081 / 1024 x 0.9 - 14.9576 - 0.35) x 1024)
        "resource_kind": "gpu_vram",
        "cost_model": {
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "kv_bytes": 2,
            "weights_gb": 14.9576,
            "gpu_vram_total_gb": 23.5166015625,
            "gpu_memory_utilization": 0.9,
            "gpu_overhead_gb": 0.35,
        },
    }
    assert code == 0
    with Client(db.dsn) as park:
        park.run(calls.put_pool("gpu0", config))
        park.run(calls.put_pool("derived", {"cost_model": config["cost_model"]}))
        assert park.run(calls.stats("derived"))[0].max_units == 5997, "SQL derives the same"
        assert park.run(calls.llm_units("gpu0", 4096, 0)) == 512


def test_the_weights_and_the_bytes_of_the_cache_can_be_told(gpus: Callable[..., Printed], model: Path) -> None:
    (model / "model.safetensors.index.json").unlink()
    code, out, err = gpus(RTX_4090, "--model", str(model))
    assert (code, out) == (2, "")
    assert err == f"pgpark: {model}: there are no safetensors beside it that tell its weights; give --weights-gb\n"
    out = gpus(RTX_4090, "--config", "--model", str(model / "config.json"), "--weights-gb", "8", "--kv-bytes", "1")[1]
    cost_model = json.loads(out)["pools"]["gpu0"]["cost_model"]
    assert (cost_model["weights_gb"], cost_model["kv_bytes"]) == (8, 1)


def test_several_cards_are_several_pools_and_what_to_do_with_them_is_said(gpus: Callable[..., Printed]) -> None:
    code, out, err = gpus(H100S)
    assert {name: config["max_units"] for name, config in pools(out).items()} == {"gpu0": 71, "gpu1": 71}
    assert "card 1: 69000 MiB are in use now" in err and "card 0" not in err
    assert "CUDA_VISIBLE_DEVICES=0 pgpark worker gpu0" in err
    assert code == 0


def test_json_is_a_line_for_a_card(gpus: Callable[..., Printed]) -> None:
    first, second = map(json.loads, gpus(H100S, "--json")[1].splitlines())
    assert first == {
        "index": 0,
        "name": "NVIDIA H100 80GB HBM3",
        "total_mb": 81559,
        "free_mb": 81007,
        "used_mb": 0,
        "driver": "570.124.06",
        "mig": 0,
        "pool": "gpu0",
        "config": {"max_units": 71, "resource_kind": "gpu_vram"},
    }
    assert second["pool"] == "gpu1"


def test_a_card_that_is_split_gets_no_pool_and_the_others_do(gpus: Callable[..., Printed]) -> None:
    code, out, err = gpus(A100S, listed=MIG_LIST)
    assert list(pools(out)) == ["gpu1"]
    assert err == (
        "card 0 (NVIDIA A100-SXM4-40GB): no pool: it is split into 2 MIG devices, and a program sees only one of them\n"
    )
    assert code == 0


@pytest.mark.parametrize("printed", [DGX_SPARK, DGX_SPARK.replace("[N/A]", "[Not Supported]"), A100S.splitlines()[0]])
def test_a_card_that_does_not_tell_its_memory_is_shown_without_a_pool(
    gpus: Callable[..., Printed], printed: str
) -> None:
    code, out, err = gpus(printed)
    assert len(out.splitlines()) == 2 and "N/A" not in out
    assert "no pool: it does not tell its memory (shared with the CPU, MIG mode, or no permission)" in err
    assert code == 1


def test_a_card_without_room_for_the_model_is_named(gpus: Callable[..., Printed], model: Path) -> None:
    code, out, err = gpus(OLD_DRIVER, "--config", "--model", str(model))
    assert (code, out) == (1, "")
    assert "card 0 (Tesla T4): no pool: cost_model leaves -1.67" in err and err.count("\n") == 1
    assert "less than one unit" in gpus(OLD_DRIVER, "--overhead-gb", "13")[2]


def test_without_nvidia_smi_it_says_so(gpus: Callable[..., Printed]) -> None:
    assert gpus(None) == (1, "", "no GPU: there is no nvidia-smi on the PATH\n")
    assert gpus(None, "--json") == (1, "", "no GPU: there is no nvidia-smi on the PATH\n")


@pytest.mark.parametrize(
    ("printed", "code", "body", "message"),
    [
        (NO_DRIVER, 9, "", "nvidia-smi failed with exit code 9: NVIDIA-SMI has failed because it couldn't communicate"),
        ("No devices were found\n", 0, "", "nvidia-smi finds no card"),
        ("No devices were found\n", 6, "", "nvidia-smi failed with exit code 6: No devices were found"),
        ("", 0, "", "nvidia-smi finds no card"),
        ("", 1, "sys.stderr.write('broken\\npipe')", "nvidia-smi failed with exit code 1: broken pipe"),
        ("", 1, "", "nvidia-smi failed with exit code 1: it said nothing"),
        ("hello\n", 0, "", "nvidia-smi printed 'hello', which is no line of index,name,memory.total"),
        ("x, y, 1, 1, 1, 1\n", 0, "", "nvidia-smi printed 'x, y, 1, 1, 1, 1', which is no line of index,name"),
        ("", 0, "sys.stdout.buffer.write(b'\\xff\\xfe')", "nvidia-smi printed '\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_an_nvidia_smi_that_does_not_answer_is_one_line(
    gpus: Callable[..., Printed], printed: str, code: int, body: str, message: str
) -> None:
    returned, out, err = gpus(printed, code=code, body=body)
    assert (returned, out) == (1, "")
    assert err.startswith(f"no GPU: {message}") and err.count("\n") == 1


def test_an_nvidia_smi_that_hangs_is_left(gpus: Callable[..., Printed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["pgpark.cli.gpu"], "_SMI_SECS", 0.2)
    assert gpus("", body="time.sleep(600)") == (1, "", "no GPU: nvidia-smi did not answer within 0.2 seconds\n")


def test_a_file_that_cannot_be_run_is_one_line(gpus: Callable[..., Printed], tmp_path: Path) -> None:
    (tmp_path / "bin" / "nvidia-smi").write_bytes(b"\x00\x01")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    assert gpus(None) == (1, "", "no GPU: nvidia-smi cannot be run: Exec format error\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--utilization", "0"], "--utilization must be above 0 and at most 1"),
        (["--utilization", "nan"], "--utilization must be above 0 and at most 1"),
        (["--utilization", "1.5"], "--utilization must be above 0 and at most 1"),
        (["--overhead-gb", "-1"], "--overhead-gb must be from 0 to 1000000 GiB"),
        (["--weights-gb", "8"], "--weights-gb and --kv-bytes go with --model"),
        (["--model", "nowhere"], "nowhere: No such file or directory"),
        (["--model", ".", "--weights-gb", "nan"], "cost_model.weights_gb: Input should be a finite number"),
        (["--model", ".", "--kv-bytes", "16"], "cost_model.kv_bytes: Input should be less than or equal to 8"),
    ],
)
def test_a_wrong_option_says_what_would_be_right(
    gpus: Callable[..., Printed], model: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(model)
    code, out, err = gpus(RTX_4090, *arguments)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1
