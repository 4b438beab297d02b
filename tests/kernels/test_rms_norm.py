"""rms_norm against loops in float64, torch's own module, autograd, and the torch.library contracts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bernini.kernels import rms_norm, which
from bernini.kernels.native import loader
from bernini.kernels.rms_norm import reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8}
DOORS = ("native", "reference")


@pytest.fixture(autouse=True)
def one_thread_one_seed():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def by_hand(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The formula in Python floats, one row at a time."""
    rows = []
    for row in x.double().tolist():
        r = 1 / math.sqrt(math.fsum(v * v for v in row) / len(row) + eps)
        w = [1.0] * len(row) if weight is None else weight.double().tolist()
        rows.append([v * r * u for v, u in zip(row, w, strict=True)])
    return torch.tensor(rows, dtype=torch.float64).reshape(x.shape)


def strided(shape: tuple[int, int], dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    """[T, N] random values that lie in memory as ``layout`` says."""
    generator = torch.Generator().manual_seed(seed)
    tokens, width = shape
    if layout == "transposed":
        return torch.randn(width, tokens, generator=generator).to(dtype).t()
    if layout == "stepped":
        return torch.randn(2 * tokens, 3 * width + 1, generator=generator).to(dtype)[::2, 1::3]
    if layout == "expanded":
        return torch.randn(1, width, generator=generator).to(dtype).expand(tokens, width)
    return torch.randn(tokens, width, generator=generator).to(dtype)


layouts = st.sampled_from(["contiguous", "transposed", "stepped", "expanded"])


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from([None, *DTYPES]),
    layout=layouts,
    scale=st.sampled_from([2.0**-10, 1.0, 2.0**10]),
    rounding=st.sampled_from(["fp32", "eager"]),
    seed=st.integers(0, 99),
)
def test_against_loops(shape, dtype, weight_dtype, layout, scale, rounding, seed):
    x = strided(shape, dtype, layout, seed) * scale
    weight = None if weight_dtype is None else torch.randn(shape[1]).to(weight_dtype)
    expected = by_hand(x, weight, 1e-6)
    for door in DOORS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("BERNINI_KERNELS", door)
            y = rms_norm(x, weight, rounding=rounding)
        assert y.dtype == dtype
        assert y.shape == x.shape
        assert y.is_contiguous()
        torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=1e-30)


def test_leading_axes_and_a_single_row():
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(rms_norm(x), by_hand(x.view(6, 8), None, 1e-6).view(2, 3, 8).float())
    assert torch.equal(rms_norm(x[0, 0]), rms_norm(x)[0, 0])


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_has_the_bits_of_the_torch_module(door, dtype, monkeypatch):
    monkeypatch.setenv("BERNINI_KERNELS", door)
    module = torch.nn.RMSNorm(192, eps=1e-6, dtype=dtype)
    torch.nn.init.normal_(module.weight)
    x = torch.randn(31, 192).to(dtype)
    assert torch.equal(rms_norm(x, module.weight, rounding="eager"), module(x))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bf16_is_the_best_rounding(door, weight_dtype, monkeypatch):
    monkeypatch.setenv("BERNINI_KERNELS", door)
    x, weight = torch.randn(64, 256).bfloat16(), torch.randn(256).to(weight_dtype)
    exact = reference.rms_norm(x.double(), weight, 1e-6, "fp32")
    best = (exact.bfloat16().double() - exact).norm()
    assert (rms_norm(x, weight).double() - exact).norm() <= 1.05 * best


def wrong_mean(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) * weight


def wrong_axis(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(0, keepdim=True) + 1e-6) * weight


def wrong_weight(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + weight)


def wrong_eps(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * weight


@pytest.mark.parametrize("broken", [wrong_mean, wrong_axis, wrong_weight, wrong_eps])
def test_the_comparison_rejects_wrong_formulas(broken):
    x, weight = torch.randn(6, 16) * 2e-3, torch.randn(16)
    expected = by_hand(x, weight, 1e-6)
    torch.testing.assert_close(rms_norm(x, weight).double(), expected, rtol=TOLERANCE[torch.bfloat16], atol=1e-30)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(broken(x, weight).double(), expected, rtol=TOLERANCE[torch.bfloat16], atol=1e-30)


# --- gradients -------------------------------------------------------------------------------------------------------


def test_gradcheck():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w), (x, weight))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x), (x,))


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(1, 24)),
    dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from([None, *DTYPES]),
    layout=layouts,
    seed=st.integers(0, 99),
)
def test_backward_is_autograd_of_the_reference(shape, dtype, weight_dtype, layout, seed):
    x = strided(shape, dtype, layout, seed).requires_grad_()
    weight = None if weight_dtype is None else torch.randn(shape[1]).to(weight_dtype).requires_grad_()
    dy = strided(shape, dtype, layout, seed + 1)
    leaves = [x] if weight is None else [x, weight]
    ours = torch.autograd.grad(rms_norm(x, weight), leaves, dy)

    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y = reference.rms_norm(wide[0], None if weight is None else wide[1], 1e-6, "fp32")
    # Both gradients are differences of terms of this size.
    size = 4.0
    for factor in (dy, x.detach().double().square().mean(-1).add(1e-6).rsqrt(), *wide[1:]):
        size *= max(1.0, float(factor.detach().abs().max())) if factor.numel() else 1.0
    for grad, leaf, expected in zip(ours, leaves, torch.autograd.grad(y, wide, dy.double()), strict=True):
        assert grad.dtype == leaf.dtype
        coarse = max(TOLERANCE[leaf.dtype], TOLERANCE[torch.float32] if dtype != torch.float64 else 0)
        torch.testing.assert_close(grad.double(), expected, rtol=coarse, atol=coarse * size)


