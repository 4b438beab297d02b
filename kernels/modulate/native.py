"""``modulate`` by the native library, on CPU tensors in float32 or bfloat16, under ``rounding="fp32"``.

Rows of the residual, the branch and the tables may be any distance apart; where the last axis is not contiguous the
tensor is copied first. Tables, weight and bias that are neither float32 nor bfloat16, and gradients of those that are
not float32, are converted here. Shapes: T tokens, N width, R rows of the tables.
"""

from __future__ import annotations

from ctypes import Structure, byref, c_double, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from ..native import loader

PARTS = ("gate", "scale", "shift", "weight", "bias")


class _Part(Structure):
    """``Part`` in native.cpp: a table, weight or bias."""

    _fields_ = (("data", c_void_p), ("step", c_int64), ("half", c_int64))


class _Call(Structure):
    """``Call`` in native.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("residual", "branch", "dsum", "dnormed")),
        *((name, c_int64) for name in ("residual_step", "branch_step", "dsum_step", "dnormed_step")),
        *((name, c_void_p) for name in ("sum", "normed", "dresidual", "dbranch")),
        *((name, _Part) for name in PARTS),
        *((f"d{name}", c_void_p) for name in PARTS),
        ("index", c_void_p),
        *((name, c_int64) for name in ("wide_index", "tokens", "width", "rows")),
        ("eps", c_double),
        ("bf16", c_int64),
    )


class _Arguments:
    """A :class:`_Call` under construction, and the tensors it points to."""

    def __init__(self, residual: Tensor, index: Tensor | None, eps: float, parts: tuple[Tensor | None, ...]) -> None:
        """``parts`` are gate, scale, shift, weight and bias."""
        self.call = _Call(eps=eps, bf16=residual.dtype == torch.bfloat16)
        self.call.tokens, self.call.width = residual.shape
        self.call.rows = next((table.shape[0] for table in parts[:3] if table is not None), 1)
        self.kept: list[Tensor] = []
        self.index = index
        if index is not None:
            self.call.index, self.call.wide_index = self._keep(index.contiguous()), index.dtype == torch.int64
        for name, part in zip(PARTS, parts, strict=True):
            if part is not None:
                part = part if part.dtype in (torch.float32, torch.bfloat16) else part.float()
                part = part if part.stride(-1) == 1 else part.contiguous()
                setattr(self.call, name, _Part(self._keep(part), part.stride(0), part.dtype == torch.bfloat16))

    def _keep(self, x: Tensor) -> int:
        self.kept.append(x)
        return x.data_ptr()

    def reads(self, **tensors: Tensor) -> None:
        for name, x in tensors.items():
            x = x if x.stride(-1) == 1 else x.contiguous()
            setattr(self.call, name, self._keep(x))
            setattr(self.call, f"{name}_step", x.stride(0))

    def writes(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A new tensor that the call fills."""
        out = torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
        setattr(self.call, name, self._keep(out))
        return out

    def run(self, name: str) -> None:
        """Calls the library.

        Raises:
            IndexError: an index is outside the tables; nothing has been written then.
        """
        bad = loader.function(name, c_int64, c_void_p, c_int)(byref(self.call), torch.get_num_threads())
        if bad >= 0 and self.index is not None:
            raise IndexError(
                f"modulate: index {int(self.index[bad])} at position {bad} is outside tables of {self.call.rows} rows"
            )


def modulate(
    residual_TN: Tensor,
    branch_TN: Tensor,
    gate_RN: Tensor | None,
    scale_RN: Tensor | None,
    shift_RN: Tensor | None,
    index_T: Tensor | None,
    weight_N: Tensor | None,
    bias_N: Tensor | None,
    eps: float,
    rounding: str,
) -> tuple[Tensor, Tensor]:
    """See :func:`bernini.kernels.modulate`; the arguments are those of the reference."""
    arguments = _Arguments(residual_TN, index_T, eps, (gate_RN, scale_RN, shift_RN, weight_N, bias_N))
    arguments.reads(residual=residual_TN, branch=branch_TN)
    new = arguments.writes("sum", residual_TN, residual_TN.dtype)
    normed = arguments.writes("normed", residual_TN, residual_TN.dtype)
    arguments.run("bernini_modulate")
    return new, normed


def modulate_norm(
    residual_TN: Tensor,
    scale_RN: Tensor | None,
    shift_RN: Tensor | None,
    index_T: Tensor | None,
    weight_N: Tensor | None,
    bias_N: Tensor | None,
    eps: float,
    rounding: str,
) -> Tensor:
    """The second half of :func:`modulate`, where nothing is added to the residual."""
    arguments = _Arguments(residual_TN, index_T, eps, (None, scale_RN, shift_RN, weight_N, bias_N))
    arguments.reads(residual=residual_TN)
    normed = arguments.writes("normed", residual_TN, residual_TN.dtype)
    arguments.run("bernini_modulate")
    return normed


def _backward(
    gradients: dict[str, Tensor],
    residual_TN: Tensor,
    branch_TN: Tensor | None,
    parts: tuple[Tensor | None, ...],
    index_T: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradients for residual, branch and the parts; empty tensors where there are none."""
    arguments = _Arguments(residual_TN, index_T, eps, parts)
    arguments.reads(residual=residual_TN, **gradients)
    dresidual = arguments.writes("dresidual", residual_TN, residual_TN.dtype)
    dbranch = residual_TN.new_empty(0)
    if branch_TN is not None:
        arguments.reads(branch=branch_TN)
        if parts[0] is not None:
            dbranch = arguments.writes("dbranch", branch_TN, branch_TN.dtype)
    wide = [
        residual_TN.new_empty(0) if part is None else arguments.writes(f"d{name}", part, torch.float32)
        for name, part in zip(PARTS, parts, strict=True)
    ]
    arguments.run("bernini_modulate_backward")
    narrow = (grad if part is None else grad.to(part.dtype) for grad, part in zip(wide, parts, strict=True))
    return dresidual, dbranch, *narrow


def modulate_backward(
    dresidual_TN: Tensor,
    dnormed_TN: Tensor,
    residual_TN: Tensor,
    branch_TN: Tensor,
    gate_RN: Tensor | None,
    scale_RN: Tensor | None,
    shift_RN: Tensor | None,
    index_T: Tensor | None,
    weight_N: Tensor | None,
    bias_N: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradients for residual, branch, gate, scale, shift, weight and bias; dbranch is empty without a gate."""
    parts = (gate_RN, scale_RN, shift_RN, weight_N, bias_N)
    gradients = {"dsum": dresidual_TN, "dnormed": dnormed_TN}
    return _backward(gradients, residual_TN, branch_TN, parts, index_T, eps)


def modulate_norm_backward(
    dnormed_TN: Tensor,
    residual_TN: Tensor,
    scale_RN: Tensor | None,
    shift_RN: Tensor | None,
    index_T: Tensor | None,
    weight_N: Tensor | None,
    bias_N: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradients for residual, scale, shift, weight and bias."""
    parts = (None, scale_RN, shift_RN, weight_N, bias_N)
    dresidual, _, _, *others = _backward({"dnormed": dnormed_TN}, residual_TN, None, parts, index_T, eps)
    return dresidual, *others
