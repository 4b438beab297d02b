"""The C++ twin of qk_rope against the reference in float64. Shapes: T tokens, H heads, D head dim."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bernini.kernels import qk_rope, rope_tables, which
from bernini.kernels.native import loader
from bernini.kernels.qk_rope import native, reference

pytestmark = pytest.mark.skipif(loader.missing() is not None, reason=f"the native library {loader.missing()}")

DTYPES = (torch.float32, torch.bfloat16)
SIZES, PHASES = (5, 6, 7), (0.0, 1.0, 2.5)
OPS = ("qk_rope", "qk_rope_out", "qk_rope_backward")


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


def random_rows(tokens: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.stack([torch.randint(0, n, (tokens,)) for n in (*SIZES, len(PHASES))], dim=1).to(dtype)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in memory as ``layout`` says."""
    tokens, heads, dim = values.shape
    if layout == "packed":  # q or k of a fused projection [T, 3, H, D]
        return values.unsqueeze(1).expand(-1, 3, -1, -1).contiguous()[:, 1]
    if layout == "heads_first":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "odd":  # rows of odd length at an odd offset
        return torch.cat((values, values, values[..., :1]), -1)[..., dim : 2 * dim] if tokens and heads else values
    if layout == "stepped":
        return values.unsqueeze(-1).expand(-1, -1, -1, 2).contiguous()[..., 0]
    return values


LAYOUTS = ("contiguous", "packed", "heads_first", "odd", "stepped")


