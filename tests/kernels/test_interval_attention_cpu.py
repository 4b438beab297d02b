"""The CPU's interval attention: what its pieces are, what it takes, and that memory grows with the tokens only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench_perf.harness import extra_memory
from bernini.kernels import Segment, SegmentLayout, interval_attention, which
from bernini.kernels.attention import cpu, reference
from bernini.kernels.attention.cpu import CAUSAL, FULL, MASKED, Group, Piece


@pytest.fixture(autouse=True)
def _unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BERNINI_KERNELS", raising=False)


def columns(layout: SegmentLayout) -> tuple[Tensor, ...]:
    starts, ends, second = layout.intervals
    return tuple(torch.from_numpy(x) for x in (starts, ends, *(second or ())))


def plan(intervals: tuple[Tensor, ...]) -> list[Group]:
    arrays = [x.numpy().astype(np.int64) for x in intervals]
    return cpu.plan(list(zip(arrays[0::2], arrays[1::2], strict=True)))


def sample(text: int, source: int, target: int, number: int = 0) -> list[Segment]:
    """As the template has it: source, prompt, target, and one mark behind it."""
    return [
        Segment("text", (20, 1, 1), 0.0, number),
        Segment("source", (1, 1, source), 1.0, number),
        Segment("text", (text - 21, 1, 1), 0.0, number),
        Segment("target", (1, 1, target), 0.0, number),
        Segment("text", (1, 1, 1), 0.0, number),
    ]


def call(
    intervals: tuple[Tensor, ...], keys: int, heads: int = 2, groups: int = 1, width: int = 64
) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((len(intervals[0]), heads, width), (keys, groups, width), (keys, groups, width))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    two: Any = intervals[2:] or (None, None)
    return lambda: torch.ops.bernini.interval_attention(q, k, v, intervals[0], intervals[1], *two, width**-0.5)


# --- the pieces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("small", [False, True])
def test_the_pieces_are_the_mask(seed: int, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every visible pair is in one piece, no other pair is, and what needs no mask says so rightly."""
    for name, value in ({"SHORT": 3, "ROWS": 5, "APART": 2, "KEYS": 7} if small else {}).items():
        monkeypatch.setattr(cpu, name, value)
    rng = np.random.default_rng(seed)
    rows, keys = int(rng.integers(0, 400)), int(rng.integers(0, 400))
    borders = np.sort(rng.integers(0, keys + 1, (rows, 4)), axis=1)
    run = int(rng.integers(1, 90))
    borders = np.repeat(borders[::run], run, axis=0)[:rows].copy()
    borders[:, 3] = np.minimum(borders[:, 3] + np.arange(rows) % run, keys)
    borders[rng.random(rows) < 0.02] = 0
    chosen = [(0, 1, 2, 3), (2, 3, 0, 1), (2, 3)][seed % 3]
    intervals = tuple(torch.from_numpy(borders[:, number].copy()) for number in chosen)
    want = reference.interval_mask(intervals[0], intervals[1], *(intervals[2:] or (None, None)), keys)
    covered = torch.zeros(rows, keys, dtype=torch.int64)
    before = 0
    for begin, end, pieces in plan(intervals):
        assert begin == before < end
        before = end
        for low, high, kind in pieces:
            block = covered[begin:end, low:high]
            seen = want[begin:end, low:high]
            if kind == FULL:
                assert seen.all()
            elif kind == CAUSAL:
                assert high - low == end - begin and torch.equal(seen, torch.ones_like(seen).tril())
            else:
                assert kind == MASKED and high - low <= cpu.KEYS
            block += 1
    assert before == rows and bool((covered <= 1).all()) and bool((covered.bool() | ~want).all())


def test_the_planners_layouts_need_no_mask() -> None:
    v2v = plan(columns(SegmentLayout(sample(120, 300, 300))))
    assert v2v == [
        Group(0, 419, (Piece(0, 419, CAUSAL),)),
        Group(419, 719, (Piece(0, 719, FULL),)),
        Group(719, 720, (Piece(0, 419, FULL), Piece(719, 720, FULL))),
    ]
    prefix = (torch.zeros(1000, dtype=torch.int32), torch.arange(1, 1001, dtype=torch.int32))
    assert plan(prefix) == [Group(0, 1000, (Piece(0, 1000, CAUSAL),))]
    behind = SegmentLayout([*sample(120, 300, 300)[:4], Segment("text", (400, 1, 1))])
    assert plan(columns(behind))[-1] == Group(719, 1119, (Piece(0, 419, FULL), Piece(719, 1119, CAUSAL)))


def test_a_mask_is_never_larger_than_a_block() -> None:
    """Rows that have nothing in common."""
    rng = np.random.default_rng(0)
    borders = np.sort(rng.integers(0, 30_000, (3000, 2)), axis=1)
    for begin, end, pieces in plan(tuple(torch.from_numpy(borders[:, n].copy()) for n in (0, 1))):
        assert end - begin <= cpu.ROWS + cpu.SHORT
        assert all(high - low <= cpu.KEYS for low, high, kind in pieces if kind == MASKED)


