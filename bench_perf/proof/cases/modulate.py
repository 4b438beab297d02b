"""Gated residual, LayerNorm and modulation at 440 000 x 5120, with fp32 tables as the renderer has them.

Minimum: with a branch residual and branch in, both results out; without one residual in, normed out. Backward the same
inputs and a gradient for each result in; dresidual and, with a gate, dbranch out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..case import TOKENS, WIDTH, Broken, Case

SAMPLES = 4
"""Of equal length, packed one after the other, each with a row of the tables (a timestep) of its own."""


def _data(count: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty(TOKENS, WIDTH, dtype=dtype, device="cuda") for _ in range(count)]


def _tables(count: int, rows: int) -> list[Tensor]:
    """Parts of a time projection ``[R, 6, N]``."""
    return list(torch.empty(rows, 6, WIDTH, device="cuda").unbind(1))[:count]


def _index(rows: int) -> Tensor | None:
    return None if rows == 1 else torch.empty(TOKENS, dtype=torch.int64, device="cuda")


def _affine() -> list[Tensor]:
    return [torch.empty(WIDTH, device="cuda") for _ in range(2)]


Call = Callable[[Any, torch.dtype], None]


def _chain(rows: int, rounding: str = "fp32") -> Call:
    def call(kernel: Any, dtype: torch.dtype) -> None:
        kernel.modulate(*_data(2, dtype), *_tables(3, rows), _index(rows), None, None, 1e-6, rounding)

    return call


def _chain_backward(rows: int) -> Call:
    def call(kernel: Any, dtype: torch.dtype) -> None:
        kernel.modulate_backward(*_data(4, dtype), *_tables(3, rows), _index(rows), None, None, 1e-6)

    return call


def _affine_forward(kernel: Any, dtype: torch.dtype) -> None:
    kernel.modulate(*_data(2, dtype), None, None, None, None, *_affine(), 1e-6, "fp32")


def _affine_backward(kernel: Any, dtype: torch.dtype) -> None:
    kernel.modulate_backward(*_data(4, dtype), None, None, None, None, *_affine(), 1e-6)


def _everything_backward(kernel: Any, dtype: torch.dtype) -> None:
    kernel.modulate_backward(*_data(4, dtype), *_tables(3, SAMPLES), _index(SAMPLES), *_affine(), 1e-6)


def _norm(kernel: Any, dtype: torch.dtype) -> None:
    kernel.modulate_norm(*_data(1, dtype), *_tables(2, 1), None, None, None, 1e-6, "fp32")


def _norm_backward(kernel: Any, dtype: torch.dtype) -> None:
    kernel.modulate_norm_backward(*_data(2, dtype), *_tables(2, 1), None, None, None, 1e-6)


def _moved(tensors: int) -> Callable[[torch.dtype], int]:
    return lambda dtype: tensors * TOKENS * WIDTH * dtype.itemsize


_ROW = {"modulate_kernel": (1, "the token's row of the tables")}
_TAIL = "the last 1024 of a row's 2048 + 2048 + 1024 are 64 bits per thread, loaded before the loop and in it"


def _backward(name: str, call: Call, tensors: int, rows: int = 1) -> Case:
    scalars = 7 if rows > 1 else 0
    starts = np.arange(rows + 1) * (TOKENS // rows)
    return Case(
        name,
        "modulate.kernel_bwd",
        call,
        _moved(tensors),
        launches=2,
        narrow={
            "modulate_backward_kernel": (2 * tensors + scalars, f"{_TAIL}; a program's and a row's share of the order"),
            "row_sums_kernel": (3, "128 sums are 32 bits per thread; a row's share of the order"),
        },
        # One program has all registers of a multiprocessor: see the kernel's file.
        registers=255,
        barriers=24,
        values={"order.1": np.repeat(np.arange(rows), TOKENS // rows), "order.2": starts, "starts_ptr": starts},
    )


CASES = [
    Case("modulate forward", "modulate.kernel", _chain(1), _moved(4), launches=1),
    Case("modulate forward by index", "modulate.kernel", _chain(SAMPLES), _moved(4), launches=1, narrow=_ROW),
    Case("modulate forward eager", "modulate.kernel", _chain(SAMPLES, "eager"), _moved(4), launches=1, narrow=_ROW),
    Case("modulate forward affine", "modulate.kernel", _affine_forward, _moved(4), launches=1),
    Case("modulate forward norm", "modulate.kernel", _norm, _moved(2), launches=1),
    _backward("modulate backward", _chain_backward(1), 6),
    _backward("modulate backward by index", _chain_backward(SAMPLES), 6, SAMPLES),
    _backward("modulate backward with everything", _everything_backward, 6, SAMPLES),
    _backward("modulate backward affine", _affine_backward, 5),
    _backward("modulate backward norm", _norm_backward, 3),
]

_BACKWARD = "modulate.kernel_bwd"

BROKEN = [
    Broken("wrong stride", "modulate.kernel", "token * residual_row + at", "token * N + at", "semantics"),
    Broken("wrong stride of a table", "modulate.kernel", "row * table_rows[1] + at", "row * N + at", "semantics"),
    Broken("missing mask of a store", "modulate.kernel", "ys[piece], None if EXACT else at < N)", "ys[piece], None)",
           "semantics"),
    Broken("idle lanes in the variance", "modulate.kernel", "c = tl.where(piece * TILE + columns < N, c, 0.0)", "c = c",
           "semantics"),
    Broken("eager norms the unrounded sum", "modulate.kernel", "h = h.to(h_ptr.dtype.element_ty).to(tl.float32)",
           "h = h", "semantics"),
    Broken("int32 offset", "modulate.kernel", "token = tl.program_id(0).to(tl.int64)", "token = tl.program_id(0)",
           "lint", "modulate forward"),
    Broken("spilling tile", "modulate.kernel", "min(max(tile * dtype.itemsize // (16 * 32), 1), 16)", "1", "spills",
           "modulate forward"),
    Broken("a result read back", "modulate.kernel", "y = cs[piece] * r",
           "y = (tl.load(h_ptr + token * N + at) - mean) * r", "traffic", "modulate forward"),
    Broken("wrong stride", _BACKWARD, "token * gradient_rows[1]", "token * N", "semantics"),
    Broken("missing mask of a store", _BACKWARD, "element_ty), None if PIECES[piece][2] else at < N)",
           "element_ty), None)", "semantics"),
    Broken("idle lanes in the variance", _BACKWARD,
           "c = tl.where(PIECES[piece][0] + tl.arange(0, PIECES[piece][1]) < N, c, 0.0)", "c = c", "semantics"),
    Broken("parts of two rows share a slot", _BACKWARD, "slot = partial_ptr + (program + row)",
           "slot = partial_ptr + program", "semantics"),
    Broken("tokens in their own order", _BACKWARD, "tl.load(order[0] + place)", "place", "semantics"),
    Broken("a program too few", _BACKWARD, "(end + chunk - 1) // chunk", "end // chunk", "semantics"),
    Broken("int32 offset", _BACKWARD, "program = tl.program_id(0).to(tl.int64)", "program = tl.program_id(0)", "lint",
           "modulate backward"),
    Broken("int32 offset of sums", _BACKWARD, "    row = tl.program_id(0).to(tl.int64)", "    row = tl.program_id(0)",
           "lint", "modulate backward"),
    Broken("spilling tile", _BACKWARD, "LARGEST_SHARE = 20", "LARGEST_SHARE = 40", "spills", "modulate backward"),
    Broken("a token read twice", _BACKWARD, "dn = dns[piece].to(tl.float32)\n                dh =",
           "dn = tl.load(gradients[1] + token * gradient_rows[1] + PIECES[piece][0] + tl.arange(0, PIECES[piece][1]))"
           ".to(tl.float32)\n                dh =", "traffic", "modulate backward"),
]  # fmt: skip
