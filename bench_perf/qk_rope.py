"""RMSNorm of q and k over all heads, then SA-3D RoPE, at the widths of the 14B and the 1.3B model.

Peers get what they need of the rotation per token, made once and not timed, as diffusers does once per forward; ours
reads four small tables and four row numbers per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bernini.kernels import qk_rope, rope_tables
from bernini.kernels.qk_rope import reference
from bernini.kernels.qk_rope.tables import axis_dims

from .harness import Row
from .kernels import BANDWIDTH, DTYPES, both_ways, device, measure
from .providers import Call, Case, Unable, compiled, optional, provider

EPS = 1e-6
BARS = {"eager": 12.0, "torch.compile": 3.0}
FLASHINFER_HEADS = 32  # the most that its kernel takes


@dataclass(frozen=True, kw_only=True)
class QkRope(Case):
    """Shapes: T tokens, H heads, D head dim, N = H * D."""

    grid: tuple[int, int, int]
    segments: int
    """Of one grid each; the last is the target, with phase 0, the others are sources with phases 1, 2, ..."""
    q_THD: Tensor
    k_THD: Tensor
    q_weight_N: Tensor
    k_weight_N: Tensor
    tables: tuple[Tensor, ...]
    rows_T4: Tensor

    @property
    def shape(self) -> str:
        return f"{' x '.join(map(str, self.q_THD.shape))}, {self.segments} segment{'s' * (self.segments > 1)}"

    @property
    def moved(self) -> int:
        return 2 * (self.q_THD.nbytes + self.k_THD.nbytes)  # read x, write y

    @property
    def moved_backward(self) -> int:
        return 3 * (self.q_THD.nbytes + self.k_THD.nbytes)  # read x and dy, write dx

    def leaves(self) -> list[Tensor]:
        return [self.q_THD, self.k_THD, self.q_weight_N, self.k_weight_N]

    def reference(self) -> tuple[Tensor, Tensor]:
        q, k, q_weight, k_weight = self.leaves()
        return reference.qk_rope(q, k, self.tables, self.rows_T4, q_weight, k_weight, "across_heads", EPS, "fp32")

    def each(self, one: Callable[[Tensor, Tensor], Tensor]) -> Call:
        """A call that does ``one(x, weight)`` for q and for k."""
        return lambda: (one(self.q_THD, self.q_weight_N), one(self.k_THD, self.k_weight_N))

    def cos_sin(self) -> tuple[Tensor, Tensor]:
        """Of each token, ``[T, D/2]`` float64."""
        cos, sin = reference.rope_factors([table.double() for table in self.tables], self.rows_T4).unbind(-1)
        return cos, sin


def make_case(grid: tuple[int, int, int], segments: int, heads: int, dtype: torch.dtype, head_dim: int = 128) -> QkRope:
    torch.manual_seed(0)
    t, h, w = (torch.arange(size) for size in grid)
    rows = torch.cat([F.pad(torch.cartesian_prod(t, h, w), (0, 1), value=number) for number in range(segments)])
    q, k, *gradients = (torch.randn(len(rows), heads, head_dim, device=device()).to(dtype) for _ in range(4))
    q_weight, k_weight = (torch.rand(2, heads * head_dim, device=device()) + 0.5).to(dtype).unbind()
    return QkRope(
        gradients=tuple(gradients), grid=grid, segments=segments, q_THD=q, k_THD=k, q_weight_N=q_weight,
        k_weight_N=k_weight, tables=rope_tables(head_dim, grid, [*range(1, segments), 0], device=device()),
        rows_T4=rows.to(device()),
    )  # fmt: skip


@provider("qk_rope", "bernini")
def bernini(case: QkRope) -> Call:
    q, k, q_weight, k_weight = case.leaves()
    return partial(qk_rope, q, k, case.tables, case.rows_T4, q_weight=q_weight, k_weight=k_weight, eps=EPS)


def _norm(x_THD: Tensor, weight_N: Tensor) -> Tensor:
    """``torch.nn.RMSNorm`` over all heads."""
    return F.rms_norm(x_THD.flatten(1), weight_N.shape, weight_N, EPS).view(x_THD.shape)


@provider("qk_rope", "eager")
def eager(case: QkRope) -> Call:
    """diffusers' ``WanAttnProcessor`` between the projections and attention."""
    cos, sin = (part.float().unsqueeze(1) for part in case.cos_sin())

    def one(x: Tensor, weight: Tensor) -> Tensor:
        normed = _norm(x, weight)
        x1, x2 = normed.unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.empty_like(normed)
        out[..., 0::2] = x1 * cos - x2 * sin
        out[..., 1::2] = x1 * sin + x2 * cos
        return out

    return case.each(one)


