"""Noise levels of flow matching: sigma runs from 1 (noise) to 0, and ``x_sigma = (1 - sigma) x0 + sigma e``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """``timesteps[i]`` is what the model is told at step i, ``sigmas[i]`` the noise level; a last sigma, 0, ends it."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.timesteps)


def euler_schedule(steps: int, shift: float = 5.0, train_steps: int = 1000) -> Schedule:
    """Evenly spaced levels from 1 to 1/``train_steps``, shifted towards noise: ``shift*s / (1 + (shift-1)*s)``.

    Raises:
        ValueError: ``steps`` or ``shift`` not positive.
    """
    if steps < 1:
        raise ValueError(f"the number of sampling steps must be positive, got {steps}")
    if not shift > 0:
        raise ValueError(f"the flow shift must be positive, got {shift}")
    low = 1 / train_steps
    even = [1.0 - (1.0 - low) * i / max(steps - 1, 1) for i in range(steps)]
    sigmas = [shift * s / (1 + (shift - 1) * s) for s in even]
    return Schedule(tuple(s * train_steps for s in sigmas), (*sigmas, 0.0))
