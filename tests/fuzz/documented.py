"""What docs/errors.md promises: the only SQLSTATEs and exit codes that may come back."""

from __future__ import annotations

import re
from pathlib import Path

_TABLES = (Path(__file__).parents[2] / "docs" / "errors.md").read_text(encoding="utf-8")

SQLSTATES = frozenset(re.findall(r"^\| `([0-9A-Z]{5})` \|", _TABLES, re.MULTILINE))
EXIT_CODES = frozenset(int(code) for code in re.findall(r"^\| ([0-9]{1,3}) \|", _TABLES, re.MULTILINE))
