"""interval_attention and attention against loops over rows and heads, their contracts, and mistakes to be noticed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bernini.kernels import Segment, SegmentLayout, attention, interval_attention, which
from bernini.kernels.attention import backends, reference
from bernini.kernels.attention.op import available_backends

Pairs = list[tuple[int, int]]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(t: int, s: int, h: int, g: int, d: int, dv: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return rand(t, h, d, seed=1, dtype=dtype), rand(s, g, d, seed=2, dtype=dtype), rand(s, g, dv, seed=3, dtype=dtype)


def columns(pairs: Pairs, dtype: torch.dtype = torch.int32) -> tuple[Tensor, Tensor]:
    return torch.tensor([a for a, _ in pairs], dtype=dtype), torch.tensor([b for _, b in pairs], dtype=dtype)


def brute(q: Tensor, k: Tensor, v: Tensor, visible: Sequence[Sequence[int]], scale: float, mistake: str = "") -> Tensor:
    """One row and one head at a time, in Python floats. ``visible[t]`` are the keys of row t."""
    heads, groups = q.shape[1], k.shape[1]
    out = torch.zeros(q.shape[0], heads, v.shape[2], dtype=torch.float64)
    for t, keys in enumerate(visible):
        for h in range(heads):
            g = h % groups if mistake == "interleaved heads" else h // (heads // groups)
            if keys:
                dots = [sum(a * b for a, b in zip(q[t, h].tolist(), k[s, g].tolist(), strict=True)) for s in keys]
                weights = [math.exp(scale * (dot - max(dots))) for dot in dots]
                for weight, s in zip(weights, keys, strict=True):
                    out[t, h] += weight / sum(weights) * v[s, g].double()
    return out


@st.composite
def calls(draw: st.DrawFn) -> tuple[tuple[Tensor, ...], Pairs, Pairs | None, dict[str, Any]]:
    t, s, g, r = draw(st.integers(0, 5)), draw(st.integers(0, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    d, dv = draw(st.sampled_from([(4, 4), (3, 5), (1, 2)]))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    tensors = qkv(t, s, g * r, g, d, dv, dtype)
    if draw(st.booleans()):  # head-major memory
        tensors = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors)
    borders = [sorted(draw(st.tuples(*[st.integers(0, s)] * 4))) for _ in range(t)]
    first, second = [(b[0], b[1]) for b in borders], [(b[2], b[3]) for b in borders]
    if draw(st.booleans()):  # either may come first
        first, second = second, first
    options = {"scale": draw(st.sampled_from([None, 0.3]))}
    return tensors, first, second if draw(st.booleans()) else None, options


@settings(max_examples=80, deadline=None)
@given(calls(), st.sampled_from([torch.int32, torch.int64]))
def test_intervals_match_loops(
    call: tuple[tuple[Tensor, ...], Pairs, Pairs | None, dict[str, Any]], dtype: torch.dtype
) -> None:
    (q, k, v), first, second, options = call
    visible = [[*range(*a), *range(*b)] for a, b in zip(first, second or [(0, 0)] * len(first), strict=True)]
    scale = options["scale"] or q.shape[2] ** -0.5
    pair = None if second is None else columns(second, dtype)
    out = interval_attention(q, k, v, *columns(first, dtype), second=pair, **options)
    assert out.dtype == q.dtype and out.is_contiguous()
    tolerance = 1e-12 if q.dtype == torch.float64 else 2e-6
    torch.testing.assert_close(out.double(), brute(q, k, v, visible, scale), atol=tolerance, rtol=tolerance)


FIRST: Pairs = [(0, 3), (2, 2), (0, 6), (1, 4), (5, 6)]  # row 1 is empty, unless it has a second interval
SECOND: Pairs = [(4, 6), (0, 0), (6, 6), (0, 1), (0, 0)]


def visible_of(second: bool) -> list[list[int]]:
    return [[*range(*a), *(range(*b) if second else ())] for a, b in zip(FIRST, SECOND, strict=True)]


def test_mistakes_are_noticed() -> None:
    q, k, v = qkv(5, 6, 4, 2, 8, 8)
    out = interval_attention(q, k, v, *columns(FIRST), second=columns(SECOND))
    scale = 8**-0.5
    torch.testing.assert_close(out.double(), brute(q, k, v, visible_of(True), scale), atol=2e-6, rtol=0)
    wrong = {
        "interleaved heads": brute(q, k, v, visible_of(True), scale, "interleaved heads"),
        "second interval ignored": brute(q, k, v, visible_of(False), scale),
        "closed intervals": brute(q, k, v, [[*range(a, min(b + 1, 6))] for a, b in FIRST], scale),
        "no scale": brute(q, k, v, visible_of(True), 1.0),
    }
    for mistake, value in wrong.items():
        assert (out - value).abs().max() > 1e-2, mistake


@pytest.mark.parametrize("with_second", [False, True])
def test_gradients(with_second: bool) -> None:
    """gradcheck of the op; its explicit backward against autograd through the dense forward."""
    q, k, v = (x.requires_grad_() for x in qkv(5, 6, 4, 2, 3, 2, torch.float64))
    starts, ends = columns(FIRST)
    pair = columns(SECOND) if with_second else None
    assert torch.autograd.gradcheck(lambda a, b, c: interval_attention(a, b, c, starts, ends, second=pair), (q, k, v))
    two: tuple[Any, Any] = pair or (None, None)
    out, lse = reference.interval_attention(q, k, v, starts, ends, *two, 0.5)
    dout = rand(*out.shape, seed=9, dtype=torch.float64)
    expected = torch.autograd.grad(out, (q, k, v), dout)
    with torch.no_grad():
        actual = reference.interval_attention_backward(dout, q, k, v, out, lse, starts, ends, *two, 0.5)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(actual[0][1], torch.zeros_like(actual[0][1]))  # the row without keys
    assert lse.shape == (4, 5) and bool((lse[:, 1] == -torch.inf).all())


def test_low_precision_rounds_once() -> None:
    q, k, v = qkv(5, 6, 4, 2, 8, 8, torch.bfloat16)
    out = interval_attention(q, k, v, *columns(FIRST))
    wide = interval_attention(q.float(), k.float(), v.float(), *columns(FIRST))
    assert out.dtype == torch.bfloat16 and torch.equal(out, wide.bfloat16())
    assert torch.equal(out, interval_attention(q, k, v, *columns(FIRST)))  # the same bits every run


def test_opcheck() -> None:
    tensors = tuple(x.requires_grad_() for x in qkv(5, 6, 4, 2, 8, 4))
    for two in ((None, None), columns(SECOND)):
        torch.library.opcheck(torch.ops.bernini.interval_attention.default, (*tensors, *columns(FIRST), *two, 0.4))
        q, k, v = (x.detach() for x in tensors)
        out, lse = torch.ops.bernini.interval_attention(q, k, v, *columns(FIRST), *two, 0.4)
        backward = (rand(5, 4, 4), q, k, v, out, lse, *columns(FIRST), *two, 0.4)
        torch.library.opcheck(torch.ops.bernini.interval_attention_backward.default, backward)


def test_compile_intervals() -> None:
    tensors = tuple(x.requires_grad_() for x in qkv(5, 6, 4, 2, 8, 4))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return interval_attention(q, k, v, *columns(FIRST), second=columns(SECOND)).square().sum()

    expected = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_fake_at_real_size() -> None:
    with FakeTensorMode():
        q, k = torch.empty(65_520, 28, 128, dtype=torch.bfloat16), torch.empty(65_520, 4, 128, dtype=torch.bfloat16)
        q.requires_grad_()
        starts = torch.empty(65_520, dtype=torch.int32)
        out = interval_attention(q, k, k, starts, starts, second=(starts, starts))
        assert out.shape == q.shape and out.dtype == torch.bfloat16
        (dq,) = torch.autograd.grad(out.sum(), q)
        assert dq.shape == q.shape and dq.dtype == torch.bfloat16
        assert attention(q, k, k, cu_seqlens_q=[0, 1, 65_520], cu_seqlens_k=[0, 2, 65_520]).shape == q.shape


def test_intervals_of_a_layout() -> None:
    """A planner sequence: the layout's intervals are what the op takes."""
    layout = SegmentLayout(
        [Segment("text", (3, 1, 1), 0.0, 0), Segment("source", (1, 2, 2), 1.0, 0), Segment("target", (1, 2, 2), 0.0, 0)]
    )
    starts, ends, second = layout.intervals
    assert second is None
    q, k, v = qkv(11, 11, 2, 1, 4, 4)
    out = interval_attention(q, k, v, torch.from_numpy(starts), torch.from_numpy(ends))
    visible = [list(range(t + 1)) if t < 7 else list(range(11)) for t in range(11)]
    torch.testing.assert_close(out.double(), brute(q, k, v, visible, 0.5), atol=2e-6, rtol=0)


