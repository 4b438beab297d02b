"""Interval attention on the planner's layouts: 36 864 packed tokens, head dim 128, two query heads to a key head.

The queries are the second half of the tokens, as one of two ranks has them. Minimum: q in and out out once, and k and v
of every key tile that some row of a row tile sees, once for that row tile and head. The traffic so also proves that the
tiles visited are the ones that the mask needs; which those are is counted from the intervals on the host. Backward
likewise, with q and dout of every row tile that sees a key of a key tile.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, Literal

import numpy as np
import torch

from bernini.kernels.attention import visits
from bernini.kernels.segments import Segment, SegmentLayout

from ..case import Broken, Case

KEYS, TOKENS, HEADS, GROUPS, WIDTH = 36_864, 18_432, 2, 1, 128
"""More than stays in cache, of q as of k, so that every visit of a tile counts; and few programs to go through."""

Piece = tuple[Literal["text", "source", "target"], tuple[int, int, int]]


def _sample(number: int, *pieces: Piece) -> list[Segment]:
    return [Segment(kind, grid, 0.0, number) for kind, grid in pieces]


def v2v(number: int, closing: int = 0) -> list[Segment]:
    """A video made from a video; ``closing``: tokens of text behind, which sees all but the target."""
    video = (15, 30, 26)
    pieces: list[Piece] = [("text", (57, 1, 1)), ("source", video), ("text", (84, 1, 1)), ("target", video)]
    return _sample(number, *pieces, *([("text", (closing, 1, 1))] if closing else []))


def r2v(number: int) -> list[Segment]:
    """A video made from eight images."""
    images: list[Piece] = [piece for _ in range(8) for piece in (("source", (1, 16, 16)), ("text", (2, 1, 1)))]
    return _sample(number, ("text", (31, 1, 1)), *images, ("text", (120, 1, 1)), ("target", (4, 30, 40)))


@cache
def layout(second: bool) -> SegmentLayout:
    """A packed batch: a video after a video, a video after eight images, text after an image, text."""
    segments = [*v2v(0, closing=300 if second else 0), *r2v(1)]
    segments += _sample(2, ("text", (5, 1, 1)), ("source", (1, 46, 46)), ("text", (900, 1, 1)))
    left = KEYS - SegmentLayout(segments).tokens
    return SegmentLayout([*segments, *_sample(3, ("text", (left, 1, 1)))])


class _Letters:
    """A tokenizer, a letter a token: as many tokens as letters are all that a layout needs of one."""

    unk_token_id = None

    def convert_tokens_to_ids(self, token: str) -> int:
        return len(token)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(text.encode())


def planner_layouts() -> dict[str, SegmentLayout]:
    """What the planner's template makes of requests: videos of 300 tokens, images of 64, text before and after.

    A token closes every visual, behind the target too, so that each of them has second intervals.
    """
    from bernini.planner.prompt import Template, Visual
    from bernini.presets import SYSTEM_PROMPTS

    template = Template(_Letters())
    video, image = Visual("video", (6, 5, 10)), Visual("image", (1, 8, 8))
    prompt = "The second dancer wears the coat of the last picture, and it is snowing. " * 2
    v2v = template(prompt, [video], video, system=SYSTEM_PROMPTS["v2v"]).layout
    r2v = template(prompt, [image] * 8, video, system=SYSTEM_PROMPTS["r2v"]).layout
    t2i = template(prompt, [], image, system=SYSTEM_PROMPTS["t2i"]).layout
    question = template("What is in it?", [video], None, system="").layout
    samples = (v2v, r2v, question, t2i, v2v)
    packed = [replace(segment, sample=number) for number, one in enumerate(samples) for segment in one.segments]
    closed = SegmentLayout([*v2v.segments, Segment("text", (150, 1, 1))])
    return {"v2v": v2v, "v2v, closed by text": closed, "r2v with 8 images": r2v, "packed": SegmentLayout(packed)}


TILES = {
    (target, dtype): (64, 32) if dtype == torch.float32 else (128, 32) if target == "gfx942" else (128, 64)
    for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    for dtype in (torch.bfloat16, torch.float32)
}
"""Query rows and keys of the forward kernel's tiles, for heads of 128, the planner's."""


class _Call:
    """A call of the forward or backward wrapper, and what follows from the sizes of the tiles that it chose."""

    def __init__(self, second: bool, backward: bool) -> None:
        self._second, self._backward = second, backward
        self.values: dict[str, np.ndarray[Any, Any]] = {}
        self._bytes = 0

    def minimum(self, dtype: torch.dtype) -> int:
        return self._bytes

    def __call__(self, kernel: Any, dtype: torch.dtype) -> None:
        q = torch.empty(TOKENS, HEADS, WIDTH, dtype=dtype, device="cuda")
        k, v = (torch.empty(KEYS, GROUPS, WIDTH, dtype=dtype, device="cuda") for _ in range(2))
        columns = [torch.empty(TOKENS, dtype=torch.int32, device="cuda") for _ in range(4 if self._second else 2)]
        intervals = columns if self._second else [*columns, None, None]
        element, rows = dtype.itemsize * WIDTH, TOKENS * HEADS
        self.values.clear()
        if not self._backward:
            sizes = kernel.blocks(q, v)
            needed = self._rows(sizes)
            self._bytes = rows * (2 * element + 4) + HEADS * needed * sizes.n * 2 * element
            kernel.interval_attention(q, k, v, *intervals, WIDTH**-0.5)
            return
        by_row, by_key = kernel.blocks(q, v, self._second)
        needed = self._rows(by_row)
        # q, dout, out and dq; lse in, delta and lse out and in again; k, v, dk and dv.
        self._bytes = rows * (4 * element + 20) + HEADS * needed * by_row.n * 2 * element
        needed = self._keys(by_key)
        self._bytes += KEYS * GROUPS * 4 * element + HEADS * needed * by_key.m * 2 * element
        lse = torch.empty(HEADS, TOKENS, device="cuda")
        kernel.interval_attention_backward(q, q, k, v, q, lse, *intervals, WIDTH**-0.5)

    def _states(self, sizes: Any) -> np.ndarray[Any, Any]:
        starts, ends, second = layout(self._second).intervals
        last = slice(KEYS - TOKENS, None)
        two = None if second is None else (second[0][last], second[1][last])
        return visits.states(starts[last], ends[last], two, KEYS, sizes.m, sizes.n)

    def _rows(self, sizes: Any) -> int:
        """Plans row tiles and tells how many pairs of tiles are needed."""
        state = self._states(sizes)
        counts, runs = visits.row_plan(state, sizes.m * (2 if self._second else 1))
        self.values |= {"plan.0": counts, "plan.1": runs.reshape(-1)}
        return int(np.count_nonzero(state))

    def _keys(self, sizes: Any) -> int:
        """Likewise key tiles."""
        state = self._states(sizes)
        counts, runs = visits.column_plan(state, TOKENS, sizes.m)
        self.values |= {"column_plan.0": counts, "column_plan.1": runs.reshape(-1)}
        return int(np.count_nonzero(state))


PLAN = "intervals and numbers of tiles, in 32 bits"
ROWS = "lse, intervals and numbers of tiles, in 32 bits; AMD stores sums as its matrix cores hold them, in 64"
NARROW = {
    "plan_rows_kernel": (17, PLAN),
    "plan_columns_kernel": (56, PLAN),
    "interval_attention_kernel": (21, ROWS),
    "interval_attention_dq_kernel": (27, ROWS),
    "interval_attention_dkdv_kernel": (50, ROWS),
}


def _case(name: str, module: str, second: bool, backward: bool) -> Case:
    call = _Call(second, backward)
    # Tensor cores want all the registers there are; sm_100 announces every product on them by a barrier.
    return Case(
        name, f"attention.{module}", call, call.minimum, launches=5 if backward else 2, registers=255, barriers=160,
        values=call.values, narrow=NARROW,
    )  # fmt: skip


PLANNED = 440_000
PLAN_M, PLAN_N = 128, 64


def _plan(kernel: Any, dtype: torch.dtype) -> None:
    intervals = tuple(torch.empty(PLANNED, dtype=torch.int32, device="cuda") for _ in range(2))
    kernel.columns(intervals, PLANNED, PLAN_M, PLAN_N)


def _plan_bytes(dtype: torch.dtype) -> int:
    """Intervals in; runs of row tiles out and in again; those of key tiles out.

    Every key tile looks at the first runs of all row tiles: 52 bytes of each, which stay in cache.
    """
    row_tiles, key_tiles = -(-PLANNED // PLAN_M), -(-PLANNED // PLAN_N)
    return PLANNED * 8 + 2 * row_tiles * 4 * (1 + 3 * PLAN_M) + key_tiles * 4 * (1 + 3 * 8)


CASES = [
    Case(
        "interval_attention plan", "attention.kernel_plan", _plan, _plan_bytes, launches=2, dtypes=(torch.bfloat16,),
        narrow=NARROW,
    ),
    _case("interval_attention", "kernel", False, False),
    _case("interval_attention with second intervals", "kernel", True, False),
    _case("interval_attention backward", "kernel_bwd", False, True),
    _case("interval_attention backward with second intervals", "kernel_bwd", True, True),
]  # fmt: skip

FORWARD, BACKWARD = CASES[1].name, CASES[3].name


def _broken(module: str, name: str, old: str, new: str, caught_by: str, case: str | None = None) -> Broken:
    return Broken(name, f"attention.{module}", old, new, caught_by, case)


ROW_MASK = "mask = visible(borders, at * N + lanes[None, :], SECOND)"
ROW_TILE = "tile = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)"

BROKEN = [
    # --- the plan
    _broken("kernel_plan", "wrong stride", "runs = row_runs_ptr + tile * (3 * RUNS)",
            "runs = row_runs_ptr + tile * RUNS", "semantics"),
    _broken("kernel_plan", "the last key tile left out", "tl.where(some, (end + N - 1) // N, 0)",
            "tl.where(some, end // N, 0)", "semantics"),
    _broken("kernel_plan", "missing mask: a tile of which a part is seen is full", "beyond, (start + N - 1) // N,",
            "beyond, start // N,", "semantics"),
    _broken("kernel_plan", "row tiles that are not whole are full", "state = tl.where((state == FULL) & (",
            "state = tl.where((state == GAP) & (", "semantics"),
    _broken("kernel_plan", "int32 offset", "tile = tl.program_id(0).to(tl.int64)", "tile = tl.program_id(0)", "lint",
            CASES[0].name),
    _broken("kernel_plan", "spilling tile", "BLOCK = 128", "BLOCK = 2048", "spills", CASES[0].name),
    # --- forward
    _broken("kernel", "wrong stride", "k = load_rows(k_ptr, places, strides[2]",
            "k = load_rows(k_ptr, places, strides[0]", "semantics"),
    _broken("kernel", "missing mask of keys", ROW_MASK, "mask = lanes[None, :] >= 0", "semantics"),
    _broken("kernel", "missing mask of rows",
            "mask = there[:, None] if TILE * PIECES == D else there[:, None] & (d < D)", "mask = d < D", "semantics"),
    _broken("kernel", "heads of a group are not neighbours", "key_head = head // group", "key_head = head % group",
            "semantics"),
    _broken("kernel", "sums keep the old maximum", "(sums[piece] * shrink[:, None],)", "(sums[piece],)", "semantics"),
    _broken("kernel", "second intervals are not looked at", "outside = tl.minimum(outside, tl.maximum(",
            "outside = tl.maximum(outside, tl.maximum(", "semantics"),
    _broken("kernel", "int32 offset", ROW_TILE, ROW_TILE.removesuffix(".to(tl.int64)"), "lint", FORWARD),
    _broken("kernel", "spilling tile", "Blocks(64 if wide else 128, n,", "Blocks(64 if wide else 256, n,", "spills",
            FORWARD),
    _broken("kernel", "every key tile up to the last is visited", "first = tl.load(runs + run)",
            "first = 0 * tl.load(runs + run)", "traffic", FORWARD),
    _broken("kernel", "float atomics", "tl.store(lse_ptr +", "tl.atomic_add(lse_ptr +", "atomics", FORWARD),
    # --- backward
    _broken("kernel_bwd", "wrong stride of dq", "k = load_rows(k_ptr, places, strides[2]",
            "k = load_rows(k_ptr, places, strides[0]", "semantics"),
    _broken("kernel_bwd", "wrong stride of dk", "q = load_rows(q_ptr, row, strides[0]",
            "q = load_rows(q_ptr, row, strides[6]", "semantics"),
    _broken("kernel_bwd", "missing mask of dq", ROW_MASK, "mask = lanes[None, :] >= 0", "semantics"),
    _broken("kernel_bwd", "missing mask of dk and dv", "mask = visible(borders, key, SECOND)", "mask = key >= 0",
            "semantics"),
    _broken("kernel_bwd", "one head of a group only", "for member in range(group):", "for member in range(1):",
            "semantics"),
    _broken("kernel_bwd", "no scale", "dk = _scaled(dk, scale * LN2, PIECES)", "dk = _scaled(dk, 1.0, PIECES)",
            "semantics"),
    _broken("kernel_bwd", "int32 offset of dq", ROW_TILE, ROW_TILE.removesuffix(".to(tl.int64)"), "lint", BACKWARD),
    _broken("kernel_bwd", "int32 offset of dk and dv", "tile = tl.program_id(0).to(tl.int64)",
            "tile = tl.program_id(0)", "lint", BACKWARD),
    _broken("kernel_bwd", "spilling tile of dq", "Blocks(128, 64, *size", "Blocks(256, 64, *size", "spills", BACKWARD),
    _broken("kernel_bwd", "spilling tile of dk and dv", "16 if second else 32, 128", "64, 128", "spills", BACKWARD),
]  # fmt: skip
