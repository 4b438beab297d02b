"""Which example comes next: weights by data set and task that may change as training goes on.

Everything is a function of numbers that the caller drew, so the order of examples does not depend on who reads them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from bernini.errors import UserError

from .example import Example

if TYPE_CHECKING:
    from .dataset import DataSet

TABLE_2: Mapping[str, Mapping[str, float]] = {
    "I": {"T2I": 13, "T2V": 19, "I2I": 3, "V2V": 1, "I2V": 1, "IV2V": 1, "V.P.": 15, "I.P.": 21, "Int.": 6, "Und.": 20},
    "II-1": {"T2I": 31, "T2V": 42, "I2I": 4, "V2V": 0.4, "I2V": 0.4, "IV2V": 0.3, "V.P.": 11, "I.P.": 11},
    "II-2": {"T2I": 20, "T2V": 30, "I2I": 40, "V2V": 3.3, "I2V": 3.5, "IV2V": 3.2},
    "III-1": {"T2I": 16, "T2V": 24, "I2I": 32, "V2V": 2.6, "I2V": 2.8, "IV2V": 2.6, "Und.": 20},
    "III-2": {"T2I": 12, "T2V": 18, "I2I": 24, "V2V": 2, "I2V": 2, "IV2V": 2, "Und.": 20, "CoT": 20},
}
"""Percent of the samples by stage and phase, and the paper's names of the data: table 2, rows from top to bottom. V.P.
and I.P. are pairs of videos and of images, Int. is interleaved text and images, Und. understanding, CoT reasoning."""

PAPER_TASKS: Mapping[str, str] = {
    "T2I": "t2i", "T2V": "t2v", "I2I": "i2i", "V2V": "v2v", "I2V": "r2v", "IV2V": "rv2v", "Und.": "understanding",
    "V.P.": "v2v", "I.P.": "i2i", "Int.": "i2i", "CoT": "v2v",
}  # fmt: skip
"""The task of each of these kinds of data. The paper calls video from references I2V, and video editing with references
IV2V. Those below ``Und.`` are data sets of their own within a task; for Int. and CoT the task is our reading."""

PAIRS = ("V.P.", "I.P.")
"""What decays to nothing in the course of stage II (section 4.1)."""

CURRICULUM: Mapping[str, float] = {
    "T2I": 0.0, "T2V": 0.1, "V.P.": 0.1, "I.P.": 0.1, "I2I": 0.1, "V2V": 0.1, "I2V": 0.1, "IV2V": 0.1, "Int.": 0.3,
    "Und.": 0.3,
}  # fmt: skip
"""At which part of stage I data come in. The paper gives the order (text to image; then video and pairs; then
understanding) and no times; these are ours."""


@dataclass(frozen=True)
class Part:
    """A data set in the mixture.

    Args:
        data: where the examples are.
        weight: share of the samples, in proportion to the other parts that are active.
        tasks: only these, with their shares inside of the part; all examples alike if empty.
        start, end: during which part of the training it is used, from 0 to 1; the end belongs to it only at 1.
        decay: whether its weight falls linearly from ``start`` to nothing at ``end``.
    """

    data: DataSet
    weight: float = 1.0
    tasks: Mapping[str, float] = field(default_factory=dict)
    start: float = 0.0
    end: float = 1.0
    decay: bool = False

    def weight_at(self, progress: float) -> float:
        """
        Args:
            progress: how much of the training is done, 0 to 1.
        """
        if not (self.start <= progress < self.end or progress == self.end == 1.0):
            return 0.0
        return self.weight * (self.end - progress) / (self.end - self.start) if self.decay else self.weight


class Mixture:
    """Parts with weights.

    Raises:
        UserError: no part, a weight, share or time that cannot be, or a part without examples of a task it is to give.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        if not parts:
            raise UserError("a mixture needs at least one data set")
        for number, part in enumerate(parts):
            _check(number, part)
        self.parts = tuple(parts)

    def weights(self, progress: float) -> list[float]:
        """Of each part its share of the samples, all together 1.

        Raises:
            UserError: no part is active at that time.
        """
        weights = [part.weight_at(progress) for part in self.parts]
        total = sum(weights)
        if total <= 0:
            raise UserError(f"no data set has any weight when {progress:.1%} of the training is done")
        return [weight / total for weight in weights]

    def pick(self, uniforms: Sequence[float], progress: float) -> tuple[int, int]:
        """(number of the part, number of the example in its data set).

        Args:
            uniforms: three numbers, each uniform in [0, 1): they choose the part, the task and the example.
            progress: how much of the training is done, 0 to 1.
        """
        which, task, place = uniforms
        number = _chosen(self.weights(progress), which)
        part = self.parts[number]
        if not part.tasks:
            return number, min(int(place * len(part.data)), len(part.data) - 1)
        names = list(part.tasks)
        among = part.data.of_task(names[_chosen(list(part.tasks.values()), task)])
        return number, among[min(int(place * len(among)), len(among) - 1)]


def _check(number: int, part: Part) -> None:
    if not 0 < part.weight < float("inf"):
        raise UserError(f"data set {number} of the mixture: its weight must be positive, is {part.weight}")
    if not 0 <= part.start < part.end <= 1:
        raise UserError(f"data set {number} of the mixture: used from {part.start} to {part.end}; these are parts of 1")
    if not len(part.data):
        raise UserError(f"data set {number} of the mixture is empty")
    for task, share in part.tasks.items():
        if not 0 < share < float("inf"):
            raise UserError(f"data set {number} of the mixture: the share of {task} must be positive, is {share}")
        if not len(part.data.of_task(task)):
            raise UserError(f"data set {number} of the mixture has no example of the task {task}")


def _chosen(weights: Sequence[float], uniform: float) -> int:
    """The index whose part of the line from 0 to the sum holds ``uniform`` times the sum; never one without weight."""
    ends = list(accumulate(weights))
    last = max(index for index, weight in enumerate(weights) if weight > 0)
    return min(bisect_right(ends, uniform * ends[-1]), last)


def drop_conditions(
    example: Example, uniforms: Sequence[float], *, text: float = 0.1, image: float = 0.1, video: float = 0.1
) -> Example:
    """Leaves out what guidance will be computed without: all of the text, all images, all videos, each for itself.

    The target stays; an example of understanding stays as it is. Source: facts section F.

    Args:
        uniforms: three numbers, uniform in [0, 1), for text, image and video.
        text, image, video: probabilities.
    """
    if example.target is None:
        return example
    no_text, no_image, no_video = (u < rate for u, rate in zip(uniforms, (text, image, video), strict=True))
    gone = {"image": no_image, "video": no_video}
    sources = tuple(source for source in example.sources if not gone[source.kind])
    return replace(example, prompt="" if no_text else example.prompt, sources=sources)
