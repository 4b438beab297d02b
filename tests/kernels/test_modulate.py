"""modulate against loops in float64, the diffusers chain, autograd, and the torch.library contracts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers.models.normalization import FP32LayerNorm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bernini.kernels import modulate
from bernini.kernels.modulate import reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2**-7}
TABLES = ("gate", "scale", "shift")


@pytest.fixture(autouse=True)
def one_thread_one_seed():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def strided(shape: tuple[int, int], dtype: torch.dtype, layout: str) -> Tensor:
    """[T, N] random values that lie in memory as ``layout`` says."""
    if layout == "transposed":
        return torch.randn(shape[1], shape[0]).to(dtype).t()
    if layout == "sliced":  # a chunk of a wider row, as a table is cut out of [rows, 6 * width]
        return torch.randn(shape[0], 2 * shape[1] + 1).to(dtype)[:, 1 : 1 + shape[1]]
    return torch.randn(shape).to(dtype)


def by_hand(residual, branch, *, gate, scale, shift, index_T, weight, bias, eps=1e-6, rounded=False):
    """One token at a time in Python floats. ``rounded`` rounds residual' to its dtype before the norm."""
    tokens, width = residual.shape
    lists = [None if t is None else t.detach().double().tolist() for t in (gate, scale, shift, weight, bias)]
    gate, scale, shift, weight, bias = lists
    new, normed = torch.empty(tokens, width).double(), torch.empty(tokens, width).double()
    for t in range(tokens):
        row = 0 if index_T is None else int(index_T[t])
        h = residual[t].double().tolist()
        if branch is not None:
            g = [1.0] * width if gate is None else gate[row]
            h = [a + b * c for a, b, c in zip(h, branch[t].double().tolist(), g, strict=True)]
        new[t] = torch.tensor(h, dtype=torch.float64)
        if rounded:
            h = new[t].to(residual.dtype).double().tolist()
        mean = math.fsum(h) / width
        r = 1 / math.sqrt(math.fsum((v - mean) ** 2 for v in h) / width + eps)
        for n, v in enumerate(h):
            y = (v - mean) * r
            y = y if weight is None else y * weight[n]
            y = y if bias is None else y + bias[n]
            y = y if scale is None else y * (1 + scale[row][n])
            normed[t, n] = y if shift is None else y + shift[row][n]
    return new, normed


def largest(tensor: Tensor) -> float:
    return max(1.0, float(tensor.abs().max())) if tensor.numel() else 1.0


def condition(h: Tensor) -> float:
    """How much the norm magnifies a rounding error of its input: |h| over the spread of the row."""
    return largest(h / (h.double().var(-1, correction=0, keepdim=True) + 1e-6).sqrt()) if h.numel() else 1.0


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype, magnified: float = 1.0) -> None:
    limit = TOLERANCE[dtype] * magnified * largest(expected)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=limit)


@st.composite
def calls(draw: st.DrawFn, dtypes=DTYPES, layouts=("contiguous", "transposed", "sliced")):
    """(residual, branch, keywords) of a random sub-chain."""
    torch.manual_seed(draw(st.integers(0, 999)))
    tokens, width = draw(st.integers(0, 4)), draw(st.integers(2, 24))
    dtype, layout = draw(st.sampled_from(dtypes)), draw(st.sampled_from(layouts))
    table_dtype, rows = draw(st.sampled_from(dtypes)), draw(st.sampled_from([None, 1, 3]))
    residual = strided((tokens, width), dtype, layout)
    branch = strided((tokens, width), dtype, layout) if draw(st.booleans()) else None
    chosen = draw(st.sets(st.sampled_from(TABLES if branch is not None else TABLES[1:])))
    keywords = {n: strided((rows or 1, width), table_dtype, "sliced") if n in chosen else None for n in TABLES}
    for name in ("weight", "bias"):
        keywords[name] = torch.randn(width).to(draw(st.sampled_from(dtypes))) if draw(st.booleans()) else None
    index_dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    indexed = rows is not None and bool(chosen)
    keywords["index_T"] = torch.randint(0, rows, (tokens,)).to(index_dtype) if indexed else None
    return residual, branch, keywords


@settings(max_examples=80, deadline=None)
@given(call=calls(), rounding=st.sampled_from(["fp32", "eager"]))
def test_against_loops(call, rounding):
    residual, branch, keywords = call
    new, normed = modulate(residual, branch, **keywords, rounding=rounding)
    expected = by_hand(residual, branch, **keywords, rounded=rounding == "eager")
    if branch is None:
        assert new is residual
    for y, true in zip((new, normed), expected, strict=True):
        assert y.dtype == residual.dtype
        assert y.shape == residual.shape
        assert y is residual or y.is_contiguous()
        assert_near(y, true, residual.dtype, condition(expected[0]))