# --- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (6, 2), (14, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    """As the float32 form of the same numbers, rounded at the end; q is a view into a packed buffer."""
    intervals = columns(SegmentLayout([*sample(40, 60, 50), *sample(30, 40, 10, 1)]))
    tokens = len(intervals[0])
    two: Any = intervals[2:] or (None, None)
    packed = torch.randn(tokens, sum(heads) + heads[1], 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    q, k, v = packed.split([heads[0], heads[1], heads[1]], dim=1)
    out, lse = cpu.interval_attention(q, k, v, *intervals[:2], *two, 0.2)
    wide = cpu.interval_attention(q.float(), k.float(), v.float(), *intervals[:2], *two, 0.2)
    assert out.dtype == dtype and torch.equal(out, wide[0].to(dtype)) and torch.equal(lse, wide[1])
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    args: Any = (*intervals[:2], *two, 0.2)
    grads = cpu.interval_attention_backward(dout, q, k, v, out, lse, *args)
    again = cpu.interval_attention_backward(dout, q, k, v, out, lse, *args)
    floats = [x.float() for x in (dout, q, k, v, out)]
    for a, b, c, d in zip(grads, cpu.interval_attention_backward(*floats, lse, *args), again, (q, k, v), strict=True):
        assert a.dtype == dtype and a.shape == d.shape and torch.equal(a, b.to(dtype)) and torch.equal(a, c)


def test_the_same_bits_every_run() -> None:
    run = call(columns(SegmentLayout(sample(200, 700, 300))), 1200, heads=6, groups=2)
    first = run()
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize(("rows", "keys"), [(0, 0), (0, 5), (5, 0), (1, 1)])
def test_next_to_nothing(rows: int, keys: int) -> None:
    q, k, v = torch.randn(rows, 4, 3), torch.randn(keys, 2, 3), torch.randn(keys, 2, 5)
    tensors = [x.requires_grad_() for x in (q, k, v)]
    starts, ends = torch.zeros(rows, dtype=torch.int32), torch.full((rows,), keys, dtype=torch.int32)
    out = interval_attention(*tensors, starts, ends)
    assert out.shape == (rows, 4, 5)
    if rows and keys:
        torch.testing.assert_close(out, v.repeat_interleave(2, 1))
    else:
        assert not out.any()
    for grad, x in zip(torch.autograd.grad(out.sum(), tensors), tensors, strict=True):
        assert grad.shape == x.shape and bool(grad.isfinite().all())


def test_it_stands_between_native_and_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in ("interval_attention", "interval_attention_backward"):
        assert which(op) == which(op, dtype=torch.float64) == which(op, dtype=torch.bfloat16) == "tiled"
        assert which(op, "meta") == "reference"
    assert cpu.implementation(cpu.interval_attention).missing() is None
    monkeypatch.setattr(cpu, "OPERATORS", ("no_such_operator",))
    why = cpu.implementation(cpu.interval_attention).missing()
    assert why is not None and why.startswith("needs a torch with aten::no_such_operator; this is ")
    monkeypatch.setenv("BERNINI_KERNELS", "tiled")
    with pytest.raises(
        ValueError, match="rms_norm: BERNINI_KERNELS=tiled, but the tiled implementation does not exist"
    ):
        which("rms_norm")


# --- memory ---------------------------------------------------------------------------------------------------------

needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
MIB = 2**20


@needs_proc
def test_memory_grows_with_the_tokens() -> None:
    """Packed samples of 1024 tokens, forward and backward. The dense form takes 8 GiB of scores at 32 768."""
    used = []
    for tokens in (8192, 16_384, 32_768):
        layout = SegmentLayout([s for number in range(tokens // 1024) for s in sample(120, 300, 604, number)])
        intervals = columns(layout)
        assert layout.tokens == tokens == len(intervals[0])
        q, k, v = (torch.randn(tokens, heads, 64, requires_grad=True) for heads in (2, 1, 1))

        def both(q: Tensor = q, k: Tensor = k, v: Tensor = v, intervals: tuple[Tensor, ...] = intervals) -> Any:
            out = interval_attention(q, k, v, *intervals[:2], second=intervals[2:] or None)  # type: ignore[arg-type]
            return torch.autograd.grad(out.sum(), (q, k, v))

        used.append(extra_memory(both))
    assert used[2] < 160 * MIB, used
    assert 1.5 < used[1] / used[0] < 2.5 and 1.5 < used[2] / used[1] < 2.5, used


@needs_proc
def test_one_long_sequence() -> None:
    """32 768 tokens, half of them a target that sees everything: 671 million pairs, as float32 2.5 GiB a head."""
    long = call(columns(SegmentLayout(sample(1024, 15_360, 16_383))), 32_768)
    calls = iter([call(columns(SegmentLayout(sample(120, 300, 604))), 1024), long])
    assert extra_memory(lambda: next(calls)()) < 80 * MIB
