"""What a clip of the synthetic world shows, from its pixels alone: background, things, their looks and motions.

Nothing here knows what was asked for. A pixel is explained as background with some amount of a thing's color on it, so
soft edges, blur and thin strokes keep their color; things are connected in space and time. Shapes: F frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..data.scene import BACKGROUNDS, COLORS, MOTIONS, Frames
from .templates import Array, Look, centroids, recognise, smoothed

Mask = NDArray[np.bool_]

FAINT = 25.0
"""Distance in RGB (0 to 255 each) within which a pixel is background; noise of sigma 10 stays below it once smoothed.
The least contrast in the world is 94, green on olive."""
NEAR = 60.0
"""Distance within which a pixel may be of a named background; of two such, as of brown and olive, either does. No
thing's color is nearer than 94 to one."""
ODD = 30.0
"""Distance within which a color explains a pixel."""
SOLID = 0.33
"""Amount of a thing's color from which on a pixel surely belongs to it."""
LEAST = 4
"""Pixels per frame, on average, below which something is a speck and no thing."""
PLAIN = 0.3
"""Share of pixels that a plain background has at least; the largest thing of the world leaves 44 %."""
STILL = 0.15
"""Speed in pixels per frame below which a thing stands. The slowest in the world have 0.3."""


@dataclass(frozen=True)
class Found:
    """A thing that was found.

    Args:
        color: nearest name; ``None`` where none is near.
        look: shape, size and digit.
        motion: one of :data:`bernini.data.scene.MOTIONS`; ``None`` for other directions.
        path: ``[F, 2]`` (x, y) of its middle, not a number in frames without it.
        ink: ``[F, 32, 32]``: its amount in each pixel, about 0 to 1.
    """

    color: str | None
    look: Look
    motion: str | None
    path: NDArray[np.float64]
    ink: Array


@dataclass(frozen=True)
class View:
    """What a clip shows; things from the largest to the smallest. ``background`` is ``None`` where there is no plain
    one."""

    background: str | None
    things: tuple[Found, ...]


def view(frames: Frames) -> View:
    """Looks at a clip, uint8 ``[F, H, W, 3]``.

    Raises:
        ValueError: another shape or dtype.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"view: frames must be uint8 [F, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    ground = background(frames)
    excess = frames.astype(np.float32) - ground
    smooth = smoothed(excess)
    plain = float((np.linalg.norm(smooth, axis=-1) < FAINT).mean()) > PLAIN
    found = [_found(excess, ground, color, support) for color, support in _segments(smooth, ground)]
    things = [thing for thing in found if np.isfinite(thing.path).any()]  # where two touch is a sliver of both colors
    things.sort(key=lambda thing: -float(thing.ink.sum()))
    return View(_nearest(ground, BACKGROUNDS) if plain else None, tuple(things))


def background(frames: Frames) -> Array:
    """``[3]``: the color behind the things: of the named ones that most pixels come near to, as it is seen."""
    pixels = frames.reshape(-1, 3).astype(np.float32)
    near = np.linalg.norm(pixels[None] - np.array(list(BACKGROUNDS.values()), np.float32)[:, None], axis=-1) < NEAR
    most = near[near.sum(1).argmax()]
    return np.median(pixels[most] if most.any() else pixels, axis=0).astype(np.float32)


def direction(path: NDArray[np.float64]) -> str | None:
    """The motion along ``[F, 2]`` (x, y); ``None`` if it is none of the named ones or seen in less than half of it."""
    there = np.isfinite(path).all(1)
    if there.sum() < max(2, len(path) / 2):
        return None
    times = np.flatnonzero(there)
    speed = np.polyfit(times, path[there], 1)[0]  # along x and y, pixels per frame
    if np.abs(speed).max() < STILL:
        return "still"
    steps = np.sign(speed) * (np.abs(speed) > np.abs(speed).max() / 2)
    return next((name for name, step in MOTIONS.items() if step == tuple(steps)), None)


# --- things -----------------------------------------------------------------------------------------------------------


def _segments(smooth: Array, ground: Array) -> list[tuple[Array, Mask]]:
    """(color, pixels that may belong to it) of each thing.

    The color that most unexplained pixels are nearest to is taken, as it is seen and not as it is named, then the next
    one; at last every pixel goes to the color that explains it best.
    """
    least = LEAST * len(smooth)
    left = np.linalg.norm(smooth, axis=-1) > FAINT
    named = np.array(list(COLORS.values()), np.float32)
    amounts, errors = _explained(smooth, ground, named)
    nearest = np.where(amounts > SOLID, errors, np.inf)
    colors: list[Array] = []
    for _ in range(len(COLORS)):
        nearest[:, ~left] = np.inf
        votes = np.bincount(nearest.argmin(0)[np.isfinite(nearest.min(0))], minlength=len(COLORS))
        if votes.max() < least:
            break
        chosen = int(votes.argmax())
        of_it = left & (nearest.argmin(0) == chosen) & np.isfinite(nearest[chosen])
        color = _seen_color(smooth, ground, named[chosen], of_it)
        colors.append(color)
        amount, error = _explained(smooth, ground, color[None])
        left &= ~of_it & ~((error[0] < ODD) & (amount[0] > 0))
    if not colors:
        return []
    amounts, errors = _explained(smooth, ground, np.stack(colors))
    best = errors.argmin(0)
    parts = []
    for number, color in enumerate(colors):
        solid = (best == number) & (amounts[number] > SOLID) & (np.linalg.norm(smooth, axis=-1) > FAINT)
        labels, count = connected(_wider(_wider(solid)))  # pieces of a broken stroke are one thing
        for label in range(1, count + 1):
            part = solid & (labels == label)
            if part.sum() >= least:
                parts.append((color, part, errors[number]))
    segments = []
    for color, part, error in parts:
        support = _wider(_wider(part))
        for _, other, rival in parts:
            if other is not part:
                support &= ~other & ~(_wider(_wider(other)) & (rival < error))
        segments.append((color, support | part))
    return segments


def _found(excess: Array, ground: Array, color: Array, support: Mask) -> Found:
    color = _seen_color(excess, ground, color, support)
    ink = np.where(support, np.clip(_explained(excess, ground, color[None])[0][0], 0, 1.2), 0).astype(np.float32)
    path = centroids(np.where(ink > 0.2, ink, 0))  # a rim of noise would draw it to the middle of the support
    path[ink.sum((1, 2)) < LEAST] = np.nan
    return Found(_color_name(color, ground), recognise(ink, path), direction(path), path, ink)


def _explained(excess: Array, ground: Array, colors: Array) -> tuple[Array, Array]:
    """Each color's amount ``[N, F, H, W]`` that comes nearest to the pixels, from 0 to 1.1, and the distance left."""
    axes = colors - ground
    lengths = np.maximum((axes**2).sum(1), 1.0)
    amounts = np.clip(np.moveaxis(excess @ (axes / lengths[:, None]).T, -1, 0), 0, 1.1)
    errors = np.linalg.norm(excess[None] - amounts[..., None] * axes[:, None, None, None], axis=-1)
    return amounts, errors


