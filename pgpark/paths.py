"""Files and folders as people name them."""

from __future__ import annotations

from pathlib import Path

from pgpark.errors import BadInputError


def expanded(path: str | Path) -> Path:
    """A path with its ~ or ~user filled in. Raises BadInputError where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise BadInputError(
            f"{path}: there is no home folder of that name; write ./~ for a folder called so"
        ) from error
