"""rms_norm and its gradient on Triton's interpreter against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bernini.kernels import launch, rms_norm, which
from bernini.kernels.rms_norm import reference

from . import common
from .common import assert_best_rounding, assert_eager, assert_same_bits, poisoned, rand

pytestmark = common.needs_interpreter

if launch.INTERPRETED:
    from bernini.kernels.rms_norm import kernel

EPS = 1e-6
# One tile, several, exact ones, ones with idle lanes, and the widths of the 1.3B and 14B renderers.
widths = st.sampled_from([1, 3, 64, 100, 128, 760, 1536, 3000, 5120])
tokens = st.sampled_from([0, 1, 2, 5, 9])
weights = st.sampled_from([None, *launch.DTYPES])


def weight_of(width: int, dtype: torch.dtype | None) -> Tensor | None:
    return None if dtype is None else rand(width, dtype=dtype, seed=7)


def double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


def check_forward(module: Any, x: Tensor, weight: Tensor | None, eps: float = EPS) -> None:
    with poisoned():
        y = module.rms_norm(x, weight, eps, "fp32")
        again = module.rms_norm(x, weight, eps, "fp32")
    assert y.is_contiguous()
    assert_same_bits(y, again)
    # eps is a float32 number in a kernel; next to tiny rows it matters.
    exact = reference.rms_norm(x.double(), double(weight), float(torch.tensor(eps)), "fp32")
    assert_best_rounding(y, exact, x.dtype, reference.rms_norm(x, weight, eps, "fp32"))


def check_backward(module: Any, dy: Tensor, x: Tensor, weight: Tensor | None, eps: float = EPS) -> None:
    with poisoned():
        dx, dweight = module.rms_norm_backward(dy, x, weight, eps)
        again = module.rms_norm_backward(dy, x, weight, eps)
    assert dx.is_contiguous()
    for one, other in zip((dx, dweight), again, strict=True):
        assert_same_bits(one, other)
    exact, exact_weight = reference.rms_norm_backward(dy.double(), x.double(), double(weight), float(torch.tensor(eps)))
    plain, plain_weight = reference.rms_norm_backward(dy, x, weight, eps)
    if x.numel():
        r = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps)
        g = dy.double() if weight is None else dy.double() * weight.double()
        terms = float((g * r).abs().max())  # dx is a difference: nearly nothing is left of a row of one element
        assert_best_rounding(dx, exact, x.dtype, plain, terms=terms, ulps=2)
        if weight is not None:
            terms = float((dy.double() * x.double() * r).reshape(-1, x.shape[-1]).abs().sum(0).max())
            assert_best_rounding(dweight, exact_weight, weight.dtype, plain_weight, terms=terms)
    assert dx.shape == x.shape and dweight.shape == plain_weight.shape and dweight.dtype == plain_weight.dtype


@settings(max_examples=30)
@given(tokens, widths, common.dtypes, common.layouts, weights, common.scales)
def test_forward(
    count: int, width: int, dtype: torch.dtype, layout: str, weight: torch.dtype | None, scale: float
) -> None:
    x = rand(count, width, dtype=dtype, layout=layout, scale=scale)
    check_forward(kernel, x, weight_of(width, weight))


@settings(max_examples=30)
@given(tokens, widths, common.dtypes, common.layouts, weights, common.scales)
def test_eager_is_torchs_own_chain(
    count: int, width: int, dtype: torch.dtype, layout: str, weight: torch.dtype | None, scale: float
) -> None:
    x, w = rand(count, width, dtype=dtype, layout=layout, scale=scale), weight_of(width, weight)
    with poisoned():
        y = kernel.rms_norm(x, w, EPS, "eager")
    assert_eager(y, reference.rms_norm(x, w, EPS, "eager"))


@settings(max_examples=20)
@given(tokens, widths, common.dtypes, common.layouts, common.layouts, weights, common.scales)
def test_backward(
    count: int,
    width: int,
    dtype: torch.dtype,
    layout: str,
    dy_layout: str,
    weight: torch.dtype | None,
    scale: float,
) -> None:
    x = rand(count, width, dtype=dtype, layout=layout, scale=scale)
    dy = rand(count, width, dtype=dtype, layout=dy_layout, seed=1)
    check_backward(kernel, dy, x, weight_of(width, weight))


def test_leading_axes_and_packed_heads() -> None:
    x = rand(2, 3, 4, 24, dtype=torch.float16, layout="packed")
    check_forward(kernel, x, weight_of(24, torch.float32))
    check_backward(kernel, rand(2, 3, 4, 24, dtype=torch.float16, seed=1), x, weight_of(24, torch.float32))
    check_forward(kernel, rand(2, 24)[0], None)
    check_forward(kernel, rand(3, 0), None)


def test_rows_of_zeros_and_of_large_numbers() -> None:
    check_forward(kernel, torch.zeros(2, 100), weight_of(100, torch.float32))
    check_backward(kernel, rand(2, 100), torch.zeros(2, 100), weight_of(100, torch.float32))
    check_forward(kernel, torch.full((1, 100), 6e4, dtype=torch.float16), None)  # its squares need float32


@pytest.mark.parametrize("programs", [1, 2, 3, 16])
def test_tokens_are_shared_by_programs(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "programs", lambda on: programs)
    check_backward(kernel, rand(7, 100, seed=1), rand(7, 100), weight_of(100, torch.float32))


def test_public_function_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERNINI_KERNELS", "triton")
    assert which("rms_norm") == which("rms_norm_backward") == "triton"
    x, weight = rand(3, 24).requires_grad_(), rand(24, seed=7).requires_grad_()
    y = rms_norm(x, weight)
    dy = rand(3, 24, seed=1)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    expected = reference.rms_norm_backward(dy, x.detach(), weight.detach(), EPS)
    torch.testing.assert_close((dx, dweight), expected, rtol=1e-5, atol=1e-6)


def test_too_wide_rows_are_refused_before_any_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERNINI_KERNELS", "triton")
    monkeypatch.setattr(launch, "launch", lambda *args, **options: pytest.fail("launched"))
    wide = torch.zeros(1, launch.WIDEST + 1)
    with pytest.raises(ValueError, match=r"rms_norm: .* rows of up to 32768 elements, got 32769"):
        rms_norm(wide)
    with pytest.raises(ValueError, match=r"rms_norm: .* rows of up to 32768 elements, got 32769"):
        kernel.rms_norm_backward(wide, wide, None, EPS)
    with pytest.raises(ValueError, match=r"rms_norm: weight must be \[width\] = \[24\], got \[23\]"):
        rms_norm(rand(3, 24), rand(23))


def test_bf16_is_rounded_as_hardware_does() -> None:
    """What :mod:`common` replaces in the interpreter: ties to even, carries, infinities and NaNs."""
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.3895e38, -1e-40, float("nan"), float("inf"), -0.0, 0.1])
    x = torch.ones(values.numel(), 1)
    y = kernel.rms_norm(x.bfloat16(), None, 0.0, "fp32")
    assert bool((y == 1).all())
    with poisoned():  # one row of ones, times the weight: the weight, rounded
        y = kernel.rms_norm(torch.ones(1, values.numel(), dtype=torch.bfloat16), values, 0.0, "fp32")[0]
    assert torch.equal(y.isnan(), values.isnan())
    assert_same_bits(y.nan_to_num(0.0), values.bfloat16().nan_to_num(0.0))


# --- wrong kernels are noticed ---------------------------------------------------------------------------------------


def smoke(module: Any) -> None:
    """A handful of comparisons that any wrong kernel fails."""
    for dtype, width in ((torch.float32, 100), (torch.float16, 3000)):
        x, dy = (rand(6, width, dtype=dtype, layout="packed", seed=seed) for seed in (0, 1))
        check_forward(module, x, weight_of(width, torch.float32), eps=0.5)
        check_backward(module, dy, x, weight_of(width, torch.float32), eps=0.5)
        check_forward(module, x, None)


def test_smoke_accepts_the_kernel() -> None:
    smoke(kernel)


@pytest.mark.parametrize("variant", common.broken("rms_norm"))
def test_smoke_refuses_broken_kernels(variant: Any) -> None:
    with pytest.raises(AssertionError):
        smoke(variant.load())
