"""What attention by several ranks sends, copies and waits for: counted at real sizes, and timed with two processes.

Counted: the code itself runs as one rank after the other, on ``meta`` tensors, which have shapes and no memory, in a
group that only writes down what it is asked for. A dispatch mode sees what is copied and what would wait for a device.
So these figures are the same on every machine. The peer of bytes is what a rank must be sent, worked out from the mask:
the queries that it attends for, the keys that these see, and what others computed for its own tokens. The note has what
a plain Ulysses sends, where tokens and heads are padded to multiples of the ranks and keys repeated for every query
head.

Measured: one layer's attention, forward and backward, by two processes over gloo, and its exchanges alone, against that
plain form: one ``all_to_all_single`` each for q, k, v and the result, with a copy before or behind each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bernini.kernels import Segment, SegmentLayout, attention
from bernini.parallel.group import Group
from bernini.parallel.plan import Cut, Heads, Range, SPPlan
from bernini.parallel.share import Share
from bernini.parallel.ulysses import Run, Swap, Ulysses, attend
from bernini.planner.model import under_mask
from bernini.renderer.model import QKV, QKNorm

from . import ranks
from .harness import Row, Timing, judged, take_turns
from .moves import Absent, Counted, Moves, Shapes, shapes_backend
from .packer import PAPER, TALK

GB = 1e9

# --- the layers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One layer's attention.

    Args:
        planner: under the hybrid mask, without the norm and the rotation before it; else a sample's tokens see all of
            its tokens.
    """

    name: str
    layout: SegmentLayout
    heads: int
    kv_heads: int
    dim: int = 128
    planner: bool = False

    def plan(self, ranks: int) -> SPPlan:
        return SPPlan.make(self.layout, self.heads, self.kv_heads, ranks)

    def inputs(self, rank: int, ranks: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of a rank."""
        start, stop = self.plan(ranks).cut.part(rank)
        q, k, v = (
            torch.randn(stop - start, n, self.dim, **options) for n in (self.heads, self.kv_heads, self.kv_heads)
        )
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()

    def attend(self, group: Group, backend: str = "auto") -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """As the models do it, by one rank; the same for all layers."""
        if self.planner:
            under = under_mask(self.layout, share=Share(group, least=0))
            return lambda q, k, v: under(0, q, k, v, self.dim**-0.5)
        plan = self.plan(group.size)
        ranks, local = Ulysses(group, plan), plan.local(group.rank)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            norm = QKNorm(*(x.new_ones(self.heads * self.dim) for x in (q, k)), eps=1e-6)
            return ranks(q, QKV(lambda _: q, lambda _: k, lambda _: v), local, norm, "fp32", backend)

        return attend

    def seen(self, rows: Range) -> NDArray[np.bool_]:
        """Which keys these queries see."""
        counts = np.zeros(self.layout.tokens + 1, np.int64)
        for starts, ends in self._intervals:
            np.add.at(counts, starts[slice(*rows)], 1)
            np.add.at(counts, ends[slice(*rows)], -1)
        return np.cumsum(counts)[:-1] > 0

    @property
    def _intervals(self) -> list[tuple[NDArray[np.integer], NDArray[np.integer]]]:
        if self.planner:
            starts, ends, second = self.layout.intervals
            return [(starts, ends), *([] if second is None else [second])]
        owners, borders = self.layout.timestep_rows, np.asarray(self.layout.cu_seqlens)
        return [(borders[owners], borders[owners + 1])]


def trace(layer: Layer, rank: int, ranks: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Counted, Moves]:
    """Forward and backward of a rank, on ``meta`` tensors."""
    group = Counted(Absent(rank, ranks))
    leaves = layer.inputs(rank, ranks, dtype=dtype, device="meta")
    dout = torch.empty_like(leaves[0])
    with shapes_backend() as backend:
        run = layer.attend(group, backend)
        run(*leaves)  # tables and masks are made once for all layers
        group.exchanges.clear()
        with Moves() as seen:
            torch.autograd.grad(run(*leaves), leaves, dout)
    return group, seen


def least(layer: Layer, rank: int, ranks: int) -> int:
    """Elements that a rank must be sent, forward and backward, for its heads, the queries of its row and its tokens."""
    plan = layer.plan(ranks)
    heads, cut = plan.heads, plan.cut
    own, row = cut.part(rank), cut.of_row(heads.row(rank))
    tokens, queries = own[1] - own[0], row[1] - row[0]
    foreign = np.ones(cut.rows, bool)
    foreign[slice(*own)] = False
    keys = int((layer.seen(row) & foreign).sum())
    others = (cut.of_row(heads.row(other)) for other in range(ranks) if other != rank)
    key_grads = sum(int(layer.seen(rows)[slice(*own)].sum()) for rows in others)
    swapped = (queries - tokens) * heads.band + tokens * (heads.heads - heads.band)  # queries come, results come back
    return layer.dim * (2 * swapped + 2 * heads.kv_band * (keys + key_grads))


def padded(layer: Layer, ranks: int) -> int:
    """Elements that a rank of a plain Ulysses is sent, forward and backward: q, k, v and the result, and gradients."""
    tokens, heads = (-(-size // ranks) for size in (layer.layout.tokens, layer.heads))
    return 2 * 4 * (ranks - 1) * tokens * heads * layer.dim


def elements(layer: Layer, rank: int, ranks: int) -> int:
    """Elements of q, k, v and the result of a rank's tokens, and of their gradients.

    Keys that the rank reads itself and sends to another as well count as two.
    """
    plan = layer.plan(ranks)
    both = plan.heads.kv_band if plan.heads.kv_bands < ranks else 0
    return 2 * plan.cut.sizes[rank] * layer.dim * (2 * layer.heads + 2 * layer.kv_heads + both)


# --- counted --------------------------------------------------------------------------------------------------------


def _of(grids: Sequence[tuple[int, int, int]], sample: int = 0) -> list[Segment]:
    *sources, target = grids
    segments = [Segment("source", grid, float(n + 1), sample) for n, grid in enumerate(sources)]
    return [*segments, Segment("target", target, sample=sample)]


CLIP = (21, 30, 53)  # 81 frames of 480 x 848
BATCH = [*_of([CLIP, CLIP]), *_of([(1, 30, 53), (1, 30, 53)], 1), *_of([(11, 30, 53), (11, 30, 53)], 2)]
LAYERS = (
    Layer("14B", SegmentLayout(_of(PAPER)), 40, 40),
    Layer("1.3B", SegmentLayout(BATCH), 12, 12),
    Layer("planner 7B", SegmentLayout(TALK), 28, 4, planner=True),
)
RANKS = (2, 4, 8)


def counted(layer: Layer, ranks: int) -> list[Row]:
    """Of the rank that receives the most; copies and waits, of the rank that has the most."""
    found = [trace(layer, rank, ranks) for rank in range(ranks)]
    received = [sum(exchange.received for exchange in group.exchanges) for group, _ in found]
    most = int(np.argmax(received))
    exchanges, moves = found[most][0].exchanges, [moves for _, moves in found]
    heads = layer.plan(ranks).heads
    shape = f"{layer.layout.tokens} x {layer.heads}/{layer.kv_heads} x {layer.dim}, {ranks} ranks"
    case: dict[str, Any] = {"shape": shape, "dtype": "bfloat16"}
    plain = 2 * padded(layer, ranks)
    note = (
        f"peer: the least that it must be sent; {heads.ulysses} bands of heads x {heads.gather}; {len(exchanges)} "
        f"exchanges of at most {max(exchange.messages for exchange in exchanges)} messages; padded, with keys "
        f"repeated: {plain / GB:.3g} GB, {plain / received[most]:.2f} times as much"
    )
    peer = 2 * least(layer, most, ranks)
    moved = max(seen.copied for seen in moves) * 2 / GB
    shares = [seen.copied / elements(layer, rank, ranks) for rank, seen in enumerate(moves)]
    asked = max(len(seen.syncs) + len(group.others) for group, seen in found)
    return [
        judged(f"{layer.name}: sent to a rank", received[most] / GB, peer / GB, unit="GB", bar=1.0, note=note, **case),
        judged(
            f"{layer.name}: exchanges", max(len(group.exchanges) for group, _ in found), unit="exchanges", bar=4,
            note="two forward, two backward", **case,
        ),
        judged(
            f"{layer.name}: copies of an element", max(shares), unit="copies", bar=1.0,
            note=f"{moved:.3g} GB; inside attention and fused kernels not counted",
            **case,
        ),
        judged(
            f"{layer.name}: waits and questions", asked, unit="operations", bar=0,
            note="operations that wait for a device, and messages about sizes", **case,
        ),
    ]  # fmt: skip


# --- measured -------------------------------------------------------------------------------------------------------


class _AllToAll(torch.autograd.Function):
    """``[ranks, ...]``, one part for each rank -> one part of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        torch.distributed.all_to_all_single(out, x)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        return _AllToAll.forward(ctx, dout.contiguous())


def plain_ulysses(ranks: int, q: Tensor, k: Tensor, v: Tensor, run: Run) -> Tensor:
    """The usual form, for tokens and heads that the ranks divide (facts on systems, section 3.1)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))

    def out(x_tHD: Tensor) -> Tensor:
        return _AllToAll.apply(x_tHD.unflatten(1, (ranks, -1)).transpose(0, 1).contiguous()).flatten(0, 1)

    q, k, v = out(q), out(k), out(v)
    result = run(q, k, v, (0, len(q)))
    return _AllToAll.apply(result.unflatten(0, (ranks, -1)).contiguous()).transpose(0, 1).flatten(1, 2)


def attending(q: Tensor, k: Tensor, v: Tensor, rows: Range) -> Tensor:
    return attention(q, k, v)


def nothing(q: Tensor, k: Tensor, v: Tensor, rows: Range) -> Tensor:
    return Shapes.apply(q, k, v)


TIMED: Mapping[str, tuple[tuple[int, int, int], Run]] = {
    "attention of two processes, 12/12": ((1024, 12, 12), attending),
    "attention of two processes, 28/4": ((1024, 28, 4), attending),
    "its exchanges alone, 12/12": ((4096, 12, 12), nothing),
    "its exchanges alone, 28/4": ((4096, 28, 4), nothing),
}
"""Name -> (tokens, heads, key heads), what is done with them."""
TURNS = 10


def sides(group: Group, case: str) -> tuple[Callable[[], tuple[Tensor, ...]], Callable[[], tuple[Tensor, ...]]]:
    """Forward and backward of a rank: ours and the peer. Each returns the result and the gradients."""
    (tokens, heads, kv_heads), run = TIMED[case]
    layer = Layer(case, SegmentLayout([Segment("target", (tokens, 1, 1))]), heads, kv_heads)
    leaves = layer.inputs(group.rank, group.size, generator=torch.Generator().manual_seed(group.rank))
    dout = torch.ones_like(leaves[0])
    cut = Cut.even(tokens, group.size)
    swap = Swap(group, Heads.shared(heads, kv_heads, group.size), cut, cut)

    def both(call: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        out = call()
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    return partial(both, lambda: attend(swap, *leaves, run)), partial(
        both, lambda: plain_ulysses(group.size, *leaves, run)
    )


def rank(group: Group) -> dict[str, Any]:
    """What each of the processes does."""
    found = {}
    for case in TIMED:
        ours, peer = sides(group, case)
        for one, other in zip(ours(), peer(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        timings = take_turns([partial(ranks.together, ours), partial(ranks.together, peer)], (TURNS, TURNS), 0)
        found[case] = [asdict(timing) for timing in timings]
    return found


def measured(size: int = 2) -> list[Row]:
    times, unfit = ranks.ask(__spec__.name, size)
    rows = []
    for case, ((tokens, heads, kv_heads), _) in TIMED.items():
        ours, peer = (Timing(**timing) for timing in times[case])
        rows.append(
            judged(
                case, ours.median * 1e3, peer.median * 1e3, unit="ms", dtype="float32", unfit=unfit,
                shape=f"{tokens} x {heads}/{kv_heads} x 128, {size} ranks, forward and backward",
                note=f"peer: plain Ulysses; min..p80 {ours.spread('ms')} against {peer.spread('ms')} ms",
            )
        )  # fmt: skip
    return rows


def run() -> list[Row]:
    return [*(row for layer in LAYERS for ranks in RANKS for row in counted(layer, ranks)), *measured()]


if __name__ == "__main__":
    ranks.answer(rank)
