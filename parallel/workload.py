"""What a sample costs, in seconds: linear and quadratic terms, from the models' sizes or fitted to measured steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np


class Sizes(NamedTuple):
    """Of one sample, in tokens; what it has not is 0.

    Args:
        renderer: of the renderer's sequence, target and sources.
        context: keys of its cross-attention.
        planner: of the planner's conversation.
        latent: renderer tokens that the autoencoder encodes in this step.
    """

    renderer: int = 0
    context: int = 0
    planner: int = 0
    latent: int = 0


TERMS = ("step", "renderer", "renderer^2", "context", "renderer x context", "planner", "planner^2", "latent")
"""The first counts micro-batches, the others add over samples."""

LATENT_FLOPS = 4.8e9
"""Operations of Wan's encoder for one renderer token (four frames of 16 x 16 pixels), forward alone: counted by torch's
counter for 33 frames of 480 x 848 (4.5e9 for 17; an image takes 1.7e9)."""

Matrix = tuple[tuple[float, ...], ...]


def terms(samples: Sequence[Sizes], ranks: Sequence[int] | None = None) -> tuple[float, ...]:
    """:data:`TERMS` of the samples of one micro-batch.

    Args:
        ranks: over how many each sample is cut; this rank has its part. Default: all are whole.
    """
    sums = [1.0, *[0.0] * (len(TERMS) - 1)]
    for (renderer, context, planner, latent), size in zip(samples, ranks or [1] * len(samples), strict=True):
        squares = renderer * renderer, renderer * context, planner * planner
        own = (renderer, squares[0], context, squares[1], planner, squares[2], latent)
        for number, value in enumerate(own, 1):
            sums[number] += value / size
    return tuple(sums)


class Measured(NamedTuple):
    """What a rank was seen to take for a micro-batch: its own work, without waiting for others.

    Args:
        ranks: over how many each sample is cut; empty: all are whole.
    """

    samples: Sequence[Sizes]
    seconds: float
    ranks: Sequence[int] = ()


@dataclass(frozen=True)
class Workload:
    """Seconds of a micro-batch: :data:`TERMS` times coefficients.

    Coefficients begin as the models' sizes tell and follow measured times by ridge regression: of relative errors, with
    old records forgotten, towards the shape of the first coefficients (their common factor is free, so a wrong rate
    costs nothing), and never below 0. Terms that never vary apart, as renderer tokens and latents do in most data, keep
    their first ratio.

    The value is plain: :meth:`fit` returns another one, :meth:`state` is JSON, and ranks that fit the same records in
    the same order have the same bits.

    Args:
        start: seconds for one of each term, before anything is measured.
        factors: what the fit multiplies them with.
        forget: weight of what was seen, with every further record.
        ridge: as a part of what is known of a term.
        gram, moment: sums of the regression.
        errors: weighted sum of the relative errors of predictions, each made before the record was fitted.
        weight: sum of weights of ``errors``.
    """

    start: tuple[float, ...]
    factors: tuple[float, ...] = (1.0,) * len(TERMS)
    forget: float = 0.99
    ridge: float = 1e-3
    gram: Matrix = ((0.0,) * len(TERMS),) * len(TERMS)
    moment: tuple[float, ...] = (0.0,) * len(TERMS)
    errors: float = 0.0
    weight: float = 0.0

    @classmethod
    def of_models(
        cls, *, width: int, ffn: int, layers: int, planner_width: int = 0, planner_ffn: int = 0, planner_keys: int = 0,
        planner_layers: int = 0, latent_flops: float = LATENT_FLOPS, again: bool = False, rate: float = 4e14,
        step: float = 0.01,
    ) -> Workload:  # fmt: skip
        """Counted from sizes: products with weights and attention, forward and backward.

        Backward counts twice for products and 2.5 times for attention, whose scores it computes again.

        Args:
            width, ffn, layers: of the renderer.
            planner_keys: width of the planner's keys, all heads together.
            latent_flops: of the autoencoder's encoder, for a renderer token.
            again: the forward is computed again in the backward (activation checkpointing).
            rate: operations per second.
            step: seconds that a micro-batch takes however little is in it.
        """
        linear, attention = (4.0, 4.5) if again else (3.0, 3.5)
        n, p = width, planner_width
        flops = (
            linear * layers * 2 * (6 * n * n + 2 * n * ffn),
            attention * layers * 4 * n,
            linear * layers * 4 * n * n,
            attention * layers * 4 * n,
            linear * planner_layers * 2 * (2 * p * p + 2 * p * planner_keys + 3 * p * planner_ffn),
            attention * planner_layers * 4 * p,
            latent_flops,
        )
        return cls((step, *(value / rate for value in flops)))

    @property
    def coefficients(self) -> dict[str, float]:
        """Seconds for one of each term."""
        return {name: a * b for name, a, b in zip(TERMS, self.start, self.factors, strict=True)}

    @property
    def error(self) -> float:
        """Mean relative error of predictions, each made before its record was fitted; the last count most. 0 before
        there were two."""
        return self.errors / self.weight if self.weight else 0.0

    def seconds(self, sizes: Sizes) -> float:
        """Of one sample on one rank, beside what the micro-batch takes anyhow."""
        return self.predict([sizes]) - self.start[0] * self.factors[0]

    def predict(self, samples: Sequence[Sizes], ranks: Sequence[int] | None = None) -> float:
        """Of a micro-batch on one rank; see :func:`terms`."""
        columns = zip(terms(samples, ranks), self.start, self.factors, strict=True)
        return sum(value * start * factor for value, start, factor in columns)

    def fit(self, records: Iterable[Measured]) -> Workload:
        """With these records too.

        Raises:
            ValueError: a time that is not above 0.
        """
        now = self
        for record in records:
            now = now._with(record)
        return now

    def _with(self, record: Measured) -> Workload:
        if not 0 < record.seconds < float("inf"):
            raise ValueError(f"a micro-batch took {record.seconds} seconds")
        ranks = record.ranks or None
        row = np.array(terms(record.samples, ranks)) * np.array(self.start) / record.seconds
        gram = np.array(self.gram) * self.forget + np.outer(row, row)
        moment = np.array(self.moment) * self.forget + row
        known = any(map(any, self.gram))
        missed = abs(self.predict(record.samples, ranks) / record.seconds - 1)
        return replace(
            self,
            factors=_factors(gram, moment, self.ridge),
            gram=tuple(map(tuple, gram.tolist())),
            moment=tuple(moment.tolist()),
            errors=self.errors * self.forget + missed if known else 0.0,
            weight=self.weight * self.forget + 1 if known else 0.0,
        )

    def state(self) -> dict[str, Any]:
        """For JSON."""
        return dict(self.__dict__)

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Workload:
        """What :meth:`state` gave, also after JSON."""
        gram = tuple(map(tuple, state["gram"]))
        vectors = {name: tuple(state[name]) for name in ("start", "factors", "moment")}
        return cls(**{**state, **vectors, "gram": gram})


def _factors(gram: np.ndarray, moment: np.ndarray, ridge: float) -> tuple[float, ...]:
    """The least sum of squares, and a ridge towards one common factor, with no factor below 0.

    Which factors are 0 is tried out: all 2^8 ways are one batch of small systems, and the best that is not negative is
    the exact answer.
    """
    total = gram.sum()
    common = moment.sum() / total if total > 0 else 1.0
    pull = ridge * np.diag(gram) + 1e-12 * np.trace(gram) + 1e-300
    system, right = gram + np.diag(pull), moment + pull * common
    count = len(right)
    free = (np.arange(1, 1 << count)[:, None] >> np.arange(count) & 1).astype(bool)
    both = free[:, :, None] & free[:, None, :]
    scale = 1 / np.sqrt(np.diag(system))
    scaled = system * scale[:, None] * scale
    found = np.linalg.solve(np.where(both, scaled, np.eye(count)), (free * right * scale)[..., None])[..., 0]
    good = (found >= 0).all(axis=1)
    value = np.where(good, -0.5 * found @ (right * scale), np.inf)
    return tuple((found[value.argmin()] * scale).tolist())
