"""Runs a recipe in children that are killed with SIGKILL, again and again, until it is done.

Called as ``python killed.py MODEL FEATURES OUTPUT STAGE KILLS``. The children are forked from a process that has
imported everything and computed nothing, so that each starts at once.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path


def main() -> None:
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    import small

    from bernini.training.stages import make_stage
    from bernini.training.trainer import LOG, Trainer

    model, features, output = (Path(argument) for argument in sys.argv[1:4])
    stage, kills = sys.argv[4], int(sys.argv[5])
    recipe = replace(small.recipe(stage, model, output, features), steps=14)

    def child() -> int:
        pid = os.fork()
        if pid == 0:
            try:
                Trainer(recipe, make_stage(recipe)).train()
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
        return pid

    def steps() -> int:
        file = output / LOG
        return len(file.read_text().splitlines()) if file.is_file() else 0

    dice, killed, at = random.Random(0), 0, []
    while killed < kills:
        pid, goal = child(), steps() + dice.randint(1, 2)
        while steps() < min(goal, 13):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                sys.exit(f"a child ended early with {status}")
            time.sleep(0.002)
        time.sleep(dice.random() * 0.03)  # anywhere in a step, or while a checkpoint is written
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        killed += 1
        at.append(steps())
    _, status = os.waitpid(child(), 0)
    print(json.dumps({"killed at": at, "status": status}))


if __name__ == "__main__":
    main()
