"""What the suite's checks do not say, and ablations ask: how much of a reference's background is in the result, and how
far colors go beyond any that the world has. Noted for each sample while it is generated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..data.scene import BACKGROUNDS, COLORS, Frames
from ..data.world import Sample
from .suite import Generate, Result

DARKEST, BRIGHTEST = (pick(value for rgb in (*BACKGROUNDS.values(), *COLORS.values()) for value in rgb)
                      for pick in (min, max))  # fmt: skip
"""Of all channels of all colors: 10 and 250."""

Key = tuple[str, str, int]


@dataclass(frozen=True)
class Leak:
    """Of one sample.

    Args:
        leak: share of the pixels that look like a reference's background and like nothing that is wanted; ``None``
            without a reference whose background is another one.
        other: the same of a background that is neither wanted nor of a reference, on average: what is wrong anyway.
        overshoot: by how much channels are below the darkest or above the brightest there is, on average, of 255.
    """

    leak: float | None
    other: float | None
    overshoot: float


def leak(drawn: Sample, frames: Frames) -> Leak:
    """Looks at uint8 ``[F, H, W, 3]``: each pixel is what it is nearest to, a wanted color or any background.

    Raises:
        ValueError: a sample without a target.
    """
    if drawn.scene is None or drawn.target is None:
        raise ValueError(f"leak: a sample of {drawn.task} has no picture to be made")
    values = frames.astype(np.float32)
    overshoot = float((np.maximum(DARKEST - values, 0) + np.maximum(values - BRIGHTEST, 0)).mean())
    wanted = drawn.scene.background
    references = {"r2v": drawn.sources, "rv2v": drawn.sources[1:]}.get(drawn.task, ())
    theirs = {scene.background for scene in references} - {wanted}
    if not theirs:
        return Leak(None, None, overshoot)
    neither = [name for name in BACKGROUNDS if name != wanted and name not in theirs]
    things = [COLORS[thing.color] for thing in drawn.scene.things]
    palette = np.array([BACKGROUNDS[wanted], *things, *(BACKGROUNDS[name] for name in (*sorted(theirs), *neither))])
    nearest = np.linalg.norm(values.reshape(-1, 1, 3) - palette, axis=-1).argmin(1)
    shares = np.bincount(nearest, minlength=len(palette)) / len(nearest)
    first = 1 + len(things)
    return Leak(
        float(shares[first : first + len(theirs)].mean()), float(shares[first + len(theirs) :].mean()), overshoot
    )


class Watch:
    """A ``generate`` that notes a :class:`Leak` for every sample, in a file beside the suite's results.

    A sample's line is written before the suite writes its own, so whoever goes on finds a line for every result.
    """

    def __init__(self, generate: Generate, file: Path) -> None:
        self._generate, self._file = generate, file

    def __call__(self, drawn: Sample) -> Frames:
        frames = np.asarray(self._generate(drawn))
        line = {"key": (drawn.task, drawn.edit or "", drawn.seed), **asdict(leak(drawn, frames))}
        with self._file.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(line))  # in this order a line that a kill cut off spoils no other
        return frames

    def of(self, rows: Sequence[Result]) -> list[Leak]:
        """Those of results."""
        found = self._read()
        return [found[row.task, row.kind if row.task in ("i2i", "v2v") else "", row.seed] for row in rows]

    def _read(self) -> Mapping[Key, Leak]:
        found: dict[Key, Leak] = {}
        for text in self._file.read_text("utf-8").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # empty, or cut off; its sample was made again
                continue
            task, edit, seed = line.pop("key")
            found[task, edit, seed] = Leak(**line)
        return found
