"""Installs what the compared systems need, at the pinned versions: into bench/peers/.venv and bench/peers/node_modules.

Run: python bench/peers/install.py. Systems that are not installed are left out of a bench, with a line that says so.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    environment = HERE / ".venv"
    venv.create(environment, with_pip=True)
    python = str(environment / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "-r", str(HERE / "requirements.txt")]
    subprocess.run(pip, check=True)
    if npm := shutil.which("npm"):
        subprocess.run([npm, "ci", "--no-fund", "--no-audit"], cwd=HERE, check=True)
    else:
        sys.exit("no npm: the systems for Node (graphile-worker, pg-boss) are left out; install Node 20 or newer")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.cmd[0]} failed; what it said is above")
