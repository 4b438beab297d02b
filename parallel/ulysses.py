"""Attention over a sequence that is cut into ranges of tokens: queries are swapped for heads, and back.

    q k v of the own tokens, all heads  ->  one exchange  ->  q of the row's tokens, k v of all tokens, own heads
    attention                           ->  one exchange  ->  results of the own tokens, all heads

Backward runs the same two exchanges the other way. Sizes come from the plan, so nobody asks for them. A rank is sent
the queries that it attends for and the keys that these see, once each. Nothing is copied more than once on its way:
queries and keys are written by the norm-and-rotation kernel where they are sent from, and received where attention
reads them; values are copied before they are sent, results and gradients when they have come. Gradients of keys that
several ranks read are added in the order of the ranks.

Shapes: t own tokens, T queries of a row of ranks, S all keys, H query heads, G key heads, D head dim; U bands of h
query heads, K bands of g key heads (see :class:`bernini.parallel.plan.Heads`).

Source: arXiv 2309.14509 (Ulysses); paper section 5; facts on systems, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bernini.kernels import SegmentLayout, attention, qk_rope

from .group import Group, Message
from .plan import Cut, Heads, LocalLayout, Range, SPPlan, clipped

if TYPE_CHECKING:
    from bernini.renderer.model import QKNorm

Run = Callable[[Tensor, Tensor, Tensor, Range], Tensor]
"""``(q_ThD, k_SgD, v_SgD, rows) -> out_ThD``: attention of one band, whose queries are those rows of all."""


@dataclass(frozen=True)
class Swap:
    """The exchanges of one attention.

    Args:
        q, kv: which rows each rank has, of the queries and of the keys.
        reads: which keys the queries see that a rank attends for; all by default.
    """

    group: Group
    heads: Heads
    q: Cut
    kv: Cut
    reads: tuple[Range, ...] | None = None

    @property
    def row(self) -> range:
        return self.heads.row(self.group.rank)

    @property
    def rows(self) -> Range:
        """The queries that this rank attends for, as rows of all."""
        return self.q.of_row(self.row)

    def _row_slices(self, x_T: Tensor) -> list[tuple[int, Tensor]]:
        """(rank, its rows) of the queries of this rank's row of ranks."""
        return list(zip(self.row, x_T.split([self.q.sizes[rank] for rank in self.row]), strict=True))

    @cached_property
    def given(self) -> list[Range]:
        """Which of its own keys this rank gives to each, numbered among them."""
        reads = self.reads or [(0, self.kv.rows)] * self.group.size
        return [clipped(read, self.kv.part(self.group.rank)) for read in reads]

    @cached_property
    def read(self) -> list[int]:
        """How many keys this rank reads of each."""
        reads = (0, self.kv.rows) if self.reads is None else self.reads[self.group.rank]
        return np.diff(clipped(self.kv.borders, reads)).tolist()

    def out(self, q_UthD: Tensor, *kv_KtgD: Tensor) -> tuple[Tensor, ...]:
        """Bands of the own tokens -> ``q_ThD`` and, where they are given, ``k_SgD`` and ``v_SgD`` of the own band.

        Views will do. Those that are not contiguous are copied once: to what is sent, or straight to their place.
        """
        own, heads, size = self.group.rank, self.heads, self.group.size
        q_T = q_UthD.new_empty((self.rows[1] - self.rows[0], *q_UthD.shape[2:]))
        band = own % heads.ulysses
        kept, sends = [q_UthD[band]], list(zip(self.row, _messages(q_UthD, band), strict=True))
        receives, kv_S = self._row_slices(q_T), []
        for x_KtgD in kv_KtgD:
            kv_S.append(x_KtgD.new_empty((sum(self.read), *x_KtgD.shape[2:])))
            band = heads.kv_band_of(own)
            kept.append(x_KtgD[band, slice(*self.given[own])])
            bands = _messages(x_KtgD, band if heads.kv_bands == size else None)
            sends += [(rank, bands[heads.kv_band_of(rank)][slice(*self.given[rank])]) for rank in range(size)]
            receives += enumerate(kv_S[-1].split(self.read))
        for source, place in zip(kept, [place for rank, place in receives if rank == own], strict=True):
            place.copy_(source)
        self._exchange(sends, receives)
        return q_T, *kv_S

    def back(self, q_ThD: Tensor, *kv_SgD: Tensor) -> tuple[Tensor, ...]:
        """The way back: ``[t, H, D]`` of the own tokens and, of keys and values, ``[t, G, D]``, sums over readers."""
        own = self.group.rank
        sends = self._row_slices(q_ThD.contiguous())
        q_parts = [part if rank == own else _room(part, self.q.sizes[own]) for rank, part in sends]
        receives, kv_parts = list(zip(self.row, q_parts, strict=True)), []
        for x_SgD in kv_SgD:
            slices = x_SgD.contiguous().split(self.read)
            places = enumerate(self.given)
            kv_parts.append([slices[own] if rank == own else _room(x_SgD, b - a) for rank, (a, b) in places])
            sends += enumerate(slices)
            receives += enumerate(kv_parts[-1])
        self._exchange(sends, receives)
        return torch.cat(q_parts, dim=1), *(self._summed(parts) for parts in kv_parts)

    def _exchange(self, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]]) -> None:
        self.group.exchange(
            *([Message(*pair) for pair in pairs if pair[0] != self.group.rank] for pairs in (sends, receives))
        )

    def _summed(self, parts_tgD: list[Tensor]) -> Tensor:
        """The parts of all ranks -> ``[t, G, D]``; sums in float32 at least, in the order of the ranks."""
        first, heads, tokens = parts_tgD[0], self.heads, self.kv.sizes[self.group.rank]
        if heads.kv_bands == self.group.size and all(len(part) == tokens for part in parts_tgD):
            return torch.cat(parts_tgD, dim=1)
        wide = torch.promote_types(first.dtype, torch.float32)
        sums_tKgD = first.new_zeros((tokens, heads.kv_bands, *first.shape[1:]), dtype=wide)
        for rank, part in enumerate(parts_tgD):
            sums_tKgD[slice(*self.given[rank]), heads.kv_band_of(rank)].add_(part)
        return sums_tKgD.flatten(1, 2).to(first.dtype)