def weight_for(heads: int, dim: int, norm: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(heads * dim if norm == "across_heads" else dim).to(dtype)


def assert_rounded_once(actual: Tensor, exact: Tensor, size: float = 0.0) -> None:
    """Off by no more than the one rounding, and by what float32 arithmetic on values of this size may add to it."""
    if exact.numel() == 0:
        return
    best = (exact.to(actual.dtype).double() - exact).abs()
    room = 24 * 2.0**-24 * max(float(exact.abs().max()), size)
    worst = ((actual.double() - exact).abs() - best).max()
    assert worst <= room, f"{float(worst):.3g} over the rounding, {float(room):.3g} allowed"


cases = given(
    tokens=st.sampled_from([0, 1, 2, 5, 40]),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dim=st.sampled_from([2, 6, 10, 32, 34, 70, 128]),
    dtype=st.sampled_from(DTYPES),
    table_dtype=st.sampled_from([torch.float32, torch.float64]),
    row_dtype=st.sampled_from([torch.int32, torch.int64]),
    weight_dtype=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    norm=st.sampled_from(["across_heads", "per_head"]),
    layout=st.sampled_from(LAYOUTS),
    scale=st.sampled_from([2.0**-10, 1.0, 2.0**10]),
    seed=st.integers(0, 99),
)


def arguments(tokens, heads, dim, dtype, table_dtype, row_dtype, weight_dtype, norm, layout, scale, seed):
    torch.manual_seed(seed)
    xs = [laid_out((torch.randn(tokens, h, dim) * scale).to(dtype), layout) for h in heads]
    weights = [None if weight_dtype is None else weight_for(h, dim, norm, weight_dtype) for h in heads]
    return xs, weights, rope_tables(dim, SIZES, PHASES, dtype=table_dtype), random_rows(tokens, row_dtype)


def exactly(xs: list[Tensor], weights: list[Tensor | None], tables, rows: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    wide = [weight if weight is None else weight.double() for weight in weights]
    tables = [table.double() for table in tables]
    return reference.qk_rope(xs[0].double(), xs[1].double(), tables, rows, *wide, norm, 1e-6, "fp32")


@settings(max_examples=80)
@cases
def test_forward(**case):
    xs, weights, tables, rows = arguments(**case)
    norm = case["norm"]
    ours = qk_rope(*xs, tables, rows, q_weight=weights[0], k_weight=weights[1], norm=norm)
    for y, x, exact in zip(ours, xs, exactly(xs, weights, tables, rows, norm), strict=True):
        assert (y.dtype, y.shape, y.is_contiguous()) == (x.dtype, x.shape, True)
        assert_rounded_once(y, exact)


@settings(max_examples=50)
@cases
def test_backward(**case):
    xs, weights, tables, rows = arguments(**case)
    norm = case["norm"]
    dys = [laid_out(torch.randn(x.shape).to(x.dtype), case["layout"]) for x in xs]
    leaves = [leaf.requires_grad_() for leaf in (*xs, *weights) if leaf is not None]
    ours = torch.autograd.grad(
        qk_rope(*xs, tables, rows, q_weight=weights[0], k_weight=weights[1], norm=norm), leaves, dys
    )
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = exactly(wide[:2], wide[2:] or [None, None], tables, rows, norm)
    theirs = torch.autograd.grad(exact, wide, [dy.double() for dy in dys])
    for i, (grad, leaf, true) in enumerate(zip(ours, leaves, theirs, strict=True)):
        assert (grad.dtype, grad.shape) == (leaf.dtype, leaf.shape)
        assert_rounded_once(grad, true, terms(xs[i % 2], weights[i % 2], dys[i % 2], norm, summed=i > 1))


def terms(x: Tensor, weight: Tensor | None, dy: Tensor, norm: str, summed: bool) -> float:
    """The size of what a gradient is the sum of; the sum itself may cancel."""
    if weight is None or x.numel() == 0:
        return 0.0
    x, dy, weight = x.detach().double(), dy.double(), weight.detach().double()
    r = (x.flatten(1) if norm == "across_heads" else x).square().mean(-1).add(1e-6).rsqrt()
    size = dy.abs().max() * (x.abs().max() * len(x) * x.shape[1] if summed else weight.abs().max())
    return float(r.max() * size)


@pytest.mark.parametrize("norm", ["across_heads", "per_head"])
def test_bf16_is_the_best_rounding(norm):
    torch.manual_seed(0)
    xs = [torch.randn(96, h, 32).bfloat16() for h in (4, 2)]
    weights: list[Tensor | None] = [weight_for(h, 32, norm, torch.float32) for h in (4, 2)]
    tables, rows = rope_tables(32, SIZES, PHASES), random_rows(96)
    ours = qk_rope(*xs, tables, rows, q_weight=weights[0], k_weight=weights[1], norm=norm)
    for y, exact in zip(ours, exactly(xs, weights, tables, rows, norm), strict=True):
        assert (y.double() - exact).norm() <= 1.05 * (exact.bfloat16().double() - exact).norm()


# --- destinations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [None, 1, 2, 4])
@pytest.mark.parametrize("weighted", [True, False])
def test_out_writes_its_rows_and_nothing_else(dtype, ranks, weighted):
    torch.manual_seed(0)
    xs = [torch.randn(9, h, 12).to(dtype) for h in (8, 4)]
    weights = [torch.randn(h * 12) if weighted else None for h in (8, 4)]
    args = (*xs, rope_tables(12, SIZES, PHASES), random_rows(9))
    expected = qk_rope(*args, q_weight=weights[0], k_weight=weights[1])
    stores = [
        torch.full((9, x.shape[1], 19) if ranks is None else (ranks, 9, x.shape[1] // ranks, 19), float("nan")).to(
            dtype
        )
        for x in xs
    ]
    versions = [store._version for store in stores]
    out = (stores[0][..., 3:15], stores[1][..., 3:15])
    qk_rope(*args, q_weight=weights[0], k_weight=weights[1], out=out)
    for store, y, version in zip(stores, expected, versions, strict=True):
        rows = store if ranks is None else store.movedim(0, 1).flatten(1, 2)
        assert torch.equal(rows[..., 3:15], y)
        assert rows[..., :3].isnan().all() and rows[..., 15:].isnan().all()
        assert store._version > version, "autograd must see the change"


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_results_are_written_past_the_cache_with_the_same_bits(dtype):
    """Over the limit above which results are streamed, also to rows that are not aligned."""
    torch.manual_seed(0)
    tokens = 800 if dtype == torch.bfloat16 else 400
    xs = [torch.randn(tokens, 24, 128).to(dtype) for _ in range(2)]
    weight, tables, rows = torch.randn(24 * 128), rope_tables(128, SIZES, PHASES), random_rows(tokens)
    assert 2 * xs[0].nbytes > 8 * 2**20
    pieces = [
        qk_rope(*(x[i : i + 100] for x in xs), tables, rows[i : i + 100], q_weight=weight, k_weight=weight)
        for i in range(0, tokens, 100)
    ]
    expected = [torch.cat(ys) for ys in zip(*pieces, strict=True)]
    stores = [torch.full((tokens, 24, 133), float("nan"), dtype=dtype) for _ in range(2)]
    out = (stores[0][..., 1:129], stores[1][..., 2:130])
    for ys in (
        qk_rope(*xs, tables, rows, q_weight=weight, k_weight=weight),
        qk_rope(*xs, tables, rows, q_weight=weight, k_weight=weight, out=out),
    ):
        assert all(torch.equal(y, true) for y, true in zip(ys, expected, strict=True))
    assert stores[0][..., :1].isnan().all() and stores[0][..., 129:].isnan().all()


def test_packed_projections_are_read_where_they_lie():
    qkv = torch.randn(6, 3, 4, 8)
    q, k, _ = qkv.unbind(1)
    assert native._rows_whole(q) is q and native._rows_whole(k) is k
    tables, rows = rope_tables(8, SIZES, PHASES), random_rows(6)
    for y, true in zip(qk_rope(q, k, tables, rows), qk_rope(q.contiguous(), k.contiguous(), tables, rows), strict=True):
        assert torch.equal(y, true)


# --- the same bits ---------------------------------------------------------------------------------------------------

FIRST: dict[tuple[torch.dtype, str], list[Tensor]] = {}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["across_heads", "per_head"])
def test_every_run_and_every_number_of_threads(dtype, norm, threads):
    torch.manual_seed(0)
    xs = [torch.randn(301, h, 32).to(dtype).requires_grad_() for h in (6, 4)]
    weights = [weight_for(h, 32, norm, torch.float32).requires_grad_() for h in (6, 4)]
    tables, rows = rope_tables(32, SIZES, PHASES), random_rows(301)
    for _ in range(3):
        ys = qk_rope(*xs, tables, rows, q_weight=weights[0], k_weight=weights[1], norm=norm)
        grads = torch.autograd.grad(ys, (*xs, *weights), [y.detach().sign() for y in ys])
        results = [y.detach() for y in ys] + list(grads)
        first = FIRST.setdefault((dtype, norm), results)
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


# --- values that are no numbers, and rows that are no rows -----------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_stays_one(dtype):
    tables, rows = rope_tables(8, SIZES, PHASES), random_rows(2)
    x = torch.randn(2, 3, 8).to(dtype)
    x[0, 1, 3] = float("nan")
    alone = qk_rope(x, x, tables, rows)[0]
    assert alone.isnan().nonzero().tolist() == [[0, 1, 2], [0, 1, 3]], "the pair of the NaN and nothing else"
    normed = qk_rope(x, x, tables, rows, q_weight=torch.ones(24), k_weight=torch.ones(24))[0]
    assert normed[0].isnan().all() and normed[1].isfinite().all()
    # A NaN whose mantissa is all ones: rounding up would carry into the sign.
    odd = torch.full((24,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    assert qk_rope(x[1:], x[1:], tables, rows[1:], q_weight=odd, k_weight=odd)[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("axis", range(4))
def test_a_row_outside_its_table(dtype, axis):
    limit = (*SIZES, len(PHASES))[axis]
    q = torch.randn(3, 2, 6, requires_grad=True)
    tables = rope_tables(6, SIZES, PHASES)
    for bad in (-1, limit, 2**31 - 1):
        rows = random_rows(3, dtype)
        rows[1, axis] = bad
        message = f"row {bad} at position \\[1, {axis}\\] is outside the {native.AXES[axis]} table of {limit} rows"
        with pytest.raises(IndexError, match=message):
            qk_rope(q, q, tables, rows)
        out = torch.zeros(2, 3, 2, 6)
        with torch.no_grad(), pytest.raises(IndexError, match=message):
            qk_rope(q, q, tables, rows, out=tuple(out))
        assert out.sum() == 0, "nothing may be written before every row was checked"
        with pytest.raises(IndexError, match=message):
            torch.ops.bernini.qk_rope_backward(q, q, q, q, list(tables), rows, None, None, "per_head", 1e-6)


def test_what_it_serves(monkeypatch):
    q, tables, rows = torch.randn(2, 1, 4), rope_tables(4, SIZES, PHASES), random_rows(2)
    with pytest.raises(ValueError, match="native implementation has no rounding='eager'"):
        qk_rope(q, q, tables, rows, rounding="eager")
    with pytest.raises(ValueError, match=r"native implementation does not take torch.float64"):
        qk_rope(q.double(), q.double(), tables, rows)
    monkeypatch.delenv("BERNINI_KERNELS")
    for op in OPS:
        assert {which(op, "cpu", dtype) for dtype in DTYPES} == {"native"}
        assert which(op, "cpu", torch.float64) == which(op, "cpu", torch.float16) == "reference"
        assert which(op, "cpu", torch.float32, "eager") == "reference"
