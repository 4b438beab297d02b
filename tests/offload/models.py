"""Random small models whose blocks save tensors in every way that autograd knows, for the tests of offload."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bernini.offload.activations import ActivationOffload
from bernini.offload.arena import Arena
from bernini.offload.checker import check
from bernini.offload.log import Log
from bernini.offload.transfer_cpu import CpuTransfers

WIDTH = 16


class Project(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Attend(nn.Module):
    """Queries, keys and values are views of one tensor, with offsets and gaps."""

    plain = False
    """Written out: torch's fused one has no second derivative."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.dim = nn.Linear(WIDTH, 3 * WIDTH), dim

    def forward(self, x: Tensor) -> Tensor:
        packed = self.qkv(x)
        if self.dim == 0:  # one after the other: dense, at offsets
            packed = packed.t().contiguous()
            q, k, v = (part.t() for part in packed.split(WIDTH, 0))
        else:  # side by side: with gaps
            q, k, v = packed.split(WIDTH, -1)
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(0, 1)[None] for part in (q, k, v))
        out = (q @ k.transpose(-1, -2)).softmax(-1) @ v if self.plain else F.scaled_dot_product_attention(q, k, v)
        return out[0].transpose(0, 1).flatten(1)


class Gate(nn.Module):
    """Broadcasts: a row for all tokens, and a column for all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        column = x.mean(1, keepdim=True).expand_as(x)
        return x * torch.sigmoid(self.row).expand_as(x) + column * torch.tanh(x)


class InPlace(nn.Module):
    """What was saved is changed afterwards, in ways that autograd allows: other bytes of it, or what it saved last."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        unused = y * self.linear.bias  # saves y, and is no part of the loss
        y.relu_()
        copies = torch.zeros(2, *y.shape)
        copies[0] = y.exp().clamp(max=3.0)
        copies[1].copy_(y).mul_(2.0)
        out = copies.sum(0).sigmoid_()
        del unused
        return (out * out.detach()).add_(x)


class Views(nn.Module):
    """Saves overlapping, transposed and reversed views, halves at odd offsets, and a slice of a large tensor."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.sin()
        left, right = y[:, : WIDTH // 2 - 1], y[:, WIDTH // 2 - 1 :]
        mixed = torch.cat([left * left, right * right], 1)
        windows = y.unfold(0, 3, 1)
        smooth = (windows * windows).mean(-1)
        large = y.repeat(1, 16)
        thin = large[:, 3 : 3 + WIDTH]
        rows = y[1:] * y[:-1]
        tail = F.pad(smooth + rows[1:], (0, 0, 0, 2))
        return mixed + (thin * thin).t().contiguous().t() + tail + y.flip(0) * y


class Normal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(x)) + torch.view_as_complex(x.unflatten(1, (-1, 2))).abs().repeat_interleave(2, 1)


KINDS: tuple[Callable[[random.Random], nn.Module], ...] = (
    lambda chance: Project(),
    lambda chance: Attend(chance.randrange(2)),
    lambda chance: Gate(),
    lambda chance: InPlace(),
    lambda chance: Views(),
    lambda chance: Normal(),
)


class Block(nn.Module):
    """Some of the above, one after the other, perhaps within a checkpoint, or two."""

    def __init__(self, chance: random.Random, wrap: str) -> None:
        super().__init__()
        self.parts = nn.ModuleList(chance.choice(KINDS)(chance) for _ in range(chance.randint(1, 3)))
        self.wrap = wrap

    def _all(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + torch.tanh(part(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        if self.wrap == "inner":
            return checkpoint(self._all, x, use_reentrant=False)
        if self.wrap == "nested":
            return checkpoint(lambda y: checkpoint(self._all, y, use_reentrant=False).sin(), x, use_reentrant=False)
        return self._all(x)


class Model(nn.Module):
    """Args:
    seed: decides everything.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        chance = random.Random(seed)
        torch.manual_seed(seed)
        self.twice = chance.random() < 0.25
        """Whether the loss has a gradient in it (double backward), which checkpoints would not change."""
        wraps = ["", "inner", "nested", "outer"]
        if not self.twice:
            wraps.append("reentrant")
        self.outer = chance.choice(wraps)
        inner = self.outer if self.outer in ("inner", "nested") else ""
        self.blocks = nn.ModuleList(Block(chance, inner) for _ in range(chance.randint(2, 4)))
        for module in self.modules():
            if isinstance(module, Attend):
                module.plain = self.twice
        self.shared = chance.random() < 0.3
        self.head = nn.Linear(WIDTH, 4)
        self.x = torch.randn(chance.choice([4, 9, 32]), WIDTH)

    def hidden(self, x: Tensor) -> Tensor:
        blocks = [*self.blocks, self.blocks[0]] if self.shared else list(self.blocks)
        for block in blocks:
            if self.outer in ("outer", "reentrant"):
                x = checkpoint(block, x, use_reentrant=self.outer == "reentrant")
            else:
                x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(self.hidden(x))
        loss = out.square().mean()
        if self.twice:
            (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            loss = loss + slope.square().sum()
        return loss


def gradients(model: nn.Module, run: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    """Of the input and all parameters, after ``run(input)``, which does forward and backward."""
    model.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    run(leaf)
    assert leaf.grad is not None
    return [leaf.grad, *(torch.zeros(0) if p.grad is None else p.grad.clone() for p in model.parameters())]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Bit by bit."""
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))
        for a, b in zip(one, other, strict=True)
    )


MIB = 1 << 20


@contextmanager
def offloading(
    blocks: Any, *, arena: Arena | None = None, delay: float = 0.0, seed: int = 0, bandwidth: float | None = None,
    type: type[ActivationOffload] = ActivationOffload, **options: Any,
) -> Iterator[ActivationOffload]:  # fmt: skip
    """One whose log is right at the end, and that then has nothing left."""
    transfers = CpuTransfers(delay=delay, seed=seed, bandwidth=bandwidth, log=Log(None))
    offload = type(
        blocks, transfers=transfers, arena=arena or Arena(64 * MIB, slab_bytes=MIB), **{"minimum": 1, **options}
    )
    yield offload
    offload.finish()
    if offload.live:  # an exception's traceback may hold a graph in a cycle; nothing else does
        gc.collect()
        offload.finish()
    assert [str(wrong) for wrong in check(transfers.log)] == []
    assert offload.live == 0 and offload.arena.stats().live == 0
    transfers.close()
