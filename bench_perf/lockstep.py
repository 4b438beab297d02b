"""Ranks that run programs of work and meetings, on a virtual clock: when they end, or why they never do.

A meeting is a collective of some ranks: all of them must come, with the same call, before any goes on. Calls on the
same ranks are matched by their number, as NCCL's are: a rank that comes with another call than the others is an error,
which in life is a hang or garbage. What comes out does not depend on who is faster: programs have no choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bernini.parallel.balance import Item, Placement


@dataclass(frozen=True)
class Work:
    seconds: float


@dataclass(frozen=True)
class Meet:
    """
    Args:
        ranks: who meets, rising.
        what: is compared.
    """

    ranks: tuple[int, ...]
    what: str


Program = Sequence[Work | Meet]


class Stuck(RuntimeError):
    """Ranks that wait for each other, or for one that has ended, or that came with different calls."""


def run(programs: Sequence[Program]) -> list[float]:
    """When every rank ends.

    Raises:
        Stuck: with the ranks and what each is in.
    """
    at, clock = [0] * len(programs), [0.0] * len(programs)
    waiting: dict[tuple[int, ...], dict[int, Meet]] = {}
    ready = list(range(len(programs)))
    while ready:
        rank = ready.pop()
        while at[rank] < len(programs[rank]):
            step = programs[rank][at[rank]]
            if isinstance(step, Work):
                clock[rank] += step.seconds
                at[rank] += 1
                continue
            come = waiting.setdefault(step.ranks, {})
            come[rank] = step
            if len(come) < len(step.ranks):
                break
            del waiting[step.ranks]
            if len({meet.what for meet in come.values()}) > 1:
                raise Stuck("; ".join(f"rank {one} is in {come[one].what}" for one in sorted(come)))
            end = max(clock[one] for one in come)
            for one in come:
                clock[one], at[one] = end, at[one] + 1
            ready += [one for one in come if one != rank]
    if waiting:
        raise Stuck(_circle({one: meet for come in waiting.values() for one, meet in come.items()}))
    return clock


def _circle(inside: dict[int, Meet]) -> str:
    """Follows who waits for whom until a rank comes twice or has ended."""
    path = [min(inside)]
    while True:
        here = inside[path[-1]]
        late = min(one for one in here.ranks if one not in inside or inside[one].ranks != here.ranks)
        if late not in inside:
            return f"rank {path[-1]} waits in {here.what} for rank {late}, which has ended"
        if late in path:
            circle = path[path.index(late) :]
            return "; ".join(f"rank {one} waits in {inside[one].what} of {inside[one].ranks}" for one in circle)
        path.append(late)


def programs(
    placement: Placement, items: Sequence[Item], ranks: int, *, layers: int = 1, overhead: float = 0.0,
    dummies: bool = True,
) -> list[list[Work | Meet]]:  # fmt: skip
    """What the ranks run. In every layer of a micro-batch all meet for its weights, and each rank takes its pieces in
    their order, those of groups between two meetings of the group. In the end all meet for the gradients.

    Args:
        layers: into so many parts every piece is cut in time.
        overhead: of a group, as a part of its load.
        dummies: a rank without pieces comes to the meetings of all. Without, it does not, which is wrong.
    """
    everyone = tuple(range(ranks))
    made: list[list[Work | Meet]] = [[] for _ in everyone]
    for micro, pieces in enumerate(placement.micros):
        here = [own for rank, own in enumerate(made) if dummies or placement.of(rank, micro)]
        for layer in range(layers):
            for own in here:
                own.append(Meet(everyone, f"micro-batch {micro}, weights of layer {layer}"))
            for item, first, size in pieces:
                group = tuple(range(first, first + size))
                part: list[Work | Meet] = [Work(items[item].load / layers)]
                if size > 1:
                    to = [Meet(group, f"item {item}, to {way}") for way in ("heads", "tokens")]
                    part = [to[0], Work(items[item].load / size * (1 + overhead) / layers), to[1]]
                for rank in group:
                    made[rank] += part
        for own in here:
            own.append(Meet(everyone, f"micro-batch {micro}, gradients"))
    return made
