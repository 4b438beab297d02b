"""The ranks that have the same sequences: which sequences they cut, and what a model needs to know of it.

Models take a :class:`Share` and ask it for a plan. Where a sequence stays whole, there is none, and every rank computes
it as one process would; so one process, short sequences and long ones are the same code above this floor.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from bernini.kernels import SegmentLayout

from .group import Alone, Group
from .plan import Cut, SPPlan

LEAST = 4096
"""Tokens from which on a sequence is cut: below, two exchanges per layer cost more than they save."""


@dataclass(frozen=True)
class Share:
    """
    Args:
        group: the ranks of a sequence group.
        least: tokens from which on a packed sequence is cut.
    """

    group: Group = field(default_factory=Alone)
    least: int = LEAST

    def cuts(self, tokens: int) -> bool:
        """Whether a packed sequence of so many tokens is cut."""
        return self.group.size > 1 and tokens >= self.least

    def plan(self, layout: SegmentLayout, heads: int, kv_heads: int) -> SPPlan | None:
        """The layout cut for this group; ``None`` where it stays whole."""
        return SPPlan.make(layout, heads, kv_heads, self.group.size) if self.cuts(layout.tokens) else None

    def gather(self, rows: Tensor, cut: Cut) -> Tensor:
        """``[cut.rows, ...]``, the rows of all ranks, without gradients."""
        return rows if self.group.size == 1 else self.group.gather(rows.contiguous(), cut.sizes)


ALONE = Share()
"""One process."""
