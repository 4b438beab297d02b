"""A clip and a picture with something on them, of any size, for tests that need media.

Not a test; `import drawings` finds it (`pythonpath` in pyproject.toml).
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from bernini.media import Clip


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


def draw_house(height: int = 128, width: int = 192) -> Tensor:
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


_FINE = 4  # drawn so much larger and shrunk, for smooth edges


def _field(height: int, width: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width * _FINE, height * _FINE), (120, 180, 235))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, height * 0.7 * _FINE, width * _FINE, height * _FINE), fill=(90, 150, 80))
    return image, draw


def _pixels(image: Image.Image) -> Tensor:
    small = image.resize((image.width // _FINE, image.height // _FINE), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small))
