"""Attention over a sequence that is cut into ranges of tokens: queries are swapped for heads, and back.

    q k v of the own tokens, all heads  ->  one exchange  ->  q of the row's tokens, k v of all tokens, own heads
    attention                           ->  one exchange  ->  results of the own tokens, all heads

Backward runs the same two exchanges the other way. Sizes come from the plan, so nobody asks for them. Queries and keys
are written by the norm-and-rotation kernel where they are sent from, and received where attention reads them; values
are copied once, and so are results. Gradients of keys that several ranks read are added in the order of the ranks.

Shapes: t own tokens, T queries of a row of ranks, S all keys, H query heads, G key heads, D head dim; U bands of h
query heads, K bands of g key heads (see :class:`bernini.parallel.plan.Heads`).

Source: arXiv 2309.14509 (Ulysses); paper section 5; facts on systems, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bernini.kernels import SegmentLayout, attention, qk_rope

from .group import Group, Message
from .plan import Cut, Heads, LocalLayout, Range, SPPlan

if TYPE_CHECKING:
    from bernini.renderer.model import QKNorm

Run = Callable[[Tensor, Tensor, Tensor, Range], Tensor]
"""``(q_ThD, k_SgD, v_SgD, rows) -> out_ThD``: attention of one band, whose queries are those rows of all."""


@dataclass(frozen=True)
class Swap:
    """The exchanges of one attention.

    Args:
        q, kv: which rows each rank has, of the queries and of the keys.
    """

    group: Group
    heads: Heads
    q: Cut
    kv: Cut

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

    def _all_slices(self, x_S: Tensor) -> list[tuple[int, Tensor]]:
        return list(enumerate(x_S.split(list(self.kv.sizes))))

    def _without_own(self, pairs: list[tuple[int, Tensor]]) -> list[Message]:
        return [Message(rank, tensor) for rank, tensor in pairs if rank != self.group.rank]

    def out(self, q_UthD: Tensor, kv_KtgD: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Bands of the own tokens -> ``q_ThD`` and ``kv_SgD`` of the own band. Without keys, queries alone."""
        own, heads = self.group.rank, self.heads
        q_T = q_UthD.new_empty((self.rows[1] - self.rows[0], *q_UthD.shape[2:]))
        sends, receives = [(rank, q_UthD[rank % heads.ulysses]) for rank in self.row], self._row_slices(q_T)
        kv_S = None
        if kv_KtgD is not None:
            kv_S = kv_KtgD.new_empty((self.kv.rows, *kv_KtgD.shape[2:]))
            sends += [(rank, kv_KtgD[heads.kv_band_of(rank)]) for rank in range(self.group.size)]
            receives += self._all_slices(kv_S)
        self._move(sends, receives, own)
        return q_T, kv_S

    def back(self, q_ThD: Tensor, kv_SgD: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The way back: ``[U, t, h, D]`` of the own tokens and, of keys, the sum for each band, ``[K, t, g, D]``."""
        own, heads, size = self.group.rank, self.heads, self.group.size
        q_U = q_ThD.new_empty((heads.ulysses, self.q.sizes[own], *q_ThD.shape[1:]))
        sends, receives = self._row_slices(q_ThD), [(rank, q_U[rank % heads.ulysses]) for rank in self.row]
        kv_P = None
        if kv_SgD is not None:
            kv_P = kv_SgD.new_empty((size, self.kv.sizes[own], *kv_SgD.shape[1:]))
            sends += self._all_slices(kv_SgD)
            receives += list(enumerate(kv_P))
        self._move(sends, receives, own)
        return q_U, None if kv_P is None else self._summed(kv_P)

    def _move(self, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]], own: int) -> None:
        kept = [tensor for rank, tensor in sends if rank == own]
        for source, place in zip(kept, [tensor for rank, tensor in receives if rank == own], strict=True):
            place.copy_(source)
        self.group.exchange(self._without_own(sends), self._without_own(receives))

    def _summed(self, kv_PtgD: Tensor) -> Tensor:
        """The parts of all ranks -> of all bands; sums in float32 at least, in the order of the ranks."""
        heads = self.heads
        if heads.kv_bands == self.group.size:
            return kv_PtgD
        wide = torch.promote_types(kv_PtgD.dtype, torch.float32)
        bands = kv_PtgD.new_zeros((heads.kv_bands, *kv_PtgD.shape[1:]), dtype=wide)
        for rank, part in enumerate(kv_PtgD):
            bands[heads.kv_band_of(rank)] += part
        return bands.to(kv_PtgD.dtype)


# --- shapes: bands first, as they are sent ----------------------------------------------------------------------------


def _banded(x_tHD: Tensor, bands: int) -> Tensor:
    """A view ``[bands, t, H / bands, D]``."""
    return x_tHD.unflatten(1, (bands, -1)).transpose(0, 1)


def _joined(x_UthD: Tensor) -> Tensor:
    """``[t, U * h, D]``, contiguous: the copy of whatever was received by bands."""
    return x_UthD.transpose(0, 1).flatten(1, 2)


def _packed(k_tGD: Tensor, v_tGD: Tensor, bands: int) -> Tensor:
    """Keys and values side by side, ``[K, t, 2 g, D]``."""
    return torch.cat([_banded(k_tGD, bands), _banded(v_tGD, bands)], dim=2)


class _Out(torch.autograd.Function):
    """q, k, v as they are -> those that this rank's attention reads."""

    @staticmethod
    def forward(ctx: Any, swap: Swap, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.swap = swap
        kv_send = _packed(k, v, swap.heads.kv_bands)
        q_T, kv_S = swap.out(_banded(q, swap.heads.ulysses).contiguous(), kv_send)
        assert kv_S is not None
        k_S, v_S = kv_S.chunk(2, dim=1)
        return q_T, k_S, v_S

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_grads(ctx.swap, dq, dk, dv)


def _grads(swap: Swap, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what attention read -> of q, k, v of the own tokens."""
    dq_U, dkv = swap.back(dq.contiguous(), torch.cat([dk, dv], dim=1))
    assert dkv is not None
    dk_K, dv_K = dkv.chunk(2, dim=2)
    return _joined(dq_U), _joined(dk_K), _joined(dv_K)


class _TurnedOut(torch.autograd.Function):
    """The same behind norm and rotation, whose kernel writes into what is sent."""

    @staticmethod
    def forward(
        ctx: Any, swap: Swap, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, q_weight: Tensor, k_weight: Tensor,
        eps: float, rounding: str, *tables: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ctx.swap, ctx.eps = swap, eps
        ctx.save_for_backward(q, k, rows, q_weight, k_weight, *tables)
        heads, (tokens, _, dim) = swap.heads, q.shape
        q_send = q.new_empty((heads.ulysses, tokens, heads.band, dim))
        kv_send = k.new_empty((heads.kv_bands, tokens, 2 * heads.kv_band, dim))
        k_send, v_send = kv_send.chunk(2, dim=2)
        v_send.copy_(_banded(v, heads.kv_bands))
        qk_rope(
            q, k, tables, rows, q_weight=q_weight, k_weight=k_weight, eps=eps, out=(q_send, k_send), rounding=rounding
        )
        q_T, kv_S = swap.out(q_send, kv_send)
        assert kv_S is not None
        k_S, v_S = kv_S.chunk(2, dim=1)
        return q_T, k_S, v_S

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        q, k, rows, q_weight, k_weight, *tables = ctx.saved_tensors
        dq, dk, dv = _grads(ctx.swap, dq, dk, dv)
        dq, dk, dq_weight, dk_weight = torch.ops.bernini.qk_rope_backward(
            dq, dk, q, k, tables, rows, q_weight, k_weight, "across_heads", ctx.eps
        )
        return None, dq, dk, dv, None, dq_weight, dk_weight, None, None, *[None] * len(tables)


class _Back(torch.autograd.Function):
    """Results of a band -> results of the own tokens."""

    @staticmethod
    def forward(ctx: Any, swap: Swap, out_ThD: Tensor) -> Tensor:
        ctx.swap = swap
        return _joined(swap.back(out_ThD.contiguous())[0])

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[None, Tensor]:
        return None, ctx.swap.out(_banded(dout, ctx.swap.heads.ulysses).contiguous())[0]


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
        self.swap = Swap(group, plan.heads, plan.cut, plan.cut)
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
