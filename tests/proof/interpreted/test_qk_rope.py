"""qk_rope and its gradient on Triton's interpreter, every option and layout, against the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bernini.kernels import launch, qk_rope, rope_tables, which
from bernini.kernels.qk_rope import reference

from . import common
from .common import among_nans, assert_best_rounding, assert_eager, assert_same_bits, poisoned, rand

pytestmark = common.needs_interpreter

if launch.INTERPRETED:
    from bernini.kernels.qk_rope import kernel, kernel_bwd

EPS = 1e-6
SIZES = (3, 4, 5)
PHASES = (0.0, 1.0, 2.5)

head_dims = st.sampled_from([2, 6, 8, 32, 66, 96, 128])
head_counts = st.sampled_from([1, 2, 3, 5, 8, 12, 20])
norms = st.sampled_from([None, "across_heads", "per_head"])
weight_dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
layouts = st.sampled_from(["contiguous", "packed", "stepped", "transposed", "expanded", "qkv", "heads first"])


@dataclass(frozen=True)
class Call:
    """The arguments of the op, in order."""

    q: Tensor
    k: Tensor
    tables: tuple[Tensor, ...]
    rows: Tensor
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    norm: str = "across_heads"
    eps: float = EPS

    @property
    def args(self) -> tuple[Any, ...]:
        return self.q, self.k, list(self.tables), self.rows, self.q_weight, self.k_weight, self.norm, self.eps

    def double(self) -> Call:
        tensors = {name: value.double() for name, value in vars(self).items()
                   if isinstance(value, Tensor) and value.is_floating_point()}  # fmt: skip
        return replace(self, tables=tuple(table.double() for table in self.tables), **tensors)


def data(tokens: int, heads: int, head_dim: int, dtype: torch.dtype, layout: str, scale: float, seed: int) -> Tensor:
    """``[T, H, D]`` among NaNs; ``qkv`` is a part of a packed projection, ``heads first`` has its tokens inside."""
    if layout == "qkv":
        return rand(tokens, 3, heads, head_dim, dtype=dtype, scale=scale, seed=seed).select(1, 1)
    if layout == "heads first":
        return rand(heads, tokens, head_dim, dtype=dtype, scale=scale, seed=seed).transpose(0, 1)
    return rand(tokens, heads, head_dim, dtype=dtype, layout=layout, scale=scale, seed=seed)


def positions(tokens: int, head_dim: int, dtype: torch.dtype = torch.int64) -> tuple[tuple[Tensor, ...], Tensor]:
    """Tables among NaNs, and each token's rows in them."""
    generator = torch.Generator().manual_seed(tokens)
    rows = [torch.randint(0, size, (tokens,), generator=generator) for size in (*SIZES, len(PHASES))]
    tables = rope_tables(head_dim, SIZES, PHASES)
    return tuple(among_nans(table) for table in tables), torch.stack(rows, 1).to(dtype)


def weights(norm: str | None, heads: tuple[int, int], head_dim: int, dtypes: tuple[torch.dtype, torch.dtype]) -> Any:
    """The weights of q and k, and the norm."""
    if norm is None:
        return None, None, "across_heads"
    widths = (head_dim, head_dim) if norm == "per_head" else (heads[0] * head_dim, heads[1] * head_dim)
    pairs = zip(widths, dtypes, (8, 9), strict=True)
    return *(rand(width, dtype=dtype, seed=seed) for width, dtype, seed in pairs), norm


def simple(
    tokens: int, heads: tuple[int, int], head_dim: int, norm: str | None, dtype: torch.dtype = torch.float32
) -> Call:
    """Q and k out of a packed projection."""
    q, k = (data(tokens, count, head_dim, dtype, "qkv", 1.0, seed) for seed, count in enumerate(heads))
    return Call(q, k, *positions(tokens, head_dim), *weights(norm, heads, head_dim, (torch.float32, torch.float32)))


@st.composite
def calls(draw: st.DrawFn) -> Call:
    tokens, head_dim, norm = draw(st.integers(0, 4)), draw(head_dims), draw(norms)
    heads = draw(head_counts), draw(head_counts)
    dtype, scale = draw(common.dtypes), draw(common.scales)
    q, k = (data(tokens, count, head_dim, dtype, draw(layouts), scale, seed) for seed, count in enumerate(heads))
    rows = draw(st.sampled_from([torch.int32, torch.int64]))
    own = weights(norm, heads, head_dim, (draw(weight_dtypes), draw(weight_dtypes)))
    return Call(q, k, *positions(tokens, head_dim, rows), *own)


def by_token(x: Tensor) -> Tensor:
    """A token as one row: its largest value is the measure of float32's errors."""
    return x.reshape(x.shape[0], -1) if x.numel() else x


