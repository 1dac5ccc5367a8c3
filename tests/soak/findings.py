"""What the checks found: how often each kind of violation, with a few examples."""

from __future__ import annotations

from collections import Counter, defaultdict

EXAMPLES = 3


class Findings:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, example: object) -> None:
        self.counts[kind] += 1
        if len(self.examples[kind]) < EXAMPLES:
            self.examples[kind].append(str(example))

    def __str__(self) -> str:
        lines = []
        for kind, count in self.counts.most_common():
            lines += [f"{count:8} {kind}", *(f"           {example}" for example in self.examples[kind])]
        return "\n".join(lines)
