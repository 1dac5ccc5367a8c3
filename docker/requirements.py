"""Prints what pgpark depends on, a requirement a line, from the pyproject.toml of the current folder: all that it
always needs, and the extras given (`gateway,yaml`). So the image has a layer of dependencies that outlives changes of
the code.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import tomllib


def requirements(extras: str) -> list[str]:
    """What to install for these extras, separated by commas. Raises SystemExit for one that there is not."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    found: list[str] = list(project["dependencies"])
    for extra in filter(None, re.split(r"[\s,]+", extras)):
        if extra not in optional:
            raise SystemExit(f"there is no extra {extra!r}; extras are {', '.join(sorted(optional))}")
        for requirement in optional[extra]:
            ours = re.fullmatch(rf"{project['name']}\[([\w,]+)\]", requirement)
            found += requirements(ours[1]) if ours else [requirement]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    sys.stdout.write("\n".join([*requirements(sys.argv[1] if len(sys.argv) > 1 else ""), ""]))
