"""Gated residual, LayerNorm, scale and shift: what stands between a Wan block's branches, three times per block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bernini.kernels import modulate
from bernini.kernels.modulate import reference

from .harness import Row
from .kernels import BANDWIDTH, DTYPES, both_ways, device
from .providers import Call, Case, compiled, provider

EPS = 1e-6
BARS = {
    torch.float32: {"eager": 2.8, "torch.compile": 1.2},
    torch.bfloat16: {"eager": 8.0, "torch.compile": 1.3},
}


@dataclass(frozen=True, kw_only=True)
class Modulate(Case):
    """Shapes: T tokens, N width. One timestep for all tokens, and so one row of gate, scale and shift."""

    residual_TN: Tensor
    branch_TN: Tensor
    gate_1N: Tensor
    scale_1N: Tensor
    shift_1N: Tensor

    @property
    def shape(self) -> str:
        return " x ".join(map(str, self.residual_TN.shape))

    @property
    def moved(self) -> int:
        return 4 * self.residual_TN.nbytes  # read residual and branch, write both results

    @property
    def moved_backward(self) -> int:
        return 6 * self.residual_TN.nbytes  # read residual, branch and two gradients, write two

    def leaves(self) -> list[Tensor]:
        return [self.residual_TN, self.branch_TN, self.gate_1N, self.scale_1N, self.shift_1N]

    def reference(self) -> tuple[Tensor, Tensor]:
        tables = self.gate_1N, self.scale_1N, self.shift_1N
        return reference.modulate(self.residual_TN, self.branch_TN, *tables, None, None, None, EPS, "fp32")


def make_case(tokens: int, width: int, dtype: torch.dtype) -> Modulate:
    torch.manual_seed(0)
    residual, branch, *gradients = (torch.randn(tokens, width, device=device()).to(dtype) for _ in range(4))
    gate, scale, shift = torch.randn(3, 1, width, device=device()).unbind()  # float32, as the model has them
    return Modulate(
        gradients=tuple(gradients), residual_TN=residual, branch_TN=branch, gate_1N=gate, scale_1N=scale, shift_1N=shift
    )


@provider("modulate", "bernini")
def bernini(case: Modulate) -> Call:
    residual, branch, gate, scale, shift = case.leaves()
    return partial(modulate, residual, branch, gate=gate, scale=scale, shift=shift, eps=EPS)


def _block(case: Modulate, norm: Callable[[Tensor], Tensor]) -> Call:
    """diffusers' ``WanTransformerBlock.forward`` from a feed-forward to the next self-attention."""

    def call() -> tuple[Tensor, Tensor]:
        x = (case.residual_TN.float() + case.branch_TN.float() * case.gate_1N).type_as(case.residual_TN)
        return x, (norm(x.float()) * (1 + case.scale_1N) + case.shift_1N).type_as(x)

    return call


@provider("modulate", "eager")
def eager(case: Modulate) -> Call:
    return _block(case, partial(F.layer_norm, normalized_shape=case.residual_TN.shape[-1:], eps=EPS))


@provider("modulate", "diffusers")
def diffusers(case: Modulate) -> Call:
    from diffusers.models.normalization import FP32LayerNorm

    return _block(case, FP32LayerNorm(case.residual_TN.shape[-1], EPS, elementwise_affine=False))


@provider("modulate", "torch.compile")
def torch_compile(case: Modulate) -> Call:
    """The straightforward form: float32 until the results are stored."""

    def chain(residual: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        x = residual.float() + branch.float() * gate
        normed = F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift
        return x.to(residual.dtype), normed.to(residual.dtype)

    return compiled(chain, *case.leaves())


def run() -> list[Row]:
    rows = []
    for dtype in DTYPES:
        case = make_case(4096, 5120, dtype)
        rows += both_ways("modulate", case, ("modulate", "modulate_backward"), bars=BARS[dtype], bandwidth=BANDWIDTH)
    return rows
