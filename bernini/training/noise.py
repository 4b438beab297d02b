"""How noisy a training sample is: densities by task, shifts, and the part of the levels that an expert learns.

    position u in [0, 1], drawn from a density       0 is pure noise, 1 is clean
    -> kept if it lies in the range                  else the next draw (rejection)
    -> sigma = shift (1 - u) / (1 + (shift - 1) (1 - u)),  timestep = 1000 sigma

Positions run against the noise level: the release draws an index of its table of levels, and the table begins at
sigma 1. A logit-normal of mean 0.5 therefore prefers the clean half, before the shift moves it back towards noise.

Sources: paper table 4, equations 6 and 7; facts of the released model, section F.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bernini.errors import UserError

Weighting = Literal["logit_normal", "mode", "uniform"]

LEVELS = 1000
"""Entries of the released tables; a timestep is so many times sigma."""

BOUNDARY = 0.875
"""The released experts share the levels here: the high-noise one learns those above."""

_VIDEO_EDITS = ("i2v", "v2v", "mv2v", "ads2v", "rv2v", "vi2v", "vr2v", "vrc2v")

_RELEASE: Mapping[str, tuple[Weighting, float]] = {
    "t2i": ("logit_normal", 3.0),
    "i2i": ("logit_normal", 4.0),
    "r2i": ("logit_normal", 4.0),
    "t2v": ("mode", 3.0),
    "r2v": ("mode", 4.0),
    **dict.fromkeys(_VIDEO_EDITS, ("mode", 5.0)),
}

TABLES: Mapping[str, Mapping[str, tuple[Weighting, float]]] = {
    "release": _RELEASE,
    "paper": {**_RELEASE, "r2v": ("mode", 5.0)},
}
"""(weighting, shift) by task. ``release`` is what the published training code does; ``paper`` is table 4, whose I2V is
both i2v and r2v here and whose IV2V is rv2v. They differ in r2v alone. ``vi2v``, ``vr2v`` and ``vrc2v`` are the
release's names of video edits with pictures."""

_PATIENCE = 1_000_000
"""Draws in a row that may miss the range before it is taken for a mistake."""


class Levels(NamedTuple):
    """Noise levels ``[n]`` and what the model is told of them, in 0..1000."""

    sigma: Tensor
    timestep: Tensor


