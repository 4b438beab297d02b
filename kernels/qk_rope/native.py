"""``qk_rope`` by the native library, on CPU tensors in float32 or bfloat16, under ``rounding="fp32"``.

Any strides with a contiguous last axis are read and written as they are, q and k cut out of a fused projection too;
a tensor with another last axis is copied first. Weights that are neither float32 nor bfloat16 and gradients of
weights that are not float32 are converted here. Shapes: T tokens, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, byref, c_double, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from ..native import loader

AXES = ("t", "h", "w", "segment")


_Addresses, _Sizes = c_void_p * 4, c_int64 * 4


class _Side(Structure):
    """``Side`` in native.cpp: one of q and k."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "grad", "out", "weight", "dweight")),
        *((name, c_int64) for name in ("x_token", "x_head", "grad_token", "grad_head")),
        *((name, c_int64) for name in ("out_rank", "out_token", "out_head", "heads", "heads_per_rank", "weight_bf16")),
    )


class _Call(Structure):
    """``Call`` in native.cpp."""

    _fields_ = (
        ("q", _Side),
        ("k", _Side),
        ("tables", _Addresses),
        ("table_rows", _Sizes),
        ("table_pairs", _Sizes),
        ("rows", c_void_p),
        ("tokens", c_int64),
        ("head_dim", c_int64),
        ("eps", c_double),
        *((name, c_int64) for name in ("bf16", "per_head", "wide_rows", "wide_tables")),
    )


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A new contiguous tensor in the shape of x."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _rows_whole(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _readable(weight: Tensor | None) -> Tensor | None:
    """The weight as the library reads it: contiguous float32 or bfloat16."""
    if weight is None:
        return None
    weight = weight if weight.dtype in (torch.float32, torch.bfloat16) else weight.float()
    return weight.contiguous()


def _side(x: Tensor, out: Tensor, weight: Tensor | None, dy: Tensor | None, dweight: Tensor | None) -> _Side:
    out_rank, out_token, out_head, _ = out.stride() if out.dim() == 4 else (0, *out.stride())
    return _Side(
        x.data_ptr(),
        None if dy is None else dy.data_ptr(),
        out.data_ptr(),
        None if weight is None else weight.data_ptr(),
        None if dweight is None else dweight.data_ptr(),
        *x.stride()[:2],
        *((0, 0) if dy is None else dy.stride()[:2]),
        out_rank,
        out_token,
        out_head,
        x.shape[1],
        out.shape[-2],
        weight is not None and weight.dtype == torch.bfloat16,
    )


def _run(
    name: str, q: _Side, k: _Side, like: Tensor, tables: Sequence[Tensor], rows: Tensor, norm: str, eps: float
) -> None:
    """Calls the library; ``like`` is q.

    Raises:
        IndexError: a row number is outside its table; nothing has been written then.
    """
    tables, rows = [table.contiguous() for table in tables], rows.contiguous()
    call = _Call(
        q,
        k,
        _Addresses(*[table.data_ptr() for table in tables]),
        _Sizes(*[table.shape[0] for table in tables]),
        _Sizes(*[table.shape[1] for table in tables]),
        rows.data_ptr(),
        like.shape[0],
        like.shape[2],
        eps,
        like.dtype == torch.bfloat16,
        norm == "per_head",
        rows.dtype == torch.int64,
        tables[0].dtype == torch.float64,
    )
    bad = loader.function(name, c_int64, c_void_p, c_int)(byref(call), torch.get_num_threads())
    if bad >= 0:
        token, axis = divmod(bad, 4)
        raise IndexError(
            f"qk_rope: row {int(rows[token, axis])} at position [{token}, {axis}] is outside the {AXES[axis]} table "
            f"of {tables[axis].shape[0]} rows"
        )


def qk_rope_out(
    q_THD: Tensor,
    k_THD: Tensor,
    tables: Sequence[Tensor],
    rows_T4: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm: str,
    eps: float,
    rounding: str,
    q_out: Tensor,
    k_out: Tensor,
) -> None:
    """:func:`qk_rope` into ``[T, H, D]`` or ``[ranks, T, H/ranks, D]``, any strides with a contiguous last axis."""
    q, k, q_weight, k_weight = _rows_whole(q_THD), _rows_whole(k_THD), _readable(q_weight), _readable(k_weight)
    sides = (_side(q, q_out, q_weight, None, None), _side(k, k_out, k_weight, None, None))
    _run("bernini_qk_rope", *sides, q, tables, rows_T4, norm, eps)
    torch.autograd.graph.increment_version((q_out, k_out))


def qk_rope(
    q_THD: Tensor,
    k_THD: Tensor,
    tables: Sequence[Tensor],
    rows_T4: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm: str,
    eps: float,
    rounding: str,
) -> tuple[Tensor, Tensor]:
    """See :func:`bernini.kernels.qk_rope`; the arguments are those of the reference."""
    q, k = _like(q_THD), _like(k_THD)
    qk_rope_out(q_THD, k_THD, tables, rows_T4, q_weight, k_weight, norm, eps, rounding, q, k)
    return q, k


def qk_rope_backward(
    dq_THD: Tensor,
    dk_THD: Tensor,
    q_THD: Tensor,
    k_THD: Tensor,
    tables: Sequence[Tensor],
    rows_T4: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for q, k and the two weights (empty tensors where there are none)."""
    q, k, dq, dk = (_rows_whole(x) for x in (q_THD, k_THD, dq_THD, dk_THD))
    wq, wk = _readable(q_weight), _readable(k_weight)
    dwq, dwk = (None if weight is None else _like(weight, torch.float32) for weight in (wq, wk))
    q_out, k_out = _like(q), _like(k)
    sides = (_side(q, q_out, wq, dq, dwq), _side(k, k_out, wk, dk, dwk))
    _run("bernini_qk_rope_backward", *sides, q, tables, rows_T4, norm, eps)
    if q_weight is None or k_weight is None or dwq is None or dwk is None:
        return q_out, k_out, q.new_empty(0), k.new_empty(0)
    return q_out, k_out, dwq.to(q_weight.dtype), dwk.to(k_weight.dtype)
