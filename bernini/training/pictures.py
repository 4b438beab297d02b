"""What a stage can do by now, as pictures: the first example of each task through the whole system."""

from __future__ import annotations

from pathlib import Path

import torch

from ..contact_sheet import Panel, task_sheet
from ..data.world import sample
from ..evaluation.suite import request_of
from ..pipeline import Bernini

SEED = 0
"""Of the world's test samples that are shown."""


def write_samples(model: Path, folder: Path, step: int, *, steps: int | None = None) -> None:
    """Held-out samples of the synthetic world, made with the checkpoint ``model``: ``STEP.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    panels, bernini = [], Bernini.from_pretrained(model)
    for task in ("t2i", "t2v", "i2i", "v2v", "r2v", "rv2v"):
        shown = sample(task, SEED, "test")
        result = bernini.generate(request_of(shown, steps=steps, seed=SEED))
        sources = [(f"source {n}", torch.from_numpy(video)) for n, video in enumerate(shown.videos)]
        sources += [(f"image {n}", torch.from_numpy(image)) for n, image in enumerate(shown.images)]
        panels.append(Panel(task, shown.prompt, sources, result.frames))
    task_sheet(panels, folder / f"{step:08d}.png", f"after {step} steps")