def example(dtype=torch.float32, rows=1, tokens=40, width=96, table_dtype=torch.float32):
    residual, branch = torch.randn(2, tokens, width).to(dtype)
    tables = dict(zip(TABLES, torch.randn(3, rows, width).to(table_dtype), strict=True))
    return residual, branch, {**tables, "index_T": torch.randint(0, rows, (tokens,)) if rows > 1 else None}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_bf16_is_the_best_rounding(rows, table_dtype):
    residual, branch, keywords = example(torch.bfloat16, rows, table_dtype=table_dtype)
    exact = modulate(residual.double(), branch.double(), **keywords)
    for y, true in zip(modulate(residual, branch, **keywords), exact, strict=True):
        best = (true.bfloat16().double() - true).norm()
        assert (y.double() - true).norm() <= 1.05 * best


# --- the diffusers chain ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4])
def test_eager_has_the_bits_of_diffusers(dtype, rows):
    residual, branch, keywords = example(dtype, rows)
    index = keywords["index_T"]
    gate, scale, shift = (keywords[name] if rows == 1 else keywords[name][index] for name in TABLES)
    plain = FP32LayerNorm(96, 1e-6, elementwise_affine=False)
    affine = FP32LayerNorm(96, 1e-6, elementwise_affine=True).to(dtype)
    torch.nn.init.normal_(affine.weight)
    torch.nn.init.normal_(affine.bias)
    part = {"weight": affine.weight, "bias": affine.bias}
    only = {name: keywords[name] for name in ("scale", "shift", "index_T")}
    with torch.no_grad():
        # The first norm of a block, which adds nothing.
        new, normed = modulate(residual, **only, rounding="eager")
        assert new is residual
        assert torch.equal(normed, (plain(residual.float()) * (1 + scale) + shift).type_as(residual))
        # Self-attention's gated sum, then the affine norm before cross-attention.
        gated = (residual.float() + branch * gate).type_as(residual)
        new, normed = modulate(residual, branch, gate=keywords["gate"], index_T=index, **part, rounding="eager")
        assert torch.equal(new, gated)
        assert torch.equal(normed, affine(gated.float()).type_as(gated))
        # Cross-attention's plain sum, then the modulated norm before the feed-forward.
        added = residual + branch
        new, normed = modulate(residual, branch, **only, rounding="eager")
        assert torch.equal(new, added)
        assert torch.equal(normed, (plain(added.float()) * (1 + scale) + shift).type_as(added))
        # The feed-forward's gated sum (its branch is widened first) and the first norm of the next block.
        gated = (residual.float() + branch.float() * gate).type_as(residual)
        new, normed = modulate(residual, branch, **keywords, rounding="eager")
        assert torch.equal(new, gated)
        assert torch.equal(normed, (plain(gated.float()) * (1 + scale) + shift).type_as(gated))


def test_fp32_norms_the_unrounded_residual_and_eager_the_rounded_one():
    residual, branch, keywords = example(torch.bfloat16)
    fp32, eager = (modulate(residual, branch, **keywords, rounding=r) for r in ("fp32", "eager"))
    assert not torch.equal(fp32[1], eager[1])
    names = ("scale", "shift")
    assert torch.equal(eager[1], modulate(eager[0], **{n: keywords[n] for n in names}, rounding="eager")[1])


# --- formulas that are nearly right ----------------------------------------------------------------------------------


def chain(residual, branch, gate, scale, shift, eps=1e-6, one=1.0, correction=0, gated_residual=False, late=False):
    h = gate * (residual + branch) if gated_residual else residual + gate * branch
    u = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=correction, keepdim=True) + eps).sqrt()
    return h, (u + shift) * (one + scale) if late else u * (one + scale) + shift


@pytest.mark.parametrize(
    "mistake",
    [{"one": 0.0}, {"gated_residual": True}, {"late": True}, {"correction": 1}, {"eps": 1e-2}],
    ids=lambda mistake: next(iter(mistake)),
)
def test_the_comparison_rejects_wrong_formulas(mistake):
    residual, branch, keywords = example(width=24)
    tables = [keywords[name] for name in TABLES]
    residual, branch = 0.2 * residual, 0.2 * branch
    expected = by_hand(residual, branch, **keywords, weight=None, bias=None)
    assert_near(chain(residual, branch, *tables)[1], expected[1], torch.float32)
    with pytest.raises(AssertionError):
        assert_near(chain(residual, branch, *tables, **mistake)[1], expected[1], torch.bfloat16)


