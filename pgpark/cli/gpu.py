"""`pgpark gpu`: the cards that nvidia-smi sees, and a pool config for each."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections import defaultdict
from decimal import Decimal
from pathlib import Path
from typing import Any

import click

from pgpark.cli.common import messages, print_json, results_console, table
from pgpark.costs import LlmCostModel
from pgpark.errors import BadInputError
from pgpark.models import Row

_FIELDS = "index,name,memory.total,memory.free,memory.used,driver_version"
_SMI_SECS = 30  # a card that sleeps takes seconds to wake, eight of them longer
_UTILIZATION = 0.9


class Card(Row):
    """A card as nvidia-smi has it, in MiB; None: it does not tell. `mig` counts the devices that it is split into."""

    index: int
    name: str
    total_mb: int | None
    free_mb: int | None
    used_mb: int | None
    driver: str
    mig: int

    @property
    def usable_mb(self) -> int | None:
        """What programs can have of it: the total less what the driver keeps (new drivers count that in neither)."""
        if self.total_mb is None or self.free_mb is None or self.used_mb is None or self.mig:
            return None
        return min(self.total_mb, self.free_mb + self.used_mb) or None


class _NoCardError(Exception):
    """There is no card, or none that can be asked; the text says why."""


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="A Hugging Face model: its config.json, or its folder.")
@click.option("--weights-gb", type=float, help="GiB of its weights, if no safetensors are beside the config.")
@click.option("--kv-bytes", type=int, help="Bytes of a number in its KV cache, if not those of its dtype: 1 for fp8.")
@click.option("--utilization", default=_UTILIZATION, show_default=True, type=float, help="Share of the card to use.")
@click.option("--overhead-gb", default=0.0, show_default=True, type=float, help="GiB to leave free besides.")
@click.option(
    "--config",
    "config_only",
    envvar="PGPARK_GPU_CONFIG",
    is_flag=True,
    help="Print the pool configs alone, as a config file.",
)
@click.option("--json", "as_json", envvar="PGPARK_JSON", is_flag=True, help="Print JSON, one object a card.")
def gpu(
    model: Path | None,
    weights_gb: float | None,
    kv_bytes: int | None,
    utilization: float,
    overhead_gb: float,
    config_only: bool,
    as_json: bool,
) -> int:
    """Show the cards that nvidia-smi sees, and a pool config for each.

    max_units are GiB: the memory that programs can have of the card, times --utilization, less --overhead-gb. With
    --model they are MiB of KV cache, after its weights, and the pool gets the cost_model that charges a request by its
    tokens. What is free at the moment is shown but does not count: a pool outlives that, and a server of the model that
    runs already holds memory that is the pool's. Use it so: pgpark gpu --config > pools.json, then
    pgpark pool put gpu0 --config pools.json. Exit 1 if there is no card, or none that tells its memory.
    """
    if not 0 < utilization <= 1:
        raise click.UsageError("--utilization must be above 0 and at most 1")
    if not 0 <= overhead_gb <= 1e6:
        raise click.UsageError("--overhead-gb must be from 0 to 1000000 GiB")
    if model is None and (weights_gb is not None or kv_bytes is not None):
        raise click.UsageError("--weights-gb and --kv-bytes go with --model")
    shape = None if model is None else _shape(model, weights_gb, kv_bytes)
    try:
        cards = _cards()
    except _NoCardError as error:
        messages.print(f"no GPU: {error}", soft_wrap=True)
        return 1
    pools: dict[int, dict[str, Any]] = {}
    for card in cards:
        try:
            pools[card.index] = _pool(card, shape, utilization, overhead_gb)
        except BadInputError as error:
            messages.print(f"card {card.index} ({card.name}): no pool: {error}", soft_wrap=True)
    _print(cards, pools, config_only, as_json)
    _advise([card for card in cards if card.index in pools], utilization)
    return 0 if pools else 1


def _print(cards: list[Card], pools: dict[int, dict[str, Any]], config_only: bool, as_json: bool) -> None:
    if as_json:
        for card in cards:
            print_json(card.model_dump() | {"pool": f"gpu{card.index}", "config": pools.get(card.index)})
        return
    if not config_only:
        results_console().print(table(cards, ["index", "name", "total_mb", "free_mb", "used_mb", "mig", "driver"]))
    if pools:
        click.echo(json.dumps({"pools": {f"gpu{index}": config for index, config in pools.items()}}, indent=2))


def _advise(cards: list[Card], utilization: float) -> None:
    for card in cards:
        assert card.usable_mb is not None and card.free_mb is not None
        if card.free_mb < card.usable_mb * utilization:
            messages.print(
                f"card {card.index}: {card.used_mb} MiB are in use now. If that is not the server of this pool and"
                " stays, leave it out with --overhead-gb.",
                soft_wrap=True,
            )
    if len(cards) > 1:
        first = cards[0].index
        messages.print(
            "A pool for each card, because a unit of one is no use on another: run a worker for each, such as"
            f" CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES={first} pgpark worker gpu{first} ..., and submit to"
            " the pool whose card should do it. A model that spans several cards is one pool, with the share of one"
            " card: weights_gb and num_key_value_heads divided by the cards, an MLA latent as it is.",
            soft_wrap=True,
        )


def _shape(model: Path, weights_gb: float | None, kv_bytes: int | None) -> LlmCostModel:
    shape = LlmCostModel.from_hf_config(model, weights_gb, kv_bytes=kv_bytes)
    if shape.weights_gb is None:
        raise BadInputError(f"{model}: there are no safetensors beside it that tell its weights; give --weights-gb")
    return shape


def _pool(card: Card, shape: LlmCostModel | None, utilization: float, overhead_gb: float) -> dict[str, Any]:
    """A pool config for a card. Raises BadInputError if it has no room, or does not tell its memory."""
    if card.mig:
        raise BadInputError(f"it is split into {card.mig} MIG devices, and a program sees only one of them")
    if card.usable_mb is None:
        raise BadInputError("it does not tell its memory (shared with the CPU, MIG mode, or no permission)")
    usable_gb = Decimal(card.usable_mb) / 1024
    if shape is None:
        room = usable_gb * Decimal(str(utilization)) - Decimal(str(overhead_gb))
        if room < 1:
            raise BadInputError(f"{room:.2f} GiB are left of it, less than one unit")
        return {"max_units": int(room), "resource_kind": "gpu_vram"}
    on_card = {"gpu_vram_total_gb": usable_gb, "gpu_memory_utilization": utilization, "gpu_overhead_gb": overhead_gb}
    cost_model = LlmCostModel.from_config(shape.to_config() | on_card)
    return {"max_units": cost_model.max_units, "resource_kind": "gpu_vram", "cost_model": cost_model.to_config()}


def _cards() -> list[Card]:
    """The cards of this machine. Raises _NoCardError."""
    devices: defaultdict[int, int] = defaultdict(int)  # MIG devices by card
    lines = [line.strip() for line in _smi(f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits").splitlines()]
    lines = [line for line in lines if line]
    if not lines or lines[0].lower().startswith("no devices"):
        raise _NoCardError("nvidia-smi finds no card")
    index = -1
    with contextlib.suppress(_NoCardError):  # it only tells of MIG
        for line in _smi("-L").splitlines():
            if found := re.match(r"GPU (\d+):", line):
                index = int(found[1])
            devices[index] += re.match(r"\s+MIG ", line) is not None
    return [_card(line, devices) for line in lines]


def _card(line: str, devices: dict[int, int]) -> Card:
    values = [value.strip() for value in line.split(",")]
    if len(values) < 6 or not values[0].isdecimal():
        raise _NoCardError(f"nvidia-smi printed {line[:200]!r}, which is no line of {_FIELDS}")
    index, *name, total, free, used, driver = values
    memory = {"total_mb": _mib(total), "free_mb": _mib(free), "used_mb": _mib(used)}
    return Card(index=int(index), name=", ".join(name), driver=driver, mig=devices.get(int(index), 0), **memory)


def _mib(text: str) -> int | None:
    """`[N/A]`, `[Not Supported]`, `[Insufficient Permissions]` are none."""
    return int(text) if text.isdecimal() else None


def _smi(*arguments: str) -> str:
    """What nvidia-smi prints. Raises _NoCardError if it is not there, fails, or takes too long."""
    try:
        running = subprocess.Popen(
            ["nvidia-smi", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except FileNotFoundError:
        raise _NoCardError("there is no nvidia-smi on the PATH") from None
    except OSError as error:
        raise _NoCardError(f"nvidia-smi cannot be run: {error.strerror or error}") from error
    try:
        out, err = running.communicate(timeout=_SMI_SECS)
    except subprocess.TimeoutExpired:
        running.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # where the driver hangs, even that does not end it
            running.wait(1)
        raise _NoCardError(f"nvidia-smi did not answer within {_SMI_SECS} seconds") from None
    text = out.decode(errors="replace")
    if running.returncode != 0:
        said = " ".join((text.strip() or err.decode(errors="replace")).split())[:300]
        raise _NoCardError(f"nvidia-smi failed with exit code {running.returncode}: {said or 'it said nothing'}")
    return text
