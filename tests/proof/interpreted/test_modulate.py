"""modulate and its gradient on Triton's interpreter, every combination of parts against the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bernini.kernels import launch, modulate, which
from bernini.kernels.modulate import reference

from . import common
from .common import assert_best_rounding, assert_eager, assert_same_bits, poisoned, rand

pytestmark = common.needs_interpreter

if launch.INTERPRETED:
    from bernini.kernels.modulate import kernel, kernel_bwd

EPS = 1e-6
EXACT_STATISTICS = 256
"""A width at which small whole numbers that come with either sign have a variance without rounding, and no mean."""

# One lane, few, a whole number of warps, idle lanes in the last of several pieces.
widths = st.sampled_from([1, 3, 32, 100, 256, 300, 760])


@dataclass(frozen=True)
class Call:
    """The arguments of the op, in order; without a branch those of the norm alone."""

    residual: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    index: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = EPS

    @property
    def args(self) -> tuple[Any, ...]:
        parts = (self.scale, self.shift, self.index, self.weight, self.bias, self.eps)
        return (self.residual, *parts) if self.branch is None else (self.residual, self.branch, self.gate, *parts)

    def double(self) -> Call:
        tensors = {name: value.double() for name, value in vars(self).items()
                   if isinstance(value, Tensor) and value.is_floating_point()}  # fmt: skip
        return replace(self, **tensors)

    def forward(self, module: Any, rounding: str = "fp32") -> tuple[Tensor, ...]:
        if self.branch is None:
            return (module.modulate_norm(*self.args, rounding),)
        return tuple(module.modulate(*self.args, rounding))

    def backward(self, module: Any, dresidual: Tensor, dnormed: Tensor) -> tuple[Tensor, ...]:
        if self.branch is None:
            return tuple(module.modulate_norm_backward(dnormed, *self.args))
        return tuple(module.modulate_backward(dresidual, dnormed, *self.args))


@dataclass(frozen=True)
class Sizes:
    """The largest numbers on the way: of h over its deviation, and of what scale and weight multiply by."""

    spread: float
    r: float
    weight: float
    bias: float
    scale: float
    shift: float
    gate: float


def sizes(call: Call) -> Sizes:
    exact = call.double()
    h = exact.residual
    if exact.branch is not None:
        h = reference._add_branch(h, exact.branch, exact.gate, exact.index, "fp32")
    r = torch.rsqrt(h.var(1, correction=0, keepdim=True) + call.eps)

    def largest(part: Tensor | None, otherwise: float) -> float:
        return otherwise if part is None else float(part.abs().max())

    return Sizes(
        float((h.abs().amax(1, keepdim=True) * r).max()), float(r.max()), largest(exact.weight, 1),
        largest(exact.bias, 0), 1 + largest(exact.scale, 0), largest(exact.shift, 0), largest(exact.gate, 1),
    )  # fmt: skip


def check_forward(module: Any, call: Call) -> None:
    exact, single = call.double().forward(reference), call.forward(reference)
    with poisoned():
        found = call.forward(module)
    assert len(found) == len(exact)
    size = sizes(call) if call.residual.numel() else Sizes(0, 0, 0, 0, 0, 0, 0)
    terms = (size.spread * size.weight + size.bias) * size.scale + size.shift
    for y, expected, near, most in zip(reversed(found), reversed(exact), reversed(single), (terms, 0.0), strict=False):
        assert y.is_contiguous()
        assert_best_rounding(y, expected, call.residual.dtype, near, terms=most)


def check_backward(module: Any, call: Call, dresidual: Tensor, dnormed: Tensor) -> None:
    gradients = dresidual.double(), dnormed.double()
    exact, single = call.double().backward(reference, *gradients), call.backward(reference, dresidual, dnormed)
    with poisoned():
        found = call.backward(module, dresidual, dnormed)
    for gradient, again in zip(found, call.backward(module, dresidual, dnormed), strict=True):
        assert gradient.is_contiguous()
        assert_same_bits(gradient, again)
    if not call.residual.numel():
        for gradient in found:
            assert not gradient.any()
        return
    size = sizes(call)
    dn, tokens = float(gradients[1].abs().max()), dnormed.shape[0]
    pulled = size.r * dn * size.scale * size.weight * (1 + size.spread**2) + float(gradients[0].abs().max())
    y = size.spread * size.weight + size.bias
    most = [pulled]
    if call.branch is not None:
        most += [pulled * size.gate, tokens * pulled * float(call.branch.abs().max())]
    most += [tokens * dn * y, tokens * dn, tokens * dn * size.scale * size.spread, tokens * dn * size.scale]
    for gradient, expected, near, terms in zip(found, exact, single, most, strict=True):
        assert_best_rounding(gradient, expected, near.dtype, near, terms=terms)


@st.composite
def calls(draw: st.DrawFn, most_tokens: int = 6) -> Call:
    """Any parts of any strides and dtypes."""
    tokens, width = draw(st.integers(0, most_tokens)), draw(widths)
    dtype, scale = draw(common.dtypes), draw(common.scales)
    seed = iter(range(99))

    def data() -> Tensor:
        return rand(tokens, width, dtype=dtype, layout=draw(common.layouts), scale=scale, seed=next(seed))

    index = draw(st.sampled_from([None, torch.int32, torch.int64]))
    rows = 1 if index is None else draw(st.integers(1, 5))
    small = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]))

    def table() -> Tensor | None:
        layout = draw(st.sampled_from(["contiguous", "packed", "transposed"]))
        return rand(rows, width, dtype=small, layout=layout, seed=next(seed)) if draw(st.booleans()) else None

    def affine() -> Tensor | None:
        layout = draw(st.sampled_from(["contiguous", "transposed"]))
        return rand(1, width, dtype=small, layout=layout, seed=next(seed))[0] if draw(st.booleans()) else None

    branch = data() if draw(st.booleans()) else None
    gate, shifted, scaled = table() if branch is not None else None, table(), table()
    numbers = None
    if index is not None and any(part is not None for part in (gate, shifted, scaled)):
        drawn = draw(st.lists(st.integers(0, rows - 1), min_size=tokens, max_size=tokens))
        numbers = common.among_nans(torch.tensor(drawn, dtype=index))
    return Call(data(), branch, gate, scaled, shifted, numbers, affine(), affine())


def everything(tokens: int, width: int, rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Call:
    """All parts, strided, the tokens' rows all over the place."""
    tables = (rand(rows, width, layout="packed", seed=seed + number) for number in (2, 3, 4))
    index = torch.arange(tokens) * 7 % rows
    residual, branch = (rand(tokens, width, dtype=dtype, layout="packed", seed=seed + number) for number in (0, 1))
    weight, bias = (rand(width, seed=seed + number) for number in (5, 6))
    return Call(residual, branch, *tables, index, weight, bias)