# --- attention ------------------------------------------------------------------------------------------------------


@st.composite
def packed(draw: st.DrawFn) -> tuple[tuple[Tensor, ...], list[int], list[int]]:
    lengths = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4))
    cu_q, cu_k = [0], [0]
    for a, b in lengths:
        cu_q.append(cu_q[-1] + a)
        cu_k.append(cu_k[-1] + b)
    g, r = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    return qkv(cu_q[-1], cu_k[-1], g * r, g, 4, draw(st.sampled_from([4, 3])), dtype), cu_q, cu_k


@settings(max_examples=60, deadline=None)
@given(packed(), st.sampled_from(["auto", "sdpa", "reference"]), st.booleans(), st.booleans())
def test_packed_attention_matches_loops(
    call: tuple[tuple[Tensor, ...], list[int], list[int]], backend: str, tensors: bool, grad: bool
) -> None:
    (q, k, v), cu_q, cu_k = call
    visible: list[list[int]] = []
    for b in range(len(cu_q) - 1):
        visible += [list(range(cu_k[b], cu_k[b + 1]))] * (cu_q[b + 1] - cu_q[b])
    expected = brute(q, k, v, visible, 0.5)
    q.requires_grad_(grad)
    borders = [torch.tensor(cu, dtype=torch.int32) if tensors else cu for cu in (cu_q, cu_k)]
    out = attention(q, k, v, cu_seqlens_q=borders[0], cu_seqlens_k=borders[1], backend=backend)
    assert out.dtype == q.dtype and out.shape == expected.shape and out.requires_grad == grad
    torch.testing.assert_close(out.detach().double(), expected, atol=2e-6, rtol=0)
    if len(cu_q) == 2:
        assert torch.equal(out, attention(q, k, v, backend=backend))


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("cu", [(None, None), ([0, 2, 2, 5], [0, 3, 4, 4])])
def test_attention_gradients(backend: str, cu: Any) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(5, 4, 4, 2, 3, 2, torch.float64))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, cu_seqlens_q=cu[0], cu_seqlens_k=cu[1], backend=backend, scale=0.7)

    assert torch.autograd.gradcheck(run, (q, k, v), fast_mode=True)


