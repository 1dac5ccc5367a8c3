"""Which passages answer a question. Knows nothing of pgpark, nor of the model: only vectors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import mul

from handler import Embedded, Passage

_SAME = 0.9  # two passages that are more alike than this say the same


@dataclass
class Hit:
    """A passage of the file `name`. `score`: cosine of the angle to the question, 1 at best. `also_in`: other files
    that say the same."""

    name: str
    passage: Passage
    score: float
    also_in: list[str] = field(default_factory=list)


def best(question: Embedded, files: Iterable[Embedded], count: int) -> list[Hit]:
    """The `count` passages nearest to the question, best first; what several files say is told once."""
    asked = question.passages[0]
    found = [Hit(file.name, passage, likeness(asked, passage)) for file in files for passage in file.passages]
    hits: list[Hit] = []
    for hit in sorted(found, key=lambda hit: -hit.score):
        first = next((h for h in hits if likeness(h.passage, hit.passage) > _SAME), None)
        if first is not None:
            if hit.name not in (first.name, *first.also_in):
                first.also_in.append(hit.name)
        elif len(hits) < count:
            hits.append(hit)
    return hits


def likeness(one: Passage, other: Passage) -> float:
    """The cosine of the angle between two vectors, which is their product where both have the length 1."""
    return math.fsum(map(mul, one.vector, other.vector))
