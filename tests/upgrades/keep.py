"""`python -m tests.upgrades.keep [FOLDER]` keeps the release in a folder (this one) for the tests of upgrades.

Run it before the next migration is added. The file is named after the newest migration, and is the same whoever makes
it: sorted names, one time, and only what runs.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

RELEASES = Path(__file__).parent / "releases"
ROOT = Path(__file__).parents[2]
_TIME = (2026, 1, 1, 0, 0, 0)
_KINDS = {".py", ".sql", ".json"}


def newest(root: Path = ROOT) -> str:
    """The number of the newest migration of a source tree."""
    return max(path.name for path in (root / "sql" / "migrations").glob("*.sql"))[:4]


def keep(root: Path, folder: Path) -> Path:
    """Packs what a release needs to run; returns the file."""
    file = folder / f"{newest(root)}.zip"
    paths = [path for part in ("pgpark", "sql") for path in (root / part).rglob("*") if path.suffix in _KINDS]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in sorted(paths):
            entry = zipfile.ZipInfo(path.relative_to(root).as_posix(), _TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes())
    return file


if __name__ == "__main__":
    kept = keep(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT, RELEASES)
    sys.stdout.write(f"{kept.relative_to(ROOT)}: {kept.stat().st_size} bytes\n")
