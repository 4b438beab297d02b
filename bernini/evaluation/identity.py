"""Which handwritten digit a clip shows: the held-out digit images are the gallery, the most similar one is the answer.

A thing is cropped by its box and pooled to 8 x 8 by area; the gallery is drawn and cropped in the same way, and
normalised correlation compares. Shapes: F frames, G images of the gallery.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..data import world
from ..data.scene import RADII, SIZE, Frames, Thing
from .measure import background
from .templates import Array, cover, normal

SIDE = 8
"""Of a digit's image in scikit-learn's set."""
INNER = 8 / 9
"""Share of the box in which the image lies: it is drawn with an empty rim of half a pixel of its own at each side."""

PHASES = ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5))
"""Where between pixels the gallery is drawn: a small digit's pixels are as large as the picture's, so it matters."""


@dataclass(frozen=True)
class Match:
    """The gallery's image that is most like what was seen, by its number in scikit-learn's digits."""

    number: int
    correlation: float


def identify(frames: Frames, thing: Thing) -> Match:
    """Reads the digit in the box that the specification names, uint8 ``[F, 32, 32, 3]``; all frames count alike.

    What in the box differs from the background is taken as ink, whatever its color.
    """
    ground = background(frames)
    excess = frames.astype(np.float32) - ground
    places = np.array([thing.place(frame) for frame in range(len(frames))])
    inside = np.zeros(frames.shape[:3], bool)
    for frame in range(len(frames)):
        left, top, right, bottom = thing.box(frame)
        inside[frame, top:bottom, left:right] = True
    strongest = np.linalg.norm(excess[inside], axis=-1)
    axis = (excess[inside] * strongest[:, None]).sum(0)  # strong pixels decide what the ink's color is
    ink = (excess @ (axis / max(float(np.linalg.norm(axis)), 1e-6))).astype(np.float32)
    return _best(_pooled(ink, places, thing.radius), _gallery(thing.size))


def _best(seen: Array, gallery: Array) -> Match:
    alike = gallery @ normal(seen.reshape(1, -1))[0]
    best = int(alike.argmax())
    if alike[best] <= 0:  # nothing is there
        return Match(-1, 0.0)
    return Match(int(world.digit_numbers(True)[best // len(PHASES)]), float(alike[best]))


@functools.cache
def _gallery(size: str) -> Array:
    """``[4 * G, 64]``: every held-out digit at :data:`PHASES`, cropped by its box."""
    rows = []
    for number in world.digit_numbers(True):
        for x, y in PHASES:
            middle = (SIZE / 2 + x, SIZE / 2 + y)
            ink = cover(Thing("digit", "yellow", size, "still", middle, 0.0, int(number)))
            rows.append(_pooled(ink, np.array([middle]), RADII[size]).reshape(-1))
    return normal(np.stack(rows))


def _pooled(ink: Array, places: NDArray[np.float64], radius: float) -> Array:
    """``[8, 8]``: the image's part of a box about (x, y) in each frame, pooled by area, averaged over frames."""
    edges = np.linspace(-radius * INNER, radius * INNER, SIDE + 1)
    low, high = places[..., None] + edges[:-1], places[..., None] + edges[1:]  # [F, 2, 8]
    pixels = np.arange(SIZE)
    shares = np.clip(np.minimum(high[..., None], pixels + 1) - np.maximum(low[..., None], pixels), 0, None)
    weights = (shares / (edges[1] - edges[0])).astype(np.float32)  # [F, 2, 8, 32]
    return np.matmul(np.matmul(weights[:, 1], ink), weights[:, 0].transpose(0, 2, 1)).mean(0)
