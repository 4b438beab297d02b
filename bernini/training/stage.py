"""What the trainer asks of a stage, and what goes from one to the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from ..data.example import Example, Skip
from ..parallel.fsdp import Groups
from ..parallel.mesh import Mesh
from ..parallel.share import Share

if TYPE_CHECKING:
    from .export import Writer

Kind = Callable[[Example], bool]
"""Examples of a kind go through the same parts of the models."""


@dataclass(frozen=True)
class Micro:
    """A micro-batch, on the host: what this rank computes of it.

    Args:
        content: whatever the stage made; it alone reads it.
        counts: by loss, over how much it is a mean: the sums of all micro-batches of a step are divided by the sums of
            these, so that cutting a step into micro-batches changes nothing. They, keys and skipped are of all ranks.
        tokens: that the models compute here, dummies left out.
        keys: of its examples.
        skipped: what came up and could not be used.
        real: how many of the content's examples, the first of them, have a loss; the others are dummies.
    """

    content: Any
    counts: Mapping[str, float]
    tokens: int
    keys: tuple[str, ...]
    skipped: tuple[Skip, ...]
    real: int


def portion(
    examples: Sequence[Example], mesh: Mesh, kinds: Sequence[Kind], cost: Callable[[Example], int]
) -> tuple[tuple[Example, ...], int]:
    """What of a micro-batch this rank computes, and how many of it are real.

    Example i belongs to data rank ``i % size``. All ranks have to run the same parts of the models, since these are
    gathered from all of them. So where a rank lacks a kind that the micro-batch has, the cheapest example of that kind
    is put behind its own, as a dummy: it is computed, but no loss is taken of it, so its gradient is exactly zero.

    Args:
        kinds: which parts of the models are run depends on which of these there are, and on nothing else.
        cost: of an example.
    """
    own = [example for number, example in enumerate(examples) if number % mesh.data.size == mesh.data.rank]
    real = len(own)
    for kind in (*kinds, _any):
        there = [example for example in examples if kind(example)]
        if there and not any(map(kind, own)):
            own.append(min(there, key=cost))
    return tuple(own), real


def _any(example: Example) -> bool:
    return True


def taken(real: int, share: Share, tokens: int) -> int:
    """Of how many samples a rank takes the losses of a packed sequence: where ranks cut it each has a part of all of
    them, and where it stays whole all have the same, and the first one takes them."""
    return real if share.group.rank == 0 or share.cuts(tokens) else 0


class Stage(Protocol):
    """One way of training. It owns the modules and knows the data; the trainer owns steps, weights and files."""

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """Modules that are trained; what in them does not want a gradient stays as it is."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Of the losses, by name."""

    def groups(self) -> Groups:
        """What of the modules is gathered together, where they are spread over processes."""

    def keep_wide(self, name: str) -> bool:
        """Whether a parameter stays in float32 when the others compute in bfloat16."""

    def micro(self, step: int, number: int) -> Micro:
        """The micro-batch of that number: a pure function of the recipe, the two numbers and the rank."""

    def losses(self, micro: Micro, step: int) -> Mapping[str, Tensor]:
        """By name, the sums whose counts the micro-batch has; over all ranks they add up to those of the micro-batch.

        All that computes with the modules' weights happens in here.
        """

    def samples(self, folder: Path, step: int, model: Path) -> None:
        """Writes pictures of what it can do by now, with the weights of the checkpoint ``model``. One rank does it."""

    def export(self, folder: Path, writer: Writer) -> None:
        """Writes the whole checkpoint, with the modules' present weights. All ranks do."""