@provider("qk_rope", "diffusers")
def diffusers(case: QkRope) -> Call:
    """diffusers' own ``apply_rotary_emb``, taken out of the method that it is nested in."""
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    method = WanAttnProcessor.__call__
    parts = [part for part in method.__code__.co_consts if isinstance(part, CodeType)]
    found = [part for part in parts if part.co_name == "apply_rotary_emb" and not part.co_freevars]
    if not found:
        raise Unable("its WanAttnProcessor has no function apply_rotary_emb of its own")
    rotate = FunctionType(found[0], method.__globals__)
    cos, sin = (part.float().repeat_interleave(2, 1).unsqueeze(1) for part in case.cos_sin())
    return case.each(lambda x, weight: rotate(_norm(x, weight), cos, sin))


@provider("qk_rope", "complex128")
def complex128(case: QkRope) -> Call:
    """The released system: the rotation as a product of complex doubles."""
    factor = torch.complex(*case.cos_sin()).unsqueeze(1)

    def one(x: Tensor, weight: Tensor) -> Tensor:
        pairs = _norm(x, weight).to(torch.float64).unflatten(-1, (-1, 2))
        return torch.view_as_real(torch.view_as_complex(pairs) * factor).flatten(2).to(x.dtype)

    return case.each(one)


def _flip(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x * cos + flip(x) * sin`` in float32: whole rows are read and written, which compiles well."""
    y = _norm(x.float(), weight.float())
    return (y * cos + y.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * sin).to(x.dtype)


def _flip_both(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return _flip(q, q_weight, cos, sin), _flip(k, k_weight, cos, sin)


@provider("qk_rope", "torch.compile")
def torch_compile(case: QkRope) -> Call:
    """diffusers' form writes every second number, which compiles four times worse."""
    cos, sin = case.cos_sin()
    cos = cos.float().repeat_interleave(2, 1).unsqueeze(1)
    sin = torch.stack((-sin, sin), -1).float().flatten(1).unsqueeze(1)
    return compiled(_flip_both, *case.leaves(), cos, sin)


@provider("qk_rope", "flash_attn")
def flash_attn(case: QkRope) -> Call:
    """Its norm, then its rotation: two kernels each for q and k."""
    norm = optional("flash_attn.ops.triton.layer_norm", case).rms_norm_fn
    rotate = optional("flash_attn.layers.rotary", case).apply_rotary_emb
    cos, sin = (part.float() for part in case.cos_sin())

    def one(x: Tensor, weight: Tensor) -> Tensor:
        normed = norm(x.flatten(1), weight, None, eps=EPS).view(1, *x.shape)
        return rotate(normed, cos, sin, interleaved=True)[0]

    return case.each(one)


@provider("qk_rope", "liger")
@provider("qk_rope", "quack")
def half_split(case: QkRope) -> Call:
    raise Unable("rotates halves of a head, not adjacent pairs")


@provider("qk_rope", "flashinfer")
def flashinfer(case: QkRope) -> Call:
    """It also copies v, a third more to move; it takes one packed tensor, made before."""
    _, heads, head_dim = case.q_THD.shape
    if heads > FLASHINFER_HEADS:
        raise Unable(f"takes at most {FLASHINFER_HEADS} heads, here are {heads}")
    if case.segments > 1:
        raise Unable("takes one grid per sequence, here are several segments")
    if case.dtype != torch.bfloat16:
        raise Unable("takes bfloat16 only")
    fused = optional("flashinfer.diffusion_ops", case).fused_qk_rmsnorm_rope
    qkv = torch.cat([x.flatten(1) for x in (case.q_THD, case.k_THD, case.k_THD)], 1)[None]
    sizes = dict(zip(("ppf", "pph", "ppw"), case.grid, strict=True))
    names = (f"num_{axis}_channels" for axis in ("frame", "height", "width"))
    channels = dict(zip(names, axis_dims(head_dim), strict=True))
    counts = {f"num_heads_{part}": heads for part in "qkv"}

    def call() -> tuple[Tensor, Tensor]:
        q, k, _ = fused(
            qkv, case.q_weight_N, case.k_weight_N, **sizes, **channels, **counts, head_dim=head_dim, eps=EPS
        )
        return q.view_as(case.q_THD), k.view_as(case.k_THD)

    return call


def run() -> list[Row]:
    rows = []
    for dtype in DTYPES:
        case = make_case((2, 32, 32), 2, 40, dtype)
        rows += both_ways("qk_rope", case, ("qk_rope", "qk_rope_backward"), bars=BARS, bandwidth=BANDWIDTH)
    case = make_case((5, 40, 40), 1, 12, torch.bfloat16)
    return rows + measure("qk_rope", case, op="qk_rope")
