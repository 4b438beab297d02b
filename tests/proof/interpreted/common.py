"""What the interpreted tests share: poisoned outputs, inputs among NaNs, and how near is near enough.

These tests run kernels through Triton's interpreter, on CPU tensors, in a process with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bernini.kernels import launch

needs_interpreter = pytest.mark.skipif(not launch.INTERPRETED, reason="needs TRITON_INTERPRET=1")

dtypes = st.sampled_from(launch.DTYPES)
scales = st.integers(-10, 10).map(lambda power: 2.0**power)
layouts = st.sampled_from(["contiguous", "packed", "stepped", "transposed", "expanded"])

GUARD = 8192
"""Elements around every tensor made here that must stay as they are, and that are NaN where they would be read."""


def broken(family: str) -> list[Any]:
    """The broken variants of a family that wrong numbers must give away, as pytest parameters."""
    cases = importlib.import_module(f"bench_perf.proof.cases.{family}")
    variants = [one for one in cases.BROKEN if one.caught_by == "semantics"]
    return [pytest.param(one, id=f"{one.module}: {one.name}") for one in variants]


# --- bf16 as the hardware rounds it ----------------------------------------------------------------------------------


def _round_bf16_to_nearest() -> None:
    """Triton's interpreter cuts off where it makes bf16 out of fp32; GPUs round to nearest, ties to even.

    Replaced for the whole process, so that bf16 is held to the same bounds here as everything else.
    """
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source.name, target.name) != ("fp32", "bf16"):
            return original(data, source, target, mode)
        bits = np.ascontiguousarray(data, np.float32).view(np.uint32).astype(np.uint64)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(data), (bits >> 16) | 0x40, nearest).astype(np.uint16).reshape(data.shape)

    interpreter._convert_float = convert


def _multiply_bf16() -> None:
    """Triton's interpreter keeps bf16 as 16-bit integers, and ``tl.dot`` multiplies those; here their values."""
    from triton.language import bfloat16
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_dot

    def widen(x: Any) -> Any:
        if x.dtype.scalar != bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, widen(a), widen(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


if launch.INTERPRETED:
    _round_bf16_to_nearest()
    _multiply_bf16()


# --- tensors that tell on those who read or write outside -----------------------------------------------------------


def among_nans(x: Tensor) -> Tensor:
    """The same values, shape and strides (of more than one element), inside a buffer that is NaN elsewhere."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    fill = float("nan") if x.is_floating_point() else 0
    buffer = torch.full((span + 2 * GUARD,), fill, dtype=x.dtype)
    view = buffer.as_strided(x.shape, x.stride(), GUARD)
    if x.numel():
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())  # of an expanded axis
        view[once].copy_(x[once])
    return view


def rand(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous", scale: float = 1.0,
         seed: int = 0) -> Tensor:  # fmt: skip
    """Normal values times ``scale``, lying in memory as ``layout`` says, with NaNs in all gaps and around.

    ``contiguous``; ``packed``: rows are a part of wider ones, as q in a packed qkv; ``stepped``: every second row;
    ``transposed``: the last axis is not the dense one; ``expanded``: one row, many times (stride 0).
    """
    *leading, width = shape
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
    nan = float("nan")
    if layout == "packed":
        home = torch.full((*leading, 2 * width + 3), nan, dtype=dtype)[..., 1 : width + 1]
    elif layout == "stepped":
        home = torch.full((2 * leading[0], *leading[1:], width), nan, dtype=dtype)[::2]
    elif layout == "transposed":
        home = torch.full((width, *leading), nan, dtype=dtype).movedim(0, -1)
    elif layout == "expanded":
        return among_nans(values[:1].expand(shape) if values.numel() else values)
    else:
        home = values
    return among_nans(home.copy_(values))


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, ``torch.empty``, ``empty_like`` and ``new_empty`` return tensors full of NaN (floats) or a large number.

    At the end, nothing may have been written outside of them.
    """
    real = torch.empty
    made: list[tuple[Tensor, int]] = []

    def guard(like: Tensor) -> Tensor:
        span = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
        fill = float("nan") if like.is_floating_point() else torch.iinfo(like.dtype).max // 2
        buffer = real((span + 2 * GUARD,), dtype=like.dtype).fill_(fill)
        buffer[:GUARD] = buffer[GUARD + span :] = 77
        made.append((buffer, span))
        return buffer.as_strided(like.shape, like.stride(), GUARD)

    def usable(tensor: Tensor) -> bool:
        return type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.dtype != torch.bool

    def wrap(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            tensor = original(*args, **kwargs)
            return guard(tensor) if usable(tensor) else tensor

        return call

    with (
        mock.patch.object(torch, "empty", wrap(torch.empty)),
        mock.patch.object(torch, "empty_like", wrap(torch.empty_like)),
        mock.patch.object(torch, "empty_strided", wrap(torch.empty_strided)),
        mock.patch.object(Tensor, "new_empty", wrap(Tensor.new_empty)),
    ):
        yield
    for buffer, span in made:
        outside = torch.cat([buffer[:GUARD], buffer[GUARD + span :]])
        assert bool((outside == 77).all()), f"written outside of an output of {span} elements"


# --- how near is near enough -----------------------------------------------------------------------------------------


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of neighbouring ``dtype`` numbers at ``x``, in float64."""
    limits = torch.finfo(dtype)
    _, exponent = torch.frexp(x.double().abs().clamp_min(limits.tiny))
    return torch.ldexp(torch.full_like(x, limits.eps, dtype=torch.float64), exponent - 1)


def assert_best_rounding(
    y: Tensor, exact: Tensor, dtype: torch.dtype, reference: Tensor | None = None, *, terms: float = 0.0,
    ulps: float = 1.0,
) -> None:  # fmt: skip
    """``y`` is as near to the float64 result as one rounding allows.

    fp16 and bf16: root mean square and largest error are at most 1.05 times those of rounding ``exact`` once.
    fp32: the largest error of a row is at most twice that of ``reference`` (the float32 reference; without it, none)
    plus ``ulps`` (without it, four) of the row's largest value, because sums differ in their order.

    Args:
        terms: the largest number that is added or subtracted on the way, where that can be far larger than the result
            (terms that cancel): float32's precision is relative to it.
        ulps: one, or more for chains of several roundings behind a sum.
    """
    assert y.dtype == dtype, f"{y.dtype} instead of {dtype}"
    assert y.shape == exact.shape, f"{list(y.shape)} instead of {list(exact.shape)}"
    assert exact.dtype == torch.float64
    if not y.numel():
        return
    assert bool(torch.isfinite(y[torch.isfinite(exact.to(dtype))]).all()), "not finite: something was left unwritten"
    error = (y.double() - exact).abs()
    rows = exact.reshape(-1, exact.shape[-1]) if exact.dim() else exact.reshape(1, 1)
    largest = rows.abs().amax(-1, keepdim=True)
    if dtype == torch.float32:
        worst = torch.zeros(())
        if reference is None:
            ulps = 4.0
        else:
            worst = (reference.double() - exact).abs().reshape(rows.shape).amax(-1, keepdim=True)
        allowed = 2 * worst + ulps * ulp(largest.clamp_min(terms), dtype)
        excess = error.reshape(rows.shape) / allowed
        assert bool((excess <= 1).all()), f"error up to {float(excess.max()):.3g} times what is allowed"
        return
    best = (exact.to(dtype).double() - exact).abs()
    slack = 2.0**-21 * max(float(largest.max()), terms)  # float32 sums; far below half an ulp of what was rounded
    for name, mine, theirs in (
        ("RMS", error.square().mean().sqrt(), best.square().mean().sqrt()),
        ("largest", error.max(), best.max()),
    ):
        assert mine <= 1.05 * theirs + slack, f"{name} error {float(mine):.4g}, best possible {float(theirs):.4g}"


def assert_eager(y: Tensor, reference: Tensor, *, sums: bool = True) -> None:
    """``rounding="eager"``: 99.9 % of the elements within one ulp of the unfused chain, none more than two off.

    Args:
        sums: whether sums (row statistics) are behind ``y``. Without them bits are equal. With them float32 is held to
            four and eight ulp instead: there the sum itself is rounded as coarsely as the output.
    """
    assert y.dtype == reference.dtype and y.shape == reference.shape
    if not y.numel():
        return
    if not sums:
        assert torch.equal(y, reference), f"{int((y != reference).sum())} of {y.numel()} elements differ"
        return
    most, limit = (4, 8) if y.dtype == torch.float32 else (1, 2)
    assert bool(torch.isfinite(y[torch.isfinite(reference)]).all()), "not finite: something was left unwritten"
    off = (y.double() - reference.double()).abs() / ulp(torch.maximum(y.abs(), reference.abs()), y.dtype)
    near = float((off <= most).double().mean())
    # Of fewer than a thousand elements, one may be further off.
    assert near >= 0.999 or int((off > most).sum()) <= 1, f"only {100 * near:.2f} % within {most} ulp"
    assert float(off.max()) <= limit, f"{float(off.max()):.3g} ulp off"


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """Equal, NaNs and signs of zeros included."""
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), "other bits"
