"""``scatter_rows`` and ``gather_rows``: checks, registration and the public functions.

Shapes: T rows of the buffer, N width, n rows of a piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, launch
from ..native import loader
from . import native, reference


def _check_range(index: Tensor, rows: int) -> None:
    """On the CPU only: elsewhere reading the values would wait for the device."""
    if index.device.type == "cpu" and index.numel():
        bad = (index < 0) | (index >= rows)
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise IndexError(f"index {int(index[first])} at position {first} is outside a buffer of {rows} rows")


def _reference_scatter(out: Tensor, sources: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    for index in indices:
        _check_range(index, out.shape[0])
    reference.scatter_rows(out, sources, indices)


def _reference_gather(x: Tensor, index: Tensor) -> Tensor:
    _check_range(index, x.shape[0])
    return reference.gather_rows(x, index)


def _native_scatter(out: Tensor, sources: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    """Copies bytes, so rows that must change dtype or do not lie in one piece are the reference's."""
    (native.scatter_rows if native.serves(out, *sources) else _reference_scatter)(out, sources, indices)


def _native_gather(x: Tensor, index: Tensor) -> Tensor:
    return (native.gather_rows if native.serves(x) else _reference_gather)(x, index)


for _op in ("scatter_rows", "gather_rows", "gather_rows_backward"):
    dispatch.provide(_op, launch.triton_implementation(__package__, _op))
_NATIVE: dict[str, Any] = {"devices": ("cpu",), "missing": loader.missing}
dispatch.provide("scatter_rows", dispatch.Implementation("native", _native_scatter, **_NATIVE))
dispatch.provide("scatter_rows", dispatch.Implementation("reference", _reference_scatter))
dispatch.provide("gather_rows", dispatch.Implementation("native", _native_gather, **_NATIVE))
dispatch.provide("gather_rows", dispatch.Implementation("reference", _reference_gather))
dispatch.provide("gather_rows_backward", dispatch.Implementation("reference", reference.gather_rows_backward))


