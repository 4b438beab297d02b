"""Noise levels and solvers of flow matching.

Sigma runs from 1 (noise) to 0, and ``x_sigma = (1 - sigma) x0 + sigma e``; the model predicts ``v = e - x0``. What the
model is told is a timestep, about 1000 sigma. Sources: facts of the released model, sections D.5 and K.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from bernini.kernels import guide

TRAIN_STEPS = 1000
SOLVERS = ("unipc", "euler")
SIGMA_SCHEDULES = ("release", "diffusers-0.42")


@dataclass(frozen=True)
class Schedule:
    """``timesteps[i]`` is what the model is told at step i, ``sigmas[i]`` the noise level; a last sigma, 0, ends it."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.timesteps)


def shifted(sigma: float, shift: float) -> float:
    """Moves a noise level towards noise: ``shift * s / (1 + (shift - 1) * s)``."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def schedule(solver: str, sigma_schedule: str, steps: int, shift: float) -> Schedule:
    """The levels that a version of the released system samples at, whatever libraries are installed here.

    ``unipc``: timesteps are truncated to whole numbers while sigmas keep their fractions. ``release`` is what
    diffusers 0.35 computes (from 0.999 down in equal parts, then shifted), ``diffusers-0.42`` what 0.42 does (from 1).

    ``euler``: ``release`` is the released fallback, whose table is computed in bfloat16 and ends in a step that
    changes nothing; ``diffusers-0.42`` is diffusers' ``FlowMatchEulerDiscreteScheduler``.

    Raises:
        ValueError: an unknown name, or ``steps`` or ``shift`` not positive.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r}; expected one of {', '.join(SOLVERS)}")
    if sigma_schedule not in SIGMA_SCHEDULES:
        raise ValueError(f"sigma schedule {sigma_schedule!r}; expected one of {', '.join(SIGMA_SCHEDULES)}")
    if steps < 1:
        raise ValueError(f"the number of sampling steps must be positive, got {steps}")
    if not 0 < shift < math.inf:
        raise ValueError(f"the flow shift must be positive, got {shift}")
    low = 1 / TRAIN_STEPS
    if solver == "unipc":
        top = 1 - low if sigma_schedule == "release" else 1.0
        bottom = 0.0 if sigma_schedule == "release" else low
        sigmas = [shifted(top - (top - bottom) * i / steps, shift) for i in range(steps)]
        if sigma_schedule != "release":
            sigmas[0] = min(sigmas[0], 1 - 1e-6)  # the solver takes the logarithm of 1 - sigma
        timesteps = [float(int(s * TRAIN_STEPS)) for s in sigmas]
        return Schedule(tuple(timesteps), (*torch.tensor(sigmas, dtype=torch.float32).tolist(), 0.0))
    if sigma_schedule == "release":
        even = torch.linspace(1, 0, steps, dtype=torch.bfloat16)
        rounded = shift * even / (1 + (shift - 1) * even)
        return Schedule(tuple((rounded * TRAIN_STEPS).tolist()), (*rounded.tolist(), 0.0))
    bottom = shifted(low, shift)  # the library shifts its lowest level a second time
    sigmas = [shifted(1.0 - (1.0 - bottom) * i / max(steps - 1, 1), shift) for i in range(steps)]
    return Schedule(tuple(s * TRAIN_STEPS for s in sigmas), (*sigmas, 0.0))


