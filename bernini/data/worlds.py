"""The synthetic world as a data set: drawn when asked for, so any number of examples takes no room."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch

from bernini.errors import UserError

from .example import Example, Features, Skip
from .scene import FPS
from .world import SPLITS, TASKS, Sample, sample


class WorldData:
    """Examples ``world/<split>/<task>/<seed>`` with pixels, one task behind the other.

    Args:
        counts: of each task, how many there are.
        seed0: seed of the first of each task.
        split: of :mod:`bernini.data.world`.

    Raises:
        UserError: a task or a split that the world does not have, a count below one, or no task.
    """

    parts: frozenset[str] = frozenset()
    has_pixels = True

    def __init__(self, counts: Mapping[str, int], *, seed0: int = 0, split: str = "train") -> None:
        unknown = [task for task in counts if task not in TASKS]
        if unknown or not counts:
            named = f"the task {unknown[0]!r}" if unknown else "no task"
            raise UserError(f"world: {named}; the synthetic world has {', '.join(TASKS)}")
        if split not in SPLITS:
            raise UserError(f"world: no split {split!r}; there are {', '.join(SPLITS)}")
        if min(counts.values()) < 1 or seed0 < 0:
            raise UserError(f"world: counts must be positive and seeds not negative, got {dict(counts)} from {seed0}")
        try:
            import sklearn  # noqa: F401
        except ImportError:
            raise UserError("world: its digits come with scikit-learn: pip install 'bernini[train]'") from None
        self.counts, self.seed0, self.split, self.fps = dict(counts), seed0, split, float(FPS)
        self._starts = dict(zip(counts, accumulate(counts.values(), initial=0), strict=False))

    @property
    def identity(self) -> str:
        counts = ",".join(f"{task}={count}" for task, count in self.counts.items())
        return f"world/{self.split}/{counts} from {self.seed0}"

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __getitem__(self, index: int) -> Example | Skip:
        """
        Raises:
            IndexError: no such example.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        task = next(task for task in reversed(self._starts) if index >= self._starts[task])
        return example_of(sample(task, self.seed0 + index - self._starts[task], self.split))

    def of_task(self, task: str) -> Sequence[int]:
        start = self._starts.get(task, 0)
        return range(start, start + self.counts.get(task, 0))


def example_of(made: Sample) -> Example:
    """A sample of the world as training reads it, with pixels."""
    sources = [Features("video", torch.from_numpy(video)) for video in made.videos]
    sources += [Features("image", torch.from_numpy(image)[None]) for image in made.images]
    target = None
    if made.target is not None:
        target = Features("image" if len(made.target) == 1 else "video", torch.from_numpy(made.target))
    key = f"world/{made.split}/{made.task}/{made.seed}"
    return Example(key, made.task, made.prompt, tuple(sources), target, made.answer)


def shares(weights: Mapping[str, float], count: int) -> dict[str, int]:
    """``count`` things shared out by weight, in whole numbers; what rounding leaves goes to the largest remainders.

    >>> shares({"t2i": 2, "v2v": 5}, 10)
    {'t2i': 3, 'v2v': 7}

    Raises:
        UserError: a weight that is not positive, or fewer things than names.
    """
    total = math.fsum(weights.values())
    if not weights or not all(0 < weight < math.inf for weight in weights.values()):
        raise UserError(f"weights must be positive numbers, got {dict(weights)}")
    exact = {name: count * weight / total for name, weight in weights.items()}
    found = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: found[name] - exact[name])[: count - sum(found.values())]:
        found[name] += 1
    if min(found.values()) < 1:
        raise UserError(f"{count} examples are too few for every one of {', '.join(weights)}")
    return found
