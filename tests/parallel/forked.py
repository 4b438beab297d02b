"""Processes that meet by gloo, forked from one that has imported everything."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bernini.parallel.group import Group, Processes

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, size: int, work: Callable[[Group], Any]) -> None:
    """Ends this process; each rank, on one thread, has saved what ``work`` returned to ``RANK.pt`` of the folder."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
                torch.save(work(Processes()), folder / f"{rank}.pt")
                dist.barrier()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    sys.exit(1 if any(codes) else 0)


def found(module: str, folder: Path, size: int) -> list[Any]:
    """What each rank saved, of ``python -m MODULE FOLDER``, which calls :func:`run`."""
    command = [sys.executable, "-m", module, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]
