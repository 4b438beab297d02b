"""The C++ twin of modulate against the reference in float64. Shapes: T tokens, N width, R rows of the tables."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bernini.kernels import modulate, which
from bernini.kernels.modulate import reference
from bernini.kernels.native import loader

pytestmark = pytest.mark.skipif(loader.missing() is not None, reason=f"the native library {loader.missing()}")

DTYPES = (torch.float32, torch.bfloat16)
PART_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TABLES, PARTS = ("gate", "scale", "shift"), ("gate", "scale", "shift", "weight", "bias")
OPS = ("modulate", "modulate_norm", "modulate_backward", "modulate_norm_backward")


@pytest.fixture(autouse=True, scope="module")
def only_native() -> Iterator[None]:
    """Every call of this file, backward too, is the twin's or an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BERNINI_KERNELS", "native")
        yield


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same [T, N] values in memory as ``layout`` says."""
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "sliced":  # rows of odd length at an odd offset, as a table is cut out of [rows, 6 * width]
        return torch.cat((values[:, :1], values, values), 1)[:, 1 : 1 + values.shape[1]]
    return values


LAYOUTS = ("contiguous", "transposed", "sliced")


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """(residual, branch, keywords) of a random sub-chain."""
    torch.manual_seed(draw(st.integers(0, 999)))
    tokens = draw(st.sampled_from([0, 1, 2, 5, 40]))
    width = draw(st.sampled_from([2, 3, 15, 16, 40, 511, 513, 1100]))
    dtype, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS))
    size, offset = draw(st.sampled_from([2.0**-10, 1.0, 2.0**10])), draw(st.sampled_from([0.0, 1.0]))
    rows = draw(st.sampled_from([None, 1, 3, 70]))
    with_branch = draw(st.booleans())
    chosen = draw(st.sets(st.sampled_from(PARTS if with_branch else PARTS[1:])))

    def tokenwise() -> Tensor:
        return laid_out(((torch.randn(tokens, width) + offset) * size).to(dtype), layout)

    residual, branch = tokenwise(), tokenwise() if with_branch else None
    keywords: dict[str, Any] = dict.fromkeys(PARTS)
    for name in sorted(chosen):
        values = torch.randn(rows or 1, width) if name in TABLES else torch.randn(1, width)
        part = laid_out(values.to(draw(st.sampled_from(PART_DTYPES))), draw(st.sampled_from(LAYOUTS)))
        keywords[name] = part if name in TABLES else part[0]
    index = torch.randint(0, rows or 1, (tokens,))
    index = index.sort().values if draw(st.booleans()) else index
    index = index.to(draw(st.sampled_from([torch.int32, torch.int64])))
    keywords["index_T"] = index if rows is not None and chosen & set(TABLES) else None
    return residual, branch, keywords


def exactly(residual: Tensor, branch: Tensor | None, keywords: dict[str, Any]) -> tuple[Tensor, ...]:
    """The reference in float64."""
    gate, scale, shift, weight, bias = (None if (p := keywords[n]) is None else p.double() for n in PARTS)
    rest = (scale, shift, keywords["index_T"], weight, bias, 1e-6, "fp32")
    if branch is None:
        return (reference.modulate_norm(residual.double(), *rest),)
    return reference.modulate(residual.double(), branch.double(), gate, *rest)


def condition(h: Tensor) -> float:
    """How much the norm magnifies a rounding error of its input: |h| over the spread of the row."""
    if h.numel() == 0:
        return 1.0
    return max(1.0, float((h.abs() / (h.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()).max()))


def assert_rounded_once(actual: Tensor, exact: Tensor, size: float = 0.0) -> None:
    """Off by no more than the one rounding, and by what float32 arithmetic on values of this size may add to it."""
    if exact.numel() == 0:
        return
    best = (exact.to(actual.dtype).double() - exact).abs()
    room = 24 * 2.0**-24 * max(float(exact.abs().max()), size)
    worst = ((actual.double() - exact).abs() - best).max()
    assert worst <= room, f"{float(worst):.3g} over the rounding, {float(room):.3g} allowed"


def largest(*tensors: Tensor | None) -> float:
    return max((float(t.detach().abs().max()) for t in tensors if t is not None and t.numel()), default=0.0)


@settings(max_examples=100)
@given(call=calls())
def test_forward(call):
    residual, branch, keywords = call
    new, normed = modulate(residual, branch, **keywords)
    *sums, true = exactly(*call)
    h = sums[0] if sums else residual.double()
    for y in (normed,) if branch is None else (new, normed):
        assert (y.dtype, y.shape, y.is_contiguous()) == (residual.dtype, residual.shape, True)
    if branch is None:
        assert new is residual
    else:
        assert_rounded_once(new, h, largest(branch) * max(1.0, largest(keywords["gate"])) + largest(residual))
    factor = max(1.0, largest(keywords["weight"])) * (1 + largest(keywords["scale"]))
    assert_rounded_once(normed, true, condition(h) * factor)


def as_leaves(call: tuple[Tensor, Tensor | None, dict[str, Any]]) -> tuple[dict[str, Tensor], Tensor | None]:
    residual, branch, keywords = call
    named = {"residual_TN": residual, "branch_TN": branch, **{name: keywords[name] for name in PARTS}}
    return {n: t.detach().requires_grad_() for n, t in named.items() if t is not None}, keywords["index_T"]


@settings(max_examples=80)
@given(call=calls(), layout=st.sampled_from(LAYOUTS))
def test_backward(call, layout):
    residual, branch, _ = call
    leaves, index = as_leaves(call)
    results = modulate(**leaves, index_T=index)
    results = results if branch is not None else results[1:]
    dys = [laid_out(torch.randn(residual.shape).to(residual.dtype), layout) for _ in results]
    ours = torch.autograd.grad(results, list(leaves.values()), dys)

    wide = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    named = {name: wide.get(name) for name in PARTS} | {"index_T": index}
    exact = exactly(wide["residual_TN"], wide.get("branch_TN"), named)
    theirs = torch.autograd.grad(exact, list(wide.values()), [dy.double() for dy in dys])

    h = exact[0].detach() if branch is not None else residual.double()
    spread = float((h.var(-1, correction=0) + 1e-6).rsqrt().max()) if h.numel() else 1.0
    part = {name: max(1.0, largest(leaves.get(name))) for name in PARTS}
    dn, tokens = largest(dys[-1]), len(residual)
    dh = largest(*dys) + spread * dn * part["weight"] * (1 + part["scale"])
    u = largest(h) * spread
    sizes = {
        "residual_TN": dh,
        "branch_TN": dh * part["gate"],
        "gate": tokens * dh * largest(branch),
        "shift": tokens * dn,
    }
    sizes["scale"] = tokens * dn * (u * part["weight"] + part["bias"])
    sizes["weight"], sizes["bias"] = (tokens * dn * (1 + part["scale"]) * x for x in (u, 1))
    for (name, leaf), grad, true in zip(leaves.items(), ours, theirs, strict=True):
        assert (grad.dtype, grad.shape) == (leaf.dtype, leaf.shape), name
        assert_rounded_once(grad, true, sizes[name] * condition(h))


def example(
    dtype: torch.dtype, rows: int = 1, tokens: int = 40, width: int = 96
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    torch.manual_seed(0)
    residual, branch = torch.randn(2, tokens, width).to(dtype)
    tables = dict(zip(TABLES, torch.randn(3, rows, width), strict=True))
    others = dict(zip(("weight", "bias"), torch.randn(2, width), strict=True))
    return residual, branch, {**tables, **others, "index_T": torch.randint(0, rows, (tokens,)) if rows > 1 else None}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_branch", [True, False])
def test_every_combination_of_parts(dtype, with_branch):
    """Forward and backward against the reference in float32, which rounds the same values."""
    residual, branch, keywords = example(dtype, rows=4)
    names = PARTS if with_branch else PARTS[1:]
    for count in range(len(names) + 1):
        for chosen in itertools.combinations(names, count):
            index = keywords["index_T"] if set(chosen) & set(TABLES) else None
            picked = {name: keywords[name] if name in chosen else None for name in PARTS} | {"index_T": index}
            call = (residual, branch if with_branch else None, picked)
            *_, normed = modulate(*call[:2], **picked)
            assert_rounded_once(normed, exactly(*call)[-1], 20)
            leaves, index = as_leaves(call)
            outputs = modulate(**leaves, index_T=index)
            ours = torch.autograd.grad(outputs[-1].float().sin().sum(), list(leaves.values()))
            wide = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
            true = exactly(
                wide["residual_TN"], wide.get("branch_TN"), {n: wide.get(n) for n in PARTS} | {"index_T": index}
            )[-1]
            theirs = torch.autograd.grad(
                true, list(wide.values()), outputs[-1].detach().float().cos().to(dtype).double()
            )
            for name, a, b in zip(leaves, ours, theirs, strict=True):
                assert_rounded_once(a, b, 400), (chosen, name)


@pytest.mark.parametrize("rows", [1, 4])
def test_bf16_is_the_best_rounding(rows):
    call = example(torch.bfloat16, rows)
    for y, exact in zip(modulate(*call[:2], **call[2]), exactly(*call), strict=True):
        assert (y.double() - exact).norm() <= 1.05 * (exact.bfloat16().double() - exact).norm()


@pytest.mark.parametrize("offset", [0.0, 100.0, -30000.0])
@pytest.mark.parametrize("where", [slice(None), slice(0, 256), slice(256, None)])
def test_a_mean_far_from_zero(offset, where):
    """Or zero in the first block of a row, on which the sums are centred, and far from it in the others."""
    torch.manual_seed(0)
    x = torch.randn(7, 1600)
    x[:, where] += offset
    exact = reference.modulate_norm(x.double(), None, None, None, None, None, 1e-6, "fp32")
    assert_rounded_once(modulate(x)[1], exact, condition(x.double()))


# --- large results, and the same bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3001, 3072])
def test_large_results_are_written_past_the_cache_with_the_same_bits(dtype, width):
    """Over the limit above which results are streamed; odd widths put rows where they are not aligned."""
    tokens = 800 if dtype == torch.bfloat16 else 400
    residual, branch, keywords = example(dtype, rows=5, tokens=tokens, width=width)
    assert 2 * residual.nbytes > 8 * 2**20
    whole, index = modulate(residual, branch, **keywords), keywords.pop("index_T")
    for i in range(0, tokens, 100):
        part = slice(i, i + 100)
        piece = modulate(residual[part], branch[part], **keywords, index_T=index[part])
        assert all(torch.equal(y[part], true) for y, true in zip(whole, piece, strict=True))
    leaves, _ = as_leaves((residual, branch, {**keywords, "index_T": index}))
    dys = [torch.randn(residual.shape).to(dtype) for _ in range(2)]
    dx, dbranch = torch.autograd.grad(modulate(**leaves, index_T=index), [*leaves.values()][:2], dys)
    for i in range(0, tokens, 100):
        part = slice(i, i + 100)
        named = {**leaves, "residual_TN": residual[part].requires_grad_(), "branch_TN": branch[part].requires_grad_()}
        pieces = [named["residual_TN"], named["branch_TN"]]
        grads = torch.autograd.grad(modulate(**named, index_T=index[part]), pieces, [dy[part] for dy in dys])
        assert torch.equal(dx[part], grads[0]) and torch.equal(dbranch[part], grads[1])


FIRST: dict[tuple[torch.dtype, int, bool], list[Tensor]] = {}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 400])
@pytest.mark.parametrize("with_branch", [True, False])
def test_every_run_and_every_number_of_threads(dtype, rows, with_branch, threads):
    residual, branch, keywords = example(dtype, rows, tokens=301, width=200)
    keywords["gate"] = keywords["gate"] if with_branch else None
    leaves, index = as_leaves((residual, branch if with_branch else None, keywords))
    for _ in range(3):
        ys = modulate(**leaves, index_T=index)
        grads = torch.autograd.grad(ys[-1], list(leaves.values()), ys[-1].detach().sign())
        results = [y.detach() for y in ys] + list(grads)
        first = FIRST.setdefault((dtype, rows, with_branch), results)
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


# --- values that are no numbers, and rows that are no rows -----------------------------------------------------------


def test_bf16_rounds_as_torch_does():
    """Through 0 + gate * 1, with every kind of float32: ties, denormals, infinities and NaNs of all sorts."""
    torch.manual_seed(0)
    upper = torch.arange(0, 2**16, 7).int() * 2**16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]).int()
    gate = (upper[:, None] + lower).flatten().view(torch.float32)[None]
    zero = torch.zeros(1, gate.shape[1]).bfloat16()
    assert torch.equal(modulate(zero, zero + 1, gate=gate)[0].nan_to_num(12345), gate.bfloat16().nan_to_num(12345))


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_stays_in_its_row(dtype):
    residual, branch, keywords = example(dtype, tokens=5)
    residual[1, 3], branch[3, 0] = float("nan"), float("inf")
    new, normed = modulate(residual, branch, **keywords)
    assert new.isfinite().logical_not().nonzero().tolist() == [[1, 3], [3, 0]]
    assert [bool(row.isnan().all()) for row in normed] == [False, True, False, True, False]
    assert normed[::2].isfinite().all()


def test_no_tokens_and_rows_without_tokens():
    residual, branch, keywords = example(torch.float32, rows=4, tokens=0)
    leaves, index = as_leaves((residual, branch, keywords))
    for grad, leaf in zip(
        torch.autograd.grad(modulate(**leaves, index_T=index)[1].sum(), [*leaves.values()]),
        leaves.values(),
        strict=True,
    ):
        assert torch.equal(grad, torch.zeros_like(leaf))
    residual, branch, keywords = example(torch.float32, rows=4)
    keywords["index_T"] = torch.full((40,), 2)
    leaves, index = as_leaves((residual, branch, keywords))
    grads = torch.autograd.grad(modulate(**leaves, index_T=index)[1].square().sum(), [leaves[name] for name in TABLES])
    for grad in grads:
        assert grad[[0, 1, 3]].abs().max() == 0 and grad[2].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1])
def test_an_index_outside_the_tables(dtype, bad):
    residual, branch, keywords = example(torch.float32, rows=4)
    keywords["index_T"] = keywords["index_T"].to(dtype)
    keywords["index_T"][[7, 9]] = bad
    parts = [keywords[name] for name in (*TABLES, "index_T", "weight", "bias")]
    for call in (
        lambda: modulate(residual, branch, **keywords),
        lambda: modulate(residual, **{**keywords, "gate": None}),
        lambda: torch.ops.bernini.modulate_backward(residual, residual, residual, branch, *parts, 1e-6),
        lambda: torch.ops.bernini.modulate_norm_backward(residual, residual, *parts[1:], 1e-6),
    ):
        with pytest.raises(IndexError, match=f"index {bad} at position 7 is outside tables of 4 rows"):
            call()


def test_an_index_into_one_row_is_not_read():
    residual, branch, keywords = example(torch.float32)
    expected = modulate(residual, branch, **keywords)
    keywords["index_T"] = torch.full((40,), 99)
    assert all(torch.equal(a, b) for a, b in zip(modulate(residual, branch, **keywords), expected, strict=True))


def test_what_it_serves(monkeypatch):
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="native implementation has no rounding='eager'"):
        modulate(x, rounding="eager")
    with pytest.raises(ValueError, match=r"native implementation does not take torch.float64"):
        modulate(x.double())
    monkeypatch.delenv("BERNINI_KERNELS")
    for op in OPS:
        assert {which(op, "cpu", dtype) for dtype in DTYPES} == {"native"}
        assert which(op, "cpu", torch.float64) == which(op, "cpu", torch.float16) == "reference"
        assert which(op, "cpu", torch.float32, "eager") == "reference"
