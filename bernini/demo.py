"""``bernini demo``: small media are drawn, sent through every task of the renderer, and shown beside what came out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .contact_sheet import Panel, task_sheet
from .errors import UserError
from .media import Clip
from .media_write import write_image, write_media, write_video
from .pipeline import Bernini, Progress
from .request import Request
from .toy import write_toy

CAPTION = "random weights: the path runs, the picture means nothing"
HEIGHT, WIDTH, FRAMES = 64, 96, 9


@dataclass(frozen=True)
class Part:
    """One task of the demonstration: which of the drawn files it takes, by name."""

    task: str
    prompt: str
    videos: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    suffix: str = ".mp4"


PARTS = (
    Part("t2i", "a red ball on a green field", suffix=".png"),
    Part("t2v", "a red ball bounces over a green field"),
    Part("i2i", "turn the house blue", images=("house.png",), suffix=".png"),
    Part("v2v", "turn the ball into a blue cube", videos=("ball.mp4",)),
    Part("r2v", "the kite from image0 flies over the house from image1", images=("kite.png", "house.png")),
    Part("rv2v", "replace the ball with the kite from the image", videos=("ball.mp4",), images=("kite.png",)),
)


def run(output: Path, *, steps: int = 3, progress: Progress | None = None) -> dict[str, Path]:
    """Writes the sources, every task's result and ``demo.png`` into ``output``; makes a toy checkpoint there if needed.

    Returns:
        The results' paths by task, and the picture's as ``sheet``.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be made a folder ({error.strerror})") from None
    checkpoint = output / "toy-checkpoint"
    if not (checkpoint / "config.json").is_file():
        write_toy(checkpoint)
    drawn = _write_sources(output)
    model = Bernini.from_pretrained(checkpoint)
    paths: dict[str, Path] = {}
    panels: list[Panel] = []
    for part in PARTS:

        def report(stage: str, done: int, total: int, task: str = part.task) -> None:
            if progress is not None and stage == "sampling":
                progress(task, done, total)

        request = Request(
            part.prompt,
            videos=[output / name for name in part.videos],
            images=[output / name for name in part.images],
            task=part.task,
            steps=steps,
            size=(HEIGHT, WIDTH),
            max_size=max(HEIGHT, WIDTH),
            num_frames=FRAMES,
        )
        result = model.generate(request, report)
        paths[part.task] = output / f"{part.task}{part.suffix}"
        write_media(paths[part.task], result)
        sources = [(Path(name).stem, drawn[name]) for name in (*part.videos, *part.images)]
        panels.append(Panel(part.task, part.prompt, sources, result.frames))
    paths["sheet"] = output / "demo.png"
    task_sheet(panels, paths["sheet"], CAPTION)
    return paths


# --- what is drawn ----------------------------------------------------------------------------------------------------


def _write_sources(folder: Path) -> dict[str, Tensor]:
    """Writes the drawn files; their pixels by name."""
    clip = draw_clip(FRAMES, 2 * HEIGHT, 2 * WIDTH)
    drawn = {"ball.mp4": clip.frames, "house.png": draw_house(), "kite.png": draw_kite()}
    write_video(folder / "ball.mp4", clip.frames, clip.fps)
    for name in ("house.png", "kite.png"):
        write_image(folder / name, drawn[name])
    return drawn


def draw_clip(frames: int = 17, height: int = 96, width: int = 160, fps: float = 16) -> Clip:
    """A red ball that bounces over a green field under a blue sky; uint8 ``[F, H, W, 3]``."""
    pictures = []
    for number in range(frames):
        image, draw = _field(height, width)
        radius = height * 0.14
        x = width * (0.12 + 0.76 * number / max(frames - 1, 1))
        y = height * (0.7 - 0.4 * abs(np.sin(2.5 * np.pi * number / max(frames - 1, 1)))) - radius
        draw.ellipse([_FINE * v for v in (x - radius, y - radius, x + radius, y + radius)], fill=(205, 50, 45))
        pictures.append(_pixels(image))
    return Clip(torch.stack(pictures), fps)


def draw_house(height: int = 2 * HEIGHT, width: int = 2 * WIDTH) -> Tensor:
    """A yellow house with a red roof on the same field; uint8 ``[H, W, 3]``."""
    image, draw = _field(height, width)
    unit = height * _FINE / 10
    left, right, top, floor = 4.5 * unit, 10.5 * unit, 4.2 * unit, 8.2 * unit
    draw.rectangle((left, top, right, floor), fill=(236, 200, 110))
    draw.polygon(((left - unit, top), ((left + right) / 2, 1.4 * unit), (right + unit, top)), fill=(170, 62, 52))
    draw.rectangle((left + 2.3 * unit, floor - 2.4 * unit, left + 3.7 * unit, floor), fill=(110, 74, 48))
    for window in (left + 0.6 * unit, right - 1.9 * unit):
        draw.rectangle((window, top + 0.9 * unit, window + 1.3 * unit, top + 2.2 * unit), fill=(210, 232, 245))
    return _pixels(image)


def draw_kite(height: int = 2 * HEIGHT, width: int = 2 * WIDTH) -> Tensor:
    """A violet kite with a tail before a plain background, as a picture of a subject is; uint8 ``[H, W, 3]``."""
    image = Image.new("RGB", (width * _FINE, height * _FINE), (246, 243, 236))
    draw, unit, x = ImageDraw.Draw(image), height * _FINE / 10, width * _FINE / 2
    top, right, bottom, left = (x, unit), (x + 2.3 * unit, 3.9 * unit), (x, 7.4 * unit), (x - 2.3 * unit, 3.9 * unit)
    draw.polygon((top, right, bottom, left), fill=(126, 87, 194))
    draw.polygon((top, right, (x, 3.9 * unit)), fill=(171, 133, 227))
    draw.polygon((bottom, left, (x, 3.9 * unit)), fill=(96, 62, 160))
    tail = [(x + np.sin(step / 3) * unit * 0.5, 7.4 * unit + step * unit * 0.12) for step in range(19)]
    draw.line(tail, fill=(214, 120, 60), width=max(1, round(unit / 5)))
    return _pixels(image)


_FINE = 4  # drawn so much larger and shrunk, for smooth edges


def _field(height: int, width: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width * _FINE, height * _FINE), (120, 180, 235))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, height * 0.7 * _FINE, width * _FINE, height * _FINE), fill=(90, 150, 80))
    return image, draw


def _pixels(image: Image.Image) -> Tensor:
    small = image.resize((image.width // _FINE, image.height // _FINE), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small))
