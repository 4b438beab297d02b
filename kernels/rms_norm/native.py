"""``rms_norm`` by the native library, on CPU tensors in float32 or bfloat16. Shapes: T tokens, N width.

Rows may be any distance apart; where the last axis is not contiguous the tensor is copied first. A weight that is not
float32, and the gradient of such a one, is converted here.
"""

from __future__ import annotations

from ctypes import Structure, byref, c_double, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from ..native import loader


class _Call(Structure):
    """``Call`` in native.cpp."""

    _fields_ = (
        ("x", c_void_p), ("dy", c_void_p), ("x_step", c_int64), ("dy_step", c_int64), ("weight", c_void_p),
        ("y", c_void_p), ("dx", c_void_p), ("dweight", c_void_p), ("tokens", c_int64), ("width", c_int64),
        ("eps", c_double), ("bf16", c_int64),
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """``[..., N]`` as ``[T, N]`` with a contiguous last axis."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _run(name: str, x: Tensor, eps: float, *, dy: Tensor | None = None, **pointers: Tensor | None) -> None:
    call = _Call(x=x.data_ptr(), x_step=x.stride(0), eps=eps, bf16=x.dtype == torch.bfloat16)
    if dy is not None:
        call.dy, call.dy_step = dy.data_ptr(), dy.stride(0)
    call.tokens, call.width = x.shape
    for field, tensor in pointers.items():
        if tensor is not None:
            setattr(call, field, tensor.data_ptr())
    loader.function(name, None, c_void_p, c_int)(byref(call), torch.get_num_threads())


def _wide(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.float().contiguous()


def rms_norm(x_TN: Tensor, weight_N: Tensor | None, eps: float, rounding: str) -> Tensor:
    """See :func:`bernini.kernels.rms_norm`; computes in float32 and rounds once."""
    y = torch.empty(x_TN.shape, dtype=x_TN.dtype)
    if y.numel():
        _run("bernini_rms_norm", _rows(x_TN), eps, weight=_wide(weight_N), y=y)
    return y


def rms_norm_backward(dy_TN: Tensor, x_TN: Tensor, weight_N: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients for x and weight, an empty one where there is no weight."""
    dx = torch.empty(x_TN.shape, dtype=x_TN.dtype)
    dweight = None if weight_N is None else torch.zeros(weight_N.shape)
    if dx.numel():
        dy = _rows(dy_TN.to(x_TN.dtype))
        _run("bernini_rms_norm_backward", _rows(x_TN), eps, dy=dy, weight=_wide(weight_N), dx=dx, dweight=dweight)
    return dx, x_TN.new_empty(0) if weight_N is None or dweight is None else dweight.to(weight_N.dtype)
