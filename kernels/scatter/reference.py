"""Row scatter and gather in plain PyTorch: the definition of right.

``out[index[i]] = source[i]`` and ``y[i] = x[index[i]]``; each is the other's transpose. Rows are copied, so the only
arithmetic is the sum in :func:`gather_rows_backward`. Shapes: T rows of the buffer, N width, n rows of a piece.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CONVERT_ROWS = 4096
"""Rows converted at a time when a source has another dtype than the buffer: no temporary of a source's size."""


def scatter_rows(out_TN: Tensor, sources: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    """In place: ``out[indices[i][j]] = sources[i][j]``."""
    for source_nN, index_n in zip(sources, indices, strict=True):
        index = index_n.to(torch.int64)
        step = max(1, len(index) if source_nN.dtype == out_TN.dtype else CONVERT_ROWS)
        for start in range(0, len(index), step):
            rows = slice(start, start + step)
            out_TN.index_copy_(0, index[rows], source_nN[rows].to(out_TN.dtype))


def gather_rows(x_TN: Tensor, index_n: Tensor) -> Tensor:
    """``y[i] = x[index[i]]``."""
    return x_TN.index_select(0, index_n)


def gather_rows_backward(dy_nN: Tensor, index_n: Tensor, rows: int) -> Tensor:
    """Gradient of :func:`gather_rows`: ``dx[t] = sum of dy[i] over the i with index[i] = t``, in index order.

    Summed in float32 (float64 for float64) and rounded once.
    """
    wide = torch.float64 if dy_nN.dtype == torch.float64 else torch.float32
    dx_TN = torch.zeros((rows, dy_nN.shape[1]), dtype=wide, device=dy_nN.device)
    index = index_n.to(torch.int64)
    if dy_nN.device.type == "cpu":
        dx_TN.index_add_(0, index, dy_nN.to(wide))
    else:  # index_add_ uses float atomics there; this form sorts and gives the same bits every run
        dx_TN.index_put_((index,), dy_nN.to(wide), accumulate=True)
    return dx_TN.to(dy_nN.dtype)
