"""The guidance benchmark: everybody computes the same, and what is counted."""

from __future__ import annotations

import pytest
import torch

from bench_perf import guidance
from bench_perf.providers import check, provided


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_providers_compute_the_reference(dtype: torch.dtype) -> None:
    """In a case where a threshold cuts in: frames long enough for that."""
    case = guidance.make_case(dtype, (2, 16, 20, 40))
    want = case.double().reference()
    for name, prepare in provided("guidance").items():
        torch.compiler.reset()
        call = prepare(case)
        for _ in range(2):  # a solver that remembers must be set back
            check(call(), want, dtype)
        other = case.copy()
        assert name != "bernini" or all(torch.equal(a, b) for a, b in zip(call(), prepare(other)(), strict=True))


def test_counts() -> None:
    ours, theirs = guidance.launches(guidance.bernini), guidance.launches(guidance.eager)
    assert (ours.all, ours.large) == (1, 1)
    assert theirs.all > theirs.large > 80
    case = guidance.make_case(torch.bfloat16, (2, 3, 4, 5))
    assert case.moved == 120 * (2 * 5 * 2 + 5 * 4)
