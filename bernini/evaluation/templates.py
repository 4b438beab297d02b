"""What a thing of the synthetic world looks like: pictures of every shape in both sizes, and the one most like a thing.

Shapes: F frames, W = :data:`WINDOW` pixels. Coordinates as in :mod:`bernini.data.scene`: a pixel's centre lies at half
numbers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data import world
from ..data.scene import BACKGROUNDS, COLORS, RADII, SHAPES, SIZE, Scene, Thing, digits, draw

WINDOW = 29
"""Side of the square in which pictures are compared, with a pixel in its middle: the large box of 24 pixels, and 2 at
each side."""
LIKE = 0.7
"""A thing less alike than this to all pictures has no shape. Truths, blurred and noisy, are above 0.8."""

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Look:
    """The picture most like a thing.

    Args:
        shape, size: ``None`` where nothing is like it.
        digit: 0 to 9 where it is a digit.
        likeness: normalised correlation, at most 1.
    """

    shape: str | None
    size: str | None
    digit: int | None
    likeness: float


def centroids(ink: Array) -> NDArray[np.float64]:
    """``[F, 2]`` (x, y) of the middle of the ink of ``[F, 32, 32]``; not a number where there is none."""
    at = np.arange(SIZE) + 0.5
    mass = ink.sum((1, 2), dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack([ink.sum(1) @ at / mass, ink.sum(2) @ at / mass], 1)


def window(ink: Array, path: NDArray[np.float64]) -> Array:
    """``[W, W]``: ``[F, 32, 32]`` around its middle in each frame (between pixels in proportion), averaged over frames.

    Args:
        path: ``[F, 2]`` from :func:`centroids`; frames without a middle are left out.
    """
    there = np.isfinite(path).all(1)
    if not there.any():
        return np.zeros((WINDOW, WINDOW), np.float32)
    shifts = np.arange(WINDOW) - WINDOW // 2
    at = np.arange(SIZE) + 0.5
    # The weight of a pixel falls off in proportion to its distance, and is zero a pixel away: [2, F, W, 32].
    weights = np.maximum(1 - np.abs(path[there].T[:, :, None, None] + shifts[:, None] - at), 0).astype(np.float32)
    return np.matmul(np.matmul(weights[1], ink[there]), weights[0].transpose(0, 2, 1)).mean(0)


def recognise(ink: Array, path: NDArray[np.float64]) -> Look:
    """The shape and size that a thing's ink ``[F, 32, 32]`` is most like.

    Which digit it is says a classifier that learned from those for training: the held-out ones are not known here.
    """
    pictures, labels = _pictures()
    seen = normal(window(ink, path).reshape(1, -1))[0]
    alike = pictures @ seen
    best = int(alike.argmax())
    likeness = float(alike[best])
    if likeness < LIKE:
        return Look(None, None, None, likeness)
    shape, size, _ = labels[best]
    digit = int(_classifier().predict(seen[None])[0]) if shape == "digit" else None
    return Look(shape, size, digit, likeness)


def cover(thing: Thing, frames: int = 1) -> Array:
    """``[F, 32, 32]``: how much of each pixel a thing covers, from its drawing."""
    ground, color = BACKGROUNDS["black"], COLORS["yellow"]
    drawn = draw(Scene("black", (Thing(thing.shape, "yellow", thing.size, thing.motion, thing.start, thing.speed,
                                       thing.digit),)), frames)  # fmt: skip
    return ((drawn[..., 0].astype(np.float32) - ground[0]) / (color[0] - ground[0])).astype(np.float32)


@functools.cache
def _pictures() -> tuple[Array, tuple[tuple[str, str, int | None], ...]]:
    """``[N, W * W]`` normalised, and (shape, size, digit) of each."""
    rows, labels = [], []
    middle = (SIZE / 2, SIZE / 2)
    for size in RADII:
        for shape in SHAPES:
            for number in world.digit_numbers(False) if shape == "digit" else (None,):
                digit = None if number is None else int(number)
                ink = cover(Thing(shape, "yellow", size, "still", middle, 0.0, digit))
                rows.append(window(ink, centroids(ink)).reshape(-1))
                labels.append((shape, size, None if digit is None else int(digits()[1][digit])))
    return normal(np.stack(rows)), tuple(labels)


@functools.cache
def _classifier() -> Any:
    """Tells digits apart: a support vector machine on their pictures, sharp and blurred; takes a second."""
    from sklearn.svm import SVC

    pictures, labels = _pictures()
    rows = [row for row, (shape, _, _) in enumerate(labels) if shape == "digit"]
    sharp = pictures[rows].reshape(-1, WINDOW, WINDOW)
    blurred = normal(smoothed(sharp).reshape(len(rows), -1))
    return SVC(C=10, gamma=4).fit(np.concatenate([pictures[rows], blurred]), 2 * [labels[row][2] for row in rows])


def smoothed(values: Array) -> Array:
    """Weights 1 2 1 along the second and third axis, height and width; the borders are repeated."""
    for axis in (1, 2):
        padded = np.pad(values, [(1, 1) if a == axis else (0, 0) for a in range(values.ndim)], mode="edge")
        first, middle, last = (np.take(padded, np.arange(values.shape[axis]) + shift, axis) for shift in range(3))
        values = ((first + 2 * middle + last) / 4).astype(np.float32)
    return values


def normal(rows: Array) -> Array:
    """Without their mean and of length one; zero where there is nothing."""
    rows = rows - rows.mean(1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
