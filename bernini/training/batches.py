"""Which examples a step has, and which of them this rank computes.

    the draws of a window of steps -> dealt out to the steps, as much work to each   follows from the recipe alone
    the examples of a step         -> given to ranks and micro-batches               follows from the ranks as well

Only the first decides what is learned, so a run has the same steps on any number of processes; the second decides in
which order numbers are added up. A window of one step has its examples as they were drawn. Without ``batch.balance``
ranks take turns: example i of a micro-batch belongs to data rank ``i % size``.

A step with n of the N examples of K steps weighs its mean by n K / N: so the gradients of the window's steps, at the
same weights, have for their mean the gradient of the plain mean over all its examples. Each loss has its own n and N.

Source: paper section 5 (token buckets with loss weights for each); facts on systems, section 4.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

import torch

from ..data.example import Example, Skip
from ..parallel.balance import LEAST, Item, Placement, place
from ..parallel.group import Group
from ..parallel.mesh import Mesh
from ..parallel.policy import Policy
from ..parallel.share import Share
from ..parallel.workload import Sizes, Workload
from .draws import generator
from .feed import Feed
from .recipe import Recipe
from .work import NOTHING, Estimate, Load

T = TypeVar("T")
Kind = Callable[[Example], bool]
"""Examples of a kind go through the same parts of the models."""
Ranks = tuple[int, int]
"""(first, size)."""

GAIN = 0.05
"""Of the time of a step, that examples cut have to save: ranks that share one exchange its tokens in every layer."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """An example, and the step that it was drawn for: its noise, masks and drops follow from that, wherever it is
    computed."""

    example: Example
    step: int


@dataclass(frozen=True)
class Portion:
    """A micro-batch, and what of it this rank computes.

    Args:
        examples: of all ranks.
        own: those of this rank; behind the first ``real`` come dummies, of which no loss is taken.
        skipped: what came up in the draws and could not be used; of all ranks.
        weights: of the losses by name: what the mean over this step's examples counts among the steps of its window.
        share: the ranks that compute these examples together, where they are more than a sequence group.
        load: of the rank that has most.
    """

    examples: tuple[Drawn, ...]
    own: tuple[Drawn, ...]
    real: int
    skipped: tuple[Skip, ...]
    weights: Mapping[str, float] = field(default_factory=dict)
    share: Share | None = None
    load: Load = NOTHING


@dataclass(frozen=True)
class _Placed:
    """A micro-batch of a step, by numbers of the step's examples: everybody's, this rank's, and over how many ranks
    these are cut."""

    everybody: tuple[int, ...]
    own: tuple[int, ...]
    ranks: int
    load: Load


class Batches:
    """
    Args:
        feed: what draws examples.
        kinds: which parts of the models are run depends on which of these there are, and on nothing else.
        counts: of examples, by loss, over how many of them it is a mean.
        sizes: of an example, which it is as much work as.
        workload: what sizes take, before anything is measured.
        splits: whether several ranks can compute an example together.
        distinct: whether of the same example twice in a draw the second is left out.
    """

    def __init__(
        self,
        recipe: Recipe,
        feed: Feed,
        mesh: Mesh,
        *,
        kinds: Sequence[Kind],
        counts: Callable[[Sequence[Example]], Mapping[str, float]],
        sizes: Callable[[Example], Sizes],
        workload: Workload,
        splits: bool = True,
        distinct: bool = False,
    ) -> None:
        self.feed, self.estimate, self.least = feed, Estimate(workload, recipe.batch.fit), LEAST
        self._recipe, self._batch, self._mesh = recipe, recipe.batch, mesh
        self._kinds, self._counts, self._sizes = tuple(kinds), counts, sizes
        most = min(recipe.batch.split, mesh.data.size) if splits else 1
        self._largest, self._distinct = 1 << (most.bit_length() - 1), distinct
        self._teams: dict[int, Group] = {}
        self._policy = Policy(recipe.swap)
        self._known: WeakKeyDictionary[Drawn, tuple[int, Sizes]] = WeakKeyDictionary()
        self._draws = _Lately(self._draw, keep=2 * self._batch.window)
        self._windows = _Lately(self._deal, keep=2)
        self._plans = _Lately(self._plan, keep=2)

    def meet(self) -> None:
        """Makes the groups of ranks that compute large examples together. All processes do this once, at first."""
        span, ranks = self._mesh.sequence.size, self._mesh.data.size
        sizes = [2**power for power in range(1, self._largest.bit_length())]
        ranges = [
            range(first * span, (first + size) * span) for size in sizes for first in range(0, ranks - size + 1, size)
        ]
        for at, group in zip(ranges, self._mesh.world.parts(ranges) if ranges else (), strict=True):
            if group is not None:
                self._teams[len(at) // span] = group

    def count(self, step: int) -> int:
        """Micro-batches of a step."""
        return len(self._plans(step)) if self._batch.balance else self._batch.accumulate

    def portion(self, step: int, number: int) -> Portion:
        """The micro-batch of that number.

        Raises:
            UserError: an example alone passes a budget, or nothing usable comes.
        """
        if not self._batch.balance:
            return self._in_turn(step, number)
        placed, members = self._plans(step)[number], self.members(step)
        own = [members[index] for index in placed.own]
        skipped = tuple(skip for part in self._draws(step) for skip in part[1]) if number == 0 else ()
        share = Share(self._teams[placed.ranks], least=1, policy=self._policy) if placed.ranks > 1 else None
        everybody = tuple(members[index] for index in placed.everybody)
        return Portion(
            everybody, self._completed(own, everybody), len(own), skipped, self.weights(step), share, placed.load
        )

    # --- what follows from the recipe alone ---

    def members(self, step: int) -> tuple[Drawn, ...]:
        """A balanced step's examples, in the order in which they were drawn: the same for any ranks."""
        first = step - step % self._batch.window
        members = self._windows(first)[step - first]
        ahead = step + self._batch.window
        if self._batch.window > 1 and ahead < self._recipe.steps:
            self._draws(ahead)  # a step's draws at a time, so that none has to wait for those of a whole window
        return members

    def weights(self, step: int) -> dict[str, float]:
        """Of a balanced step's losses."""
        first = step - step % self._batch.window
        window = self._windows(first)
        counts = [self._counts([drawn.example for drawn in part]) for part in window]
        own = counts[step - first]
        return {name: n * len(window) / sum(other.get(name, 0.0) for other in counts) for name, n in own.items() if n}

    def _draw(self, step: int) -> list[tuple[tuple[Drawn, ...], tuple[Skip, ...]]]:
        """(examples, skipped) of each draw of a step."""
        return [self._drawn(step, number) for number in range(self._batch.accumulate)]

    def _drawn(self, step: int, number: int) -> tuple[tuple[Drawn, ...], tuple[Skip, ...]]:
        picked = self.feed.pick(step, number)
        examples: Iterable[Example] = picked.examples
        if self._distinct:
            examples = {example.key: example for example in examples}.values()
        return tuple(Drawn(example, step) for example in examples), tuple(picked.skipped)

    def _deal(self, first: int) -> list[tuple[Drawn, ...]]:
        """The examples of each step of a window."""
        steps = range(first, max(first + 1, min(first + self._batch.window, self._recipe.steps)))
        drawn = [[one for part in self._draws(step) for one in part[0]] for step in steps]
        if len(steps) == 1:
            return [tuple(drawn[0])]
        together = [one for part in drawn for one in part]
        # By the estimate that does not change: what a step has must not depend on times.
        items = [self._item(one, self.estimate.first) for one in together]
        placement = place(items, len(steps), cap_tokens=1 + sum(item.tokens for item in items), largest=1)
        dealt: list[list[int]] = [[] for _ in steps]
        for piece in placement.micros[0]:
            dealt[piece.first].append(piece.item)
        if not all(dealt):
            return [tuple(part) for part in drawn]
        # The largest are placed first: their steps should not always be the first.
        order = torch.randperm(len(steps), generator=generator(self._recipe.seed, "window", first)).tolist()
        return [tuple(together[index] for index in sorted(dealt[at])) for at in order]

    # --- what follows from the ranks as well ---

    def _plan(self, step: int) -> list[_Placed]:
        """The micro-batches of a balanced step."""
        members, workload = self.members(step), self.estimate.at(step)
        items = [self._item(one, workload) for one in members]
        placement = self._placed(items)
        found = []
        for pieces in placement.micros:
            if not pieces:
                continue
            group_of = _groups([(piece.first, piece.size) for piece in pieces], self._mesh.data.size)
            held: dict[Ranks, list[int]] = {group: [] for group in group_of}
            for piece in pieces:
                held[group_of[piece.first]].append(piece.item)
            loads = [
                Load(tuple(self._measured(members[item])[1] for item in held_), (group[1],) * len(held_))
                for group, held_ in held.items()
            ]
            mine = group_of[self._mesh.data.rank]
            # The longest first: of ranks with several, neighbours have about the same lengths at the same time.
            own = sorted(held[mine], key=lambda index: (-items[index].tokens, index))
            most = max(loads, key=lambda load: workload.predict(*load))
            everybody = sorted(piece.item for piece in pieces)
            found.append(_Placed(tuple(everybody), tuple(own), mine[1], most))
        return found

    def _placed(self, items: Sequence[Item]) -> Placement:
        ranks, cap, micros = self._mesh.data.size, self._cap, self._batch.accumulate
        while True:
            try:
                whole = place(items, ranks, cap_tokens=cap, micros=micros, largest=1)
                break
            except ValueError:  # too many tokens for so few; those that fit alone fit one by one
                if micros >= self._batch.accumulate + len(items):
                    raise
                micros += 1
        if self._largest == 1:
            return whole
        cut = place(items, ranks, cap_tokens=cap, micros=micros, largest=self._largest, least=self.least)
        return cut if cut.seconds < (1 - GAIN) * whole.seconds else whole

    @property
    def _cap(self) -> int:
        return max(self._batch.renderer_tokens, self._batch.planner_tokens)

    def _measured(self, drawn: Drawn) -> tuple[int, Sizes]:
        """(tokens, sizes). Tokens are those of the larger budget; of two models, of that which is nearer to its own."""
        if drawn not in self._known:
            budgets, costs = (self._batch.renderer_tokens, self._batch.planner_tokens), self.feed.cost(drawn.example)
            tokens = max(-(-need * self._cap // budget) for need, budget in zip(costs, budgets, strict=True))
            self._known[drawn] = tokens, self._sizes(drawn.example)
        return self._known[drawn]

    def _item(self, drawn: Drawn, workload: Workload) -> Item:
        tokens, sizes = self._measured(drawn)
        return Item(tokens, workload.seconds(sizes))

    def _in_turn(self, step: int, number: int) -> Portion:
        drawn, skipped = self._drawn(step, number)
        own = list(drawn[self._mesh.data.rank :: self._mesh.data.size])
        return Portion(drawn, self._completed(own, drawn), len(own), skipped)

    def _completed(self, own: Sequence[Drawn], everybody: Sequence[Drawn]) -> tuple[Drawn, ...]:
        """A rank's examples with dummies behind them.

        All ranks have to run the same parts of the models, since these are gathered from all of them. So where a rank
        lacks a kind that the micro-batch has, the least work of that kind is put behind its own: it is computed, but no
        loss is taken of it, so its gradient is exactly zero.
        """
        found = list(own)
        for kind in (*self._kinds, _any):
            there = [one for one in everybody if kind(one.example)]
            if there and not any(kind(one.example) for one in own):
                found.append(min(there, key=lambda one: self.estimate.first.seconds(self._sizes(one.example))))
        return tuple(found)


def _any(example: Example) -> bool:
    return True


def _groups(ranges: Iterable[Ranks], ranks: int) -> list[Ranks]:
    """Of each rank the group that it computes with.

    What is given to a part of a group is computed by all of it, in one packed sequence with the rest. That is cut
    evenly, so none of a group has more than the most that one of its ranks was given.

    Args:
        ranges: of pieces; of two one is inside of the other, or they have nothing in common.
    """
    found: list[Ranks] = []
    for first, size in sorted({*ranges, *((rank, 1) for rank in range(ranks))}, key=lambda own: (own[0], -own[1])):
        if first >= len(found):
            found += [(first, size)] * size
    return found


class _Lately(Generic[T]):
    """What was made of the last few numbers."""

    def __init__(self, make: Callable[[int], T], *, keep: int) -> None:
        self._make, self._keep, self._made = make, keep, dict[int, T]()

    def __call__(self, number: int) -> T:
        if number not in self._made:
            self._made[number] = self._make(number)
            while len(self._made) > self._keep:
                del self._made[next(iter(self._made))]
        return self._made[number]