def _seen_color(excess: Array, ground: Array, color: Array, where: Mask) -> Array:
    """What a thing's color really is: the mean of the quarter of its pixels that have most of it."""
    amounts = _explained(excess, ground, color[None])[0][0][where]
    return ground + excess[where][amounts >= np.quantile(amounts, 0.75)].mean(0)


def _color_name(color: Array, ground: Array) -> str | None:
    """The named color of which this is the whole or, as in thin strokes, a good part on the background."""
    errors = {}
    for name, value in COLORS.items():
        axis = np.array(value, np.float32) - ground
        amount = float(np.clip((color - ground) @ axis / (axis @ axis), 0.5, 1.1))
        errors[name] = float(np.linalg.norm(color - ground - amount * axis)) + 10 * (1 - min(amount, 1))
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] < 2 * ODD else None


def _nearest(color: Array, names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(color - names[name])))


# --- grids ------------------------------------------------------------------------------------------------------------


def connected(mask: Mask) -> tuple[NDArray[np.int64], int]:
    """Numbers the pieces of ``[F, H, W]`` from 1, 0 outside; neighbours in space and time touch, also at corners."""
    flat = np.arange(1, mask.size + 1).reshape(mask.shape)
    labels = np.where(mask, flat, 0)
    while True:
        spread = labels
        for axis in range(3):
            low, high = [slice(None)] * 3, [slice(None)] * 3
            low[axis], high[axis] = slice(None, -1), slice(1, None)
            wide = spread.copy()
            np.maximum(wide[tuple(low)], spread[tuple(high)], out=wide[tuple(low)])
            np.maximum(wide[tuple(high)], spread[tuple(low)], out=wide[tuple(high)])
            spread = wide
        spread = np.where(mask, spread, 0)
        if np.array_equal(spread, labels):
            break
        labels = spread
    names, numbers = np.unique(labels, return_inverse=True)
    numbers = numbers.reshape(mask.shape)
    return (numbers, len(names) - 1) if names[0] == 0 else (numbers + 1, len(names))


def _wider(mask: Mask) -> Mask:
    """One pixel more at every side, corners included, within each frame."""
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    rows = padded[:, :-2] | padded[:, 1:-1] | padded[:, 2:]
    return rows[..., :-2] | rows[..., 1:-1] | rows[..., 2:]
