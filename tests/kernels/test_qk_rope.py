"""qk_rope against complex numbers in Python, the diffusers chain, autograd, and the torch.library contracts."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanRotaryPosEmbed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bernini.kernels import qk_rope, rope_tables
from bernini.kernels.qk_rope import reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 2**-7}
SIZES = (5, 6, 7)
PHASES = (0.0, 1.0, 2.5)


@pytest.fixture(autouse=True)
def one_thread_one_seed():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def random_rows(tokens: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.stack([torch.randint(0, n, (tokens,)) for n in (*SIZES, len(PHASES))], dim=1).to(dtype)


def strided(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """Random values that lie in memory as ``layout`` says."""
    if layout == "heads_first":
        return torch.randn(shape[1], shape[0], *shape[2:]).to(dtype).transpose(0, 1)
    if layout == "sliced":  # part of a fused projection, at an odd offset with an odd row
        return torch.randn(*shape[:-1], 2 * shape[-1] + 1).to(dtype)[..., 1 : 1 + shape[-1]]
    if layout == "stepped":
        return torch.randn(*shape[:-1], 3 * shape[-1]).to(dtype)[..., ::3]
    return torch.randn(shape).to(dtype)


def angles_by_hand(head_dim: int, row: list[int], theta: float = 10000.0) -> list[float]:
    """The angle of each complex slot: the axis angle plus the segment's, both from the definition."""
    side = 2 * (head_dim // 6)
    axes = []
    for position, dim in zip(row, (head_dim - 2 * side, side, side), strict=False):
        axes += [position * theta ** (-2 * k / dim) for k in range(dim // 2)]
    phase = PHASES[row[3]]
    return [angle + phase * theta ** (-2 * k / head_dim) for k, angle in enumerate(axes)]


def by_hand(x: Tensor, rows: Tensor, weight: Tensor | None, norm: str, eps: float = 1e-6) -> Tensor:
    """One token, one head, one complex number at a time."""
    tokens, heads, head_dim = x.shape
    out = torch.empty(x.shape, dtype=torch.float64)
    for t in range(tokens):
        token = x[t].double().tolist()
        if weight is not None:
            w = weight.double().tolist()
            whole = math.fsum(v * v for head in token for v in head) / (heads * head_dim)
            for h, head in enumerate(token):
                mean = whole if norm == "across_heads" else math.fsum(v * v for v in head) / head_dim
                offset = h * head_dim if norm == "across_heads" else 0
                token[h] = [v / math.sqrt(mean + eps) * w[offset + d] for d, v in enumerate(head)]
        turns = [cmath.exp(1j * angle) for angle in angles_by_hand(head_dim, rows[t].tolist())]
        for h, head in enumerate(token):
            pairs = [complex(head[2 * k], head[2 * k + 1]) * turn for k, turn in enumerate(turns)]
            out[t, h] = torch.tensor([part for z in pairs for part in (z.real, z.imag)], dtype=torch.float64)
    return out


def weights_for(heads: int, head_dim: int, norm: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(heads * head_dim if norm == "across_heads" else head_dim).to(dtype)


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Errors are measured against the largest value: a rotation mixes two of them and may cancel."""
    limit = TOLERANCE[dtype] * float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=limit)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 3),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    head_dim=st.sampled_from([2, 4, 6, 10, 12, 16]),
    dtype=st.sampled_from(DTYPES),
    table_dtype=st.sampled_from([torch.float32, torch.float64]),
    row_dtype=st.sampled_from([torch.int32, torch.int64]),
    weight_dtype=st.sampled_from([None, *DTYPES]),
    norm=st.sampled_from(["across_heads", "per_head"]),
    layout=st.sampled_from(["contiguous", "heads_first", "sliced", "stepped"]),
    scale=st.sampled_from([2.0**-10, 1.0, 2.0**10]),
    rounding=st.sampled_from(["fp32", "eager"]),
    seed=st.integers(0, 99),
)
def test_against_complex_numbers(
    tokens, heads, head_dim, dtype, table_dtype, row_dtype, weight_dtype, norm, layout, scale, rounding, seed
):
    torch.manual_seed(seed)
    q, k = (strided((tokens, h, head_dim), dtype, layout) * scale for h in heads)
    wq, wk = (None if weight_dtype is None else weights_for(h, head_dim, norm, weight_dtype) for h in heads)
    tables, rows = rope_tables(head_dim, SIZES, PHASES, dtype=table_dtype), random_rows(tokens, row_dtype)
    results = qk_rope(q, k, tables, rows, q_weight=wq, k_weight=wk, norm=norm, rounding=rounding)
    exactness = torch.float32 if dtype == torch.float64 and table_dtype == torch.float32 else dtype
    for y, x, weight in zip(results, (q, k), (wq, wk), strict=True):
        assert y.dtype == dtype
        assert y.shape == x.shape
        assert y.is_contiguous()
        assert_near(y, by_hand(x, rows, weight, norm), exactness)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bf16_and_fp32_are_close_to_the_best_rounding(dtype, weight_dtype):
    q, k = torch.randn(2, 96, 4, 32).to(dtype)
    weight = torch.randn(128).to(weight_dtype)
    rows, exact_tables = random_rows(96), rope_tables(32, SIZES, PHASES, dtype=torch.float64)
    exact = qk_rope(q.double(), k.double(), exact_tables, rows, q_weight=weight, k_weight=weight)
    ours = qk_rope(q, k, rope_tables(32, SIZES, PHASES), rows, q_weight=weight, k_weight=weight)
    for y, true in zip(ours, exact, strict=True):
        error, best = (y.double() - true).norm(), (true.to(dtype).double() - true).norm()
        # In float32 the arithmetic rounds as often as the store does; only for bf16 is the store all there is.
        assert error <= (1.05 if dtype == torch.bfloat16 else 5) * best


# --- the tables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [2, 10, 128])
def test_factors_are_the_definition(head_dim):
    rows = random_rows(20)
    factors = reference.rope_factors(rope_tables(head_dim, SIZES, PHASES, dtype=torch.float64), rows)
    assert factors.shape == (20, head_dim // 2, 2)
    angles = torch.tensor([angles_by_hand(head_dim, row) for row in rows.tolist()], dtype=torch.float64)
    torch.testing.assert_close(factors, torch.stack((angles.cos(), angles.sin()), -1), rtol=0, atol=1e-13)


def test_tables_split_as_wan_and_are_rounded_once():
    tables = rope_tables(128, (4, 5, 6), (0.0, 1.0, 1.8))
    assert [list(table.shape) for table in tables] == [[4, 22, 2], [5, 21, 2], [6, 21, 2], [3, 64, 2]]
    exact = rope_tables(128, (4, 5, 6), (0.0, 1.0, 1.8), dtype=torch.float64)
    assert all(torch.equal(a, b.float()) for a, b in zip(tables, exact, strict=True))
    assert torch.equal(tables[3][0], torch.tensor([1.0, 0.0]).expand(64, 2))
    assert rope_tables(8, (0, 1, 1), ())[0].shape == (0, 2, 2)


def test_cached_tables_are_private_and_real():
    with FakeTensorMode():
        rope_tables(24, (3, 3, 3), (0.0,))
    first = rope_tables(24, (3, 3, 3), (0.0,))
    first[0].zero_()
    assert torch.equal(rope_tables(24, (3, 3, 3), (0.0,))[0][0, :, 0], torch.ones(4))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((7, SIZES, PHASES), {}, "head_dim must be even and positive, got 7"),
        ((0, SIZES, PHASES), {}, "head_dim must be even and positive, got 0"),
        ((8, (1, 2, -1), PHASES), {}, r"sizes must be three lengths \(t, h, w\) >= 0, got \(1, 2, -1\)"),
        ((8, (1, 2), PHASES), {}, r"got \(1, 2\)"),
        ((8, SIZES, PHASES), {"dtype": torch.bfloat16}, "dtype must be torch.float32 or torch.float64"),
    ],
)
def test_bad_tables(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        rope_tables(*args, **kwargs)


# --- the diffusers chain ---------------------------------------------------------------------------------------------


class Recorder:
    """Stands in for attention and keeps the q and k that reach it."""

    def __call__(self, query, key, value, **kwargs):
        self.q, self.k = query[0], key[0]
        return value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_has_the_bits_of_diffusers(dtype, monkeypatch):
    from diffusers.models.transformers import transformer_wan

    heads, head_dim, grid = 3, 32, (3, 4, 5)
    recorder = Recorder()
    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", recorder)
    attention = WanAttention(heads * head_dim, heads, head_dim, eps=1e-6, processor=WanAttnProcessor()).to(dtype)
    for weight in (attention.norm_q.weight, attention.norm_k.weight):
        torch.nn.init.normal_(weight)
    rope = WanRotaryPosEmbed(head_dim, (1, 2, 2), 64)
    hidden = torch.randn(1, math.prod(grid), heads * head_dim, dtype=dtype)
    with torch.no_grad():
        attention(hidden, rotary_emb=rope(torch.empty(1, 16, grid[0], 2 * grid[1], 2 * grid[2])))
        q, k = (layer(hidden)[0].unflatten(-1, (heads, head_dim)) for layer in (attention.to_q, attention.to_k))
        positions = torch.cartesian_prod(*(torch.arange(n) for n in grid))
        rows = torch.cat((positions, torch.zeros(len(positions), 1, dtype=torch.int64)), dim=1)
        weights = {"q_weight": attention.norm_q.weight, "k_weight": attention.norm_k.weight}
        ours = qk_rope(q, k, rope_tables(head_dim, grid, (0.0,)), rows, **weights, rounding="eager")
    assert torch.equal(ours[0], recorder.q)
    assert torch.equal(ours[1], recorder.k)


def test_eager_rounds_after_the_norm_and_fp32_does_not():
    x, rows, tables = torch.randn(64, 2, 16).bfloat16(), random_rows(64), rope_tables(16, SIZES, PHASES)
    weight = torch.randn(32)
    both = {
        rounding: qk_rope(x, x, tables, rows, q_weight=weight, k_weight=weight, rounding=rounding)[0]
        for rounding in ("fp32", "eager")
    }
    assert not torch.equal(both["fp32"], both["eager"])
    normed = torch.nn.functional.rms_norm(x.float().flatten(1), (32,), weight, 1e-6).bfloat16().view_as(x)
    assert torch.equal(both["eager"], qk_rope(normed, normed, tables, rows)[0])


# --- formulas that are nearly right ----------------------------------------------------------------------------------


def half_split(x: Tensor, factors: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    cos, sin = factors[:, None, :, 0], factors[:, None, :, 1]
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), -1)


def interleaved(x: Tensor, factors: Tensor) -> Tensor:
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = factors[:, None, :, 0], factors[:, None, :, 1]
    return torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), -1).flatten(-2)


def clockwise(x: Tensor, factors: Tensor) -> Tensor:
    return interleaved(x, factors * torch.tensor([1.0, -1.0]))


def segment_on_t_only(tables, rows: Tensor) -> Tensor:
    segment = tables[3].clone()
    segment[:, tables[0].shape[1] :] = torch.tensor([1.0, 0.0])
    return reference.rope_factors((*tables[:3], segment), rows)


def test_the_comparison_rejects_wrong_formulas():
    tables, rows = rope_tables(16, SIZES, PHASES), random_rows(12)
    rows[:, 3] = 2
    x, weight = torch.randn(12, 2, 16) * torch.tensor([[1.0], [3.0]]), torch.randn(32)
    factors = reference.rope_factors(tables, rows)
    normed = torch.nn.functional.rms_norm(x.flatten(1), (32,), weight, 1e-6).view_as(x)
    per_head = torch.nn.functional.rms_norm(x, (16,), None, 1e-6) * weight.view(2, 16)
    late = torch.nn.functional.rms_norm(interleaved(x, factors).flatten(1), (32,), weight, 1e-6).view_as(x)
    expected = by_hand(x, rows, weight, "across_heads")
    assert_near(interleaved(normed, factors), expected, torch.float32)
    wrong = {
        "half-split pairs": half_split(normed, factors),
        "turned the other way": clockwise(normed, factors),
        "segment factor on the t slots only": interleaved(normed, segment_on_t_only(tables, rows)),
        "no segment factor": interleaved(normed, reference.rope_factors(tables, rows * torch.tensor([1, 1, 1, 0]))),
        "norm per head": interleaved(per_head, factors),
        "norm after the rotation": late,
    }
    # In float32: the segment turns the slow slots by less than bf16 can see.
    limit = TOLERANCE[torch.float32] * float(expected.abs().max())
    assert [name for name, y in wrong.items() if float((y - expected).abs().max()) <= limit] == []


# --- destinations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [None, 1, 2, 4])
def test_out(dtype, ranks):
    q, k = torch.randn(5, 8, 12).to(dtype), torch.randn(5, 4, 12).to(dtype)
    tables, rows = rope_tables(12, SIZES, PHASES), random_rows(5)
    expected = qk_rope(q, k, tables, rows)
    shapes = [(5, x.shape[1], 12) if ranks is None else (ranks, 5, x.shape[1] // ranks, 12) for x in (q, k)]
    # A wider last axis gives rows that are not adjacent, as in a buffer shared with v.
    out = tuple(torch.full((*shape[:-1], 20), float("nan"), dtype=dtype)[..., 3:15] for shape in shapes)
    results = qk_rope(q, k, tables, rows, out=out)
    assert results[0] is out[0]
    assert results[1] is out[1]
    for destination, y in zip(out, expected, strict=True):
        packed = destination if ranks is None else destination.movedim(0, 1).flatten(1, 2)
        assert torch.equal(packed, y)


def test_out_cannot_be_differentiated():
    q = torch.randn(2, 1, 4, requires_grad=True)
    args = (q, q, rope_tables(4, SIZES, PHASES), random_rows(2))
    out = (torch.empty(2, 1, 4), torch.empty(2, 1, 4))
    with pytest.raises(ValueError, match="out= cannot be differentiated: the results go into a buffer"):
        qk_rope(*args, out=out)
    with torch.no_grad():
        assert torch.equal(qk_rope(*args, out=out)[0], qk_rope(*args)[0])


@pytest.mark.parametrize(
    ("q_out", "message"),
    [
        (torch.empty(2, 4, 8), r"q_out must be .* = \[2, 4, 6\] or .*, got \[2, 4, 8\]"),
        (torch.empty(3, 2, 1, 6), r"got \[3, 2, 1, 6\]"),
        (torch.empty(2, 4, 6).double(), "q_out must be torch.float32, got torch.float64"),
        (torch.empty(2, 6, 4).mT, r"q_out \[2, 4, 6\] needs a contiguous last axis, got strides \(24, 1, 4\)"),
        (torch.empty(2, 4, 6, device="meta"), "different devices: .*q_out on meta"),
    ],
)
def test_bad_out(q_out, message):
    q = torch.randn(2, 4, 6)
    with pytest.raises(ValueError, match=message):
        qk_rope(q, q, rope_tables(6, SIZES, PHASES), random_rows(2), out=(q_out, torch.empty(2, 4, 6)))


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [None, "across_heads", "per_head"])
def test_gradcheck(norm):
    leaves = [torch.randn(2, h, 6, dtype=torch.float64, requires_grad=True) for h in (2, 1)]
    if norm is not None:
        leaves += [weights_for(h, 6, norm, torch.float64).requires_grad_() for h in (2, 1)]
    tables, rows = rope_tables(6, SIZES, PHASES, dtype=torch.float64), random_rows(2)

    def call(q, k, wq=None, wk=None):
        return qk_rope(q, k, tables, rows, q_weight=wq, k_weight=wk, norm=norm or "across_heads")

    assert torch.autograd.gradcheck(call, leaves)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(0, 4),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from([None, *DTYPES]),
    norm=st.sampled_from(["across_heads", "per_head"]),
    layout=st.sampled_from(["contiguous", "heads_first", "sliced"]),
    seed=st.integers(0, 99),
)
def test_backward_is_autograd_of_the_reference(tokens, heads, dtype, weight_dtype, norm, layout, seed):
    torch.manual_seed(seed)
    tables, rows = rope_tables(10, SIZES, PHASES, dtype=torch.float64), random_rows(tokens)
    leaves = [strided((tokens, h, 10), dtype, layout).requires_grad_() for h in heads]
    grads = [strided((tokens, h, 10), dtype, layout) for h in heads]
    if weight_dtype is not None:
        leaves += [weights_for(h, 10, norm, weight_dtype).requires_grad_() for h in heads]
    wq, wk = leaves[2:] or (None, None)
    ours = torch.autograd.grad(qk_rope(*leaves[:2], tables, rows, q_weight=wq, k_weight=wk, norm=norm), leaves, grads)

    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y = reference.qk_rope(*wide[:2], tables, rows, *(wide[2:] or (None, None)), norm, 1e-6, "fp32")
    theirs = torch.autograd.grad(y, wide, [grad.double() for grad in grads])
    for grad, leaf, expected in zip(ours, leaves, theirs, strict=True):
        assert grad.dtype == leaf.dtype
        assert_near(grad, expected, max(leaf.dtype, dtype, key=lambda d: TOLERANCE[d]))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["across_heads", "per_head"])
def test_one_of_the_two_alone(side, dtype, norm):
    """The other has no heads, and gets nothing; this one gets the bits that it has beside another."""
    tables, rows = rope_tables(6, SIZES, PHASES, dtype=torch.float64), random_rows(5)
    full = [torch.randn(5, 4, 6).to(dtype).requires_grad_() for _ in "qk"]
    weights = [weights_for(4, 6, norm, dtype).requires_grad_() for _ in "qk"]
    dy = torch.randn(5, 4, 6).to(dtype)
    y = qk_rope(*full, tables, rows, q_weight=weights[0], k_weight=weights[1], norm=norm)[side]
    expected = torch.autograd.grad(y, (full[side], weights[side]), dy)

    xs = [x if number == side else x.detach()[:, :0] for number, x in enumerate(full)]
    scales = [w if number == side or norm == "per_head" else w.detach()[:0] for number, w in enumerate(weights)]
    results = qk_rope(*xs, tables, rows, q_weight=scales[0], k_weight=scales[1], norm=norm)
    assert torch.equal(results[side], y) and results[1 - side].shape == (5, 0, 6)
    got = torch.autograd.grad(results[side], (xs[side], scales[side]), dy)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_one_result_is_enough_for_a_gradient():
    q, k = torch.randn(2, 3, 2, 6, requires_grad=True)
    result = qk_rope(q, k, rope_tables(6, SIZES, PHASES), random_rows(3))
    dq, dk = torch.autograd.grad(result[0].sum(), (q, k))
    assert dq.abs().sum() > 0
    assert dk.abs().sum() == 0


# --- contracts -------------------------------------------------------------------------------------------------------


def op_inputs(dtype=torch.float32, weighted=True, norm="across_heads", layout="contiguous"):
    q, k = strided((3, 4, 6), dtype, layout), strided((3, 2, 6), dtype, layout)
    wq, wk = (weights_for(h, 6, norm, torch.float32) if weighted else None for h in (4, 2))
    return [q, k, list(rope_tables(6, SIZES, PHASES)), random_rows(3), wq, wk, norm, 1e-6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("weighted", "norm"), [(False, "across_heads"), (True, "across_heads"), (True, "per_head")])
def test_opcheck(dtype, weighted, norm):
    inputs = op_inputs(dtype, weighted, norm, "heads_first")
    torch.library.opcheck(torch.ops.bernini.qk_rope_backward, (*inputs[:2], *inputs))
    out = (torch.empty(3, 4, 6, dtype=dtype), torch.empty(2, 3, 1, 6, dtype=dtype))
    torch.library.opcheck(torch.ops.bernini.qk_rope_out, (*inputs, "fp32", *out))
    for tensor in (inputs[0], inputs[1], *(inputs[4:6] if weighted else ())):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.bernini.qk_rope, (*inputs, "eager"))


def test_compiles_in_one_graph():
    q, k, tables, rows, wq, wk, _, _ = op_inputs()
    q.requires_grad_()
    out = (torch.empty(3, 4, 6), torch.empty(3, 2, 6))

    def call(q, k):
        return qk_rope(2 * q, k, tables, rows, q_weight=wq, k_weight=wk)

    def call_out(q, k):
        return [y + 1 for y in qk_rope(q, k, tables, rows, out=out)]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k), call(q, k))
    ours, theirs = (torch.autograd.grad(f(q, k)[0].square().sum(), q)[0] for f in (compiled, call))
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        compiled = torch.compile(call_out, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(q, k), [y + 1 for y in qk_rope(q, k, tables, rows)])


def test_real_size_without_memory():
    with FakeTensorMode():
        q, k = (torch.empty(440_000, 40, 128, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        weight = torch.empty(5120, requires_grad=True)
        tables, rows = rope_tables(128, (21, 30, 52), PHASES), torch.empty(440_000, 4, dtype=torch.int32)
        ys = qk_rope(q, k, tables, rows, q_weight=weight, k_weight=weight)
        assert all((y.shape, y.dtype, y.stride()) == (q.shape, q.dtype, q.stride()) for y in ys)
        dq, dweight = torch.autograd.grad(ys, (q, weight), [torch.empty_like(y) for y in ys])
        assert (dq.shape, dq.dtype, dweight.shape, dweight.dtype) == (q.shape, q.dtype, weight.shape, weight.dtype)
        out = tuple(torch.empty(8, 440_000, 5, 128, dtype=torch.bfloat16) for _ in range(2))
        with torch.no_grad():
            assert qk_rope(q, k, tables, rows, out=out)[0] is out[0]


def changed(**changes):
    q = torch.ones(3, 4, 6)
    named = {"q_THD": q, "k_THD": q, "tables": rope_tables(6, SIZES, PHASES), "rows_T4": random_rows(3)}
    return {**named, **changes}


T, H, W, S = rope_tables(6, SIZES, PHASES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_THD": torch.ones(3, 24)}, r"q must be \[tokens, heads, head_dim\] = \[\*, \*, \*\], got \[3, 24\]"),
        ({"q_THD": torch.ones(3, 4, 6).long()}, "q must be floating point, got torch.int64"),
        ({"k_THD": torch.ones(2, 4, 6)}, r"k must be .* = \[3, \*, 6\], got \[2, 4, 6\]"),
        ({"k_THD": torch.ones(3, 4, 6).double()}, "one dtype, got torch.float32 and torch.float64"),
        ({"q_THD": torch.ones(3, 4, 5), "k_THD": torch.ones(3, 4, 5)}, r"head_dim must be even .* 5 in q \[3, 4, 5\]"),
        ({"tables": (T, H, W)}, r"four \(t, h, w, segment\), got 3"),
        ({"tables": (T, H, W, S.double())}, "tables must be all float32 or all float64"),
        ({"tables": (T.bfloat16(), H.bfloat16(), W.bfloat16(), S.bfloat16())}, "all float32 or all float64"),
        ({"tables": (T[..., 0], H, W, S)}, r"each table must be \[rows, pairs, 2\], got \[5, 1\]"),
        ({"tables": (T, H, W, T)}, r"sum to head_dim / 2 = 3, as the segment table has, got .*\[5, 1, 2\]"),
        ({"rows_T4": random_rows(2)}, r"rows must be .* = \[3, 4\], got \[2, 4\]"),
        ({"rows_T4": random_rows(3).float()}, r"rows must be int32 or int64, got torch.float32 \[3, 4\]"),
        ({"rows_T4": random_rows(3).to("meta")}, "different devices: q on cpu, .*rows on meta"),
        ({"q_weight": torch.ones(24)}, "both q_weight and k_weight, or neither"),
        ({"q_weight": torch.ones(23), "k_weight": torch.ones(24)}, r"q_weight must be .* = \[24\], got \[23\]"),
        ({"q_weight": torch.ones(24), "k_weight": torch.ones(6)}, r"k_weight must be .* = \[24\], got \[6\]"),
        (
            {"q_weight": torch.ones(6), "k_weight": torch.ones(24), "norm": "per_head"},
            r"k_weight must be \[head_dim\] = \[6\], got \[24\]",
        ),
        ({"norm": "layer"}, "norm='layer'; expected one of 'across_heads', 'per_head'"),
        ({"rounding": "none"}, "rounding='none'; expected one of"),
    ],
)
def test_bad_inputs(changes, message):
    with pytest.raises(ValueError, match=message):
        qk_rope(**changed(**changes))


def test_a_row_outside_its_table_raises_on_the_cpu():
    rows = random_rows(3)
    for bad in (-1, SIZES[0]):
        rows[1, 0] = bad
        with pytest.raises((IndexError, RuntimeError), match="index out of range|is outside"):
            qk_rope(**changed(rows_T4=rows))
