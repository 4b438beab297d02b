"""Which parts of a checkpoint stay in memory under a limit: of the ways that fit, the one that moves the least."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import UserError
from .amounts import amount, whole
from .needs import STAGES, Stage


class Mode(NamedTuple):
    """One way to keep a part.

    Args:
        name: for people: ``resident``, ``one at a time``, ``loaded for its stage``, ``streamed``.
        idle: bytes of it in the stages of others.
        busy: bytes of it in its own.
        moved: bytes that a request has copied to the device for it.
    """

    name: str
    idle: int
    busy: int
    moved: int


class Part(NamedTuple):
    """A part with its ways, the best first."""

    name: str
    stages: tuple[Stage, ...]
    modes: tuple[Mode, ...]


@dataclass(frozen=True)
class Choice:
    """What was chosen."""

    limit: int
    modes: dict[str, Mode]
    """By part."""
    stages: dict[Stage, int]
    """Bytes of each stage, weights and all."""

    @property
    def most(self) -> int:
        return max(self.stages.values())

    def describe(self) -> str:
        """One line for people."""
        parts = ", ".join(f"{name} {mode.name}" for name, mode in self.modes.items())
        stage = max(self.stages, key=self.stages.__getitem__)
        return f"memory {amount(self.limit)}: {parts}; at most {amount(self.most)}, while {stage}"


def choose(limit: int, parts: Sequence[Part], beside: Mapping[Stage, int], *, tiled: bool = True) -> Choice:
    """
    Args:
        limit: bytes.
        beside: what each stage takes beside the weights; stages that do not run are left out.
        tiled: whether the VAE works in tiles already.

    Raises:
        UserError: nothing fits; the message names the least that would.
    """
    ways = []
    for modes in itertools.product(*(part.modes for part in parts)):
        stages = {stage: beside[stage] for stage in STAGES if stage in beside}
        for part, mode in zip(parts, modes, strict=True):
            for stage in stages:
                stages[stage] += mode.busy if stage in part.stages else mode.idle
        names = {part.name: mode for part, mode in zip(parts, modes, strict=True)}
        ways.append((sum(mode.moved for mode in modes), Choice(limit, names, stages)))
    fitting = [way for way in ways if way[1].most <= limit]
    if fitting:
        return min(fitting, key=lambda way: (way[0], way[1].most))[1]
    least = min((choice for _, choice in ways), key=lambda choice: choice.most)
    stage = max(least.stages, key=least.stages.__getitem__)
    tiles = ", --vae-tiling" if stage in ("encoding", "decoding") and not tiled else ""
    raise UserError(
        f"a memory of {amount(limit)} is too small: this request takes at least {whole(least.most)}, while {stage} "
        f"({amount(beside[stage])} of it beside the weights); fewer --num-frames, a smaller --size, smaller sources"
        f"{tiles} or --dtype bfloat16 take less"
    )
