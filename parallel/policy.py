"""Which of the ways through attention is the fastest here: measured once, agreed between ranks, kept.

All of them give the same bits (:mod:`bernini.parallel.overlap`), so a layer is simply run by each, forward and, where
gradients are wanted, backward, a few times in turns before it is run for real. A round's time is that of its slowest
rank, and what counts is the median over the rounds of how many times packed's that is: what slows a machine down for a
while slows both, and gloo's slow exchanges are few. Rounds go on until some more of them change neither the choice nor
the medians, or :data:`BUDGET` is spent. Of those that gain more than :data:`GAIN` over packed, and that beyond the
error of their median, the fastest is taken; in doubt it is packed, to which nothing is lost then.

What is measured is kept for a group, a device, and shapes that are alike: tokens and keys per query within a factor of
:data:`ALIKE`. All ranks know the same numbers, so they ask, measure and choose at the same time.

Source: facts on systems, sections 0.4 (overlap is a policy with an automatic off switch) and 3.3.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from math import log
from statistics import median
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from .group import Group
from .swap import Swap

Variant = Literal["packed", "async", "chunk"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
CHOICES = ("auto", *VARIANTS)
"""What people may ask for: one of them, or to have them measured."""

GAIN = 0.01
"""Share of a simpler one's time that another one has to save."""
ROUNDS = (3, 8)
"""Rounds that are made before ranks tell each other their times, and how often they do at most."""
SETTLED = 0.01
"""Share that no median changed by in the last rounds."""
BUDGET = 10.0
"""Seconds after which a choice has to do."""
ALIKE = 2**0.5
"""Shapes whose numbers differ less are taken for one."""


@dataclass(frozen=True)
class Measured:
    """
    Args:
        group: of the ranks that measured.
        rounds: seconds of each variant, by the slowest rank.
    """

    group: Group
    rounds: Sequence[Mapping[Variant, float]]

    @cached_property
    def seconds(self) -> dict[Variant, float]:
        """Of each: packed's median, times the median of how many times packed's it took in a round."""
        packed = median(times["packed"] for times in self.rounds)
        return {name: packed * self._against_packed(name)[0] for name in self.rounds[0]}

    @cached_property
    def choice(self) -> Variant:
        """The fastest of those that surely gain :data:`GAIN` over packed; else packed."""
        quotients = {name: self._against_packed(name) for name in self.rounds[0]}
        gain = {name: found for name, (found, error) in quotients.items() if found + 2 * error < 1 - GAIN}
        return min(gain, key=lambda name: gain[name], default="packed")

    def _against_packed(self, name: Variant) -> tuple[float, float]:
        return middle([times[name] / times["packed"] for times in self.rounds])


def middle(values: Sequence[float]) -> tuple[float, float]:
    """(their median, its standard error): 1.25 times that of a mean, and the deviation 1.48 times the median one."""
    found = median(values)
    return found, 1.25 * 1.48 * median(abs(value - found) for value in values) / len(values) ** 0.5


class Policy:
    """
    Args:
        choice: a variant, or ``auto``.
        rounds: how many between two looks at the times, and how many looks at most.
        clock: tells seconds.

    Raises:
        ValueError: a choice that there is not.
    """

    def __init__(
        self, choice: str = "auto", *, rounds: tuple[int, int] = ROUNDS, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        if choice not in CHOICES:
            raise ValueError(f"Policy: {choice!r} is none of {', '.join(CHOICES)}")
        self.choice, self.rounds, self.clock = choice, rounds, clock
        self.found: dict[Hashable, Measured] = {}
        """By what was asked for."""

    def choose(
        self, swap: Swap, samples: Sequence[int], chunks: int, x_TN: Tensor, by: Callable[[Variant, Tensor], Tensor]
    ) -> Variant:
        """The variant for a layer. The ranks of the group call it at the same time.

        Args:
            swap: its exchanges.
            samples: borders of the samples, whose tokens attend to each other.
            chunks: into how many the heads of a rank can go.
            x_TN: its input, of the own tokens.
            by: runs it.
        """
        if self.choice != "auto":
            return next(variant for variant in VARIANTS if variant == self.choice)
        if swap.group.size == 1 or x_TN.is_meta or isinstance(x_TN, FakeTensor):
            return "packed"  # nothing is sent, or nothing takes any time
        lengths = [stop - start for start, stop in pairwise(samples)]
        tokens, pairs = sum(lengths), sum(length**2 for length in lengths)
        key = (
            id(swap.group), swap.heads, _step(tokens), _step(pairs / max(tokens, 1)), x_TN.shape[1], x_TN.dtype,
            x_TN.device.type, torch.is_grad_enabled(),
        )  # fmt: skip
        if key not in self.found:
            self.found[key] = self._measured(swap.group, VARIANTS if chunks > 1 else VARIANTS[:-1], x_TN, by)
        return self.found[key].choice

    def _measured(
        self, group: Group, variants: tuple[Variant, ...], x_TN: Tensor, by: Callable[[Variant, Tensor], Tensor]
    ) -> Measured:
        for variant in variants:  # what is made or compiled on first use
            self._timed(group, partial(by, variant), x_TN)
        found, rounds = Measured(group, [dict.fromkeys(variants, 1e30)]), list[dict[Variant, float]]()
        turns = [number % len(variants) for number in range(self.rounds[0])]  # another one begins each time
        for _ in range(self.rounds[1]):
            own = [self._round(group, variants[first:] + variants[:first], x_TN, by) for first in turns]
            rounds += [
                {variant: max(times[variant] for times in ranks) for variant in variants}
                for ranks in zip(*group.tell(own), strict=True)
            ]
            before, found = found, Measured(group, list(rounds))
            settled = all(abs(found.seconds[name] / before.seconds[name] - 1) < SETTLED for name in variants)
            spent = sum(sum(times.values()) for times in rounds)
            if spent > BUDGET or (settled and found.choice == before.choice):
                break
        return found

    def _round(
        self, group: Group, variants: Sequence[Variant], x_TN: Tensor, by: Callable[[Variant, Tensor], Tensor]
    ) -> dict[Variant, float]:
        return {variant: self._timed(group, partial(by, variant), x_TN) for variant in variants}

    def _timed(self, group: Group, run: Callable[[Tensor], Tensor], x_TN: Tensor) -> float:
        """Seconds of a layer, with its backward where gradients are wanted. Nothing of it is kept."""
        x_TN = x_TN.detach().requires_grad_(torch.is_grad_enabled())
        group.tell(None)  # all begin together
        start = self.clock()
        # Whoever offloads or recomputes what a layer keeps must not take this for one.
        with _disable_current_modes(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
            out = run(x_TN)
            if out.requires_grad:
                torch.autograd.grad(out, [x_TN, *_weights(out, x_TN)], torch.ones_like(out))
            if x_TN.is_cuda:
                torch.cuda.synchronize(x_TN.device)
        return self.clock() - start


PACKED = Policy("packed")
"""Nothing is measured."""


def _step(number: float) -> int:
    return round(log(max(number, 1.0), ALIKE))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _weights(out: Tensor, x: Tensor) -> list[Tensor]:
    """The leaves but x that the result comes from."""
    found, seen, queue = list[Tensor](), set[Any](), [out.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf is not x:
            found.append(leaf)
        queue += [before for before, _ in node.next_functions]
    return found
