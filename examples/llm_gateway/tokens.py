"""How many tokens a request may come to, and the limit that holds it to that. Knows nothing of pgpark.

Three ways to count a prompt: by the server's own /tokenize (vLLM and llama.cpp have one, Ollama has none), by a
tokenizer.json with the package `tokenizers`, or by an estimate: a token for every digit, and for every three bytes of
UTF-8 else. Text and code have more bytes a token, so this is rather too much than too little (README.md has figures);
what it may miss by is what the pool's room to spare is for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

_BYTES_PER_TOKEN = 3
_PER_MESSAGE = 8  # what chat templates put around a message
_PER_ATTACHMENT = 1024  # an image or a sound: nobody knows without the model, this is what many charge
_MOST = 2_147_483_647
_LIMITS = ("max_tokens", "max_completion_tokens", "n_predict")
_ANSWERS = ("n", "best_of", "n_cmpl")


class BadRequestError(ValueError):
    """A request that no server would take; `param` is the key."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Ask:
    """What is to be counted: texts, tokens that are known, and how many tokens may be written at most."""

    texts: list[str]
    known: int
    max_tokens: int


def read(path: str, body: dict[str, Any], default_max_tokens: int) -> Ask:
    """What a request asks for. Writes the limit that is charged into the body, under each name that it was given and
    as max_tokens, so that every server keeps to it: vLLM believes max_completion_tokens first, llama.cpp n_predict, and
    older ones know max_tokens alone. Raises BadRequestError."""
    if path.endswith("/embeddings"):
        texts, known, _ = _prompt(body, "input")
        return Ask(texts, known, max_tokens=0)
    if path.endswith("/chat/completions"):
        texts, known, prompts = _messages(body)
    else:
        texts, known, prompts = _prompt(body, "prompt")
    given = [key for key in _LIMITS if body.get(key) is not None]
    most = min((_whole(body, key) for key in given), default=default_max_tokens)
    body.update(dict.fromkeys([*given, "max_tokens"], most))
    answers = max(_whole(body, key, 1) for key in _ANSWERS)
    return Ask(texts, known, min(most * answers * prompts, _MOST))


def _messages(body: dict[str, Any]) -> tuple[list[str], int, int]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
        raise BadRequestError("messages must be a list of objects that is not empty", "messages")
    texts, known = [json.dumps(body["tools"])] if body.get("tools") else [], 0
    for message in messages:
        known += _PER_MESSAGE
        content = message.get("content")
        pieces = content if isinstance(content, list) else [{"text": content or ""}]
        for piece in pieces:
            if isinstance(piece, dict) and isinstance(piece.get("text"), str):
                texts.append(piece["text"])
            else:
                known += _PER_ATTACHMENT
        if rest := {key: value for key, value in message.items() if key not in ("content", "role")}:
            texts.append(json.dumps(rest))
    return texts, known, 1


def _prompt(body: dict[str, Any], key: str) -> tuple[list[str], int, int]:
    """A text, a list of texts, or tokens in their place."""
    value = body.get(key)
    if isinstance(value, str):
        return [value], 0, 1
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value, 0, len(value)
        if all(isinstance(item, int) for item in value):
            return [], len(value), 1
        if all(isinstance(item, list) for item in value):
            return [], sum(map(len, value)), len(value)
    raise BadRequestError(f"{key} must be a text, a list of texts, or a list of tokens", key)


def _whole(body: dict[str, Any], key: str, default: int | None = None) -> int:
    value = body.get(key) if body.get(key) is not None else default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST:
        raise BadRequestError(f"{key} must be a whole number of at least 1, not {value!r}", key)
    return value


def estimate(text: str) -> int:
    """Tokens of a text, rather too many than too few."""
    digits = sum(map(str.isdigit, text))  # many models make a token of each
    return digits - (digits - len(text.encode(errors="replace"))) // _BYTES_PER_TOKEN


def from_file(tokenizer: Path) -> Callable[[str], int]:
    """Counts with a tokenizer.json of the model; needs the package `tokenizers`."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer))
    loaded.no_truncation()
    return lambda text: len(loaded.encode(text).ids)


async def from_server(server: httpx.AsyncClient, model: Any, texts: list[str]) -> int | None:
    """Counts with the server's /tokenize; None where it has none, or does not answer."""
    text = "\n".join(texts)
    try:
        answer = await server.post("/tokenize", json={"model": model, "prompt": text, "content": text})
        counted = answer.json()
        return int(counted["count"]) if "count" in counted else len(counted["tokens"])
    except (httpx.HTTPError, ValueError, TypeError, KeyError):
        return None
