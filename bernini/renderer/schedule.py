"""Noise levels and solvers of flow matching.

Sigma runs from 1 (noise) to 0, and ``x_sigma = (1 - sigma) x0 + sigma e``; the model predicts ``v = e - x0``. What the
model is told is a timestep, about 1000 sigma. Sources: facts of the released model, sections D.5 and K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

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


class Solver(Protocol):
    """Takes the state from one noise level to the next. Steps must be taken in order, once each."""

    schedule: Schedule

    def step(self, index: int, velocity: Tensor, latent: Tensor) -> Tensor: ...


class Euler:
    """``x' = x + (sigma' - sigma) v``."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def step(self, index: int, velocity: Tensor, latent: Tensor) -> Tensor:
        return latent + (self.schedule.sigmas[index + 1] - self.schedule.sigmas[index]) * velocity


class UniPC:
    """diffusers' multistep predictor-corrector (order 2, bh2, on x0), at the levels of ``schedule``."""

    def __init__(self, schedule: Schedule) -> None:
        from diffusers import UniPCMultistepScheduler

        self.schedule = schedule
        self._scheduler: Any = UniPCMultistepScheduler(
            num_train_timesteps=TRAIN_STEPS,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            solver_order=2,
            solver_type="bh2",
            predict_x0=True,
            lower_order_final=True,
            final_sigmas_type="zero",
        )
        self._scheduler.set_timesteps(schedule.steps)
        # The library's own levels depend on its version.
        self._scheduler.sigmas = torch.tensor(schedule.sigmas, dtype=torch.float32)
        self._scheduler.timesteps = torch.tensor(schedule.timesteps).to(torch.int64)
        self._scheduler.set_begin_index(0)

    def step(self, index: int, velocity: Tensor, latent: Tensor) -> Tensor:
        # A batch axis, which the scheduler's sums over its history expect.
        moved = self._scheduler.step(velocity[None], self._scheduler.timesteps[index], latent[None], return_dict=False)
        return moved[0][0]


def make_solver(solver: str, sigma_schedule: str, steps: int, shift: float) -> Solver:
    """A fresh solver; see :func:`schedule` for the arguments."""
    levels = schedule(solver, sigma_schedule, steps, shift)
    return UniPC(levels) if solver == "unipc" else Euler(levels)
