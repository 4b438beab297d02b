"""Loading golden files and comparing with them. A failed comparison names its key and says by how much."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .subset import SHORT


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file.

    Most files keep one JSON object under the metadata key ``meta``; others one JSON value under each key. Both come
    out as one dictionary. Rows of zeros that were left out are put back.
    """
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, a file is no mapping
        raw = file.metadata() or {}
    for name, (shape, rows) in json.loads(raw.pop(SHORT, "{}")).items():
        short, tensors[name] = tensors[name], tensors[name].new_zeros(shape)
        tensors[name].flatten(0, -2)[rows] = short
    meta = json.loads(raw["meta"]) if "meta" in raw else {key: json.loads(text) for key, text in raw.items()}
    return tensors, meta


def close(name: str, got: Tensor, want: Tensor, *, atol: float | None = None, rel_l2: float | None = None) -> None:
    """Asserts equal shapes, finite values and every limit that is given.

    Args:
        atol: largest absolute difference of any element.
        rel_l2: largest ``|got - want| / |want|`` over the whole tensor.
    """
    if atol is None and rel_l2 is None:
        raise ValueError(f"{name}: a comparison needs a limit")
    _same_shape(name, got, want)
    wide, reference = got.detach().double(), want.double()
    if not bool(torch.isfinite(wide).all()):
        raise AssertionError(f"{name}: {int((~torch.isfinite(wide)).sum())} values are not finite")
    difference = wide - reference
    worst = float(difference.abs().max()) if difference.numel() else 0.0
    relative = float(difference.norm() / reference.norm().clamp_min(1e-300))
    if (atol is not None and worst > atol) or (rel_l2 is not None and relative > rel_l2):
        raise AssertionError(
            f"{name} {list(want.shape)}: max abs {worst:.3g} (limit {atol}), rel. L2 {relative:.3g} (limit {rel_l2}), "
            f"max of the golden tensor {float(reference.abs().max()):.3g}"
        )


def within_ulps(name: str, got: Tensor, want: Tensor, *, ulps: int, atol: float) -> None:
    """Asserts that bfloat16 values are at most ``ulps`` steps apart, or ``atol`` where results cancel to near zero."""
    _same_shape(name, got, want)
    if got.dtype != torch.bfloat16 or want.dtype != torch.bfloat16:
        raise AssertionError(f"{name}: expected bfloat16, got {got.dtype} against {want.dtype}")
    steps = (_order(got.detach()) - _order(want)).abs()
    steps[(got.detach().double() - want.double()).abs() <= atol] = 0
    if int(steps.max()) > ulps:
        raise AssertionError(
            f"{name}: {int((steps > ulps).sum())} values differ by more than {ulps} ulp: {steps.max()}"
        )


def _order(x: Tensor) -> Tensor:
    """Integers that count bfloat16 values in ascending order; both zeros are 0."""
    bits = x.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def same(name: str, got: Any, want: Any) -> None:
    """Asserts equality: of shape, dtype and every bit for two tensors, ``==`` for anything else."""
    if isinstance(got, Tensor) and isinstance(want, Tensor):
        _same_shape(name, got, want)
        if got.dtype != want.dtype:
            raise AssertionError(f"{name}: dtype {got.dtype}, golden {want.dtype}")
        if not torch.equal(got, want):
            raise AssertionError(f"{name} {list(want.shape)}: {int((got != want).sum())} values differ")
    elif got != want:
        raise AssertionError(f"{name}: {got!r}, golden {want!r}")


def _same_shape(name: str, got: Tensor, want: Tensor) -> None:
    if got.shape != want.shape:
        raise AssertionError(f"{name}: shape {list(got.shape)}, golden {list(want.shape)}")
