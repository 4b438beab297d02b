"""``bernini demo``: scenes are drawn, sent through every task of the shipped toy, and shown beside what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .contact_sheet import Panel, task_sheet
from .data.scene import FPS, Scene, Thing, draw
from .errors import UserError
from .media import Clip
from .media_write import write_image, write_media, write_video
from .pipeline import Bernini, Progress
from .request import Request
from .shipped import shipped

CAPTION = "the toy that comes with the package, on scenes that it has never seen"

SCENES: Mapping[str, Scene] = {
    "circle.mp4": Scene("olive", (Thing("circle", "red", "large", "right", (12.0, 20.0), 1.0),)),
    "square.png": Scene("gray", (Thing("square", "green", "large", "still", (20.0, 12.0)),)),
    "triangle.png": Scene("white", (Thing("triangle", "purple", "large", "still", (12.0, 20.0)),)),
}
"""What is drawn, by file; as in the world, a reference shows its thing where the video begins with it."""


@dataclass(frozen=True)
class Part:
    """One task of the demonstration: which of the drawn files it takes, by name."""

    task: str
    prompt: str
    videos: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    suffix: str = ".mp4"


PARTS = (
    Part("t2i", "a large blue circle on a white background", suffix=".png"),
    Part("t2v", "a large orange square moves right on a navy background"),
    Part("i2i", "recolor the square to yellow", images=("square.png",), suffix=".png"),
    Part("v2v", "change the background to white", videos=("circle.mp4",)),
    Part("r2v", "a video in which the object in the image moves right, black background", images=("triangle.png",)),
    Part("rv2v", "replace the circle with the one in the reference image", ("circle.mp4",), ("triangle.png",)),
)


def run(output: Path, *, steps: int | None = None, progress: Progress | None = None) -> dict[str, Path]:
    """Writes the drawn sources, every task's result and ``demo.png`` into ``output``.

    Args:
        steps: of sampling; by default the preset's.

    Returns:
        The results' paths by task, and the picture's as ``sheet``.

    Raises:
        UserError: the folder cannot be made, or no model is shipped.
    """
    checkpoint = shipped()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be made a folder ({error.strerror})") from None
    drawn = {name: torch.from_numpy(draw(scene)) for name, scene in SCENES.items()}
    for name, frames in drawn.items():
        if name.endswith(".mp4"):
            write_video(output / name, frames, FPS)
        else:
            write_image(output / name, frames[0])
    model = Bernini.from_pretrained(checkpoint)
    paths: dict[str, Path] = {}
    panels: list[Panel] = []
    for part in PARTS:

        def report(stage: str, done: int, total: int, task: str = part.task) -> None:
            if progress is not None and stage == "sampling":
                progress(task, done, total)

        request = Request(
            part.prompt,
            # As drawn: a file's compression is hard on pictures as small as these.
            videos=[Clip(drawn[name], FPS) for name in part.videos],
            images=[drawn[name][0] for name in part.images],
            task=part.task,
            steps=steps,
        )
        result = model.generate(request, report)
        paths[part.task] = output / f"{part.task}{part.suffix}"
        write_media(paths[part.task], result)
        sources = [(Path(name).stem, _shown(drawn[name], name)) for name in (*part.videos, *part.images)]
        panels.append(Panel(part.task, part.prompt, sources, result.frames))
    paths["sheet"] = output / "demo.png"
    task_sheet(panels, paths["sheet"], CAPTION)
    return paths


def _shown(frames: Tensor, name: str) -> Tensor:
    return frames if name.endswith(".mp4") else frames[0]
