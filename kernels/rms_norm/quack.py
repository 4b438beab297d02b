"""RMSNorm by quack, a library of CuTe kernels for Hopper and Blackwell, for rows that are too wide for ours.

The rule is made from what is published, not measured here, and errs on our side:

- A row of more than :data:`launch.WIDEST` elements does not fit into one multiprocessor's registers, and ours does not
  take it. Quack spreads it over a cluster of them; its authors report about 3 TB/s on an H100 for rows of up to
  262 144, and a clear lead over every Triton kernel from 65 536 on ("Getting Memory-bound Kernels to Speed-of-Light",
  2025-07-10). Here quack is used, on compute capability 9.0 and above.
- For narrower rows one read and one write at nearly full bandwidth is what both do: the same report has a Triton kernel
  at 3.0 TB/s, too, at 32 768, and PyTorch reports parity of its generated Triton with quack on H100 and B200 ("SOTA
  Normalization Performance with torch.compile"). Nothing is known to be gained by another kernel, so ours is used.

:data:`WIDTHS` is the whole rule; ``python -m bench_perf rms_norm`` measures both sides on a GPU that has quack.

Quack's backward wants the 1 / RMS of every row, which the op does not keep; a forward pass computes it again. That
moves 10 bytes per bf16 element instead of 6: one more reason to leave narrower rows alone.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from .. import launch
from ..dispatch import Implementation

WIDTHS = (launch.WIDEST + 1, 262_144)
"""Elements of the rows that are given to quack, least and most."""


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("quack") is not None


def missing() -> str | None:
    """Why quack cannot be used on this machine, or ``None``."""
    if not _installed():
        return "needs the package quack-kernels, which is not installed"
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "needs a GPU of NVIDIA's"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 9 else f"needs compute capability 9.0 or more, this is {major}.{minor}"


def implementation(function: Any) -> Implementation:
    """The ``quack`` row of an op's table."""
    return Implementation("quack", function, devices=("cuda",), dtypes=launch.DTYPES, widths=WIDTHS, missing=missing)


def _kernels() -> Any:
    # By its full name: the package's attribute `rmsnorm` is a function.
    return importlib.import_module("quack.rmsnorm")


def _rows(x: Tensor) -> Tensor:
    """``[T, N]``, contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _weight(weight: Tensor | None) -> Tensor | None:
    """In a dtype that quack takes."""
    return None if weight is None else (weight if weight.dtype in launch.DTYPES else weight.float()).contiguous()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, rounding: str) -> Tensor:
    """The op ``bernini::rms_norm``; the two roundings coincide."""
    y, _, _ = _kernels().rmsnorm_fwd(_rows(x), _weight(weight), eps=eps)
    return y.view(x.shape)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The op ``bernini::rms_norm_backward``."""
    rows = _rows(x)
    _, _, reciprocals = _kernels().rmsnorm_fwd(rows, None, eps=eps, store_rstd=True)
    dx, dweight, _, _ = _kernels().rmsnorm_bwd(rows, _weight(weight), _rows(dy), reciprocals)
    return dx.view(x.shape), x.new_empty(0) if weight is None else dweight.to(weight.dtype)
