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
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bernini.kernels import SegmentLayout, attention, qk_rope

from .group import Group, Message
from .overlap import chunks_of, overlapped
from .plan import Cut, LocalLayout, Range, SPPlan
from .policy import PACKED, Policy, Variant
from .swap import Swap, banded

if TYPE_CHECKING:
    from bernini.kernels.segments import DeviceLayout
    from bernini.renderer.model import QKV, QKNorm

Run = Callable[[Tensor, Tensor, Tensor, Range], Tensor]
"""``(q_ThD, k_SgD, v_SgD, rows) -> out_ThD``: attention of one band, whose queries are those rows of all."""


class _Out(torch.autograd.Function):
    """q, k, v as they are -> those that this rank's attention reads."""

    @staticmethod
    def forward(ctx: Any, swap: Swap, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        ctx.swap, heads = swap, swap.heads
        return swap.out(banded(q, heads.ulysses), *(banded(x, heads.kv_bands) for x in (k, v)))

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
        return swap.out(q_send, k_send, banded(v, heads.kv_bands))

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
        return None, ctx.swap.out(banded(dout, ctx.swap.heads.ulysses))[0]


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


def packed(
    swap: Swap, x_TN: Tensor, to: QKV, here: DeviceLayout, norm: QKNorm, rounding: str,
    run: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """Projection, norm, rotation and attention of the own tokens with the keys of all ranks, ``[t, H, D]``.

    One exchange there and one back, and everybody waits; :func:`bernini.parallel.overlap.overlapped` does the same.
    """
    # In the order in which they leave there: the gradients of x are added up in the reverse one.
    v, k, q = to.v(x_TN), to.k(x_TN), to.q(x_TN)
    sent = _TurnedOut.apply(
        swap, q, k, v, here.rows, norm.q, norm.k, norm.eps, rounding, *here.tables(q.shape[-1])
    )  # fmt: skip
    return _Back.apply(swap, run(*sent))


def gathered(group: Group, cut: Cut, rows: Tensor) -> Tensor:
    """``[cut.rows, ...]``, the rows of all ranks, on every rank; differentiable."""
    return rows if group.size == 1 else _Gathered.apply(group, cut, rows)


class Ulysses:
    """What the renderer's layers call instead of attending themselves; see ``bernini.renderer.model.SelfAttend``.

    Args:
        group: ranks that share the sequence.
        plan: made for as many.
        policy: which of the ways with the same result is taken.
    """

    def __init__(self, group: Group, plan: SPPlan, policy: Policy = PACKED) -> None:
        if plan.heads.ranks != group.size:
            raise ValueError(f"Ulysses: the plan is for {plan.heads.ranks} ranks, the group has {group.size}")
        self.swap = Swap(group, plan.heads, plan.cut, plan.cut, tuple(map(plan.reads, range(group.size))))
        self.borders, self.policy, self.chunks = plan.borders(group.rank), policy, chunks_of(plan.heads)
        self._samples = plan.layout.cu_seqlens

    def __call__(
        self, x_TN: Tensor, to: QKV, layout: SegmentLayout | LocalLayout, norm: QKNorm, rounding: str, backend: str
    ) -> Tensor:
        cu_seqlens_q, cu_seqlens_k = self.borders
        run = partial(attention, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, backend=backend)
        here = layout.on(x_TN.device)

        def by(variant: Variant, x_TN: Tensor) -> Tensor:
            if variant == "packed":
                return packed(self.swap, x_TN, to, here, norm, rounding, run)
            chunks = 1 if variant == "async" else self.chunks
            return overlapped(self.swap, chunks, x_TN, to, here, norm, rounding, run)

        return by(self.policy.choose(self.swap, self._samples, self.chunks, x_TN, by), x_TN)
