"""What every data set has, whatever it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .example import Example, Skip


class DataSet(Protocol):
    """Examples by number. What an example is never depends on what was read before."""

    @property
    def fps(self) -> float:
        """Frames per second of all videos."""

    @property
    def identity(self) -> str:
        """Changes with what the examples are made of."""

    @property
    def parts(self) -> frozenset[str]:
        """The features that examples come with: ``"vae"``, ``"vit"``."""

    @property
    def has_pixels(self) -> bool:
        """Whether examples come with pixels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example | Skip:
        """Never raises for what is wrong with an example."""

    def of_task(self, task: str) -> Sequence[int]:
        """Numbers of the examples of a task."""
