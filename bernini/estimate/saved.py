"""What is kept between forward and backward, as ``bernini.offload.activations`` and activation checkpointing keep it.

    policy              saved of a block                                computed again
    none                all, or its inputs with ``recompute``           nothing, or all
    hidden              its inputs, on the host                         all
    hidden+attention    its inputs and its attention's results, there   all but self-attention
    all                 all, on the host                                nothing

A tensor is on the host as one of the meta device, so a tracker counts it there. It leaves the device when the block
after it has begun, and is back when the block behind it goes backward: one block's tensors are in flight each way.
What is small stays, and so do parameters. Tensors that share their memory go and come as one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from .fakes import fused

Policy = Literal["none", "hidden", "hidden+attention", "all"]
POLICIES: tuple[Policy, ...] = ("none", "hidden", "hidden+attention", "all")

SMALL = 1 << 20
"""Bytes below which a tensor stays where it is."""


@dataclass
class Away:
    """Memory that was moved to the host.

    Args:
        block: number of the block that saved it.
        host: as many bytes, on the meta device.
        landed: the memory that it came back to, for as long as somebody has it.
    """

    block: int
    host: Tensor
    landed: Callable[[], Tensor | None] = lambda: None

    def land(self) -> Tensor:
        """Bytes on the device."""
        there = self.landed()
        if there is None:
            there = torch.empty(self.host.shape, dtype=torch.float32)
            self.landed = weakref.ref(there)
        return there


@dataclass(frozen=True)
class View:
    """How a tensor lies in its memory."""

    away: Away
    dtype: torch.dtype
    shape: torch.Size


@dataclass
class Keeper:
    """Treats the blocks of one stack.

    Args:
        policy: where their saved tensors go.
        recompute: whether blocks are computed again in backward.
    """

    policy: Policy
    recompute: bool
    small: int = SMALL
    _away: dict[int, Away] = field(default_factory=dict)
    _groups: dict[int, list[Away]] = field(default_factory=dict)
    _leaving: list[Tensor] = field(default_factory=list)
    _coming: dict[int, list[Tensor]] = field(default_factory=dict)
    _attended: dict[int, list[Tensor | View]] = field(default_factory=dict)
    _block: int | None = None
    _kept: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.policy in ("hidden", "hidden+attention") and not self.recompute:
            raise ValueError(f"policy {self.policy!r} keeps inputs only: it needs blocks that are computed again")
        if self.policy == "all" and self.recompute:
            raise ValueError("policy 'all' keeps everything: with it no block is computed again")

    def treat(self, blocks: Iterable[nn.Module]) -> None:
        """Changes how the blocks are called."""
        for number, block in enumerate(blocks):
            block.forward = partial(self._call, number, block, block.forward)

    def _call(self, number: int, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def inner(*leaves: Any) -> Any:
            self._block = number
            try:
                args_, kwargs_ = tree_unflatten(leaves, spec)
                return forward(*args_, **kwargs_)
            finally:
                self._block = None

        # Flat, so that the checkpoint sees all tensors among its arguments, those inside of tuples too.
        leaves, spec = tree_flatten((args, kwargs))
        run = partial(checkpoint, inner, use_reentrant=False) if self.recompute else inner
        if self.policy == "none":
            return run(*leaves)
        self._kept = {p.untyped_storage()._cdata for p in block.parameters()}
        with saved_tensors_hooks(partial(self._pack, number), self._unpack):
            return run(*leaves)

    # --- to the host and back ---

    def _pack(self, number: int, tensor: Tensor) -> Tensor | View:
        memory = tensor.untyped_storage()
        kept = isinstance(tensor, nn.Parameter) or memory._cdata in self._kept
        if kept or memory.nbytes() < self.small or not tensor.is_floating_point():
            return tensor
        return View(self._send(number, tensor), tensor.dtype, tensor.shape)

    def _send(self, number: int, tensor: Tensor) -> Away:
        memory = tensor.untyped_storage()
        known = self._away.get(memory._cdata)
        if known is not None:
            return known
        away = Away(number, torch.empty(-(-memory.nbytes() // 16) * 4, dtype=torch.float32, device="meta"))
        place = memory._cdata
        self._away[place] = away
        weakref.finalize(memory, self._away.pop, place, None)
        if number not in self._groups:
            self._leaving.clear()  # those of the block before have arrived
        self._groups.setdefault(number, []).append(away)
        self._leaving.append(tensor.detach())
        return away

    def _unpack(self, saved: Tensor | View) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self._begin(saved.away.block)
        return _shaped(saved.away.land(), saved.dtype, saved.shape)

    def _begin(self, number: int) -> None:
        """Backward is at this block: what it needs is there, and that of the block before it is on its way."""
        self._leaving.clear()
        for at in (number, number - 1):
            if at in self._groups:
                self._coming[at] = [away.land() for away in self._groups.pop(at)]
        for at in [at for at in self._coming if at > number]:
            del self._coming[at]

    # --- attention that is not computed again ---

    def attend(self, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, scale: float) -> Tensor:
        """For :func:`bernini.estimate.fakes.attention`. Where there are as many keys as queries it is self-attention,
        whose results the policy ``hidden+attention`` keeps."""
        block = self._block
        if self.policy != "hidden+attention" or block is None or len(k_SGD) < len(q_THD):
            return fused(q_THD, k_SGD, v_SGD, scale)
        return cast("Tensor", _Kept.apply(self, block, scale, q_THD, k_SGD, v_SGD))

    def results(self, block: int, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Of an attention: made in forward, and found again when the block is computed again."""
        kept = self._attended.setdefault(block, [])
        if torch._C._current_graph_task_id() == -1:
            out, lse = make()
            kept += [self._pack(block, out), self._pack(block, lse)]
            return out, lse
        out, lse = (self._unpack(kept.pop(0)) for _ in range(2))
        return out, lse


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keeper: Keeper, block: int, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, last = torch.empty((2, len(q)), dtype=torch.int32)

        def make() -> tuple[Tensor, Tensor]:
            return cast(
                "tuple[Tensor, Tensor]",
                torch.ops.bernini.interval_attention(q, k, v, first, last, None, None, scale),
            )

        out, lse = keeper.results(block, make)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, first, last, out, lse)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, first, last, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.ops.bernini.interval_attention_backward(
            dout, q, k, v, out, lse, first, last, None, None, ctx.scale
        )
        return None, None, None, dq, dk, dv


def _shaped(memory: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """A tensor in that memory; where in it does not matter to a count."""
    count = shape.numel()
    return memory.view(dtype)[:count].view(shape)
