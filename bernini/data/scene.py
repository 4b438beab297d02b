"""Scenes of the synthetic world: a thing or two on a plain background, and how they are drawn.

A scene is a specification; :func:`draw` is a pure function of it, so whatever a picture shows is known exactly. Lengths
are in pixels, x to the right and y downwards, and a pixel's centre lies at half numbers. Shapes: F frames.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE, FRAMES, FPS = 32, 9, 8
"""Height and width, frames of a video, frames per second."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "orange": (245, 140, 20),
    "yellow": (240, 225, 40),
    "green": (40, 180, 60),
    "cyan": (40, 210, 220),
    "blue": (45, 80, 235),
    "purple": (130, 40, 180),
    "pink": (250, 130, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (10, 10, 10),
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "brown": (105, 65, 35),
    "navy": (15, 20, 80),
    "olive": (95, 105, 45),
}
SHAPES = ("square", "circle", "triangle", "cross", "ring", "digit")
RADII: dict[str, float] = {"small": 8.0, "large": 12.0}
"""Half the side of a thing's box."""
GRID = 8
"""The edges of things begin at multiples of so many pixels: whole tokens of the toy's renderer."""
SPEEDS = (1.0, 2.0)
"""Pixels per frame. The faster are on the grid again after 4 frames, which are one latent, the others after 8."""
MOTIONS: dict[str, tuple[int, int]] = {
    "still": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "diagonally up": (1, -1),
    "diagonally down": (1, 1),
}
"""Steps along x and y; both diagonals lead to the right."""

FINE = 4
"""Points per pixel and axis that are drawn and averaged."""

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Thing:
    """An object.

    Args:
        start: (x, y) of its middle in the first frame.
        speed: pixels per frame along each axis that its motion names.
        digit: number of the picture in scikit-learn's digits; of the shape ``"digit"`` only.
    """

    shape: str
    color: str
    size: str
    motion: str
    start: tuple[float, float]
    speed: float = 0.0
    digit: int | None = None

    @property
    def radius(self) -> float:
        return RADII[self.size]

    def place(self, frame: int) -> tuple[float, float]:
        """(x, y) of the middle in a frame."""
        (x, y), (dx, dy) = self.start, MOTIONS[self.motion]
        return x + frame * self.speed * dx, y + frame * self.speed * dy

    def box(self, frame: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of all pixels that the thing touches in a frame; right and bottom are behind."""
        (x, y), r = self.place(frame), self.radius
        left, top, right, bottom = np.floor(x - r), np.floor(y - r), np.ceil(x + r), np.ceil(y + r)
        return max(int(left), 0), max(int(top), 0), min(int(right), SIZE), min(int(bottom), SIZE)


@dataclass(frozen=True)
class Scene:
    """Things in the order in which they are drawn, the one that is spoken of last; none for an empty scene."""

    background: str
    things: tuple[Thing, ...] = ()

    @property
    def main(self) -> Thing:
        return self.things[-1]


@functools.cache
def digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """scikit-learn's handwritten digits: ``[1797, 8, 8]`` from 0 to 1, and what they show.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 16).astype(np.float32), data.target.astype(np.int64)


def draw(scene: Scene, frames: int = FRAMES) -> Frames:
    """``[F, 32, 32, 3]`` RGB."""
    points = (np.arange(SIZE * FINE) + 0.5) / FINE
    pictures = np.empty((frames, SIZE, SIZE, 3), np.uint8)
    for frame in range(frames):
        picture = np.broadcast_to(np.array(BACKGROUNDS[scene.background], np.float64), (SIZE, SIZE, 3)).copy()
        for thing in scene.things:
            cover = _cover(thing, frame, points)[..., None]
            picture += cover * (np.array(COLORS[thing.color]) - picture)
        pictures[frame] = np.rint(picture)
    return pictures


def _cover(thing: Thing, frame: int, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[32, 32]``: how much of each pixel the thing covers."""
    x, y = thing.place(frame)
    across, down = (points - x)[None, :] / thing.radius, (points - y)[:, None] / thing.radius
    if thing.shape == "digit":
        fine = _digit(thing.digit, across, down)
    else:
        fine = _inside(thing.shape, across, down).astype(np.float64)
    return fine.reshape(SIZE, FINE, SIZE, FINE).mean((1, 3))


def _inside(shape: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether points belong to a shape whose box runs from -1 to 1."""
    if shape == "square":
        return (np.abs(x) <= 0.9) & (np.abs(y) <= 0.9)
    if shape == "circle":
        return x * x + y * y <= 1
    if shape == "ring":
        return (x * x + y * y <= 1) & (x * x + y * y >= 0.3)
    if shape == "triangle":
        return (y <= 0.9) & (np.abs(x) <= (y + 1) / 1.9)
    if shape == "cross":
        return (np.abs(x) <= 1) & (np.abs(y) <= 1) & ((np.abs(x) <= 0.35) | (np.abs(y) <= 0.35))
    raise ValueError(f"unknown shape {shape!r}; there are {', '.join(SHAPES)}")


def _digit(number: int | None, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """The digit's own picture with an empty rim over the box, between its pixels in proportion; nothing outside."""
    if number is None:
        raise ValueError("a digit needs the number of its picture")
    ink = np.pad(digits()[0][number].astype(np.float64), 1)
    column, row = (x[0] + 1) * 4.5, (y[:, 0] + 1) * 4.5  # from 0 to 9, rim to rim
    return _between(_between(ink, row).T, column).T


def _between(values: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of ``values`` at fractional places; the first and last are zero, and so is all beyond."""
    at = np.clip(at, 0, len(values) - 1)
    low = np.minimum(at.astype(np.int64), len(values) - 2)
    share = (at - low)[:, None]
    return (1 - share) * values[low] + share * values[low + 1]
