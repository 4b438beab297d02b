"""interval_attention and its gradients on Triton's interpreter: numbers against float64, tiles against the mask."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench_perf.proof.cases import attention as cases
from bernini.kernels import Segment, SegmentLayout, interval_attention, launch, which
from bernini.kernels.attention import reference, visits

from . import common
from .common import among_nans, assert_same_bits, poisoned, rand

pytestmark = common.needs_interpreter

if launch.INTERPRETED:
    from bernini.kernels.attention import kernel, kernel_bwd, kernel_plan

M = N = 16
Columns = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def sizes(d: int, dv: int, m: int = M, n: int = N) -> Any:
    """Small tiles; head dims in pieces of 16, as float32 has them."""
    return kernel.Blocks(m, n, kernel.pieces(d, 16), kernel.pieces(dv, 16), warps=4, stages=1)


def random_columns(tokens: int, keys: int, second: bool, kind: torch.dtype, seed: int) -> Columns:
    """Any intervals; of two, either may come first, and some are empty."""
    generator = torch.Generator().manual_seed(seed)
    borders = torch.randint(0, keys + 1, (tokens, 4), generator=generator).sort(1).values.to(kind)
    pairs = [(borders[:, 0], borders[:, 1]), (borders[:, 2], borders[:, 3])]
    if seed % 2:
        pairs.reverse()
    made = [among_nans(column.contiguous()) for pair in pairs for column in pair]
    return (made[0], made[1], made[2], made[3]) if second else (made[0], made[1], None, None)


def columns_of(layout: SegmentLayout) -> Columns:
    starts, ends, second = layout.intervals
    two = (None, None) if second is None else tuple(map(torch.from_numpy, second))
    return torch.from_numpy(starts), torch.from_numpy(ends), *two


def needed_tiles(columns: Columns, keys: int, m: int = M, n: int = N) -> Tensor:
    """``[T / m, S / n]``, true where some row of a row tile sees some key of a key tile. From the dense mask."""
    mask = reference.interval_mask(*columns, keys)
    mask = torch.nn.functional.pad(mask, (0, -mask.shape[1] % n, 0, -mask.shape[0] % m))
    return mask.unflatten(1, (-1, n)).unflatten(0, (-1, m)).any(3).any(1)


def assert_near(x: Tensor, exact: Tensor, scale: float, what: str) -> None:
    """fp32: 2e-6 of the largest number, at least of ``scale``. Else twice what rounding once costs, since weights are
    rounded on their way into the second product."""
    assert x.shape == exact.shape and bool(torch.isfinite(x).all()), what
    error = (x.double() - exact).abs()
    if not x.numel():
        return
    largest = max(float(exact.abs().max()), scale)
    if x.dtype == torch.float32:
        assert error.max() <= 2e-6 * largest, f"{what}: {float(error.max()):.3g} off, of {largest:.3g}"
        return
    best = (exact.to(x.dtype).double() - exact).square().mean().sqrt() + torch.finfo(x.dtype).eps * largest / 16
    rms = error.square().mean().sqrt()
    assert rms <= 2 * best, f"{what}: RMS error {float(rms):.3g}, best possible {float(best):.3g}"


def check_forward(
    module: Any, q: Tensor, k: Tensor, v: Tensor, columns: Columns, factor: float, block: Any, scale: float = 1.0,
    twice: bool = False,
) -> None:  # fmt: skip
    (tokens, heads, _), keys = q.shape, len(k)
    visited = torch.zeros(heads, -(-tokens // block.m), dtype=torch.int32)
    with poisoned():
        out, lse = module.interval_attention(q, k, v, *columns, factor, sizes=block, visits=visited)
        if twice:
            again = module.interval_attention(q, k, v, *columns, factor, sizes=block)
            assert_same_bits(out, again[0])
            assert_same_bits(lse, again[1])
    assert out.dtype == q.dtype and lse.dtype == torch.float32 and out.is_contiguous()
    exact, exact_lse = reference.interval_attention(q.double(), k.double(), v.double(), *columns, factor)
    assert_near(out, exact, scale, "out")
    assert torch.equal(lse == -torch.inf, exact_lse == -torch.inf)
    finite = exact_lse > -torch.inf
    assert_near(lse[finite], exact_lse[finite], 1.0, "lse")
    assert torch.equal(visited, needed_tiles(columns, keys, block.m, block.n).sum(1).int().expand_as(visited))


def check_backward(
    module: Any, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, columns: Columns, factor: float,
    blocks: tuple[Any, Any], scale: float = 1.0, twice: bool = False,
) -> None:  # fmt: skip
    (tokens, heads, _), (keys, groups, _) = q.shape, k.shape
    out, lse = reference.interval_attention(q, k, v, *columns, factor)
    visited = [
        torch.zeros(count, -(-length // size), dtype=torch.int32)
        for count, length, size in ((heads, tokens, blocks[0].m), (groups, keys, blocks[1].n))
    ]
    args = (dout, q, k, v, out, lse, *columns, factor)
    with poisoned():
        found = module.interval_attention_backward(*args, sizes=blocks, visits=visited)
        again = module.interval_attention_backward(*args, sizes=blocks) if twice else found
    wide = [x.double() for x in args[:6]]
    wide[5] = reference.interval_attention(*wide[1:4], *columns, factor)[1]
    expected = reference.interval_attention_backward(*wide, *columns, factor)
    for name, one, other, exact in zip(("dq", "dk", "dv"), found, again, expected, strict=True):
        assert_same_bits(one, other)
        assert_near(one, exact, scale, name)
    by_row, by_key = (needed_tiles(columns, keys, block.m, block.n) for block in blocks)
    assert torch.equal(visited[0], by_row.sum(1).int().expand_as(visited[0]))
    assert torch.equal(visited[1], (heads // groups * by_key.sum(0)).int().expand_as(visited[1]))


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    seed = draw(st.integers(0, 2**20))
    tokens, keys = draw(st.sampled_from([0, 1, 15, 16, 40])), draw(st.sampled_from([0, 1, 16, 33, 70]))
    groups, members = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    d, dv = draw(st.sampled_from([(16, 16), (5, 40), (32, 20), (48, 3), (1, 16), (80, 80)]))
    dtype, layout = draw(common.dtypes), draw(st.sampled_from(["contiguous", "packed", "stepped", "transposed"]))
    large = draw(common.scales)
    q = rand(tokens, groups * members, d, dtype=dtype, layout=layout, seed=seed, scale=min(large, 2.0**6))
    k = rand(keys, groups, d, dtype=dtype, layout=layout, seed=seed + 1)
    v = rand(keys, groups, dv, dtype=dtype, layout=layout, seed=seed + 2, scale=large)
    factor = draw(st.sampled_from([1.0, -1.0, 0.0])) * d**-0.5 / min(large, 2.0**6)
    columns = random_columns(tokens, keys, draw(st.booleans()), draw(st.sampled_from([torch.int32, torch.int64])), seed)
    return {"q": q, "k": k, "v": v, "columns": columns, "factor": factor, "scale": large}


tiles = st.sampled_from([(16, 16), (32, 16), (16, 64)])


@settings(max_examples=20)
@given(calls(), tiles)
def test_forward(call: dict[str, Any], size: tuple[int, int]) -> None:
    check_forward(kernel, **call, block=sizes(call["q"].shape[2], call["v"].shape[2], *size), twice=True)


@settings(max_examples=15)
@given(calls(), tiles)
def test_backward(call: dict[str, Any], size: tuple[int, int]) -> None:
    q, v = call["q"], call["v"]
    dout = rand(len(q), q.shape[1], v.shape[2], dtype=q.dtype, seed=99)
    block = sizes(q.shape[2], v.shape[2], *size)
    scale = call.pop("scale")
    # Gradients of q and k grow with the other of the two and with v.
    check_backward(kernel_bwd, **call, dout=dout, blocks=(block, block), scale=max(1.0, scale), twice=True)


# --- the planner's layouts --------------------------------------------------------------------------------------------


def random_layout(generator: np.random.Generator, tokens: int = 36) -> SegmentLayout:
    """Packed samples of text, sources and targets, down to one token; text may follow a target, once."""
    segments: list[Segment] = []
    sample = 0
    while tokens > 0:
        kind = generator.choice(["text", "source", "target"])
        size = min(tokens, int(generator.choice([1, 2, 5, 9, 20])))
        more = [*segments, Segment(kind, (size, 1, 1), 0.0, sample)]
        try:
            _ = SegmentLayout(more).intervals
        except ValueError:  # it would need a third interval
            sample += 1
            continue
        segments, tokens = more, tokens - size
        sample += int(generator.integers(0, 5) == 0)
    return SegmentLayout(segments)


def assert_reference_is_dense_attention(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, columns: Columns) -> None:
    """What the kernel is compared with equals torch's masked attention in float64, gradients too."""
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    mask, members = reference.interval_mask(*columns, len(k)), q.shape[1] // k.shape[1]
    heads = [wide[0], *(x.repeat_interleave(members, 1) for x in wide[1:])]
    dense = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in heads), mask, scale=0.25).transpose(0, 1)
    expected = torch.autograd.grad(dense, wide, dout.double())
    with torch.no_grad():
        out, lse = reference.interval_attention(*wide, *columns, 0.25)
        found = reference.interval_attention_backward(dout.double(), *wide, out, lse, *columns, 0.25)
    for one, other in zip((out, *found), (dense, *expected), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("part", range(4))
def test_random_layouts_in_float32(part: int) -> None:
    for seed in range(2):
        generator = np.random.default_rng(100 * part + seed)
        layout = random_layout(generator)
        groups, members = ((1, 1), (1, 2), (2, 1), (1, 3))[(part + seed) % 4]
        q, k, v, dout = (
            rand(layout.tokens, heads, 16, seed=seed + number)
            for number, heads in enumerate((groups * members, groups, groups, groups * members))
        )
        columns = columns_of(layout)
        assert_reference_is_dense_attention(q, k, v, dout, columns)
        block = sizes(16, 16)
        check_forward(kernel, q, k, v, columns, 0.25, block)
        check_backward(kernel_bwd, q, k, v, dout, columns, 0.25, (block, block))


REAL = {
    "v2v": SegmentLayout(cases.v2v(0)),
    "v2v, closed by text": SegmentLayout(cases.v2v(0, closing=300)),
    "r2v with 8 images": SegmentLayout(cases.r2v(0)),
    "packed": cases.layout(False),
    "packed, with second intervals": cases.layout(True),
}
PLANNERS = cases.planner_layouts()


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(("m", "n"), [(128, 64), (32, 128)])
def test_tiles_of_real_layouts(name: str, m: int, n: int) -> None:
    """The tiles planned are those of the mask: needed if a row sees a key, full if all rows see all keys."""
    layout = REAL[name]
    starts, ends, second = layout.intervals
    tokens = layout.tokens
    state = np.zeros((-(-tokens // m), -(-tokens // n)), np.uint8)
    mask = np.zeros((m, state.shape[1] * n), bool)
    for tile in range(len(state)):
        rows = range(tile * m, min(tokens, tile * m + m))
        mask[:] = False
        for line, row in zip(mask, rows, strict=False):
            line[starts[row] : ends[row]] = True
            if second is not None:
                line[second[0][row] : second[1][row]] = True
        some, every = mask.any(0).reshape(-1, n).any(1), mask[: len(rows)].all(0).reshape(-1, n).all(1)
        state[tile] = some.astype(np.uint8) + (some & every)
    assert np.array_equal(visits.states(starts, ends, second, tokens, m, n), state)
    assert np.array_equal(visits.tiles_visited(starts, ends, second, tokens, m, n), (state > 0).sum(1))
    # The kernels plan alike: row tiles across and beside each border of segments; no more runs than are looked at.
    borders = {start // m + beside for start, _ in layout.ranges for beside in (0, 1)}
    some_tiles = sorted(tile for tile in borders if (tile + 1) * m <= tokens)[:12]
    rows = np.concatenate([np.arange(tile * m, tile * m + m) for tile in some_tiles])
    some_rows = kernel.pack(*(None if x is None else x[rows] for x in columns_of(layout)))
    counts, runs = kernel_plan.rows(some_rows, tokens, m, n)
    for found, expected in zip((counts, runs), visits.row_plan(state[some_tiles], runs.shape[2]), strict=True):
        assert np.array_equal(found.numpy(), expected)
    assert max(len(visits._runs(line)) for line in state) <= kernel_plan.LOOKED_AT
    assert visits.column_plan(state, tokens, m)[0].min() >= 0


@pytest.mark.parametrize("name", PLANNERS)
def test_tiles_visited_on_the_planners_layouts(name: str) -> None:
    """Counted inside the kernels, with the tiles of bf16 on NVIDIA; the mask is spelt out pair by pair in
    ``tests/kernels/test_attention_tiles.py``, and so are the other sizes."""
    layout = PLANNERS[name]
    columns, (m, n) = columns_of(layout), cases.TILES["sm_90", torch.bfloat16]
    q = rand(layout.tokens, 1, 16)
    check_forward(kernel, q, q, q, columns, 0.25, sizes(16, 16, m, n))
    if name == "v2v":  # the smallest; the interpreter takes its time
        check_backward(kernel_bwd, q, q, q, q, columns, 0.25, (sizes(16, 16, m, n), sizes(16, 16, 16, 128)))


@pytest.mark.parametrize("name", ["v2v, closed by text", "packed, with second intervals"])
def test_column_plan_of_real_layouts(name: str) -> None:
    """Of large tiles, since the interpreter takes its time."""
    layout = REAL[name]
    size = 1024
    state = visits.states(*layout.intervals, layout.tokens, size, size)
    found = kernel_plan.columns(kernel.pack(*columns_of(layout)), layout.tokens, size, size)
    for one, expected in zip(found, visits.column_plan(state, layout.tokens, size), strict=True):
        assert np.array_equal(one.numpy(), expected)


@settings(max_examples=20)
@given(st.integers(0, 2**20), st.sampled_from([1, 16, 50]), st.sampled_from([1, 16, 90, 200]), st.booleans())
def test_plan_of_any_intervals(seed: int, tokens: int, keys: int, second: bool) -> None:
    columns = random_columns(tokens, keys, second, torch.int32, seed)
    if seed % 3 == 0:  # short ones, far apart
        columns = (columns[0], torch.minimum(columns[0] + 1, columns[1]), *columns[2:])
    starts, ends, *two = (None if x is None else x.numpy() for x in columns)
    state = visits.states(starts, ends, tuple(two) if second else None, keys, M, N)
    assert np.array_equal(state > 0, needed_tiles(columns, keys).numpy())
    intervals = kernel.pack(*columns)
    with poisoned():
        counts, runs = kernel_plan.rows(intervals, keys, M, N)
        column_counts, column_runs = kernel_plan.columns(intervals, keys, M, N)
    for found, expected in zip((counts, runs), visits.row_plan(state, runs.shape[2]), strict=True):
        assert np.array_equal(found.numpy(), expected)
    expected_counts, expected_runs = visits.column_plan(state, tokens, M)
    assert np.array_equal(column_counts.numpy(), expected_counts)
    planned = expected_counts >= 0
    assert np.array_equal(column_runs.numpy()[planned], expected_runs[planned])


def test_more_runs_than_are_planned() -> None:
    """Then each key tile looks for its row tiles itself."""
    row, tile = torch.arange(4 * M), torch.arange(18 * M) // M
    start = (2 * N * (row % M) + N * (row // M % 2)).int() % (12 * N)  # a row tile sees every other key tile
    stripes: Columns = (start, torch.where(row % M < 6, start + 1, start).int(), None, None)
    alternating: Columns = (tile.int() * 0, torch.where(tile % 2 == 0, 9, 0).int(), None, None)
    for columns, keys in ((stripes, 12 * N), (alternating, N + 1)):
        tokens = len(columns[0])
        counts, _ = kernel_plan.columns(kernel.pack(*columns), keys, M, N)
        assert counts[0] == -1
        q, k, v, dout = (rand(length, 1, 16, seed=seed) for seed, length in enumerate((tokens, keys, keys, tokens)))
        check_forward(kernel, q, k, v, columns, 0.25, sizes(16, 16))
        check_backward(kernel_bwd, q, k, v, dout, columns, 0.25, (sizes(16, 16), sizes(16, 16)))


def test_wrong_intervals_on_a_device_stay_inside() -> None:
    """Values are not checked there; nothing outside of k and v may be read all the same."""
    q, k, v = rand(20, 1, 16), rand(33, 1, 16, seed=1), rand(33, 1, 16, seed=2)
    starts, ends = torch.full((20,), -50, dtype=torch.int32), torch.full((20,), 2_000, dtype=torch.int32)
    with poisoned():
        out, _ = kernel.interval_attention(q, k, v, starts, ends, None, None, 0.25, sizes=sizes(16, 16))
    assert bool(torch.isfinite(out).all())


# --- the op -----------------------------------------------------------------------------------------------------------


def test_the_op_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public function, its gradients and opcheck, with the sizes that it chooses."""
    monkeypatch.setenv("BERNINI_KERNELS", "triton")
    assert which("interval_attention") == which("interval_attention_backward") == "triton"
    kinds = (("text", 20), ("target", 30), ("text", 20))
    columns = columns_of(SegmentLayout([Segment(kind, (size, 1, 1)) for kind, size in kinds]))  # type: ignore[arg-type]
    assert columns[2] is not None
    tensors = [rand(70, heads, 16, seed=heads).requires_grad_() for heads in (4, 2, 2)]
    out = interval_attention(*tensors, *columns[:2], second=columns[2:])  # type: ignore[arg-type]
    grads = torch.autograd.grad(out.square().sum(), tensors)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    exact = reference.interval_attention(*wide, *columns, 0.25)[0]
    expected = torch.autograd.grad(exact.square().sum(), wide)
    assert_near(out.detach(), exact.detach(), 1.0, "out")
    for one, other in zip(grads, expected, strict=True):
        assert_near(one, other, 1.0, "gradient")
    small = [x.detach()[:20].requires_grad_() for x in tensors]
    starts, ends = (torch.clamp(x[:20], max=20) for x in columns[:2])
    torch.library.opcheck(torch.ops.bernini.interval_attention.default, (*small, starts, ends, None, None, 0.3))


def test_bad_input() -> None:
    q, wide = rand(4, 1, 16), rand(4, 1, 300)
    columns = random_columns(4, 4, False, torch.int32, 0)
    with pytest.raises(ValueError, match=r"interval_attention: .* head dims up to 256, got q \[4, 1, 300\]"):
        kernel.interval_attention(wide, wide, q, *columns, 1.0)
    with pytest.raises(ValueError, match=r"head dims up to 256, got v \[4, 1, 300\]"):
        kernel_bwd.interval_attention_backward(wide, q, q, wide, wide, rand(1, 4), *columns, 1.0)
    long = q[:1].expand(2**30 + 1, 1, 16)
    with pytest.raises(ValueError, match=r"up to 1073741824 tokens, got k \[1073741825, 1, 16\]"):
        kernel.interval_attention(q, long, long, *columns, 1.0)


# --- broken variants --------------------------------------------------------------------------------------------------


def check_plan(module: Any, columns: Columns, keys: int) -> None:
    """A plan against the one that the host makes. Nothing attends by it: a wrong one may lead anywhere in memory."""
    starts, ends, *two = (None if x is None else x.numpy() for x in columns)
    state = visits.states(starts, ends, None if two[0] is None else tuple(two), keys, M, N)
    with poisoned():
        found = module.rows(kernel.pack(*columns), keys, M, N) + module.columns(kernel.pack(*columns), keys, M, N)
    plan = visits.row_plan(state, found[1].shape[2]) + visits.column_plan(state, len(starts), M)
    for one, expected in zip(found, plan, strict=True):
        assert np.array_equal(one.numpy(), expected)


def smoke(module: ModuleType) -> None:
    """A few small comparisons on a module of the family."""
    place = torch.arange(47, dtype=torch.int32)  # one row less than whole tiles
    causal: Columns = (place // 25 * 25, place + 1, None, None)
    two: Columns = (place * 0, place * 0 + 20, torch.clamp(place - 20, min=20), torch.clamp(place + 1, min=20))
    all_keys: Columns = (place * 0, place * 0 + 40, None, None)
    block = sizes(24, 16)
    for columns in (causal, two, all_keys):
        if hasattr(module, "plan_rows_kernel"):
            check_plan(module, columns, 50)
            continue
        q, k, v = rand(47, 4, 24), rand(50, 2, 24, layout="packed", seed=1), rand(50, 2, 16, layout="packed", seed=2)
        if hasattr(module, "interval_attention"):
            check_forward(module, q, k, v, columns, 0.25, block)
        else:
            check_backward(module, q, k, v, rand(47, 4, 16, seed=3), columns, 0.25, (block, block))


def test_the_right_modules_pass() -> None:
    for module in (kernel, kernel_bwd, kernel_plan):
        smoke(module)


@pytest.mark.parametrize("variant", common.broken("attention"))
def test_a_broken_variant_is_refused(variant: Any) -> None:
    with pytest.raises(AssertionError):
        smoke(variant.load())