def largest(x: Tensor | None, otherwise: float = 0.0) -> float:
    return otherwise if x is None or not x.numel() else float(x.double().abs().max())


def check(found: Tensor, exact: Tensor, dtype: torch.dtype, single: Tensor, terms: float = 0.0) -> None:
    assert found.shape == exact.shape
    assert_best_rounding(by_token(found), by_token(exact), dtype, by_token(single), terms=terms, ulps=2)


def check_forward(module: Any, call: Call) -> None:
    exact, single = reference.qk_rope(*call.double().args, "fp32"), reference.qk_rope(*call.args, "fp32")
    with poisoned():
        found = module.qk_rope(*call.args, "fp32")
    for y, expected, near in zip(found, exact, single, strict=True):
        assert y.is_contiguous()
        check(y, expected, call.q.dtype, near)


def check_out(module: Any, call: Call, ranks: tuple[int, int], layout: str = "contiguous") -> None:
    """Into ``[ranks, T, H / ranks, D]``, or ``[T, H, D]`` for 0 ranks; nothing else may be written."""
    exact, single = reference.qk_rope(*call.double().args, "fp32"), reference.qk_rope(*call.args, "fp32")
    outs = []
    for x, count in zip((call.q, call.k), ranks, strict=True):
        tokens, heads, head_dim = x.shape
        shape = (count, tokens, heads // count, head_dim) if count else (tokens, heads, head_dim)
        home = rand(*shape, dtype=x.dtype, layout=layout)
        outs.append(home.fill_(float("nan")))
    buffers = [torch.as_strided(out, (out.untyped_storage().size() // out.element_size(),), (1,), 0) for out in outs]
    module.qk_rope_out(*call.args, "fp32", *outs)
    for x, out, buffer, expected, near in zip((call.q, call.k), outs, buffers, exact, single, strict=True):
        found = out.movedim(0, 1).reshape(x.shape) if out.dim() == 4 else out.clone()
        check(found, expected, x.dtype, near)
        out.fill_(float("nan"))
        assert bool(buffer.isnan().all()), "written outside of the output"


def check_backward(module: Any, call: Call, dq: Tensor, dk: Tensor) -> None:
    exact = reference.qk_rope_backward(dq.double(), dk.double(), *call.double().args)
    single = reference.qk_rope_backward(dq, dk, *call.args)
    with poisoned():
        found = module.qk_rope_backward(dq, dk, *call.args)
    for mine, again in zip(found, module.qk_rope_backward(dq, dk, *call.args), strict=True):
        assert_same_bits(mine, again)
    sides = (call.q, dq, call.q_weight), (call.k, dk, call.k_weight)
    for number, (x, dy, weight) in enumerate(sides):
        dx, dweight = found[number], found[2 + number]
        assert dx.is_contiguous() and dweight.shape == single[2 + number].shape
        if weight is None:
            check(dx, exact[number], x.dtype, single[number])
            assert not dweight.numel()
            continue
        grouped = x.double().flatten(1) if call.norm == "across_heads" else x.double()
        r = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + call.eps)
        # dx is a difference: nearly nothing may be left of its terms.
        g, spread = 1.5 * largest(dy), largest(grouped * r)
        check(dx, exact[number], x.dtype, single[number], largest(r) * g * largest(weight) * (1 + spread**2))
        sums = x.shape[0] * (x.shape[1] if call.norm == "per_head" else 1)
        assert_best_rounding(dweight, exact[2 + number], weight.dtype, single[2 + number], terms=sums * g * spread)


def gradients(call: Call, layout: str = "contiguous") -> tuple[Tensor, Tensor]:
    dq, dk = (data(*x.shape, x.dtype, layout, 1.0, seed) for seed, x in ((5, call.q), (6, call.k)))
    return dq, dk


# --- against the float64 reference ------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(calls())
def test_forward(call: Call) -> None:
    check_forward(kernel, call)


@settings(max_examples=25)
@given(calls(), st.data())
def test_forward_into_the_buffers_of_an_all_to_all(call: Call, draw: st.DataObject) -> None:
    ranks = [draw.draw(st.sampled_from([0, *(n for n in range(1, 21) if x.shape[1] % n == 0)])) for x in
             (call.q, call.k)]  # fmt: skip
    check_out(kernel, call, (ranks[0], ranks[1]), draw.draw(st.sampled_from(["contiguous", "packed"])))


@settings(max_examples=30)
@given(calls(), layouts)
def test_backward(call: Call, layout: str) -> None:
    check_backward(kernel_bwd, call, *gradients(call, layout))


def unfused(call: Call) -> list[Tensor]:
    """The chain of diffusers, one rounding after the other.

    The reference turns by complex multiplication, whose last few numbers torch contracts to a multiply-add.
    """
    t, h, w, segment = (table[rows.long()] for table, rows in zip(call.tables, call.rows.unbind(1), strict=True))
    axes = torch.cat((t, h, w), 1)
    axis_cos, axis_sin, segment_cos, segment_sin = *axes.unbind(-1), *segment.unbind(-1)
    cos = (axis_cos * segment_cos - axis_sin * segment_sin)[:, None]
    sin = (axis_cos * segment_sin + axis_sin * segment_cos)[:, None]
    results = []
    for x, weight in ((call.q, call.q_weight), (call.k, call.k_weight)):
        a, b = reference._normed(x, weight, call.norm, call.eps, "eager").unflatten(-1, (-1, 2)).unbind(-1)
        results.append(torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype))
    return results


@settings(max_examples=30)
@given(calls())
def test_eager_is_the_unfused_chain(call: Call) -> None:
    with poisoned():
        found = kernel.qk_rope(*call.args, "eager")
    for y, chain in zip(found, unfused(call), strict=True):
        if call.q_weight is None:
            assert_eager(y, chain, sums=False)
            continue
        # Another order of the sum moves the norm by a bit. What that does to a pair is measured by the pair.
        y, chain = (x.double().unflatten(-1, (-1, 2)) for x in (y, chain))
        pair = chain.abs().amax(-1, keepdim=True).expand(chain.shape)
        off = (y - chain).abs() / common.ulp(pair, call.q.dtype)
        most = 4 if call.q.dtype == torch.float32 else 1
        assert bool((off <= 2 * most).all()) and int((off > most).sum()) <= max(1, off.numel() // 1000)


def check_eager_bits(module: Any, norm: str, dtype: torch.dtype) -> None:
    """Every value is 4 or -4: the mean square is exact, whatever the order of its sum, and so all bits must agree."""
    call = simple(3, (8, 8), 32, norm, dtype)
    call = replace(call, q=4 * call.q.sign(), k=4 * call.k.sign(), eps=0.0)
    for y, chain in zip(module.qk_rope(*call.args, "eager"), unfused(call), strict=True):
        assert_eager(y, chain, sums=False)


@pytest.mark.parametrize("norm", ["across_heads", "per_head"])
@pytest.mark.parametrize("dtype", launch.DTYPES)
def test_eager_has_the_bits_of_the_unfused_chain(norm: str, dtype: torch.dtype) -> None:
    check_eager_bits(kernel, norm, dtype)


@pytest.mark.parametrize("norm", ["across_heads", "per_head", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_renderers_width_without_a_mask(norm: str | None, dtype: torch.dtype) -> None:
    call = simple(2, (40, 40), 128, norm, dtype)
    check_forward(kernel, call)
    check_out(kernel, call, (8, 8))
    check_backward(kernel_bwd, call, *gradients(call))


@pytest.mark.parametrize("norm", ["across_heads", "per_head"])
def test_tokens_of_up_to_8192_elements(norm: str) -> None:
    call = simple(1, (64, 8), 128, norm)
    check_forward(kernel, call)
    check_backward(kernel_bwd, call, *gradients(call))


@pytest.mark.parametrize("norm", ["across_heads", "per_head"])
def test_more_tokens_than_programs(norm: str) -> None:
    call = simple(11, (3, 3), 6, norm)
    check_backward(kernel_bwd, call, *gradients(call))


def test_the_same_bits_every_run() -> None:
    call = simple(3, (5, 3), 66, "across_heads")
    for y, again in zip(kernel.qk_rope(*call.args, "fp32"), kernel.qk_rope(*call.args, "fp32"), strict=True):
        assert_same_bits(y, again)


def test_tables_of_float64_at_odd_offsets_and_of_any_strides() -> None:
    call = simple(3, (4, 4), 8, "across_heads")
    wide = tuple(table.double() for table in call.tables)
    check_forward(kernel, replace(call, tables=wide))
    odd = tuple(torch.cat([torch.zeros(1), table.flatten()])[1:].view(table.shape) for table in call.tables)
    turned = tuple(table.flip(2).clone().flip(2).transpose(0, 1).contiguous().transpose(0, 1) for table in call.tables)
    for tables in (odd, turned):
        mine = kernel.qk_rope(*replace(call, tables=tables).args, "fp32")
        for y, expected in zip(mine, kernel.qk_rope(*call.args, "fp32"), strict=True):
            assert_same_bits(y, expected)


# --- the public function ----------------------------------------------------------------------------------------------


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERNINI_KERNELS", "triton")


@pytest.mark.parametrize("norm", ["across_heads", "per_head", None])
def test_the_public_function_runs_on_triton(monkeypatch: pytest.MonkeyPatch, norm: str | None) -> None:
    monkeypatch.setenv("BERNINI_KERNELS", "triton")
    assert {which(op) for op in ("qk_rope", "qk_rope_out", "qk_rope_backward")} == {"triton"}
    call = simple(4, (5, 3), 12, norm)

    def run(call: Call) -> list[Tensor]:
        leaves = {name: value.detach().clone().requires_grad_() for name, value in vars(call).items()
                  if name in ("q", "k", "q_weight", "k_weight") and value is not None}  # fmt: skip
        q, k, own = leaves.pop("q"), leaves.pop("k"), call.norm
        y, z = qk_rope(q, k, call.tables, call.rows, norm=own, **leaves)
        (y.square() * 3 + y).sum().add(z.sin().sum()).backward()
        return [x.grad for x in (q, k, *leaves.values()) if x.grad is not None]

    mine = run(call)
    monkeypatch.setenv("BERNINI_KERNELS", "reference")
    exact = run(call.double())
    assert len(mine) == len(exact)
    for gradient, expected in zip(mine, exact, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("forced")
def test_out_is_written_and_autograd_sees_it() -> None:
    call = simple(3, (4, 2), 8, None)
    outs = torch.empty(2, 3, 2, 8), torch.empty(3, 2, 8)
    versions = [out._version for out in outs]
    qk_rope(call.q, call.k, call.tables, call.rows, out=outs)
    q, k = kernel.qk_rope(*call.args, "fp32")
    assert_same_bits(outs[0].movedim(0, 1).reshape(q.shape), q)
    assert_same_bits(outs[1], k)
    assert all(out._version > before for out, before in zip(outs, versions, strict=True))


def no_launch(*args: Any, **options: Any) -> None:
    pytest.fail("launched")


@pytest.mark.usefixtures("forced")
def test_tokens_that_are_too_wide_are_refused_before_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "launch", no_launch)
    call = simple(1, (2, 129), 128, "across_heads")
    with pytest.raises(ValueError, match=r"up to 12288 elements .* q \[1, 2, 128\] and k \[1, 129, 128\]"):
        qk_rope(call.q, call.k, call.tables, call.rows, q_weight=call.q_weight, k_weight=call.k_weight)
    with pytest.raises(ValueError, match=r"q \[1, 2, 128\] and k \[1, 129, 128\]"):
        kernel_bwd.qk_rope_backward(call.q, call.k, *call.args)


@pytest.mark.usefixtures("forced")
def test_wrong_shapes_are_refused_before_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "launch", no_launch)
    call = simple(3, (4, 2), 8, "across_heads")
    with pytest.raises(ValueError, match=r"k must be .* = \[3, \*, 8\], got \[2, 2, 8\]"):
        qk_rope(call.q, call.k[:2], call.tables, call.rows)
    with pytest.raises(ValueError, match=r"rows must be .* = \[3, 4\], got \[2, 4\]"):
        qk_rope(call.q, call.k, call.tables, call.rows[:2])
    with pytest.raises(ValueError, match=r"q_weight must be \[head_dim\] = \[8\], got \[32\]"):
        qk_rope(call.q, call.k, call.tables, call.rows, q_weight=call.q_weight, k_weight=call.k_weight, norm="per_head")
    with pytest.raises(ValueError, match=r"q_out must be .* got \[3, 3, 4, 8\]"):
        qk_rope(call.q, call.k, call.tables, call.rows, out=(torch.empty(3, 3, 4, 8), torch.empty(3, 2, 8)))


# --- broken variants --------------------------------------------------------------------------------------------------


def smoke(module: Any) -> None:
    """A few small calls; raises AssertionError where the numbers of ``module`` are wrong.

    The first have a tile that is a little larger than a token: in heads, then in head dims. What a missing mask writes
    outside then stays within the guards.
    """
    for heads, head_dim in (((7, 7), 32), ((2, 2), 66), ((5, 3), 12)):
        for norm in ("across_heads", "per_head"):
            call = simple(6, heads, head_dim, norm)
            if hasattr(module, "qk_rope_backward"):
                check_backward(module, call, *gradients(call))
            else:
                check_forward(module, call)
    if not hasattr(module, "qk_rope_backward"):
        check_out(module, simple(3, (10, 6), 32, "across_heads"), (2, 2), "packed")
        check_eager_bits(module, "across_heads", torch.bfloat16)


@pytest.mark.parametrize("module", ["kernel", "kernel_bwd"])
def test_the_right_modules_pass_the_smoke_test(module: str) -> None:
    smoke(globals()[module])


@pytest.mark.parametrize("variant", common.broken("qk_rope") if launch.INTERPRETED else [])
def test_a_broken_variant_is_refused(variant: Any) -> None:
    with pytest.raises(AssertionError):
        smoke(variant.load())
