"""RMSNorm at 440 000 x 5120. Minimum: x in and y out; backward x and dy in and dx out."""

from __future__ import annotations

from typing import Any

import torch

from ..case import TOKENS, WIDTH, Broken, Case


def _tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(TOKENS, WIDTH, dtype=dtype, device="cuda"), torch.empty(WIDTH, device="cuda")


def _forward(kernel: Any, dtype: torch.dtype) -> None:
    x, weight = _tensors(dtype)
    kernel.rms_norm(x, weight, 1e-6, "fp32")


def _backward(kernel: Any, dtype: torch.dtype) -> None:
    x, weight = _tensors(dtype)
    kernel.rms_norm_backward(torch.empty_like(x), x, weight, 1e-6)


CASES = [
    Case(
        "rms_norm forward", "rms_norm.kernel", _forward, lambda dtype: 2 * TOKENS * WIDTH * dtype.itemsize, launches=1
    ),
    # A thread holds 40 elements of x, of dy and of the weight's gradient; three programs fit a multiprocessor. Two of
    # the barriers are a token's; the others belong to the partial sums, written once per program.
    Case(
        "rms_norm backward", "rms_norm.kernel", _backward, lambda dtype: 3 * TOKENS * WIDTH * dtype.itemsize,
        launches=1, registers=176, barriers=12,
    ),
]  # fmt: skip


def _broken(name: str, old: str, new: str, caught_by: str, case: str | None = None) -> Broken:
    return Broken(name, "rms_norm.kernel", old, new, caught_by, case)


_LOAD = (
    "x = tl.load(x_ptr + token * x_row + at, None if EXACT else at < N, None if EXACT else 0.0).to(tl.float32)\n"
    "        squares"
)
_WEIGHTED = "y = _weighted(xs[piece] * r, weight_ptr, at, N, EXACT, HAS_WEIGHT)"
_GRADIENT = "g = _weighted(dys[piece], weight_ptr, at, N, EXACT, HAS_WEIGHT)"

BROKEN = [
    _broken("forward: wrong stride", _LOAD, _LOAD.replace("x_row", "N"), "semantics"),
    _broken("forward: int32 offset", "token = tl.program_id(0).to(tl.int64)", "token = tl.program_id(0)", "lint",
            "rms_norm forward"),
    _broken("forward: missing mask of the store", "y.to(y_ptr.dtype.element_ty), None if EXACT else at < N)",
            "y.to(y_ptr.dtype.element_ty))", "semantics"),
    _broken("forward: missing mask of the load", _LOAD,
            _LOAD.replace("None if EXACT else at < N, None if EXACT else 0.0", "None"), "semantics"),
    _broken("forward: too large a tile for its registers", 'num_warps=warps, exact=rounding == "eager"',
            'num_warps=warps, registers=32, exact=rounding == "eager"', "spills", "rms_norm forward"),
    _broken("forward: missing weight", _WEIGHTED, "y = xs[piece] * r", "semantics"),
    _broken("forward: missing eps", "tl.div_rn(squares, N) + eps", "tl.div_rn(squares, N)", "semantics"),
    _broken("forward: x is read twice", _WEIGHTED,
            f"{_LOAD.partition(chr(10))[0]}\n        {_WEIGHTED.replace('xs[piece]', 'x')}", "traffic",
            "rms_norm forward"),
    _broken("forward: idle lanes", "launch.tiles(width, 32 * warps * 8)", "(triton.next_power_of_2(width), 1)",
            "traffic", "rms_norm forward"),
    _broken("forward: float64 statistics", "return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, N) + eps))",
            "return (1.0 / tl.sqrt(squares.to(tl.float64) / N + eps)).to(tl.float32)", "fp64", "rms_norm forward"),
    _broken("backward: wrong stride", "dy_ptr + token * dy_row + at", "dy_ptr + token * N + at", "semantics"),
    _broken("backward: int32 offset", "program = tl.program_id(0).to(tl.int64)", "program = tl.program_id(0)", "lint",
            "rms_norm backward"),
    _broken("backward: missing mask", "dx.to(dx_ptr.dtype.element_ty), None if EXACT else at < N)",
            "dx.to(dx_ptr.dtype.element_ty))", "semantics"),
    _broken("backward: missing mask of the partial sums", "sums[piece], None if EXACT else at < N)", "sums[piece])",
            "semantics"),
    _broken("backward: spilling tile", "_shape(width, BACKWARD_PER_THREAD)", "_shape(width, 160)", "spills",
            "rms_norm backward"),
    _broken("backward: missing weight", _GRADIENT, "g = dys[piece]", "semantics"),
    _broken("backward: weight's gradient without the norm", "dys[piece] * (xs[piece] * r)", "dys[piece] * xs[piece]",
            "semantics"),
    _broken("backward: last token forgotten", "range(program, tokens, tl.num_programs(0))",
            "range(program, tokens - 1, tl.num_programs(0))", "semantics"),
    _broken("backward: a barrier per piece", "square, product = tl.split(tl.sum(tl.join(squares, products), 0))",
            "square, product = 0.0, 0.0\n        for piece in tl.static_range(TILES):\n"
            "            square += tl.sum(xs[piece] * xs[piece])\n"
            "            product += tl.sum(dys[piece] * xs[piece])", "barriers", "rms_norm backward"),
]  # fmt: skip