@dataclass(frozen=True)
class Timesteps:
    """Draws noise levels.

    Args:
        weighting: density of the position: ``"logit_normal"`` (eq. 6), ``"mode"`` (eq. 7) or ``"uniform"``.
        shift: moves levels towards noise; 1 leaves them.
        low, high: the range of sigma that is learned.
        parity: as the release has it: one of 1000 levels whose table is computed in bfloat16 (318, 288 or 270 distinct
            ones at shift 3, 4, 5), the range rounded to the table, everything returned in bfloat16. Otherwise levels
            are any numbers of the range, in float64.
        mean, std: of the normal variable whose logistic is the logit-normal position.
        scale: s of eq. 7.

    Raises:
        UserError: an unknown weighting, a range that is empty or leaves [0, 1], or a number without meaning.
    """

    weighting: Weighting
    shift: float
    low: float = 0.0
    high: float = 1.0
    parity: bool = False
    mean: float = 0.5
    std: float = 1.0
    scale: float = 1.29

    def __post_init__(self) -> None:
        if self.weighting not in get_args(Weighting):
            raise UserError(f"noise: weighting {self.weighting!r}; there are {', '.join(get_args(Weighting))}")
        if not 0 < self.shift < math.inf:
            raise UserError(f"noise: the shift must be positive, got {self.shift}")
        if not 0 <= self.low < self.high <= 1:
            raise UserError(f"noise: sigma must range upwards within [0, 1], got {self.low} to {self.high}")
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise UserError(f"noise: the logit-normal needs a mean and a positive std, got {self.mean} and {self.std}")
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise UserError(f"noise: the scale of the mode density must be in [-1, 1.75], got {self.scale}")

    @property
    def positions(self) -> tuple[float, float]:
        """The range as positions, both ends included: the upper sigma first."""
        if self.parity:
            table = boundary_table(self.shift)
            begin, end = (int((table - sigma).abs().argmin()) for sigma in (self.high, self.low))
            return begin / LEVELS, end / LEVELS
        first, last = (1 - sigma / (self.shift - (self.shift - 1) * sigma) for sigma in (self.high, self.low))
        return first, last

    def trials(self, generator: torch.Generator, count: int) -> Tensor:
        """``[count]`` numbers that :meth:`density` takes: normal ones for the logit-normal, else uniform ones."""
        dtype = torch.float32 if self.parity else torch.float64
        if self.weighting == "logit_normal":
            return torch.randn(count, generator=generator, dtype=dtype) * self.std + self.mean
        return torch.rand(count, generator=generator, dtype=dtype)

    def density(self, trials: Tensor) -> Tensor:
        """``[n]`` -> ``[n]`` positions, each from its own trial."""
        if self.weighting == "logit_normal":
            # The release takes one at a time; a whole row goes through other instructions and differs in the last bit.
            return torch.cat([one.sigmoid() for one in trials.split(1)]) if self.parity else trials.sigmoid()
        if self.weighting == "mode":
            return 1 - trials - self.scale * (torch.cos(math.pi * trials / 2) ** 2 - 1 + trials)
        return trials

    def accept(self, trials: Tensor, count: int) -> tuple[Tensor, int]:
        """The first ``count`` positions within the range, or as many as there are, and how many trials that took."""
        first, last = self.positions
        u = self.density(trials)
        kept = ((u >= first) & (u <= last)).nonzero().flatten()[:count]
        return u[kept], int(kept[-1]) + 1 if len(kept) == count > 0 else len(trials)

    def levels(self, u: Tensor) -> Levels:
        """The levels at positions within the range."""
        if self.parity:
            sigmas, timesteps = released_tables(self.shift)
            drawn = timesteps[(u * LEVELS).long()]
            # The release looks sigma up by its timestep, and those repeat more often than the sigmas: the first is it.
            return Levels(sigmas[(timesteps == drawn[:, None]).int().argmax(1)], drawn)
        # The limits may be missed by the rounding of the way there and back.
        sigma = _shifted(1 - u, self.shift).clamp(self.low, self.high)
        return Levels(sigma, sigma * LEVELS)

    def draw(self, generator: torch.Generator, count: int = 1) -> Levels:
        """``count`` levels.

        Raises:
            UserError: the density practically never meets the range.
        """
        found: list[Tensor] = []
        missing, missed, chunk = count, 0, max(64, 2 * count)
        while missing:
            u, _ = self.accept(self.trials(generator, chunk), missing)
            found.append(u)
            missing, missed = missing - len(u), 0 if len(u) else missed + chunk
            chunk = chunk if len(u) else min(2 * chunk, 65536)
            if missed >= _PATIENCE:
                raise UserError(
                    f"noise: {self.weighting} at shift {self.shift:g} never falls between sigma {self.low} and "
                    f"{self.high}: none of {missed} draws did; widen the range"
                )
        return self.levels(torch.cat(found) if found else torch.empty(0))


def timesteps_for(
    task: str, *, table: str = "release", low: float = 0.0, high: float = 1.0, parity: bool = False
) -> Timesteps:
    """The task's noise by one of :data:`TABLES`, in a range of sigma such as :func:`expert_range` gives.

    Raises:
        UserError: no such table, or the task is not in it.
    """
    if table not in TABLES:
        raise UserError(f"noise: there is no table {table!r}; there are {', '.join(TABLES)}")
    if task not in TABLES[table]:
        raise UserError(f"noise: no schedule for task {task!r}; there are {', '.join(TABLES[table])}")
    weighting, shift = TABLES[table][task]
    return Timesteps(weighting, shift, low, high, parity)


def expert_range(expert: str, boundary: float = BOUNDARY) -> tuple[float, float]:
    """(lowest, highest) sigma of ``"high"``, ``"low"``, or ``"both"`` where one model serves all levels.

    Raises:
        UserError: another name.
    """
    ranges = {"high": (boundary, 1.0), "low": (0.0, boundary), "both": (0.0, 1.0)}
    if expert not in ranges:
        raise UserError(f"noise: there is no expert {expert!r}; there are {', '.join(ranges)}")
    return ranges[expert]


@functools.cache
def released_tables(shift: float) -> tuple[Tensor, Tensor]:
    """bfloat16 ``[1000]`` each: sigmas and timesteps, computed in bfloat16 throughout. Not to be written to."""
    sigmas = _shifted(torch.linspace(1, 0, LEVELS + 1, dtype=torch.bfloat16)[:-1], shift)
    return sigmas, sigmas * LEVELS


@functools.cache
def boundary_table(shift: float) -> Tensor:
    """float32 ``[1000]``: the sigmas among which the release finds the ends of a range. Not to be written to."""
    return _shifted(torch.linspace(1, 0, LEVELS + 1)[:-1], shift)


def _shifted(sigma: Tensor, shift: float) -> Tensor:
    return shift * sigma / (1 + (shift - 1) * sigma)