class Solver:
    """Takes the state from one noise level to the next. Steps must be taken in order, once each.

    A step is linear in the state, the velocity and what was remembered, with weights that the levels give: guidance
    computes it along with the velocity, from the rows of :meth:`update`.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._history: list[Tensor] = []

    def update(self, index: int) -> tuple[list[list[float]], list[Tensor]]:
        """``(rows, history)`` as :func:`bernini.kernels.guide` takes them.

        The first row gives the next state, the others what :meth:`remember` wants.
        """
        raise NotImplementedError

    def remember(self, outputs: Sequence[Tensor]) -> None:
        """Keeps what a step computed besides the next state."""

    def step(self, index: int, velocity: Tensor, latent: Tensor) -> Tensor:
        """One step by itself, from a velocity that is there already."""
        state, *outputs = guide([velocity], [], latent=latent, update=self.update(index))
        self.remember(outputs)
        return state


class Euler(Solver):
    """``x' = x + (sigma' - sigma) v``."""

    def update(self, index: int) -> tuple[list[list[float]], list[Tensor]]:
        return [[1.0, self.schedule.sigmas[index + 1] - self.schedule.sigmas[index]]], []


class UniPC(Solver):
    """The multistep predictor-corrector of order 2 (arXiv 2302.04867; bh2, on x0) that diffusers has.

    ``m = x - sigma v`` is the clean latent as seen from this step, ``m1`` and ``m2`` those of the two steps before. The
    corrector replaces the state that the last step predicted by ``x + correction``, then the predictor goes on from
    there. The state before that prediction, which diffusers keeps, is not needed: the corrector starts anew from it
    with the terms that the predictor had, and they cancel.
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule)
        fall = all(high > low >= 0 for high, low in pairwise(schedule.sigmas))
        if not (fall and schedule.sigmas[0] < 1):
            raise ValueError(f"unipc needs noise levels below 1 that fall, got {schedule.sigmas}")

    def update(self, index: int) -> tuple[list[list[float]], list[Tensor]]:
        sigma, after = self.schedule.sigmas[index : index + 2]
        denoised = [1.0, -sigma]
        if after == 0:  # the end of the path is m itself
            return [denoised], []
        # Weights of x, m, m1, m2. First the corrected state.
        corrected = [1.0, 0.0, 0.0, 0.0]
        if index:
            corrected = [a + b for a, b in zip(corrected, self._correction(index), strict=True)]
        # Then the prediction from it: the exponential step towards m, and along the line through m1 and m.
        growth = math.expm1(-self._step(index + 1))
        moved = [after / sigma * weight for weight in corrected]
        moved[1] -= (1 - after) * growth
        if self._order(index) == 2:
            slope = (1 - after) * growth * 0.5 / self._ratio(index + 1)
            moved[1] += slope
            moved[2] -= slope
        known = len(self._history)
        row = [moved[0] + moved[1], -sigma * moved[1], *moved[2 : 2 + known]]
        return [row, [*denoised, *[0.0] * known]], list(self._history)

    def remember(self, outputs: Sequence[Tensor]) -> None:
        self._history = [*outputs[:1], *self._history[:1]]

    def _correction(self, index: int) -> list[float]:
        """Weights of x, m, m1, m2 in what the corrector adds to the state that the last step predicted."""
        h = -self._step(index)
        growth = math.expm1(h)
        scale = -(1 - self.schedule.sigmas[index]) * growth
        phi = growth / h - 1
        if self._order(index - 1) == 1:
            return [0.0, 0.5 * scale, -0.5 * scale, 0.0]
        # The weights that are exact for linear and quadratic m: rho1 + rho2 = b1, ratio rho1 + rho2 = b2.
        ratio = self._ratio(index)
        b1, b2 = phi / growth, 2 * (phi / h - 0.5) / growth
        rho1 = (b1 - b2) / (1 - ratio)
        rho2 = b1 - rho1
        slope = scale * (rho1 - 0.5) / ratio  # the predictor had put a half in the place of rho1
        return [0.0, scale * rho2, -scale * rho2 - slope, slope]

    def _order(self, index: int) -> int:
        """Of the prediction at a step: 1 at the first, where nothing is remembered, and at the last."""
        return min(2, index + 1, self.schedule.steps - index)

    def _step(self, index: int) -> float:
        """How far the step that arrives at a level goes, in the logarithm of signal over noise."""
        return self._log_ratio(index) - self._log_ratio(index - 1)

    def _ratio(self, index: int) -> float:
        """The step before the one that arrives at a level, as a part of that one; negative, for it lies behind."""
        return -self._step(index - 1) / self._step(index)

    def _log_ratio(self, index: int) -> float:
        sigma = self.schedule.sigmas[index]
        return math.log(1 - sigma) - math.log(sigma)


def make_solver(solver: str, sigma_schedule: str, steps: int, shift: float) -> Solver:
    """A fresh solver; see :func:`schedule` for the arguments."""
    levels = schedule(solver, sigma_schedule, steps, shift)
    return UniPC(levels) if solver == "unipc" else Euler(levels)
