"""Processes that measure together over gloo, one thread each: a benchmark's module runs itself once for every rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bernini.parallel.group import Group, Processes

from .harness import Watch, once

ROOT = Path(__file__).resolve().parents[1]


def ask(module: str, size: int = 2) -> tuple[Any, str | None]:
    """What the first rank of ``python -m MODULE`` found, and why it may not be judged.

    Raises:
        RuntimeError: a rank failed.
    """
    with tempfile.TemporaryDirectory() as folder, Watch() as watch:
        meeting, result = Path(folder, "meeting"), Path(folder, "result.json")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        command = [sys.executable, "-m", module]
        ranks = [
            subprocess.Popen([*command, str(rank), str(size), str(meeting), str(result)], cwd=ROOT, env=environment)
            for rank in range(size)
        ]
        try:
            while any(rank.poll() is None for rank in ranks) and not any(rank.returncode for rank in ranks):
                time.sleep(0.05)
        finally:
            for rank in ranks:
                rank.kill()  # the others wait for one that failed
                rank.wait()
        if any(rank.returncode for rank in ranks):
            raise RuntimeError(f"{module}: a rank failed; what it said is above")
        found = json.loads(result.read_text(encoding="utf-8"))
    return found, watch.unfit


def answer(work: Callable[[Group], Any], *, own_core: bool = False) -> None:
    """What each of these processes does, all its threads on a core of its own if asked for: the first writes down what
    its ``work`` found."""
    import torch
    import torch.distributed as dist

    rank, size, meeting, result = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    if own_core:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    found = work(Processes())
    if rank == 0:
        Path(result).write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def together(call: Callable[[], Any], to_the_end: bool = False) -> float:
    """Seconds of a call that all begin at the same time, and maybe end at the same time."""
    import torch.distributed as dist

    dist.barrier()
    return once(lambda: (call(), dist.barrier())) if to_the_end else once(call)