needs_library = pytest.mark.skipif(loader.missing() is not None, reason=f"the native library {loader.missing()}")


def gradients(door: str, x: Tensor, weight: Tensor | None, dy: Tensor) -> tuple[Tensor, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BERNINI_KERNELS", door)
        return tuple(torch.ops.bernini.rms_norm_backward(dy, x, weight, 1e-6))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(0, 8), (1, 1), (31, 17), (300, 192), (2000, 33), (40, 5120)])
def test_the_twin_rounds_once(dtype, weight_dtype, tokens, width):
    x, dy = torch.randn(tokens, width).to(dtype), torch.randn(tokens, width).to(dtype)
    weight = None if weight_dtype is None else torch.randn(width).to(weight_dtype)
    wide = [None if t is None else t.double() for t in (dy, x, weight)]
    exact = reference.rms_norm_backward(*wide, 1e-6)
    for actual, true, terms in zip(gradients("native", x, weight, dy), exact, (1, tokens), strict=True):
        if true.numel():
            best = (true.to(actual.dtype).double() - true).abs()
            # A gradient is a difference of terms as large as its largest; of a sum they add up like a random walk.
            room = 32 * 2.0**-24 * max(4.0, float(true.abs().max())) * max(1, terms) ** 0.5
            assert float(((actual.double() - true).abs() - best).max()) <= room


@needs_library
def test_the_twin_has_the_same_bits_on_any_number_of_threads():
    x, dy, weight = torch.randn(999, 192).bfloat16(), torch.randn(999, 192).bfloat16(), torch.randn(192)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append((rms_norm(x, weight), *gradients("native", x, weight, dy)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_library
def test_the_twin_serves_training():
    assert which("rms_norm_backward", dtype=torch.bfloat16) == which("rms_norm_backward") == "native"
    assert which("rms_norm_backward", dtype=torch.float64) == "reference"


# --- contracts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["", "reference"])  # unforced is native where the library is
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck(door, layout, monkeypatch):
    monkeypatch.setenv("BERNINI_KERNELS", door)
    for dtype, weight in (
        (torch.float32, torch.randn(8, requires_grad=True)),
        (torch.bfloat16, torch.randn(8, requires_grad=True)),
        (torch.float32, None),
    ):
        x = strided((5, 8), dtype, layout, 0).requires_grad_()
        torch.library.opcheck(torch.ops.bernini.rms_norm, (x, weight, 1e-6, "fp32"))


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck_backward(layout):
    x = strided((5, 8), torch.bfloat16, layout, 0)
    torch.library.opcheck(torch.ops.bernini.rms_norm_backward, (x, x, torch.randn(8), 1e-6))
    torch.library.opcheck(torch.ops.bernini.rms_norm_backward, (x, x, None, 1e-6))


def test_compiles_in_one_graph():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    compiled = torch.compile(lambda x, w: rms_norm(2 * x, w), fullgraph=True, backend="aot_eager")
    y = compiled(x, weight)
    torch.testing.assert_close(y, rms_norm(2 * x, weight))
    grads = torch.autograd.grad(y.square().sum(), (x, weight))
    expected = torch.autograd.grad(rms_norm(2 * x, weight).square().sum(), (x, weight))
    torch.testing.assert_close(grads, expected)


def test_real_size_without_memory():
    with FakeTensorMode():
        x = torch.empty(440_000, 5120, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(5120, requires_grad=True)
        y = rms_norm(x, weight)
        assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, x.stride())
        dx, dweight = torch.autograd.grad(y, (x, weight), torch.empty_like(y))
        assert (dx.shape, dx.dtype, dweight.shape, dweight.dtype) == (x.shape, x.dtype, weight.shape, weight.dtype)


@pytest.mark.parametrize(
    ("x", "weight", "rounding", "message"),
    [
        (torch.ones(2, 4), torch.ones(5), "fp32", r"weight must be \[width\] = \[4\], got \[5\]"),
        (torch.ones(2, 4), torch.ones(1, 4), "fp32", r"weight must be \[width\] = \[4\], got \[1, 4\]"),
        (torch.ones(2, 4, dtype=torch.int32), None, "fp32", r"x must be floating point, got torch.int32 \[2, 4\]"),
        (torch.ones(2, 4), torch.ones(4).long(), "fp32", "weight must be floating point, got torch.int64"),
        (torch.ones(2, 4), torch.ones(4, device="meta"), "fp32", "different devices: x on cpu, weight on meta"),
        (torch.tensor(1.0), None, "fp32", "at least one axis"),
        (torch.ones(2, 4), None, "bf16", "rounding='bf16'; expected one of 'fp32', 'eager'"),
    ],
)
def test_bad_inputs(x, weight, rounding, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, rounding=rounding)
