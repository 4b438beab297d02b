"""RMSNorm and SA-3D RoPE of q and k at 440 000 tokens of 40 heads of 128, q and k cut out of a packed qkv.

Minimum: q and k in and out; backward behind a norm also their gradients in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..case import TOKENS, WIDTH, Broken, Case

HEADS, HEAD_DIM, RANKS = 40, 128, 8
PAIRS = (22, 21, 21, 64)
POSITIONS = (60, 60, 104, 12)
"""Rows of the t, h, w and segment tables."""

Call = Callable[[Any, torch.dtype], None]


def _packed(dtype: torch.dtype) -> list[Tensor]:
    qkv = torch.empty(TOKENS, 3, HEADS, HEAD_DIM, dtype=dtype, device="cuda")
    return [qkv.select(1, part) for part in (0, 1)]


def _positions() -> tuple[list[Tensor], Tensor]:
    tables = [torch.empty(rows, pairs, 2, device="cuda") for rows, pairs in zip(POSITIONS, PAIRS, strict=True)]
    return tables, torch.empty(TOKENS, 4, dtype=torch.int32, device="cuda")


def _norm(norm: str | None) -> tuple[Any, ...]:
    """The weights, the norm and eps."""
    if norm is None:
        return None, None, "across_heads", 1e-6
    width = WIDTH if norm == "across_heads" else HEAD_DIM
    return torch.empty(width, device="cuda"), torch.empty(width, device="cuda"), norm, 1e-6


def _forward(norm: str | None, rounding: str = "fp32") -> Call:
    def call(kernel: Any, dtype: torch.dtype) -> None:
        kernel.qk_rope(*_packed(dtype), *_positions(), *_norm(norm), rounding)

    return call


def _by_rank(kernel: Any, dtype: torch.dtype) -> None:
    outs = [torch.empty(RANKS, TOKENS, HEADS // RANKS, HEAD_DIM, dtype=dtype, device="cuda") for _ in range(2)]
    kernel.qk_rope_out(*_packed(dtype), *_positions(), *_norm("across_heads"), "fp32", *outs)


def _backward(norm: str | None) -> Call:
    def call(kernel: Any, dtype: torch.dtype) -> None:
        gradients = [torch.empty(TOKENS, HEADS, HEAD_DIM, dtype=dtype, device="cuda") for _ in range(2)]
        kernel.qk_rope_backward(*gradients, *_packed(dtype), *_positions(), *_norm(norm))

    return call


def _moved(tensors: int) -> Callable[[torch.dtype], int]:
    return lambda dtype: tensors * TOKENS * WIDTH * dtype.itemsize


_ROTATION = "a token's four row numbers; the pairs of an axis, which begin at any pair of their table"


def _forward_case(name: str, call: Call) -> Case:
    return Case(name, "qk_rope.kernel", call, _moved(4), launches=1, narrow={"qk_rope_kernel": (8, _ROTATION)})


CASES = [
    _forward_case("qk_rope forward", _forward("across_heads")),
    _forward_case("qk_rope forward eager", _forward("across_heads", "eager")),
    _forward_case("qk_rope forward by rank", _by_rank),
    _forward_case("qk_rope forward per head", _forward("per_head")),
    _forward_case("qk_rope forward without norm", _forward(None)),
    # A thread holds 40 elements of x, of its gradient and of the weight's; three programs fit a multiprocessor. At most
    # four of the barriers are a token's; the others belong to the partial sums, written once per program.
    Case(
        "qk_rope backward", "qk_rope.kernel_bwd", _backward("across_heads"), _moved(6), launches=1,
        narrow={"across_heads_kernel": (8, _ROTATION)}, registers=171, barriers=16,
    ),
    Case(
        "qk_rope backward per head", "qk_rope.kernel_bwd", _backward("per_head"), _moved(6), launches=1,
        narrow={"per_head_kernel": (9, f"{_ROTATION}; the partial sums of one head, once per program")},
        registers=168, barriers=12,
    ),
    Case(
        "qk_rope backward without norm", "qk_rope.kernel_bwd", _backward(None), _moved(4), launches=1,
        narrow={"qk_rope_kernel": (8, _ROTATION)},
    ),
]  # fmt: skip


def _broken(name: str, old: str, new: str, caught_by: str, case: str | None = None) -> Broken:
    return Broken(name, "qk_rope.kernel", old, new, caught_by, case)


def _broken_backward(name: str, old: str, new: str, caught_by: str, case: str | None = None) -> Broken:
    return Broken(name, "qk_rope.kernel_bwd", old, new, caught_by, case)


_HINT = (
    "    axis_ptr = tl.max_contiguous(tl.multiple_of(axis_ptr, (1, 8)), (1, 2))  # a pair is one access of 8 bytes\n"
)
_FROM = "x_from = x_ptr + token * x_token * UNIT"
_ACROSS = "products = tl.zeros((X, W // 2), tl.float32)\n        xs = ()\n        gs = ()\n        "
_EACH = "PAIRS, X, W, True)\n        xs = ()\n        gs = ()\n        "
_STORED = "dx, heads, dims, count, D, FULL)\n"
_PROGRAM = "program = tl.program_id(0).to(tl.int64)\n"

BROKEN = [
    _broken("wrong stride", "side.x + token * side.x_token * UNIT", "side.x + token * HEADS * D", "semantics"),
    _broken("wrong stride of the result", "side.y + token * side.y_token * UNIT", "side.y + token * HEADS * D",
            "semantics"),
    _broken("missing mask of the store", "y.to(ptr.dtype.element_ty), None if FULL else (heads < HEADS) & (dims < D))",
            "y.to(ptr.dtype.element_ty))", "semantics"),
    _broken("missing mask of heads", "tl.load(ptr + at, (heads < HEADS) & (dims < D), 0.0)",
            "tl.load(ptr + at, (heads < HEADS + 1) & (dims < D), 0.0)", "semantics"),
    _broken("missing mask of head dims", "tl.load(ptr + at, (heads < HEADS) & (dims < D), 0.0)",
            "tl.load(ptr + at, (heads < HEADS) & (dims < D + 1), 0.0)", "semantics"),
    _broken("turned the other way", "a * cos - b * sin, a * sin + b * cos", "a * cos + b * sin, b * cos - a * sin",
            "semantics"),
    _broken("w in the slots of h", "(w_row * (D - TH) - TH)", "(w_row * (D - TH) - T)", "semantics"),
    _broken("angles subtracted", "axis_cos * segment_sin + axis_sin * segment_cos",
            "axis_cos * segment_sin - axis_sin * segment_cos", "semantics"),
    _broken("heads of the wrong rank", "(heads // PER_RANK).to(tl.int64) * side.y_rank",
            "(piece * X // PER_RANK + first * 0).to(tl.int64) * side.y_rank", "semantics"),
    _broken("eager without the rounding of the norm", "if EAGER and NORM", "if False and NORM", "semantics"),
    _broken("int32 offset", "token = tl.program_id(0).to(tl.int64)", "token = tl.program_id(0)", "lint",
            "qk_rope forward"),
    _broken("int32 row of a table", "segment_row = tl.load(rows_ptr + token * 4 + 3).to(tl.int64)",
            "segment_row = tl.load(rows_ptr + token * 4 + 3)", "lint", "qk_rope forward"),
    _broken("spilling registers", "registers=cut.elements + 56,", "registers=40,", "spills",
            "qk_rope forward"),
    _broken("cos and sin apart", _HINT, "", "widths", "qk_rope forward"),
    _broken("x is read twice", "        y = xs[piece]\n",
            "        at = token * side.x_token * UNIT + tl.full((), piece * X * UNIT, tl.int64) * side.x_head\n"
            "        y = tl.load(side.x + at + x_lanes).to(tl.float32)\n", "traffic", "qk_rope forward"),
    _broken("float64 statistics", "squares * one_over_count + eps",
            "(squares.to(tl.float64) / 5120 + eps).to(tl.float32)", "fp64", "qk_rope forward"),
    _broken_backward("across: wrong stride", _ACROSS + _FROM, _ACROSS + "x_from = x_ptr + token * count * D",
                     "semantics"),
    _broken_backward("per head: wrong stride", _EACH + _FROM, _EACH + "x_from = x_ptr + token * count * D",
                     "semantics"),
    _broken_backward("across: int32 offset", _PROGRAM + "    sums = ()", "program = tl.program_id(0)\n    sums = ()",
                     "lint", "qk_rope backward"),
    _broken_backward("per head: int32 offset", _PROGRAM + "    weight", "program = tl.program_id(0)\n    weight",
                     "lint", "qk_rope backward per head"),
    _broken_backward("across: missing mask", f"{_STORED}            grown",
                     f"{_STORED.replace('FULL', 'True')}            grown", "semantics"),
    _broken_backward("per head: missing mask", f"{_STORED}    total", f"{_STORED.replace('FULL', 'True')}    total",
                     "semantics"),
    _broken_backward("across: missing mask of the partial sums", "sums[piece], heads, dims, count, D, FULL)",
                     "sums[piece], heads, dims, count, D, True)", "semantics"),
    _broken_backward("across: turned the same way", "PAIRS, X, W, True)\n        squares",
                     "PAIRS, X, W, False)\n        squares", "semantics"),
    _broken_backward("per head: turned the same way", "PAIRS, X, W, True)\n        xs",
                     "PAIRS, X, W, False)\n        xs", "semantics"),
    _broken_backward("across: weight's gradient without the norm", "gs[piece] * (xs[piece] * r)",
                     "gs[piece] * xs[piece]", "semantics"),
    _broken_backward("per head: no gradient through the norm",
                     "r * (g - normed * (tl.sum(g * normed, 1)[:, None] * (1.0 / D)))", "r * g", "semantics"),
    _broken_backward("k with the heads of q", "HEADS[0], HEADS[1]).to(tl.int64)  #",
                     "HEADS[0], HEADS[0]).to(tl.int64)  #", "semantics"),
    _broken_backward("half a pair is not summed", "    total += b\n", "", "semantics"),
    _broken_backward("spilling registers", "registers=registers,", "registers=96,", "spills", "qk_rope backward"),
]  # fmt: skip
