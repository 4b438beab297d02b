"""A case in a process of its own, and its memory, watched from here.

The process has the C library's own malloc settings, since those of the benchmarks keep what is freed. It is told to
call ``child(*arguments)`` of a module of this package, and says by a line on its standard output that it has got
somewhere.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

INTERVAL = 0.010  # seconds between two looks
MALLOC = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
ROOT = Path(__file__).resolve().parents[1]
# The root goes to the end of the path and off it again: our folder `kernels` must not shadow the package of that name.
_CHILD = """
import sys
sys.path.append({root!r})
from {module} import child
sys.path.remove({root!r})
child(*sys.argv[1:])
"""


def start(module: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Starts ``child`` of a module; ``options`` are :class:`subprocess.Popen`'s, and its output is a pipe."""
    environment = {name: value for name, value in os.environ.items() if name not in MALLOC}
    code = _CHILD.format(root=str(ROOT), module=module)
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **options)


def resident(pid: int) -> tuple[int, int]:
    """Bytes in memory: (anonymous and shared, of files)."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    anonymous, shared, files = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem", "RssFile"))
    return anonymous + shared, files


def peak(process: subprocess.Popen[str]) -> tuple[int, int]:
    """The most that :func:`resident` sees until the process says something or is gone."""
    assert process.stdout is not None
    most, done = (0, 0), False
    while not done:
        done = bool(select.select([process.stdout], [], [], INTERVAL)[0])
        try:
            now = resident(process.pid)
        except (OSError, KeyError):  # it is gone
            break
        most = (max(most[0], now[0]), max(most[1], now[1]))
    return most
