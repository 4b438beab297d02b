"""What the trainer asks of a stage, and what goes from one to the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from ..data.example import Skip


@dataclass(frozen=True)
class Micro:
    """A micro-batch, on the host.

    Args:
        content: whatever the stage made; it alone reads it.
        counts: by loss, over how much it is a mean: the sums of all micro-batches of a step are divided by the sums of
            these, so that cutting a step into micro-batches changes nothing.
        tokens: that the models compute.
        keys: of its examples.
        skipped: what came up and could not be used.
    """

    content: Any
    counts: Mapping[str, float]
    tokens: int
    keys: tuple[str, ...]
    skipped: tuple[Skip, ...]


class Stage(Protocol):
    """One way of training. It owns the modules and knows the data; the trainer owns steps, weights and files."""

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """Modules that are trained; what in them does not want a gradient stays as it is."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Of the losses, by name."""

    def keep_wide(self, name: str) -> bool:
        """Whether a parameter stays in float32 when the others compute in bfloat16."""

    def micro(self, step: int, number: int) -> Micro:
        """The micro-batch of that number: a pure function of the recipe and the two numbers."""

    def losses(self, micro: Micro, step: int) -> Mapping[str, Tensor]:
        """By name, the sums whose counts the micro-batch has."""

    def samples(self, folder: Path, step: int) -> None:
        """Writes pictures of what it can do by now."""

    def export(self, folder: Path) -> None:
        """Writes the whole checkpoint, with the modules' present weights."""