class Recorder(TorchDispatchMode):
    """Names of the operations that reach the backend."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_one_sequence_adds_no_copy() -> None:
    """The very operations of SDPA called on transposed views."""
    q, k, v = qkv(64, 80, 4, 4, 16, 16)
    with Recorder() as ours:
        attention(q, k, v, backend="sdpa")
    with Recorder() as direct:
        q_HTD, k_HSD, v_HSD = (x.transpose(0, 1)[None] for x in (q, k, v))
        F.scaled_dot_product_attention(q_HTD, k_HSD, v_HSD).squeeze(0).transpose(0, 1)
    assert ours.names == direct.names and not any("copy" in name or "clone" in name for name in ours.names)


def test_short_sequences_of_one_shape_go_together() -> None:
    """Their results and gradients are those of each alone; so are those of the empty and the long between them."""
    lengths = [(5, 7), (3, 4), (5, 7), (0, 2), (5, 7), (1100, 3), (3, 4)]
    cu_q, cu_k = ([0, *accumulate(column)] for column in zip(*lengths, strict=True))
    for dtype, limit in ((torch.float64, 1e-12), (torch.bfloat16, 1e-2)):
        tensors = tuple(x.requires_grad_() for x in qkv(cu_q[-1], cu_k[-1], 4, 2, 8, 8, dtype))
        with Recorder() as calls:
            out = attention(*tensors, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, backend="sdpa")
        assert sum("scaled_dot_product" in name for name in calls.names) == 3
        exact = tuple(x.detach().double().requires_grad_() for x in tensors)
        alone = torch.cat([
            attention(exact[0][a:b], exact[1][c:d], exact[2][c:d], backend="reference")
            for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k), strict=True)
        ])  # fmt: skip
        grad = torch.randn(out.shape, dtype=torch.float64)
        found = (out, *torch.autograd.grad(out, tensors, grad.to(dtype)))
        wanted = (alone, *torch.autograd.grad(alone, exact, grad.to(dtype).double()))
        for one, other in zip(found, wanted, strict=True):
            assert float((one.double() - other).detach().norm()) <= limit * float(other.detach().norm())


def test_compile_attention() -> None:
    tensors = tuple(x.requires_grad_() for x in qkv(5, 6, 4, 2, 8, 8, torch.float64))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        some = attention(q, k, v, cu_seqlens_q=[0, 2, 5], cu_seqlens_k=[0, 4, 6])
        return some.square().sum() + attention(q, k, v, backend="reference").sum() + attention(q, k, v).sum()

    expected = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_backend_table(monkeypatch: pytest.MonkeyPatch) -> None:
    serving = [name for name, why in available_backends("cpu", torch.bfloat16).items() if why is None]
    assert serving == ["sdpa", "flex", "reference"]
    monkeypatch.delenv("BERNINI_KERNELS", raising=False)
    monkeypatch.setattr(backends, "BACKENDS", dict(backends.BACKENDS))
    ones = backends.per_sequence(lambda q, k, v, scale: torch.ones_like(q))
    backends.add(backends.Backend("never", lambda device, dtype: f"is not for {device}", ones), before="sdpa")
    backends.add(backends.Backend("ones", lambda device, dtype: None, ones), before="sdpa")
    assert list(available_backends("cpu", torch.float32))[-5:] == ["never", "ones", "sdpa", "flex", "reference"]
    q, k, v = qkv(2, 2, 1, 1, 4, 4)
    assert torch.equal(attention(q, k, v), torch.ones_like(q))
    with pytest.raises(ValueError, match=r"'never' cannot serve .*never: is not for cpu; ones: available; sdpa: avail"):
        attention(q, k, v, backend="never")
    with pytest.raises(ValueError, match=r"backend='flash9' is unknown \(fa3: .*; never: is not"):
        attention(q, k, v, backend="flash9")
    monkeypatch.setenv("BERNINI_KERNELS", "reference")
    assert torch.equal(attention(q, k, v), attention(q, k, v, backend="reference"))
    assert which("interval_attention") == "reference"


Q, K, V = qkv(2, 3, 4, 2, 4, 4)
ROWS = columns([(0, 3), (0, 2)])
BAD_INTERVALS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    (r"q must be \[queries, heads, head_dim\] = .* got \[2, 16\]", (Q.flatten(1), K, V, *ROWS), {}),
    (r"k must be .*\[\*, \*, 4\], got \[3, 2, 3\]", (Q, K[..., :3], V, *ROWS), {}),
    (r"v must be .*\[3, 2, \*\], got \[2, 2, 4\]", (Q, K, V[:2], *ROWS), {}),
    (r"the 3 heads of q \[2, 3, 4\] must be a multiple of the 2", (Q[:, :3], K, V, *ROWS), {}),
    ("must have one dtype", (Q, K.double(), V, *ROWS), {}),
    ("floating point", (Q.int(), K, V, *ROWS), {}),
    (r"ends must be \[queries\] = \[2\], got \[1\]", (Q, K, V, ROWS[0], ROWS[1][:1]), {}),
    ("starts must be int32 or int64, got torch.float32", (Q, K, V, ROWS[0].float(), ROWS[1]), {}),
    (r"second\[1\] must be .* got \[3\]", (Q, K, V, *ROWS), {"second": (ROWS[0], torch.zeros(3, dtype=torch.int32))}),
    ("different devices", (Q, K.to("meta"), V, *ROWS), {}),
    (r"the interval of row 1 is \[0, 4\); expected 0 <= start <= end <= 3", (Q, K, V, *columns([(0, 3), (0, 4)])), {}),
    (r"the interval of row 0 is \[2, 1\)", (Q, K, V, *columns([(2, 1), (0, 4)])), {}),
    (r"the interval of row 1 is \[-1, 1\)", (Q, K, V, *columns([(0, 1), (-1, 1)])), {}),
    (r"the second interval of row 1 is \[3, 2\)", (Q, K, V, *ROWS), {"second": columns([(3, 3), (3, 2)])}),
    (r"row 1 overlap: \[0, 2\) and \[1, 3\)", (Q, K, V, *ROWS), {"second": columns([(3, 3), (1, 3)])}),
]


@pytest.mark.parametrize(("message", "args", "options"), BAD_INTERVALS)
def test_bad_intervals(message: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        interval_attention(*args, **options)


BAD_BORDERS: list[tuple[str, dict[str, Any]]] = [
    (r"cu_seqlens_q must run from 0 to the 2 tokens, got \[0, 1\]", {"cu_seqlens_q": [0, 1]}),
    (r"must run from 0 to the 2 tokens, got \[1, 2\]", {"cu_seqlens_q": [1, 2]}),
    (r"must run from 0 to the 2 tokens, got \[\]", {"cu_seqlens_q": []}),
    (r"cu_seqlens_k must not decrease, got \[0, 2, 1, 3\]", {"cu_seqlens_k": [0, 2, 1, 3]}),
    ("cu_seqlens_q has 2 sequences, cu_seqlens_k has 1", {"cu_seqlens_q": [0, 1, 2]}),
    (r"must be a 1-D int32 or int64 tensor, got torch.float32 \[2\]", {"cu_seqlens_q": torch.tensor([0.0, 2.0])}),
    (
        r"cu_seqlens_q \[2\] is on meta; it must be on the host",
        {"cu_seqlens_q": torch.empty(2, dtype=torch.int32, device="meta")},
    ),
]


@pytest.mark.parametrize(("message", "options"), BAD_BORDERS)
def test_bad_borders(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        attention(Q, K, V, **options)


def test_borders_on_a_gpu_are_refused() -> None:
    with FakeTensorMode():
        q, k = torch.empty(4, 2, 8), torch.empty(4, 2, 8)
        with pytest.raises(ValueError, match="is on cuda:0; it must be on the host"):
            attention(q, k, k, cu_seqlens_q=torch.empty(2, dtype=torch.int32, device="cuda:0"))
