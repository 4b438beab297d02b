"""What a stage can do by now, as pictures: the first example of each task through the whole system."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from ..contact_sheet import Panel, task_sheet
from ..data.world import sample
from ..geometry import Geometry
from ..media import Clip
from ..pipeline import Bernini
from ..presets import TASKS
from ..request import Request

SEED = 0
"""Of the world's test samples that are shown."""


class Exports(Protocol):
    geometry: Geometry

    def export(self, folder: Path) -> None: ...


def write_samples(stage: Exports, folder: Path, step: int, *, steps: int | None = None) -> None:
    """Held-out samples of the synthetic world, made with the present weights: ``STEP.png``.

    The present weights are written to a temporary folder and loaded as anyone would load them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    panels = []
    with tempfile.TemporaryDirectory() as work:
        stage.export(Path(work) / "model")
        model = Bernini.from_pretrained(Path(work) / "model")
        for task in ("t2i", "t2v", "i2i", "v2v", "r2v", "rv2v"):
            shown = sample(task, SEED, "test")
            videos = [Clip(torch.from_numpy(video.copy()), stage.geometry.fps) for video in shown.videos]
            images = [torch.from_numpy(image.copy()) for image in shown.images]
            request = Request(shown.prompt, videos=videos, images=images, task=task, seed=SEED, steps=steps)
            assert task in TASKS
            result = model.generate(request)
            sources = [(f"source {n}", clip.frames) for n, clip in enumerate(videos)]
            sources += [(f"image {n}", image) for n, image in enumerate(images)]
            panels.append(Panel(task, shown.prompt, sources, result.frames))
    task_sheet(panels, folder / f"{step:08d}.png", f"after {step} steps")


def losses_line(losses: Mapping[str, float]) -> str:
    """For people."""
    return "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
