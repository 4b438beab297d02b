"""Which examples a micro-batch has: a pure function of the recipe, the step and the micro-batch's number.

Draw after draw, the mixture names a data set and an example in it, until the next example would pass a budget. What
cannot be used is passed over and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..data.example import Example, Skip
from ..data.mixture import Mixture, drop_conditions
from ..errors import UserError
from .draws import generator
from .recipe import Recipe

T = TypeVar("T")
PATIENCE = 1000
"""Examples in a row that may be unusable before the data are taken for broken."""


def dropped(recipe: Recipe, example: Example, step: int) -> Example:
    """The example with conditions left out: the same ones for planner and renderer."""
    uniforms = torch.rand(3, generator=generator(recipe.seed, example.key, step, "drop"), dtype=torch.float64)
    rates = recipe.dropout
    return drop_conditions(example, uniforms.tolist(), text=rates.text, image=rates.image, video=rates.video)


@dataclass(frozen=True)
class Picked:
    """Examples of a micro-batch, and why others were passed over."""

    examples: tuple[Example, ...]
    skipped: tuple[Skip, ...]


class Feed:
    """
    Args:
        mixture: of the recipe's data.
        cost: of an example: (tokens of the renderer, tokens of the planner).
        usable: why an example cannot be used here, or ``None``.
    """

    def __init__(
        self,
        recipe: Recipe,
        mixture: Mixture,
        cost: Callable[[Example], tuple[int, int]],
        usable: Callable[[Example], str | None] = lambda example: None,
    ) -> None:
        self._recipe, self._mixture, self.cost, self._usable = recipe, mixture, cost, usable

    def pick(self, step: int, number: int) -> Picked:
        """The examples of a micro-batch.

        Raises:
            UserError: an example alone passes a budget, or nothing usable comes.
        """
        batch, skipped = self._recipe.batch, list[Skip]()
        chosen: list[Example] = []
        room = [batch.renderer_tokens, batch.planner_tokens]
        draws = generator(self._recipe.seed, "mixture", step, str(number))
        missed = 0
        while len(chosen) < batch.samples:
            uniforms = torch.rand(3, generator=draws, dtype=torch.float64).tolist()
            part, index = self._mixture.pick(uniforms, min(1.0, step / self._recipe.steps))
            example = self._mixture.parts[part].data[index]
            if isinstance(example, Example) and (lack := self._usable(example)) is not None:
                example = Skip(example.key, "wrong stage", lack)
            if isinstance(example, Skip):
                skipped.append(example)
                missed += 1
                if missed >= PATIENCE:
                    raise UserError(
                        f"none of {PATIENCE} examples in a row can be used; the last one is {example.key}: "
                        f"{example.reason} ({example.detail}); 'bernini data check' tells about all"
                    )
                continue
            missed, needed = 0, self.cost(example)
            if any(need > have for need, have in zip(needed, room, strict=True)):
                if not chosen:
                    raise UserError(
                        f"the example {example.key} has {needed[0]} and {needed[1]} tokens, and a micro-batch has room "
                        f"for {batch.renderer_tokens} and {batch.planner_tokens}; raise batch.renderer_tokens or "
                        "batch.planner_tokens"
                    )
                break
            room = [have - need for need, have in zip(needed, room, strict=True)]
            chosen.append(example)
        return Picked(tuple(chosen), tuple(skipped))


@contextmanager
def ahead(make: Callable[[int], T]) -> Iterator[Callable[[int], T]]:
    """``make``, which works on the next step's batch while this one's is computed."""
    waiting: dict[int, Future[T]] = {}
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        # One thread for that thread's own operations: with a team of its own there are more threads than cores, and
        # OpenMP then puts ours to sleep between any two operations (1.7 s a step instead of 0.9 on two cores).
        threads = torch.get_num_threads()
        pool.submit(torch.set_num_threads, 1).result()
        torch.set_num_threads(threads)

        def take(step: int) -> T:
            future = waiting.pop(step, None) or pool.submit(make, step)
            batch = future.result()
            waiting[step + 1] = pool.submit(make, step + 1)
            return batch

        try:
            yield take
        finally:
            for future in waiting.values():
                future.cancel()
