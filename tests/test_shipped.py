"""The toy that comes with the package does what docs/toy.md says: a few samples here, all in `bernini eval toy`."""

from __future__ import annotations

import pytest

from bernini import Bernini
from bernini.evaluation.suite import evaluate, generator
from bernini.shipped import shipped

MEGABYTES = 20


@pytest.fixture(scope="module")
def model() -> Bernini:
    return Bernini.from_pretrained()


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in shipped().rglob("*") if file.is_file()) <= MEGABYTES * 10**6


def test_it_has_a_planner_and_edits(model: Bernini) -> None:
    assert model.has_planner
    results = evaluate(generator(model), tasks=("v2v:background", "v2v:remove"), splits=("test",), count=4)
    assert len(results.rows) == 8 and sum(row.followed for row in results.rows) >= 6
