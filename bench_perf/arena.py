"""Host memory that 10 000 steps of offloaded activations need, over the bytes that were ever offloaded at once.

Sizes are those of a 14B renderer with a 7B planner in bfloat16 on one of 8 ranks that share every sequence; lengths are
those of the workload mix, packed by the trainer's feed or one sample a step. A step takes its blocks in the order of
the layers and frees them backwards, each up to three places early or late, as transfers end. With two graphs in flight
(a generator and its critic, or a pipeline's schedule) the older one is freed while the newer one stays: the order in
which an arena falls to pieces.

Nothing is copied, and no memory stands behind the arenas here; the allocator is the real one. Peers are models of what
they do with sizes: ``power of two`` is torch's cache of page-locked memory, ``shape-keyed`` a pool with a list for
every size (Megatron's), ``flat buffers`` reuses its n-th buffer for the n-th tensor of a step and replaces it by a
larger one where needed. None of them gives anything back. All figures are the same on every machine.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from heapq import heappop, heappush
from typing import Protocol

from bernini.offload.arena import Arena, ArenaFull, Block, Stats

from . import batching, workload
from .harness import Row, judged

STEPS = 10_000
BAR = 1.05
RANKS = 8
SLAB = 64 << 20
FILL = 11  # samples for each packed step: more than a micro-batch has on average
EARLY = 3.0  # places by which a block is freed early or late
RENDERER, PLANNER = (40, 5120), (28, 3584)  # layers, width
GB = 1e9


@dataclass(frozen=True)
class Case:
    """A trace.

    Args:
        packed: micro-batches of 150 000 tokens, as the feed makes them; else a sample a step.
        graphs: in flight at once.
        kept: tensors offloaded of each renderer layer: its input, and the output of its attention.
    """

    name: str
    packed: bool
    graphs: int
    kept: int


CASES = (
    Case("packed, hidden", True, 1, 1),
    Case("packed, hidden, two graphs", True, 2, 1),
    Case("one sample, hidden+attention, two graphs", False, 2, 2),
)


def steps(case: Case, count: int) -> list[list[int]]:
    """Bytes of every offloaded tensor of every step, in the order of the forward."""
    samples = count * (FILL if case.packed else 1)
    lengths = _lengths(samples)
    batches = _batches(samples) if case.packed else [[number] for number in range(count)]
    if len(batches) < count:
        raise RuntimeError(f"{samples} samples made {len(batches)} batches, not {count}")
    out = []
    for batch in batches[:count]:
        renderer = sum(lengths[number].renderer for number in batch)
        planner = sum(lengths[number].planner for number in batch)
        out.append(_tensors(planner, *PLANNER, 1) + _tensors(renderer, *RENDERER, case.kept))
    return out


@cache
def _lengths(count: int) -> list[batching.Lengths]:
    return [batching.full_lengths(record) for record in workload.sample(count)]


@cache
def _batches(count: int) -> batching.Batches:
    return batching.packed(_lengths(count))


def _tensors(tokens: int, layers: int, width: int, kept: int) -> list[int]:
    return [-(-tokens // RANKS) * width * 2] * (layers * kept if tokens else 0)


Action = tuple[int, int | None]
"""A tensor's number, and its bytes if it is taken, None if it is freed."""


def trace(sizes: Iterable[Sequence[int]], graphs: int, seed: int = 0) -> Iterator[list[Action]]:
    """What happens in every step. Each tensor is taken once and freed once."""
    draw, flight, number = random.Random(seed), list[range](), 0
    for step in sizes:
        own = range(number, number + len(step))
        actions: list[Action] = list(zip(own, step, strict=True))
        number += len(step)
        flight.append(own)
        if len(flight) == graphs:
            actions += [(n, None) for n in _backwards(flight.pop(0), draw)]
        yield actions
    for rest in flight:
        yield [(n, None) for n in _backwards(rest, draw)]


def _backwards(numbers: range, draw: random.Random) -> list[int]:
    return sorted(numbers, key=lambda n: EARLY * draw.random() - n)


# --- who gives memory -----------------------------------------------------------------------------------------------


class Pool(Protocol):
    @property
    def held(self) -> int:
        """Bytes it has from the system."""
        ...

    def take(self, nbytes: int) -> object: ...

    def free(self, block: object) -> None: ...


