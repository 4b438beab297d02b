"""Row scatter and gather by the native library, on CPU tensors. Shapes: T rows of the buffer, S rows of a source.

A row is everything behind the first axis and must lie in one piece; rows may be any distance apart. Bytes are copied,
so source and destination have one dtype (conversion is the reference's).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from ..native import loader

# out, its row stride, source, its row stride, index, int64?, rows, bytes per row, threads
_COPY = (None, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int, c_int64, c_int64, c_int)
_CHECK = (c_int64, c_void_p, c_int, c_int64, c_int64)


def scatter_rows(out: Tensor, sources: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    """``out[indices[k]] = sources[k]`` for every k, in place. No row of ``out`` may be named twice.

    Raises:
        IndexError: an index is negative or past the end; nothing has been written then.
        ValueError: shapes, dtypes or strides that byte rows cannot serve.
    """
    _check_rows("out", out)
    if len(sources) != len(indices):
        raise ValueError(f"scatter_rows: {len(sources)} sources but {len(indices)} indices")
    for source, index in zip(sources, indices, strict=True):
        _check_rows("source", source, like=out)
        _check_index(index, rows=len(source), limit=len(out))
    call = loader.function("bernini_scatter_rows", *_COPY)
    for source, index in zip(sources, indices, strict=True):
        _copy(call, out, source, index)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]``: a new contiguous tensor. Rows may be named any number of times.

    Raises:
        IndexError: an index is negative or past the end.
        ValueError: shapes or strides that byte rows cannot serve.
    """
    _check_rows("x", x)
    _check_index(index, rows=None, limit=len(x))
    out = torch.empty((index.numel(), *x.shape[1:]), dtype=x.dtype)
    _copy(loader.function("bernini_gather_rows", *_COPY), out, x, index)
    return out


def serves(*tensors: Tensor) -> bool:
    """Whether these are CPU tensors of one dtype whose rows lie in one piece each."""
    return all(x.device.type == "cpu" and x.dtype == tensors[0].dtype and _row_is_whole(x) for x in tensors)


def _copy(call: Callable[..., Any], out: Tensor, source: Tensor, index: Tensor) -> None:
    index = index.contiguous()
    size = out.element_size()
    rows, row_bytes = index.numel(), size * out.shape[1:].numel()
    if rows and row_bytes:
        to, at = (out.data_ptr(), out.stride(0) * size), (source.data_ptr(), source.stride(0) * size)
        call(*to, *at, index.data_ptr(), index.dtype == torch.int64, rows, row_bytes, torch.get_num_threads())


def _row_is_whole(x: Tensor) -> bool:
    """Whether everything behind the first axis is contiguous, whatever the distance of the rows."""
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return x.numel() == 0
        expected *= size
    return x.dim() > 0


def _check_rows(name: str, x: Tensor, like: Tensor | None = None) -> None:
    if x.device.type != "cpu" or not _row_is_whole(x):
        got = f"{list(x.shape)} with strides {x.stride()} on {x.device}"
        raise ValueError(f"{name} must be a CPU tensor of contiguous rows, got {got}")
    if like is not None and (x.dtype != like.dtype or x.shape[1:] != like.shape[1:]):
        raise ValueError(f"{name} {list(x.shape)} {x.dtype} has other rows than out {list(like.shape)} {like.dtype}")


def _check_index(index: Tensor, rows: int | None, limit: int) -> None:
    if index.device.type != "cpu" or index.dtype not in (torch.int32, torch.int64) or index.dim() != 1:
        got = f"{list(index.shape)} {index.dtype} on {index.device}"
        raise ValueError(f"index must be a 1-D int32 or int64 CPU tensor, got {got}")
    if rows is not None and index.numel() != rows:
        raise ValueError(f"{rows} rows need as many indices, got {index.numel()}")
    index = index.contiguous()
    check = loader.function("bernini_first_row_outside", *_CHECK)
    bad = check(index.data_ptr(), index.dtype == torch.int64, index.numel(), limit)
    if bad >= 0:
        raise IndexError(f"index {index[bad].item()} at position {bad} is outside a buffer of {limit} rows")