def test_the_comparison_rejects_the_wrong_row():
    residual, branch, keywords = example(rows=3, width=24)
    expected = by_hand(residual, branch, **keywords, weight=None, bias=None)
    new, normed = modulate(residual, branch, **{**keywords, "index_T": (keywords["index_T"] + 1) % 3})
    for y, true in zip((new, normed), expected, strict=True):
        with pytest.raises(AssertionError):
            assert_near(y, true, torch.bfloat16)


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [("gate", "scale", "shift", "weight", "bias"), (), ("gate",), ("scale", "bias")])
@pytest.mark.parametrize("with_branch", [True, False])
def test_gradcheck(parts, with_branch):
    parts = [part for part in parts if with_branch or part != "gate"]
    width, rows = 4, 2
    index = torch.tensor([1, 0, 1]) if set(parts) & set(TABLES) else None
    leaves = [torch.randn(3, width, dtype=torch.float64, requires_grad=True) for _ in range(1 + with_branch)]
    leaves += [torch.randn((rows, width) if p in TABLES else width).double().requires_grad_() for p in parts]

    def call(residual, *others):
        branch, others = (others[0], others[1:]) if with_branch else (None, others)
        return modulate(residual, branch, **dict(zip(parts, others, strict=True)), index_T=index)

    assert torch.autograd.gradcheck(call, leaves)


