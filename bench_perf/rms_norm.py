"""RMSNorm over Wan's width, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bernini.kernels import rms_norm
from bernini.kernels.rms_norm import reference

from .harness import Row
from .kernels import DTYPES, both_ways, device
from .providers import Call, Case, compiled, optional, provider

EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class RmsNorm(Case):
    """Shapes: T tokens, N width."""

    x_TN: Tensor
    weight_N: Tensor

    @property
    def shape(self) -> str:
        return " x ".join(map(str, self.x_TN.shape))

    @property
    def moved(self) -> int:
        return 2 * self.x_TN.nbytes  # read x, write y

    @property
    def moved_backward(self) -> int:
        return 3 * self.x_TN.nbytes  # read x and dy, write dx

    def leaves(self) -> list[Tensor]:
        return [self.x_TN, self.weight_N]

    def reference(self) -> Tensor:
        return reference.rms_norm(self.x_TN, self.weight_N, EPS, "fp32")


def make_case(tokens: int, width: int, dtype: torch.dtype) -> RmsNorm:
    torch.manual_seed(0)
    x, dy = (torch.randn(tokens, width, device=device()).to(dtype) for _ in range(2))
    return RmsNorm(gradients=(dy,), x_TN=x, weight_N=torch.rand(width, device=device()).to(dtype) + 0.5)


@provider("rms_norm", "bernini")
def bernini(case: RmsNorm) -> Call:
    return partial(rms_norm, case.x_TN, case.weight_N, eps=EPS)


@provider("rms_norm", "eager")
def eager(case: RmsNorm) -> Call:
    """What ``torch.nn.RMSNorm`` calls, and so diffusers' Wan."""
    return partial(F.rms_norm, case.x_TN, case.x_TN.shape[-1:], case.weight_N, EPS)


@provider("rms_norm", "diffusers")
def diffusers(case: RmsNorm) -> Call:
    """The class that its other models use."""
    from diffusers.models.normalization import RMSNorm

    norm = RMSNorm(case.x_TN.shape[-1], EPS)
    del norm.weight  # a parameter; what replaces it must stay the tensor that is differentiated
    norm.weight = case.weight_N
    return partial(norm, case.x_TN)


@provider("rms_norm", "torch.compile")
def torch_compile(case: RmsNorm) -> Call:
    return compiled(F.rms_norm, case.x_TN, case.x_TN.shape[-1:], case.weight_N, EPS)


@provider("rms_norm", "liger")
def liger(case: RmsNorm) -> Call:
    function = optional("liger_kernel.ops.rms_norm", case).LigerRMSNormFunction
    # no offset of the weight, its default rounding, and not its default of writing into dy, which is used again
    return partial(function.apply, case.x_TN, case.weight_N, EPS, 0.0, "llama", False)


@provider("rms_norm", "quack")
def quack(case: RmsNorm) -> Call:
    return partial(optional("quack", case).rmsnorm, case.x_TN, case.weight_N, eps=EPS)


@provider("rms_norm", "flash_attn")
def flash_attn(case: RmsNorm) -> Call:
    norm = optional("flash_attn.ops.triton.layer_norm", case).rms_norm_fn
    return partial(norm, case.x_TN, case.weight_N, None, eps=EPS)


@provider("rms_norm", "flashinfer")
def flashinfer(case: RmsNorm) -> Call:
    return partial(optional("flashinfer.norm", case).rmsnorm, case.x_TN, case.weight_N, EPS)


def run() -> list[Row]:
    rows = []
    for dtype in DTYPES:
        case = make_case(4096, 5120, dtype)
        rows += both_ways("rms_norm", case, ("rms_norm", "rms_norm_backward"))
    return rows
