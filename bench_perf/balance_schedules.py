"""Placements of windows made to be difficult, as schedules of collectives: none stands still, and broken ones do."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from bernini.parallel.balance import Item, Placement, place

from .harness import Row, judged
from .lockstep import Program, Stuck, programs
from .lockstep import run as simulate

FREE = 10**9
"""A cap that binds nothing."""


def adversarial(n: int, seed: int = 0) -> Iterator[tuple[Placement, list[Item], int]]:
    """Placements of windows made to be difficult: one giant, many of them, all alike, nothing to do, caps that just
    fit, ranks that are no power of two."""
    draw = random.Random(seed)
    made = 0
    while made < n:
        ranks, micros = draw.choice([1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24]), draw.randint(1, 3)
        count = draw.choice([0, 1, ranks - 1, ranks, draw.randint(1, 4 * ranks)])
        kinds: list[Callable[[], float]] = [
            lambda: draw.lognormvariate(0, 2), lambda: 1.0, lambda: draw.choice([1e-3, 100.0]), lambda: 0.0,
            lambda: 2.0 ** draw.randint(0, 8),
        ]  # fmt: skip
        kind = draw.choice(kinds)
        window = []
        for _ in range(count):
            load = kind()
            window.append(Item(draw.choice([round(4096 * load), draw.randint(0, 60_000)]), load))
        room = max(1, sum(item.tokens for item in window) // (ranks * micros))
        cap = draw.choice([FREE, 4 * room, round(1.3 * room)])
        largest = draw.choice([None, 2, 4])
        try:
            got = place(window, ranks, cap_tokens=cap, micros=micros, largest=largest, least=draw.choice([0, 4096]))
        except ValueError:
            continue
        made += 1
        yield got, window, ranks


def each_its_own(placement: Placement, items: Sequence[Item], ranks: int) -> list[Program]:
    """Broken: odd ranks take their pieces the other way round."""
    back = replace(placement, micros=tuple(pieces[::-1] for pieces in placement.micros))
    there, other = programs(placement, items, ranks), programs(back, items, ranks)
    return [(other if rank % 2 else there)[rank] for rank in range(ranks)]


def stands_still(programs_: Sequence[Program]) -> bool:
    try:
        simulate(programs_)
    except Stuck:
        return True
    return False


def schedule_rows(n: int = 10_000) -> list[Row]:
    stuck = late = groups = turned = idle = missed = 0
    for got, window, ranks in adversarial(n):
        try:
            end = max(simulate(programs(got, window, ranks, layers=2)))
            late += end > got.seconds * (1 + 1e-9)
        except Stuck:
            stuck += 1
        groups += any(piece.size > 1 for pieces in got.micros for piece in pieces)
        turned += stands_still(each_its_own(got, window, ranks))
        if any(0 < sum(bool(got.of(rank, micro)) for rank in range(ranks)) < ranks for micro in range(len(got.micros))):
            idle += 1
            missed += stands_still(programs(got, window, ranks, dummies=False))
    shape = f"{n} adversarial placements"
    return [
        judged(
            "balance, schedules that stand still", stuck, unit="of them", bar=0, shape=shape,
            note=f"{groups} have groups; {late} end later than they were placed to: no group waits for a late rank",
        ),
        judged(
            "balance, broken schedules that are found", turned, unit="of them", shape=shape, bar=1,
            higher_is_better=True, note="odd ranks take pieces the other way round: wrong where groups overlap",
        ),
        judged(
            "balance, schedules without dummies that are found", 100 * missed / idle, unit="%", bar=100.0, shape=shape,
            higher_is_better=True, note=f"{idle} have ranks without work in a micro-batch; they do not come",
        ),
    ]  # fmt: skip
