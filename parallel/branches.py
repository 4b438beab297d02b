"""Which ranks compute which branches of guided sampling.

A step evaluates the model on two to five branches that differ in length (those without the sources are two to three
times shorter), and any of them may go to any ranks:

    together         all ranks share every branch, one after another; what is too short to be cut, each computes whole
    side by side     ranks are divided into groups of neighbours, each with branches of its own
    one after another    a group has several branches; it may be divided for some of them and not for others

A *placement* is a nesting of the two, and the search for the one that takes least by the model below is exact among
all nestings. Then every rank computes what is its own, and predictions, which are as small as the target's latent, go
to all ranks in one exchange (:func:`spread`), so that each takes the same step.

**Model.** A branch of n tokens under L text tokens, in each of ``layers`` layers of width N and feed-forward F, on s
ranks (t = ceil(n / s) tokens each, U bands of heads, see :class:`bernini.parallel.plan.Heads`):

    compute   t (12 N^2 + 4 N F + 4 L N) + 4 t n N operations, and a time that no size makes shorter
    exchange  two, where s > 1; a rank sends t N (2 (U - 1) + 2 (s - 1)) / U values in both
    spread    each of a branch's target rows goes to the P - 1 others, once a step

Sending more than receiving is what takes time in the spread: a rank that computes much sends much, while all receive
the same. Rates are stated, not measured (:data:`MACHINES`).

Source: facts on systems, section 1 (branches of Bernini's guidance; others place them in turn); paper eq. 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import NamedTuple

from torch import Tensor

from .group import Group, Message
from .plan import Cut, Heads

MOST = 16
"""Ranks, or blocks of ranks where there are more, that are told apart."""
GAIN = 0.02
"""Of the time, that branches apart have to save: they take more memory than a sequence that all ranks share."""


class Machine(NamedTuple):
    """Rates of a rank.

    Args:
        flops: operations per second.
        link: bytes per second that it sends.
        latency: seconds of an exchange, however small.
        layer: seconds of a layer, however few its tokens: launches and calls.
    """

    flops: float
    link: float
    latency: float
    layer: float


MACHINES: dict[str, Machine] = {
    "cuda": Machine(flops=4e14, link=2e11, latency=1e-5, layer=1e-4),
    "cpu": Machine(flops=5e10, link=1e9, latency=3e-4, layer=3e-4),
}
"""Assumed: a GPU of 2023 in bfloat16 behind NVLink; a core with gloo on one machine."""


class Model(NamedTuple):
    """What a transformer's time depends on: layers, width, width of the feed-forward, heads, bytes of a value."""

    layers: int
    width: int
    hidden: int
    heads: int
    itemsize: int


class Work(NamedTuple):
    """A branch: tokens of its packed sequence, of its text, and bytes of its prediction."""

    tokens: int
    text: int
    bytes: int


class Piece(NamedTuple):
    """A branch, by its number, and the ranks that compute it together."""

    branch: int
    ranks: range


@dataclass(frozen=True)
class Placement:
    """
    Args:
        pieces: in an order that every rank keeps; ranks without a part in one leave it out.
        ranks: how many there are.
        seconds: of a step, by the model.
        together: of a step in which all ranks share every branch.
    """

    pieces: tuple[Piece, ...]
    ranks: int
    seconds: float = 0.0
    together: float = 0.0

    @property
    def apart(self) -> bool:
        """Whether branches are on different ranks."""
        return any(len(piece.ranks) < self.ranks for piece in self.pieces)

    @property
    def groups(self) -> list[range]:
        """The groups of ranks that are needed beside that of all, in a fixed order."""
        found = {piece.ranks for piece in self.pieces if 1 < len(piece.ranks) < self.ranks}
        return sorted(found, key=lambda ranks: (ranks.start, ranks.stop))

    def describe(self) -> str:
        """In words."""
        if not self.apart:
            return f"all {self.ranks} ranks share every branch of guidance"
        said = ", ".join(f"{piece.branch + 1} on {_named(piece.ranks)}" for piece in sorted(self.pieces))
        return f"branches of guidance: {said}; a step takes {self.seconds / self.together:.0%} of all together (model)"


def _named(ranks: range) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"


