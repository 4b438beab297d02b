"""The ranks that have the same sequences: which sequences they cut, and what a model needs to know of it.

Models take a :class:`Share` and ask it for a plan. Where a sequence stays whole, there is none, and every rank computes
it as one process would; so one process, short sequences and long ones are the same code above this floor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from bernini.kernels import SegmentLayout

from .balance import LEAST as LEAST
from .group import Alone, Group
from .plan import Cut, Heads, Range, SPPlan
from .policy import PACKED, Policy
from .swap import Swap
from .ulysses import Run, attend, gathered


@dataclass(frozen=True)
class Share:
    """
    Args:
        group: the ranks of a sequence group.
        least: tokens from which on a packed sequence is cut.
        branches: whether branches of guidance may go to some of the ranks each (:mod:`bernini.parallel.branches`).
        policy: how transfers go beside computing where a renderer's layers attend (:mod:`bernini.parallel.policy`).
    """

    group: Group = field(default_factory=Alone)
    least: int = LEAST
    branches: bool = False
    policy: Policy = PACKED

    def cuts(self, tokens: int) -> bool:
        """Whether a packed sequence of so many tokens is cut."""
        return self.group.size > 1 and tokens >= self.least

    def plan(self, layout: SegmentLayout, heads: int, kv_heads: int) -> SPPlan | None:
        """The layout cut for this group; ``None`` where it stays whole."""
        return SPPlan.make(layout, heads, kv_heads, self.group.size) if self.cuts(layout.tokens) else None

    def rows(self, tokens: int) -> Range:
        """Which rows of a packed sequence of so many this rank has: all of them where it stays whole."""
        return Cut.even(tokens, self.group.size).part(self.group.rank) if self.cuts(tokens) else (0, tokens)

    def mine(self, at: Tensor, tokens: int) -> Tensor:
        """bool: which of some rows (int64 on the host) this rank has."""
        start, stop = self.rows(tokens)
        return (at >= start) & (at < stop)

    def own(self, at: Tensor, tokens: int) -> Tensor:
        """Those of the rows that this rank has, as places among its own."""
        return at[self.mine(at, tokens)] - self.rows(tokens)[0]

    def attend(
        self, q_tHD: Tensor, k_tGD: Tensor, v_tGD: Tensor, run: Run, tokens: int, at: Tensor | None = None,
        seen: Callable[[Range], Range] | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of the own rows of a sequence that is cut; see :func:`bernini.parallel.ulysses.attend`.

        Args:
            tokens: of the sequence.
            at: int64 on the host, ascending: the rows that have queries, all by default. Keys come from all rows.
            seen: of some of the queries, the keys between the first and the last that they see; ``run`` gets those. All
                keys by default.
        """
        kv = Cut.even(tokens, self.group.size)
        q = kv if at is None else Cut.chosen(at.numpy(), kv)
        heads = Heads.shared(q_tHD.shape[1], k_tGD.shape[1], self.group.size)
        reads = None if seen is None else tuple(seen(q.of_row(heads.row(rank))) for rank in range(heads.ranks))
        return attend(Swap(self.group, heads, q, kv, reads), q_tHD, k_tGD, v_tGD, run)

    def gathered(self, own: Tensor, tokens: int, at: Tensor | None = None) -> Tensor:
        """The rows ``at`` of a sequence on every rank, from what each has of them; differentiable.

        Args:
            own: ``[those of them that this rank has, ...]``.
            at: int64 on the host, ascending; all rows by default.
        """
        if not self.cuts(tokens):
            return own
        cut = Cut.even(tokens, self.group.size)
        return gathered(self.group, cut if at is None else Cut.chosen(at.numpy(), cut), own)


ALONE = Share()
"""One process."""
