"""The four small cos/sin tables of SA-3D RoPE, computed in float64 on the host and rounded once.

Source: RoFormer (arXiv 2104.09864) eq. 15 for the ladder; the head dim split of Wan; Bernini (arXiv 2605.22344) for
the segment factor, a full-width 1-D RoPE over all pairs evaluated at the segment's phase id.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RopeTables = tuple[Tensor, Tensor, Tensor, Tensor]


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """How the head dim is shared by (t, h, w): ``h = w = 2 * (head_dim // 6)``, t takes the rest."""
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"rope_tables: head_dim must be even and positive, got {head_dim}")
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


@lru_cache(maxsize=64)
def _phasors(positions: tuple[float, ...], dim: int, theta: float) -> NDArray[np.float64]:
    """``[positions, dim/2, 2]``: cos and sin of ``position * theta^(-2k/dim)``.

    A cache of NumPy arrays, not of tensors, which would keep a fake one if first filled under FakeTensorMode.
    """
    ladder = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    angles = np.outer(np.asarray(positions, dtype=np.float64), ladder)
    return np.stack((np.cos(angles), np.sin(angles)), axis=-1)


def rope_tables(
    head_dim: int,
    sizes: tuple[int, int, int],
    phases: Sequence[float],
    *,
    theta: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> RopeTables:
    """The ``tables`` argument of :func:`bernini.kernels.qk_rope`.

    Args:
        head_dim: even; shared as in Wan, ``h = w = 2 * (head_dim // 6)`` and t takes the rest (128: 44, 42, 42).
        sizes: how many positions the t, h and w tables hold; row p is position p.
        phases: one row of the segment table each. Ids may be fractional; 0 is the identity.
        theta: base of every ladder.
        dtype: ``torch.float32``, or ``torch.float64`` for checks.
        device: where the tables are put.

    Returns:
        ``(t, h, w, segment)``, each ``[rows, pairs, 2]`` with (cos, sin) last. An axis of d dims has d/2 pairs and
        angles ``p * theta^(-2k/d)``; the segment table has head_dim/2 pairs and angles ``id * theta^(-2k/head_dim)``.

    Raises:
        ValueError: odd head_dim, a negative size, or another dtype.
    """
    dims = axis_dims(head_dim)
    if len(sizes) != 3 or min(sizes) < 0:
        raise ValueError(f"rope_tables: sizes must be three lengths (t, h, w) >= 0, got {tuple(sizes)}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"rope_tables: dtype must be torch.float32 or torch.float64, got {dtype}")

    def table(positions: tuple[float, ...], dim: int) -> Tensor:
        return torch.tensor(_phasors(positions, dim, float(theta))).to(device=device, dtype=dtype)

    t, h, w = (table(tuple(map(float, range(size))), dim) for size, dim in zip(sizes, dims, strict=True))
    return t, h, w, table(tuple(map(float, phases)), head_dim)
