"""From the chunks of a streamed answer to the whole of it, as the server would have sent it without `stream`: what
waits in the mailbox for a client that left. Knows nothing of pgpark."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_GIVEN_ONCE = {"role", "id", "type", "name"}
_NAMES = {"chat.completion.chunk": "chat.completion"}


def whole(chunks: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One object of chunks in their order: of each choice the texts joined, tool calls and log probabilities too."""
    answer: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        answer.update({key: value for key, value in chunk.items() if key != "choices" and value is not None})
        for piece in chunk.get("choices") or ():
            choice = choices.setdefault(piece.get("index", 0), {"index": piece.get("index", 0)})
            for key, value in piece.items():
                if key in ("delta", "logprobs") and isinstance(value, dict):
                    _join(choice.setdefault("message" if key == "delta" else key, {}), value)
                elif key == "text":
                    choice["text"] = choice.get("text", "") + (value or "")
                elif value is not None or key not in choice:
                    choice[key] = value
    answer["object"] = _NAMES.get(answer.get("object", ""), answer.get("object", "chat.completion"))
    answer["choices"] = [choices[index] for index in sorted(choices)]
    return answer


def _join(target: dict[str, Any], delta: dict[str, Any]) -> None:
    """Adds a delta: texts and lists are appended, but for names; elements with an `index` (tool calls) are joined."""
    for key, value in delta.items():
        have = target.get(key)
        if isinstance(value, list) and all(isinstance(item, dict) and "index" in item for item in value):
            items = target.setdefault(key, [])
            for item in value:
                while len(items) <= item["index"]:
                    items.append({})
                _join(items[item["index"]], {name: part for name, part in item.items() if name != "index"})
        elif isinstance(have, str) and isinstance(value, str) and key not in _GIVEN_ONCE:
            target[key] = have + value
        elif isinstance(have, list) and isinstance(value, list):
            target[key] = [*have, *value]
        elif isinstance(have, dict) and isinstance(value, dict):
            _join(have, value)
        elif value is not None or key not in target:
            target[key] = value