def _scatter(out: Tensor, sources: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    dispatch.run("scatter_rows", out.device, out.dtype, "fp32", out, sources, indices)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    return dispatch.run("gather_rows", x.device, x.dtype, "fp32", x, index)


def _gather_backward(dy: Tensor, index: Tensor, rows: int) -> Tensor:
    return dispatch.run("gather_rows_backward", dy.device, dy.dtype, "fp32", dy, index, rows)


def _fake_scatter(out: Tensor, sources: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    return None


def _fake_gather(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((index.shape[0], x.shape[1]))


def _fake_gather_backward(dy: Tensor, index: Tensor, rows: int) -> Tensor:
    return dy.new_empty((rows, dy.shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index = inputs
    ctx.rows = x.shape[0]
    ctx.save_for_backward(index)


def _grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    return torch.ops.bernini.gather_rows_backward(dy, index, ctx.rows), None


dispatch.define("scatter_rows(Tensor(a!) out, Tensor[] sources, Tensor[] indices) -> ()", _scatter, _fake_scatter)
dispatch.define(
    "gather_rows_backward(Tensor dy, Tensor index, SymInt rows) -> Tensor", _gather_backward, _fake_gather_backward
)
dispatch.define(
    "gather_rows(Tensor x, Tensor index) -> Tensor", _gather, _fake_gather, setup_context=_save, backward=_grad
)


class _Scatter(torch.autograd.Function):
    """The gradient of a source is the rows that it filled; torch.library allows no gradient for a mutating op."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, count: int, *pieces: Tensor) -> Tensor:
        sources, indices = pieces[:count], pieces[count:]
        torch.ops.bernini.scatter_rows(out, sources, indices)
        ctx.mark_dirty(out)
        ctx.save_for_backward(*indices)
        ctx.dtypes = [source.dtype for source in sources]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        indices = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2 : 2 + len(indices)]
        grads = [
            torch.ops.bernini.gather_rows(grad, index).to(dtype) if need else None
            for index, dtype, need in zip(indices, ctx.dtypes, wanted, strict=True)
        ]
        return None, None, *grads, *[None] * len(indices)


def scatter_rows(out_TN: Tensor, sources: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """Writes the rows of every source into ``out``, in place: ``out[indices[i][j]] = sources[i][j]``.

    Moves, per element of a source, its bytes once in and out's bytes once out, and 4 or 8 bytes of index per row; rows
    of ``out`` that no index names are left as they are and not touched. There is no temporary of full size.

    Targets must be distinct, within one index and between them; that is not checked, and which of two rows wins is
    undefined.

    Args:
        out_TN: ``[T, N]``, floating point, any strides. It must not require grad: it is a buffer.
        sources: ``[n_i, N]`` each, in any floating dtype; converted on the way.
        indices: ``[n_i]`` each, int32 or int64, values in [0, T) (checked on the CPU only).

    Returns:
        ``out_TN`` itself. Differentiable in the sources: source i gets ``grad[indices[i]]``. After a call with a
        source that requires grad the buffer is part of that graph; hand ``out.detach()`` to the next one.

    Raises:
        ValueError: wrong shapes, dtypes, devices or counts, or a buffer that requires grad.
        IndexError: on the CPU, an index outside [0, T); nothing has been written then.

    Source: the definition above.
    """
    sources, indices = list(sources), list(indices)
    if len(sources) != len(indices):
        raise ValueError(f"scatter_rows: {len(sources)} sources but {len(indices)} indices")
    dispatch.check_shape("scatter_rows", "out", out_TN, (None, None), "[rows, width]")
    named = {"out": out_TN} | {f"sources[{i}]": source for i, source in enumerate(sources)}
    dispatch.check_float("scatter_rows", **named)
    for number, (source, index) in enumerate(zip(sources, indices, strict=True)):
        dispatch.check_shape(
            "scatter_rows", f"sources[{number}]", source, (None, out_TN.shape[1]), "[rows of the source, width of out]"
        )
        _check_index("scatter_rows", f"indices[{number}]", index)
        if len(index) != len(source):
            raise ValueError(
                f"scatter_rows: indices[{number}] is {list(index.shape)}, but sources[{number}] is {list(source.shape)}"
            )
    named |= {f"indices[{i}]": index for i, index in enumerate(indices)}
    dispatch.check_same_device("scatter_rows", **named)
    if out_TN.requires_grad:
        raise ValueError(
            f"scatter_rows: out {list(out_TN.shape)} requires grad; it must be a pre-allocated buffer (out.detach())"
        )
    if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
        return _Scatter.apply(out_TN, len(sources), *sources, *indices)
    torch.ops.bernini.scatter_rows(out_TN, sources, indices)
    return out_TN


def gather_rows(x_TN: Tensor, index: Tensor) -> Tensor:
    """Rows by number: ``y[i] = x[index[i]]``; a row may be taken any number of times.

    Forward moves every gathered element once in and once out (4 bytes per bf16 element) and 4 or 8 bytes of index per
    row; backward reads the gradient and writes every row of x's gradient once. Sums over repeated rows are taken in
    float32 and always in the same order.

    Args:
        x_TN: ``[T, N]``, floating point, any strides.
        index: ``[n]``, int32 or int64, values in [0, T) (checked on the CPU only).

    Returns:
        A contiguous ``[n, N]`` tensor in the dtype of ``x_TN``, differentiable in it.

    Raises:
        ValueError: wrong shape, dtype or device mix.
        IndexError: on the CPU, an index outside [0, T).

    Source: the definition above.
    """
    dispatch.check_shape("gather_rows", "x", x_TN, (None, None), "[rows, width]")
    dispatch.check_float("gather_rows", x=x_TN)
    _check_index("gather_rows", "index", index)
    dispatch.check_same_device("gather_rows", x=x_TN, index=index)
    return torch.ops.bernini.gather_rows(x_TN, index)


def _check_index(op: str, name: str, index: Tensor) -> None:
    dispatch.check_shape(op, name, index, (None,), "[rows]")
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: {name} must be int32 or int64, got {index.dtype} {list(index.shape)}")
