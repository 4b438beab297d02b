"""Draws the losses of the toy's runs into ``docs/toy-curves.png``: ``python docs/toy_curves.py [runs/toy]``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

RUNS = {
    "vae": ("loss",), "understanding": ("text",), "pictures": ("dit",), "renderer": ("dit",),
    "planner": ("visual", "text"), "joint": ("dit", "visual", "text"),
}  # fmt: skip
"""Losses that are drawn, by run."""


def main(folder: Path) -> None:
    figure, axes = plt.subplots(1, len(RUNS), figsize=(3 * len(RUNS), 2.6), layout="constrained")
    for axis, (name, losses) in zip(axes, RUNS.items(), strict=True):
        lines = [json.loads(line) for line in (folder / name / "log.jsonl").read_text("utf-8").splitlines()]
        seconds = sum(line["seconds"] for line in lines)
        for loss in losses:
            points = [(line["step"], line[loss]) for line in lines if loss in line]
            steps, values = (np.array(column) for column in zip(*points, strict=True))
            width = max(1, len(values) // 60)
            smooth = np.convolve(values, np.ones(width) / width, "valid")
            axis.plot(steps[width - 1 :], smooth, label=loss, linewidth=1)
        axis.set_title(f"{name}, {seconds / 60:.0f} min", fontsize=9)
        axis.set_yscale("log")
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7)
    figure.savefig(Path(__file__).with_name("toy-curves.png"), dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/toy"))