class Ours:
    def __init__(self, limit: int) -> None:
        self.growths: list[int] = []
        self.arena = Arena(limit, slab_bytes=SLAB, register=lambda _, nbytes: self.growths.append(nbytes))

    @property
    def held(self) -> int:
        return self.arena.registered

    def take(self, nbytes: int) -> Block:
        return self.arena.take(nbytes)

    def free(self, block: object) -> None:
        assert isinstance(block, Block)
        block.free()


class Keyed:
    """A list of free buffers for every size, or for every power of two."""

    def __init__(self, rounded: bool) -> None:
        self.held, self._rounded = 0, rounded
        self._idle: dict[int, int] = defaultdict(int)

    def take(self, nbytes: int) -> int:
        size = 1 << (nbytes - 1).bit_length() if self._rounded else nbytes
        if self._idle[size]:
            self._idle[size] -= 1
        else:
            self.held += size
        return size

    def free(self, block: object) -> None:
        assert isinstance(block, int)
        self._idle[block] += 1


class Flat:
    """The first idle buffer in order, replaced by a larger one if it is too small."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._idle: list[int] = []

    @property
    def held(self) -> int:
        return sum(self.sizes)

    def take(self, nbytes: int) -> int:
        if not self._idle:
            self._idle.append(len(self.sizes))
            self.sizes.append(0)
        number = heappop(self._idle)
        self.sizes[number] = max(self.sizes[number], nbytes)
        return number

    def free(self, block: object) -> None:
        assert isinstance(block, int)
        heappush(self._idle, block)


@dataclass(frozen=True)
class Found:
    """Args:
    live: most bytes in use at once, as asked for.
    held: bytes that the pool had from the system at the end.
    late: times that the pool asked the system for memory after a tenth of the steps.
    refused: takes that found no room; the tensor then stays on the device.
    """

    live: int
    held: int
    late: int
    refused: int


def replay(pool: Pool, case: Case, sizes: Sequence[Sequence[int]]) -> Found:
    blocks: dict[int, tuple[object, int]] = {}
    live = peak = refused = 0
    late = 0
    for step, actions in enumerate(trace(sizes, case.graphs)):
        for number, nbytes in actions:
            if nbytes is not None:
                before = pool.held
                try:
                    blocks[number] = pool.take(nbytes), nbytes
                except ArenaFull:
                    refused += 1
                    continue
                late += step >= len(sizes) // 10 and pool.held > before
                live += nbytes
                peak = max(peak, live)
            elif number in blocks:
                block, nbytes = blocks.pop(number)
                live -= nbytes
                pool.free(block)
    return Found(peak, pool.held, late, refused)


def measure(case: Case, count: int = STEPS) -> list[Row]:
    sizes = steps(case, count)
    ours = Ours(1 << 42)
    found = replay(ours, case, sizes)
    stats: Stats = ours.arena.stats()
    shape = f"{count} steps, peak {found.live / GB:.1f} GB"
    ratio = found.held / found.live
    rows = [
        judged(
            f"arena, {case.name}: peak over live bytes", ratio, unit="x", shape=shape, dtype="bfloat16", bar=BAR,
            note=f"grown on demand, {stats.slabs} times, {found.late} of them after a tenth of the steps; blocks alone "
            f"reach {stats.peak_bytes / found.live:.4f}",
        )
    ]  # fmt: skip
    for name, peer in (("power of two", Keyed(True)), ("shape-keyed", Keyed(False)), ("flat buffers", Flat())):
        theirs = replay(peer, case, sizes)
        rows.append(
            judged(
                f"arena, {case.name}: memory held", found.held / GB, theirs.held / GB, unit="GB", shape=shape,
                dtype="bfloat16", note=f"peer: {name}, {theirs.held / theirs.live:.2f} x live; it asks the "
                f"system {theirs.late} times after a tenth of the steps",
            )
        )  # fmt: skip
    tight = Ours(int(BAR * found.live))
    tight.arena.warm_up(tight.arena.limit)
    warm = len(tight.growths)
    again = replay(tight, case, sizes)
    note = f"limit {BAR} x the longest step, known from the lengths and registered before the first step"
    return [
        *rows,
        judged(
            f"arena, {case.name}: registrations after warm-up", len(tight.growths) - warm, unit="calls", shape=shape,
            bar=0, note=note,
        ),
        judged(
            f"arena, {case.name}: blocks that fragmentation refused", again.refused, unit="blocks", shape=shape, bar=0,
            note=f"of {stats.takes}; {note}",
        ),
    ]  # fmt: skip


def run() -> list[Row]:
    return [row for case in CASES for row in measure(case)]
