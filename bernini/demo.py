"""``bernini demo``: a clip is drawn, written, sent through the whole renderer, and shown beside what came out."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw

from .contact_sheet import contact_sheet
from .media import Clip, read_video, write_video
from .pipeline import Bernini, Progress
from .toy import write_toy

CAPTION = "random weights: the path runs, the picture means nothing"
PROMPT = "turn the ball into a blue cube"


def draw_clip(frames: int = 17, height: int = 96, width: int = 160, fps: float = 16) -> Clip:
    """A red ball that bounces over a green field under a blue sky; uint8 ``[F, H, W, 3]``."""
    import numpy as np

    pictures = []
    for number in range(frames):
        image = Image.new("RGB", (width, height), (120, 180, 235))
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, height * 0.7, width, height), fill=(90, 150, 80))
        radius = height * 0.14
        x = width * (0.12 + 0.76 * number / max(frames - 1, 1))
        y = height * (0.7 - 0.4 * abs(np.sin(2.5 * np.pi * number / max(frames - 1, 1)))) - radius
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(205, 50, 45))
        pictures.append(np.asarray(image))
    return Clip(torch.from_numpy(np.stack(pictures)), fps)


def run(output: Path, *, steps: int = 6, progress: Progress | None = None) -> dict[str, Path]:
    """Writes ``source.mp4``, ``v2v.mp4`` and ``demo.png`` into ``output``; makes the toy checkpoint there if needed."""
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = output / "toy-checkpoint"
    if not (checkpoint / "config.json").is_file():
        write_toy(checkpoint)
    paths = {"source": output / "source.mp4", "result": output / "v2v.mp4", "sheet": output / "demo.png"}
    clip = draw_clip()
    write_video(paths["source"], clip.frames, clip.fps)
    model = Bernini.from_pretrained(checkpoint)
    result = model(PROMPT, videos=[paths["source"]], steps=steps, num_frames=len(clip.frames), progress=progress)
    write_video(paths["result"], result.frames, result.fps)
    source = read_video(paths["source"], num_frames=len(result.frames))
    contact_sheet([("source", source.frames), (f"v2v: {PROMPT}", result.frames)], paths["sheet"], CAPTION)
    return paths
