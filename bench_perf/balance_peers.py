"""How others balance, written from descriptions (facts on systems, section 4.1): for comparison alone.

All take the project's own loads where they take any, so what differs is the method and not the cost model. None of
their code is used.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from itertools import count

from bernini.parallel.balance import Item

Spans = list[list[float]]
"""Loads of micro-batches and their ranks."""


def seconds(spans: Spans) -> float:
    """A micro-batch ends with its last rank."""
    return math.fsum(map(max, spans))


def at_once(spans: Spans) -> float:
    """If ranks met only at the end of the window."""
    return max(map(math.fsum, zip(*spans, strict=True)))


def token_budget(items: Sequence[Item], ranks: int, cap: int, buffer: int = 200) -> Spans:
    """VeOmni's dynamic batches: every rank for itself has a buffer of its own samples and packs, in the order in which
    they came, what fits a budget of tokens. Ranks take a micro-batch together; who is done has none."""
    own = [_packs(items[rank::ranks], cap, buffer) for rank in range(ranks)]
    spans: Spans = []
    while True:
        loads = [next(packs, None) for packs in own]
        if all(load is None for load in loads):
            return spans
        spans.append([load or 0.0 for load in loads])


def _packs(items: Sequence[Item], cap: int, buffer: int) -> Iterator[float]:
    coming, held = iter(items), list[Item]()
    while True:
        while len(held) < buffer and (item := next(coming, None)) is not None:
            held.append(item)
        if not held:
            return
        used, load, left = 0, 0.0, list[Item]()
        for item in held:
            if used == 0 or used + item.tokens <= cap:
                used, load = used + item.tokens, load + item.load
            else:
                left.append(item)
        held = left
        yield load


def karmarkar_karp(items: Sequence[Item], ranks: int, cap: int, *, equal: bool = False) -> Spans:
    """verl's: largest differencing of loads over ranks; then each rank's own over as many micro-batches as the rank
    with the most tokens needs.

    Args:
        equal: the same number of samples for every rank, as verl does for its batches.
    """
    parts = differencing([item.load for item in items], ranks, equal=equal)
    own = [[items[number] for number in part] for part in parts]
    micros = max(_least_micros(part, cap) for part in own)
    split = [_micros(part, micros) for part in own]
    # Of every rank the heaviest first: which micro-batches meet is free, and this is best.
    ranked = [sorted((math.fsum(item.load for item in part) for part in rank), reverse=True) for rank in split]
    return [list(column) for column in zip(*ranked, strict=True)]


def _least_micros(items: Sequence[Item], cap: int) -> int:
    for micros in count(max(1, -(-sum(item.tokens for item in items) // cap))):
        if micros >= len(items) or max(sum(item.tokens for item in part) for part in _micros(items, micros)) <= cap:
            return micros
    raise AssertionError


def _micros(items: Sequence[Item], micros: int) -> list[list[Item]]:
    parts = differencing([item.load for item in items], micros)
    return [[items[number] for number in part] for part in parts]


def differencing(loads: Sequence[float], parts: int, *, equal: bool = False) -> list[list[int]]:
    """Karmarkar and Karp's: the two partial solutions with the largest spread are joined, full sets with empty ones."""
    ties = count()
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = []

    def push(sets: list[tuple[float, list[int]]]) -> None:
        sets.sort(key=lambda one: -one[0])
        heapq.heappush(heap, (sets[-1][0] - sets[0][0], next(ties), sets))

    order = sorted(range(len(loads)), key=lambda number: -loads[number])
    step = parts if equal else 1
    for start in range(0, len(order), step):
        some = [(loads[number], [number]) for number in order[start : start + step]]
        push([*some, *((0.0, list[int]()) for _ in range(parts - len(some)))])
    while len(heap) > 1:
        one, other = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        push([(a + b, [*x, *y]) for (a, x), (b, y) in zip(one, reversed(other), strict=True)])
    return [numbers for _, numbers in heap[0][2]] if heap else [[] for _ in range(parts)]


def bags(
    items: Sequence[Item], ranks: int, cap: int, topology: Sequence[int], overhead: float = 0.0
) -> Spans | None:  # fmt: skip
    """KnapFormer's: ranks are cut into bags of fixed sizes, a rank in one bag alone. The longest first, every sample
    goes to the bag that is relatively emptiest of those that have room, and all ranks of a bag share it. ``None`` if
    the cap does not hold; micro-batches are the least that it holds with.

    Args:
        topology: ranks of every bag; their sum is ``ranks``.
    """
    assert sum(topology) == ranks
    total = sum(item.tokens for item in items)
    for micros in range(max(1, -(-total // (cap * ranks))), len(items) + 1):
        spans = _bags(items, cap, topology, micros, overhead)
        if spans is not None:
            return spans
    return None


def _bags(items: Sequence[Item], cap: int, topology: Sequence[int], micros: int, overhead: float) -> Spans | None:
    sizes = [size for _ in range(micros) for size in topology]
    loads, tokens = [0.0] * len(sizes), [0.0] * len(sizes)
    for item in sorted(items, key=lambda one: -one.tokens):
        room = [at for at, size in enumerate(sizes) if tokens[at] + item.tokens / size <= cap]
        if not room:
            return None
        at = min(room, key=lambda bag: (loads[bag] + item.load / sizes[bag], bag))
        loads[at] += item.load / sizes[at] * (1 + overhead * (sizes[at] > 1))
        tokens[at] += item.tokens / sizes[at]
    every = [load for load, size in zip(loads, sizes, strict=True) for _ in range(size)]
    wide = sum(topology)
    return [every[micro * wide : (micro + 1) * wide] for micro in range(micros)]
