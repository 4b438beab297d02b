"""Runs mypy over the source folders as they are imported.

mypy takes package names from folders, so it is shown a tree of links in which ``kernels``, ``parallel`` and
``offload`` stand inside ``bernini``; the paths it prints are turned back into those of the repository.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build/typecheck"  # always the same place, since mypy's cache remembers paths
ROOMS = ("kernels", "parallel", "offload")


def link_tree() -> None:
    """Links every entry of bernini/ and the rooms into ``TREE/bernini``, and drops links of files that went."""
    package = TREE / "bernini"
    package.mkdir(parents=True, exist_ok=True)
    wanted = {path.name: path for path in (ROOT / "bernini").iterdir() if path.name != "__pycache__"}
    wanted |= {room: ROOT / room for room in ROOMS}
    for link in package.iterdir():
        if link.name not in wanted:
            link.unlink()
    for name, path in wanted.items():
        if not (package / name).is_symlink():
            (package / name).symlink_to(os.path.relpath(path, package))


def main() -> int:
    link_tree()
    settings = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache"]
    command = [sys.executable, "-m", "mypy", *settings, "bernini"]
    run = subprocess.run(command, cwd=TREE, stdout=subprocess.PIPE, text=True, check=False)
    print(re.sub(rf"^bernini/({'|'.join(ROOMS)})/", r"\1/", run.stdout, flags=re.MULTILINE), end="")
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