# --- shapes: bands first, as they are sent ----------------------------------------------------------------------------


def _banded(x_tHD: Tensor, bands: int) -> Tensor:
    """A view ``[bands, t, H / bands, D]``."""
    return x_tHD.unflatten(1, (bands, -1)).transpose(0, 1)


def _messages(x_UthD: Tensor, but: int | None) -> list[Tensor]:
    """The bands, contiguous but for one that nobody is sent."""
    if but is None:
        return list(x_UthD.contiguous())
    return [*x_UthD[:but].contiguous(), x_UthD[but], *x_UthD[but + 1 :].contiguous()]


def _room(x_ThD: Tensor, tokens: int) -> Tensor:
    return x_ThD.new_empty((tokens, *x_ThD.shape[1:]))


class _Out(torch.autograd.Function):
    """q, k, v as they are -> those that this rank's attention reads."""

    @staticmethod
    def forward(ctx: Any, swap: Swap, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        ctx.swap, heads = swap, swap.heads
        return swap.out(_banded(q, heads.ulysses), *(_banded(x, heads.kv_bands) for x in (k, v)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.swap.back(*grads)


class _TurnedOut(torch.autograd.Function):
    """The same behind norm and rotation, whose kernel writes into what is sent."""

    @staticmethod
    def forward(
        ctx: Any, swap: Swap, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, q_weight: Tensor, k_weight: Tensor,
        eps: float, rounding: str, *tables: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.swap, ctx.eps = swap, eps
        ctx.save_for_backward(q, k, rows, q_weight, k_weight, *tables)
        heads, (tokens, _, dim) = swap.heads, q.shape
        q_send = q.new_empty((heads.ulysses, tokens, heads.band, dim))
        k_send = k.new_empty((heads.kv_bands, tokens, heads.kv_band, dim))
        qk_rope(
            q, k, tables, rows, q_weight=q_weight, k_weight=k_weight, eps=eps, out=(q_send, k_send), rounding=rounding
        )
        return swap.out(q_send, k_send, _banded(v, heads.kv_bands))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, rows, q_weight, k_weight, *tables = ctx.saved_tensors
        dq, dk, dv = ctx.swap.back(*grads)
        dq, dk, dq_weight, dk_weight = torch.ops.bernini.qk_rope_backward(
            dq, dk, q, k, tables, rows, q_weight, k_weight, "across_heads", ctx.eps
        )
        return None, dq, dk, dv, None, dq_weight, dk_weight, None, None, *[None] * len(tables)


class _Back(torch.autograd.Function):
    """Results of a band -> results of the own tokens."""

    @staticmethod
    def forward(ctx: Any, swap: Swap, out_ThD: Tensor) -> Tensor:
        ctx.swap = swap
        return swap.back(out_ThD)[0]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[None, Tensor]:
        return None, ctx.swap.out(_banded(dout, ctx.swap.heads.ulysses))[0]


class _Gathered(torch.autograd.Function):
    """The rows of all ranks. What each rank's loss says about a row is added up where the row came from."""

    @staticmethod
    def forward(ctx: Any, group: Group, cut: Cut, rows: Tensor) -> Tensor:
        ctx.group, ctx.cut = group, cut
        return group.gather(rows.contiguous(), cut.sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        group, pieces = ctx.group, list(grad.contiguous().split(list(ctx.cut.sizes)))
        own = pieces[group.rank]
        parts = own.new_empty((group.size, *own.shape))
        parts[group.rank] = own
        others = [rank for rank in range(group.size) if rank != group.rank]
        group.exchange(
            [Message(rank, pieces[rank]) for rank in others], [Message(rank, parts[rank]) for rank in others]
        )
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return None, None, total


# --- for the models ---------------------------------------------------------------------------------------------------


def attend(swap: Swap, q_tHD: Tensor, k_sGD: Tensor, v_sGD: Tensor, run: Run) -> Tensor:
    """Attention of the own queries with the keys of all ranks, ``[t, H, D]``.

    Args:
        q_tHD, k_sGD, v_sGD: of the own rows; finished, norm and rotation are behind them.
        run: attends.
    """
    if swap.group.size == 1:
        return run(q_tHD, k_sGD, v_sGD, swap.rows)
    q, k, v = _Out.apply(swap, q_tHD, k_sGD, v_sGD)
    return _Back.apply(swap, run(q, k, v, swap.rows))


def gathered(group: Group, cut: Cut, rows: Tensor) -> Tensor:
    """``[cut.rows, ...]``, the rows of all ranks, on every rank; differentiable."""
    return rows if group.size == 1 else _Gathered.apply(group, cut, rows)


class Ulysses:
    """What the renderer's layers call instead of attending themselves; see ``bernini.renderer.model.SelfAttend``.

    Args:
        group: ranks that share the sequence.
        plan: made for as many.
    """

    def __init__(self, group: Group, plan: SPPlan) -> None:
        if plan.heads.ranks != group.size:
            raise ValueError(f"Ulysses: the plan is for {plan.heads.ranks} ranks, the group has {group.size}")
        self.swap = Swap(group, plan.heads, plan.cut, plan.cut, tuple(map(plan.reads, range(group.size))))
        self.borders = plan.borders(group.rank)

    def __call__(
        self, q_tHD: Tensor, k_tHD: Tensor, v_tHD: Tensor, layout: SegmentLayout | LocalLayout, norm: QKNorm,
        rounding: str, backend: str,
    ) -> Tensor:  # fmt: skip
        here = layout.on(q_tHD.device)
        q, k, v = _TurnedOut.apply(
            self.swap, q_tHD, k_tHD, v_tHD, here.rows, norm.q, norm.k, norm.eps, rounding,
            *here.tables(q_tHD.shape[-1]),
        )  # fmt: skip
        cu_seqlens_q, cu_seqlens_k = self.borders
        out = attention(q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, backend=backend)
        return _Back.apply(self.swap, out)