def gradients_of(call: Call, layout: str = "packed") -> tuple[Tensor, Tensor]:
    tokens, width = call.residual.shape
    dresidual, dnormed = (rand(tokens, width, dtype=call.residual.dtype, layout=layout, seed=seed) for seed in (80, 81))
    return dresidual, dnormed


@settings(max_examples=40)
@given(calls())
def test_forward(call: Call) -> None:
    check_forward(kernel, call)


@settings(max_examples=30)
@given(calls(), common.layouts)
def test_backward(call: Call, layout: str) -> None:
    check_backward(kernel_bwd, call, *gradients_of(call, layout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_full_width(dtype: torch.dtype) -> None:
    """5120: pieces of one size forward, of two sizes backward in bf16."""
    call = everything(3, 5120, 2, dtype)
    check_forward(kernel, call)
    check_backward(kernel_bwd, call, *gradients_of(call))


@pytest.mark.parametrize("rows", [1, 2, 9, 20])
def test_backward_of_rows_in_any_order(rows: int) -> None:
    """Rows that one program has, that several share, that none has; more rows than tokens."""
    call = everything(11, 50, rows)
    check_backward(kernel_bwd, call, *gradients_of(call))


# --- rounding="eager" -------------------------------------------------------------------------------------------------


def check_eager(module: Any, call: Call) -> None:
    *h, normed = call.forward(module, "eager")
    *expected_h, expected = call.forward(reference, "eager")
    for mine, theirs in zip(h, expected_h, strict=True):
        assert_eager(mine, theirs, sums=False)
    if call.residual.dtype != torch.float32:  # there shift and bias cancel more than the ulps of a sum
        assert_eager(normed, expected)


@settings(max_examples=30)
@given(calls())
def test_eager(call: Call) -> None:
    check_eager(kernel, call)


@settings(max_examples=20)
@given(calls(3), st.integers(0, 2**31))
def test_eager_has_equal_bits_given_the_statistics(call: Call, seed: int) -> None:
    """With exact means and variances all that is left of the chain is elementwise."""
    check_exact_statistics(kernel, call, seed)


def check_exact_statistics(module: Any, call: Call, seed: int) -> None:
    tokens, dtype = call.residual.shape[0], call.residual.dtype
    generator = torch.Generator().manual_seed(seed)

    def whole(rows: int, sign: float) -> Tensor:
        half = torch.randint(-8, 9, (rows, EXACT_STATISTICS // 2), generator=generator).float()
        return torch.cat([half, sign * half], 1)

    def wide(part: Tensor | None) -> Tensor | None:
        shape = () if part is None else (*part.shape[:-1], EXACT_STATISTICS)
        return None if part is None else torch.randn(shape, generator=generator).to(part.dtype)

    gate = None if call.gate is None else whole(call.gate.shape[0], 1).to(call.gate.dtype)
    call = replace(
        call,
        residual=whole(tokens, -1).to(dtype),
        branch=None if call.branch is None else whole(tokens, -1).to(dtype),
        gate=gate,
        scale=wide(call.scale),
        shift=wide(call.shift),
        weight=wide(call.weight),
        bias=wide(call.bias),
    )
    h = call.residual.float()
    if call.branch is not None:
        h = h + (call.branch.float() if gate is None else call.branch.float() * picked(gate, call.index))
    deviation = (
        (h.square().mean(1, keepdim=True) + call.eps).double().sqrt().float()
    )  # float32 sqrt of torch is not exact
    y = h * (1 / deviation)
    y = y if call.weight is None else y * call.weight.float()
    y = y if call.bias is None else y + call.bias.float()
    y = y if call.scale is None else y * (1 + picked(call.scale, call.index))
    y = y if call.shift is None else y + picked(call.shift, call.index)
    assert_eager(call.forward(module, "eager")[-1], y.to(dtype), sums=False)


def picked(table: Tensor, index: Tensor | None) -> Tensor:
    return table.float() if index is None or table.shape[0] == 1 else table.float()[index.long()]


# --- the public function ----------------------------------------------------------------------------------------------


def test_the_public_function_runs_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERNINI_KERNELS", "triton")
    assert {which(op) for op in ("modulate", "modulate_norm", "modulate_backward", "modulate_norm_backward")} == {
        "triton"
    }
    call = everything(5, 48, 3)
    parts = {"gate": call.gate, "scale": call.scale, "shift": call.shift, "weight": call.weight, "bias": call.bias}
    leaves = {name: part.clone().requires_grad_() for name, part in parts.items() if part is not None}
    residual, branch = (x.clone().requires_grad_() for x in (call.residual, rand(5, 48, seed=1)))
    h, normed = modulate(residual, branch, index_T=call.index, **leaves)
    (h * 2 + normed.square()).sum().backward()
    exact = {name: part.detach().double().requires_grad_() for name, part in leaves.items()}
    residual64, branch64 = (x.detach().double().requires_grad_() for x in (residual, branch))
    monkeypatch.setenv("BERNINI_KERNELS", "reference")
    h, normed = modulate(residual64, branch64, index_T=call.index, **exact)
    (h * 2 + normed.square()).sum().backward()
    for mine, theirs in zip((residual, branch, *leaves.values()), (residual64, branch64, *exact.values()), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_rows_that_are_too_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERNINI_KERNELS", "triton")
    monkeypatch.setattr(launch, "launch", lambda *args, **options: pytest.fail("launched"))
    x = torch.zeros(2, launch.WIDEST + 1)
    for branch in (None, x):
        with pytest.raises(ValueError, match=rf"up to {launch.WIDEST} elements, got {launch.WIDEST + 1}"):
            modulate(x, branch)
    with pytest.raises(ValueError, match=f"got {launch.WIDEST + 1}"):
        kernel_bwd.modulate_norm_backward(x, x, None, None, None, None, None, EPS)


def test_an_index_of_the_wrong_shape_is_refused_before_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERNINI_KERNELS", "triton")
    monkeypatch.setattr(launch, "launch", lambda *args, **options: pytest.fail("launched"))
    x, table = torch.zeros(3, 8), torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"index must be \[tokens\] = \[3\], got \[4\]"):
        modulate(x, scale=table, index_T=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shift must be \[rows, width\] = \[2, 8\], got \[2, 9\]"):
        modulate(x, scale=table, shift=torch.zeros(2, 9), index_T=torch.zeros(3, dtype=torch.int64))


# --- broken variants --------------------------------------------------------------------------------------------------


def smoke(module: Any) -> None:
    """A few small calls; raises AssertionError where the numbers of ``module`` are wrong."""
    call = everything(10, 100, 3)
    if hasattr(module, "modulate_backward"):
        check_backward(module, call, *gradients_of(call))
        return
    check_forward(module, call)
    call = everything(3, 100, 2, torch.bfloat16)
    check_eager(module, replace(call, residual=(call.residual + 100).to(torch.bfloat16), shift=None, bias=None))


@pytest.mark.parametrize("module", ["kernel", "kernel_bwd"])
def test_the_right_modules_pass_the_smoke_test(module: str) -> None:
    smoke(globals()[module])


@pytest.mark.parametrize("variant", common.broken("modulate") if launch.INTERPRETED else [])
def test_a_broken_variant_is_refused(variant: Any) -> None:
    with pytest.raises(AssertionError):
        smoke(variant.load())