# --- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """What branches take, by the model above.

    Args:
        works: the branches.
        ranks: how many there are in all.
        least: tokens from which on a sequence is cut; shorter ones are on one rank, or whole on each.
        cap: tokens that a rank may have of a branch, unless all ranks share it.
    """

    works: tuple[Work, ...]
    ranks: int
    model: Model
    machine: Machine
    least: int = 0
    cap: float = inf

    def cuts(self, branch: int) -> bool:
        """Whether the branch may be cut."""
        return self.ranks > 1 and self.works[branch].tokens >= self.least

    def compute(self, branch: int, size: int) -> float:
        """Seconds of one of ``size`` ranks with a branch that is cut for them, without the spread."""
        work, model, machine = self.works[branch], self.model, self.machine
        own = -(-work.tokens // size)
        linear = own * (12 * model.width**2 + 4 * model.width * (model.hidden + work.text))
        layer = machine.layer + (linear + 4 * own * work.tokens * model.width) / machine.flops
        if size > 1:
            bands = Heads.shared(model.heads, model.heads, size).ulysses
            values = own * model.width * (2 * (bands - 1) + 2 * (size - 1)) / bands
            layer += 2 * machine.latency + values * model.itemsize / machine.link
        return model.layers * layer

    def seconds(self, branch: int, size: int) -> float:
        """The same with the spread; infinite where ``size`` ranks may not have it."""
        alone = size == 1 or self.cuts(branch)
        if not alone or (size < self.ranks and -(-self.works[branch].tokens // size) > self.cap):
            return inf
        return self.compute(branch, size) + self.works[branch].bytes / size * (self.ranks - 1) / self.machine.link

    @property
    def together(self) -> float:
        """Of a step in which all ranks share every branch that is cut, and each computes the others whole."""
        shared = [self.cuts(branch) for branch in range(len(self.works))]
        took = (self.seconds(b, self.ranks) if cut else self.compute(b, 1) for b, cut in enumerate(shared))
        return sum(took) + self.machine.latency * any(shared)

    def step(self, pieces: Sequence[Piece]) -> float:
        """Of a step with branches in these places: until the last rank has its part done and told.

        The ranks of a piece begin it together; nobody else waits.
        """
        free = [0.0] * self.ranks
        for branch, ranks in pieces:
            end = max(free[rank] for rank in ranks) + self.seconds(branch, len(ranks))
            for rank in ranks:
                free[rank] = end
        return max(free) + self.machine.latency * (self.ranks > 1)


# --- placing ----------------------------------------------------------------------------------------------------------


def together(branches: int, ranks: int) -> Placement:
    """All ranks have all branches."""
    return Placement(tuple(Piece(branch, range(ranks)) for branch in range(branches)), ranks)


def in_turn(branches: int, ranks: int) -> tuple[Piece, ...]:
    """Branch i on rank i mod P, as others place them."""
    return tuple(Piece(branch, range(branch % ranks, branch % ranks + 1)) for branch in range(branches))


def place(costs: Costs) -> Placement:
    """The nesting that takes least; all together unless that saves :data:`GAIN` of it. Equal for equal arguments.

    More than :data:`MOST` ranks are placed in blocks of as few as divide them.
    """
    count, ranks, common = len(costs.works), costs.ranks, costs.together
    if count and ranks > 1:
        block = next(size for size in range(1, ranks + 1) if ranks % size == 0 and ranks // size <= MOST)
        pieces = _nested(costs, block)
        seconds = costs.step(pieces) if len(pieces) == count else inf  # nothing where all is beyond the cap
        if seconds < (1 - GAIN) * common:
            return Placement(pieces, ranks, seconds, common)
    return Placement(together(count, ranks).pieces, ranks, common, common)


def _nested(costs: Costs, block: int) -> tuple[Piece, ...]:
    """The best nesting. A set of branches on so many ranks is one branch, two sets in turn, or two side by side."""
    # A branch too short to be cut is whole on one rank of a block.
    sizes = sorted({1, *range(block, costs.ranks + 1, block)})
    single = [[costs.seconds(branch, size) for size in sizes] for branch in range(len(costs.works))]

    @cache
    def best(some: int, ranks: int) -> tuple[float, tuple[Piece, ...]]:
        """Of the branches whose bits are in ``some``, on blocks from 0 on."""
        if some & (some - 1) == 0:
            branch = some.bit_length() - 1
            fitting = [(took, size) for took, size in zip(single[branch], sizes, strict=True) if size <= ranks * block]
            seconds, size = min(fitting)
            return seconds, (Piece(branch, range(size)),)
        found: tuple[float, tuple[Piece, ...]] = inf, ()
        low, part = some & -some, some
        while part := (part - 1) & some:  # every other set of some of them
            rest = some ^ part
            if part & low:
                one, other = best(part, ranks), best(rest, ranks)
                if one[0] + other[0] < found[0]:
                    found = one[0] + other[0], one[1] + other[1]
            for first in range(1, ranks // 2 + 1):  # the smaller group first, with either set
                left, right = best(part, first), best(rest, ranks - first)
                if max(left[0], right[0]) < found[0]:
                    found = max(left[0], right[0]), left[1] + _moved(right[1], first * block)
        return found

    return best((1 << len(costs.works)) - 1, costs.ranks // block)[1]


def _moved(pieces: Sequence[Piece], by: int) -> tuple[Piece, ...]:
    return tuple(Piece(branch, range(ranks.start + by, ranks.stop + by)) for branch, ranks in pieces)


# --- what is done with it ---------------------------------------------------------------------------------------------


def owned(ranks: range, targets: Cut, of: int) -> Cut:
    """Which of all ranks has which rows of a branch's prediction.

    Args:
        ranks: those that compute it.
        targets: how the rows are cut among these.
        of: how many ranks there are in all.
    """
    return Cut((*[0] * ranks.start, *targets.borders, *[targets.rows] * (of - ranks.stop)))


def spread(group: Group, cuts: Sequence[Cut | None], parts: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """Predictions of all branches on every rank, ``[rows, ...]`` each, by one exchange.

    Args:
        cuts: which rank has which rows of each branch; ``None`` where every rank has computed all of them.
        parts: this rank's rows ``[own rows, ...]``; ``None`` where it has none.
        like: a tensor ``[any, ...]`` of the predictions' dtype and width.
    """
    own, sends, receives = group.rank, list[Message](), list[Message]()
    found = []
    for cut, part in zip(cuts, parts, strict=True):
        if cut is None:
            assert part is not None
            found.append(part)
            continue
        whole = like.new_empty((cut.rows, *like.shape[1:]))
        places = whole.split(list(cut.sizes))
        if part is not None:
            places[own].copy_(part)
        for rank in range(group.size):
            if rank != own:
                sends.append(Message(rank, places[own]))
                receives.append(Message(rank, places[rank]))
        found.append(whole)
    if any(cut is not None for cut in cuts):
        group.exchange(sends, receives)
    return found
