"""``guide`` by the native library, on CPU tensors in float32 or bfloat16, under ``rounding="fp32"``.

Inputs that are not contiguous are copied first; nothing else of a tensor's size is allocated but the outputs. Shapes: F
frames, L links.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, addressof, byref, c_double, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from ..native import loader
from .reference import output_dtype

_APG = {None: 0, "frame": 1, "global": 2}


class _Array(Structure):
    """``Array`` in native.cpp."""

    _fields_ = (("data", c_void_p), ("is_bf16", c_int64))


class _Link(Structure):
    """``Link`` in native.cpp."""

    _fields_ = (("new", c_int64), ("old", c_int64), ("scale", c_double), ("threshold", c_double))


class _Call(Structure):
    """``Call`` in native.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("predictions", "terms", "outputs", "links", "coefficients", "buffer")),
        *((name, c_int64) for name in ("prediction_count", "history_count", "output_count", "link_count")),
        *((name, c_int64) for name in ("frames", "values")),
        *((name, c_double) for name in ("sigma", "eta", "momentum")),
        *((name, c_int64) for name in ("apg", "in_x0")),
    )


def _arrays(tensors: Sequence[Tensor | None]) -> Any:
    entries = [_Array() if t is None else _Array(t.data_ptr(), t.dtype == torch.bfloat16) for t in tensors]
    return (_Array * len(entries))(*entries)


def _guide(
    outputs: Sequence[Tensor],
    buffer: Tensor | None,
    momentum: float,
    predictions: Sequence[Tensor],
    new: Sequence[int],
    old: Sequence[int],
    scales: Sequence[float],
    apg: str | None,
    space: str,
    latent: Tensor | None,
    sigma: float,
    eta: float,
    thresholds: Sequence[float],
    coefficients: Sequence[float],
    history: Sequence[Tensor],
    rounding: str,
) -> None:
    if not predictions[0].numel():
        return
    # In variables, because the library sees only their addresses.
    predictions = [p.contiguous() for p in predictions]
    terms = [None if t is None else t.contiguous() for t in (latent, *history)]
    links = [_Link(*link) for link in zip(new, old, scales, thresholds or [0.0] * len(scales), strict=True)]
    pointed_at = (
        _arrays(predictions),
        _arrays(terms),
        _arrays(outputs),
        (_Link * len(links))(*links),
        (c_double * len(coefficients))(*coefficients) if coefficients else None,
    )
    call = _Call(
        *(None if array is None else addressof(array) for array in pointed_at),
        None if buffer is None else buffer.data_ptr(),
        *(len(predictions), len(history), len(outputs), len(links)),
        *(len(predictions[0]), predictions[0][0].numel()),
        *(sigma, eta, momentum),
        *(_APG[apg], space == "x0"),
    )
    loader.function("bernini_guide", None, c_void_p, c_int)(byref(call), torch.get_num_threads())


def guide(predictions: Sequence[Tensor], *args: Any) -> list[Tensor]:
    """See :func:`bernini.kernels.guide`; the arguments are those of the reference, without momentum."""
    _, _, _, _, space, latent, _, _, _, coefficients, history, _ = args
    dtype = output_dtype(predictions[0], latent, space, bool(coefficients))
    count = len(coefficients) // (2 + len(history)) or 1
    outputs = [torch.empty(predictions[0].shape, dtype=dtype) for _ in range(count)]
    _guide(outputs, None, 0.0, predictions, *args)
    return outputs


def guide_momentum(buffer: Tensor, outputs: Sequence[Tensor], momentum: float, *args: Any) -> None:
    """The same into ``outputs``, with a contiguous float32 ``buffer`` ``[L, F, ...]`` that is updated in place."""
    _guide(outputs, buffer, momentum, *args)
    torch.autograd.graph.increment_version((buffer, *outputs))
