"""What the trainer asks of a stage, and what goes from one to the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from ..data.example import Skip
from ..parallel.fsdp import Groups
from ..parallel.share import Share
from .batches import Batches, Portion
from .work import NOTHING, Load

if TYPE_CHECKING:
    from .export import Writer


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
        weights: of the losses by name, what the step's mean counts in its window; 1 by default.
        share: the ranks that compute it together, where they are more than a sequence group.
        load: of the rank that has most.
    """

    content: Any
    counts: Mapping[str, float]
    tokens: int
    keys: tuple[str, ...]
    skipped: tuple[Skip, ...]
    real: int
    weights: Mapping[str, float] = field(default_factory=dict)
    share: Share | None = None
    load: Load = NOTHING

    @classmethod
    def of(cls, portion: Portion, content: Any, counts: Mapping[str, float], tokens: int) -> Micro:
        """What a stage made of its portion."""
        keys = tuple(drawn.example.key for drawn in portion.examples)
        return cls(
            content, counts, tokens, keys, portion.skipped, portion.real, portion.weights, portion.share, portion.load
        )


def taken(real: int, share: Share, tokens: int) -> int:
    """Of how many samples a rank takes the losses of a packed sequence: where ranks cut it each has a part of all of
    them, and where it stays whole all have the same, and the first one takes them."""
    return real if share.group.rank == 0 or share.cuts(tokens) else 0


class Stage(Protocol):
    """One way of training. It owns the modules and knows the data; the trainer owns steps, weights and files."""

    @property
    def batches(self) -> Batches:
        """Which examples its micro-batches have."""

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
