"""The longest sequence that fits, and the settings that make one fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..training.dimensions import Dimensions
from .ledger import Part
from .rates import Rates, Seconds, seconds
from .saved import Policy
from .step import Need, Settings


def longest(measure: Callable[[int], Sequence[int]], limit: int, *, first: int, least: int, most: int) -> int | None:
    """The largest number of units, from ``least`` to ``most``, all of whose parts take at most ``limit`` bytes.

    What a part takes grows with the units, nearly along a line: two sizes tell where it will meet the limit, and the
    answer is measured, as is the next larger one, which does not fit.

    Args:
        measure: bytes of every part of the work at so many units, always as many parts.
        first: where to begin.

    Returns:
        ``None`` where not even ``least`` fits.
    """
    known: dict[int, Sequence[int]] = {}
    low, high = least - 1, most + 1
    guess = min(max(first, least), most)
    while high - low > 1:
        known[guess] = measure(guess)
        if max(known[guess]) <= limit:
            low = guess
        else:
            high = guess
        if len(known) == 1:
            guess = min(max(2 * guess, guess + 1), most) if low == guess else max(guess // 2, least)
        else:
            guess = _meets(known, limit)
        guess = min(max(guess, low + 1), high - 1)
    return None if low < least else low


def _meets(known: dict[int, Sequence[int]], limit: int) -> int:
    """Where the first of the parts meets the limit, on the lines through the two sizes that are nearest to it."""
    one, other = sorted(sorted(known, key=lambda units: abs(max(known[units]) - limit))[:2])
    found = float("inf")
    for a, b in zip(known[one], known[other], strict=True):
        if b > a:
            found = min(found, one + (limit - a) * (other - one) / (b - a))
    return int(min(found, 1 << 40))


@dataclass(frozen=True)
class Way:
    """Settings, and what a step takes with them.

    Args:
        counted: whether the tracker has run with these very settings; otherwise the average or the moments were moved
            to the host by arithmetic.
    """

    settings: Settings
    need: Need
    seconds: Seconds
    counted: bool = True

    def fits(self, device: int, host: int | None) -> bool:
        return self.need.most.total <= device and (host is None or self.need.host <= host)


_KEPT: Sequence[tuple[bool, Policy]] = (
    (False, "none"), (False, "all"), (True, "none"), (True, "hidden+attention"), (True, "hidden"),
)  # fmt: skip
_STATES = ((True, True), (False, True), (False, False))


def ways(sizes: Dimensions, settings: Settings, measure: Callable[[Settings], Need], rates: Rates) -> Iterator[Way]:
    """All ways to keep activations and states, one after the other: whatever moves the least first.

    Args:
        settings: ranks, and what is not searched for.
        measure: tracks a step.
    """
    spread = replace(settings, fsdp="blocks" if settings.world > 1 else "none", packer=True)
    for recompute, offload in _KEPT:
        own = replace(spread, recompute=recompute, offload=offload, average=True, optimizer=True)
        need = measure(own)
        for average, optimizer in _STATES:
            there = replace(own, average=average, optimizer=optimizer)
            moved = moved_states(need, average=average, optimizer=optimizer)
            yield Way(there, moved, seconds(sizes, there, moved, rates), counted=average and optimizer)


def search(
    sizes: Dimensions, settings: Settings, measure: Callable[[Settings], Need], rates: Rates, device: int,
    host: int | None = None,
) -> tuple[list[Way], Way | None]:  # fmt: skip
    """All ways, and of those that fit the one with the shortest step by the stated rates; that one is tracked itself.

    Args:
        device, host: bytes that there are for a rank; ``None`` for as many as it takes.
    """
    tried = list(ways(sizes, settings, measure, rates))
    for way in sorted(tried, key=lambda way: way.seconds.total):
        if way.fits(device, host):
            if not way.counted:
                need = measure(way.settings)
                way = Way(way.settings, need, seconds(sizes, way.settings, need, rates))
            if way.fits(device, host):
                return tried, way
    return tried, None


def moved_states(need: Need, *, average: bool, optimizer: bool) -> Need:
    """The same step with the average or the moments on the host."""
    start = need.parts[0].bytes
    away = {"average": 0 if average else start["average"], "optimizer": 0 if optimizer else start["optimizer"]}
    parts = [
        Part(part.name, {kind: count - away.get(kind, 0) for kind, count in part.bytes.items()},
             part.host + sum(away.values()))
        for part in need.parts
    ]  # fmt: skip
    return replace(need, parts=tuple(parts))