@settings(max_examples=40, deadline=None)
@given(call=calls())
def test_backward_is_autograd_of_the_reference(call):
    residual, branch, keywords = call
    named = {"residual": residual, "branch": branch, **{n: t for n, t in keywords.items() if n != "index_T"}}
    leaves = {name: t.detach().requires_grad_() for name, t in named.items() if t is not None}
    grads = [strided(residual.shape, residual.dtype, "transposed") for _ in range(2)]
    index = keywords["index_T"]

    def inputs(source):
        return [source.get(name) for name in named]

    x, b, *parts = inputs(leaves)
    names = [*TABLES, "weight", "bias"]
    results = modulate(x, b, **dict(zip(names, parts, strict=True)), index_T=index)
    wide = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    x, b, gate, scale, shift, weight, bias = inputs(wide)
    if branch is None:
        exact = (reference.modulate_norm(x, scale, shift, index, weight, bias, 1e-6, "fp32"),)
        results, grads = results[1:], grads[1:]
    else:
        exact = reference.modulate(x, b, gate, scale, shift, index, weight, bias, 1e-6, "fp32")
    magnified = condition(residual.double() if branch is None else exact[0].detach())
    ours = torch.autograd.grad(results, list(leaves.values()), grads)
    theirs = torch.autograd.grad(exact, list(wide.values()), [grad.double() for grad in grads])
    for name, grad, true in zip(leaves, ours, theirs, strict=True):
        assert grad.dtype == leaves[name].dtype, name
        dtype = max(grad.dtype, residual.dtype, key=lambda d: TOLERANCE[d])
        limit = 4 * TOLERANCE[dtype] * magnified * max(largest(t) for t in theirs)
        torch.testing.assert_close(
            grad.double(), true, rtol=0, atol=limit, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_one_result_is_enough_for_a_gradient():
    residual, branch, keywords = example()
    residual.requires_grad_()
    new, normed = modulate(residual, branch, **keywords)
    assert torch.equal(torch.autograd.grad(new.sum(), residual, retain_graph=True)[0], torch.ones_like(residual))
    (alone,) = torch.autograd.grad(normed.square().sum(), residual)
    assert alone.abs().sum() > 0


def test_ungated_branches_share_the_gradient_safely():
    residual, branch = torch.randn(2, 3, 8).unbind(0)
    residual, branch = residual.clone().requires_grad_(), branch.clone().requires_grad_()
    modulate(residual, branch)[0].sum().backward()
    assert residual.grad.data_ptr() != branch.grad.data_ptr()


# --- contracts -------------------------------------------------------------------------------------------------------


def op_parts(rows, parts, width=8, tokens=5, grad=False):
    """gate, scale, shift, index, weight, bias, with those of ``parts`` present."""
    shapes = {"gate": (rows, width), "scale": (rows, width), "shift": (rows, width), "weight": width, "bias": width}
    made = {name: torch.randn(shape, requires_grad=grad) for name, shape in shapes.items() if name in parts}
    index = torch.randint(0, rows, (tokens,)) if set(parts) & set(TABLES) else None
    gate, scale, shift, weight, bias = (made.get(name) for name in shapes)
    return [gate, scale, shift, index, weight, bias, 1e-6]


@pytest.mark.parametrize("parts", [("gate", "scale", "shift", "weight", "bias"), ("scale", "shift"), ("gate",), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(parts, dtype):
    x = [strided((5, 8), dtype, "transposed") for _ in range(4)]
    inputs = op_parts(3, parts)
    torch.library.opcheck(torch.ops.bernini.modulate_backward, (*x, *inputs))
    torch.library.opcheck(torch.ops.bernini.modulate_norm_backward, (*x[:2], *inputs[1:]))
    x, inputs = [t.requires_grad_() for t in x], op_parts(3, parts, grad=True)
    torch.library.opcheck(torch.ops.bernini.modulate, (*x[:2], *inputs, "eager"))
    torch.library.opcheck(torch.ops.bernini.modulate_norm, (x[0], *inputs[1:], "fp32"))


@pytest.mark.parametrize("with_branch", [True, False])
def test_compiles_in_one_graph(with_branch):
    residual, branch, keywords = example(rows=2)
    residual.requires_grad_()
    if not with_branch:
        branch, keywords["gate"] = None, None

    def call(residual):
        return modulate(2 * residual, branch, **keywords)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(residual), call(residual))
    ours, theirs = (torch.autograd.grad(f(residual)[1].square().sum(), residual) for f in (compiled, call))
    torch.testing.assert_close(ours, theirs)


def test_real_size_without_memory():
    with FakeTensorMode():
        residual, branch = (torch.empty(440_000, 5120, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        gate, scale, shift = (torch.empty(21, 5120, requires_grad=True) for _ in range(3))
        index = torch.empty(440_000, dtype=torch.int32)
        keywords = {"scale": scale, "shift": shift, "index_T": index}
        for results in (modulate(residual, branch, gate=gate, **keywords), modulate(residual, **keywords)[1:]):
            described = {(y.shape, y.dtype, y.stride()) for y in results}
            assert described == {(residual.shape, residual.dtype, residual.stride())}
            leaves = (residual, scale)
            for grad, leaf in zip(torch.autograd.grad(results[-1].sum(), leaves), leaves, strict=True):
                assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)


ROW = torch.ones(1, 4)
TWO = torch.ones(2, 4)
INDEX = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residual_TN": torch.ones(1, 3, 4)}, r"residual must be \[tokens, width\] = \[\*, \*\], got \[1, 3, 4\]"),
        ({"residual_TN": torch.ones(3, 4).int()}, "residual must be floating point, got torch.int32"),
        ({"branch_TN": torch.ones(2, 4)}, r"branch must be \[tokens, width\] = \[3, 4\], got \[2, 4\]"),
        ({"branch_TN": torch.ones(3, 4).bfloat16()}, "branch must be torch.float32 as residual, got torch.bfloat16"),
        ({"branch_TN": None, "gate": ROW}, r"gate \[1, 4\] needs a branch"),
        ({"scale": TWO}, r"without index, scale must be one row \[1, 4\], got \[2, 4\]"),
        ({"shift": torch.ones(4)}, r"without index, shift must be one row \[1, 4\], got \[4\]"),
        ({"shift": torch.ones(4), "index_T": INDEX}, r"shift must be \[rows, width\] = \[4, 4\], got \[4\]"),
        ({"gate": TWO, "scale": torch.ones(3, 4), "index_T": INDEX}, r"scale must be .* = \[2, 4\], got \[3, 4\]"),
        ({"scale": torch.ones(1, 5)}, r"scale must be .* = \[1, 4\], got \[1, 5\]"),
        ({"scale": ROW.long()}, "scale must be floating point"),
        ({"weight": torch.ones(5)}, r"weight must be \[width\] = \[4\], got \[5\]"),
        ({"bias": torch.ones(1, 4)}, r"bias must be \[width\] = \[4\], got \[1, 4\]"),
        ({"scale": TWO, "index_T": INDEX[:2]}, r"index must be \[tokens\] = \[3\], got \[2\]"),
        ({"scale": TWO, "index_T": INDEX.float()}, "index must be int32 or int64, got torch.float32"),
        ({"index_T": INDEX}, r"index \[3\] picks rows of gate, scale or shift, but none is given"),
        ({"scale": ROW.to("meta")}, "different devices: .*scale on meta"),
        ({"scale": TWO, "index_T": INDEX.to("meta")}, "different devices: .*index on meta"),
        ({"rounding": "bf16"}, "rounding='bf16'; expected one of"),
    ],
)
def test_bad_inputs(changes, message):
    with pytest.raises(ValueError, match=message):
        modulate(**{"residual_TN": torch.ones(3, 4), "branch_TN": torch.ones(3, 4), **changes})


@pytest.mark.parametrize(("bad", "with_branch"), list(itertools.product([-1, 2], [True, False])))
def test_an_index_outside_the_tables_raises_on_the_cpu(bad, with_branch):
    index = INDEX.clone()
    index[1] = bad
    branch = torch.ones(3, 4) if with_branch else None
    with pytest.raises((IndexError, RuntimeError), match="index out of range|is outside"):
        modulate(torch.ones(3, 4), branch, scale=TWO, index_T=index)
