"""Noise levels against their formulas by numerical integration, and draws that follow from names."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bernini.errors import UserError
from bernini.presets import TASKS
from bernini.training.draws import generator, uniform
from bernini.training.noise import (
    TABLES,
    Timesteps,
    Weighting,
    boundary_table,
    expert_range,
    released_tables,
    timesteps_for,
)

Array = NDArray[np.float64]
COUNT = 20_000
LIMIT = 1.63 / COUNT**0.5
"""Of the Kolmogorov-Smirnov distance: one run in a hundred is farther off by chance; the seeds are fixed."""


def logit_normal(u: Array, mean: float = 0.5, std: float = 1.0) -> Array:
    """Paper, equation 6."""
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = -((np.log(u / (1 - u)) - mean) ** 2) / (2 * std**2)
        density = np.exp(exponent) / (std * math.sqrt(2 * math.pi) * u * (1 - u))
    return np.nan_to_num(density)


def mode(u: Array, scale: float = 1.29) -> Array:
    """Density of equation 7's value for a uniform x: 1 / |f'(x)| where f(x) = u."""
    x = np.linspace(1, 0, 400_001)
    f = 1 - x - scale * (np.cos(np.pi * x / 2) ** 2 - 1 + x)
    there = np.interp(u, f, x)
    return 1 / np.abs(-1 - scale * (1 - np.pi / 2 * np.sin(np.pi * there)))


def flat(u: Array) -> Array:
    return np.ones_like(u)


DENSITIES: dict[Weighting, Callable[[Array], Array]] = {"logit_normal": logit_normal, "mode": mode, "uniform": flat}


def distance(sigma: torch.Tensor, density: Callable[[Array], Array], shift: float, low: float, high: float) -> float:
    """Kolmogorov-Smirnov distance between draws and a density of clean positions, shifted, cut to a range of sigma."""
    u = np.linspace(0, 1, 400_001)
    levels = shift * (1 - u) / (1 + (shift - 1) * (1 - u))
    weights = np.where((levels >= low) & (levels <= high), density(u), 0)
    below = 1 - np.cumsum(weights) / weights.sum()  # of the levels, which fall with u
    ordered = np.sort(sigma.double().numpy())
    want = np.interp(ordered, levels[::-1], below[::-1])
    steps = np.arange(len(ordered) + 1) / len(ordered)
    return float(max(np.abs(want - steps[1:]).max(), np.abs(want - steps[:-1]).max()))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.875, 1.0), (0.0, 0.875), (0.3, 0.5)])
@pytest.mark.parametrize(
    ("weighting", "shift"),
    [("logit_normal", 3.0), ("logit_normal", 4.0), ("mode", 3.0), ("mode", 5.0), ("uniform", 2.0)],
)
def test_levels_are_distributed_as_the_formula(weighting: Weighting, shift: float, low: float, high: float) -> None:
    timesteps = Timesteps(weighting, shift, low, high)
    sigma, timestep = timesteps.draw(generator("ks", weighting, str(low)), COUNT)
    assert sigma.dtype == torch.float64 and torch.equal(timestep, 1000 * sigma)
    assert low <= float(sigma.min()) and float(sigma.max()) <= high
    assert distance(sigma, DENSITIES[weighting], shift, low, high) < LIMIT


def test_a_mistake_would_show() -> None:
    """The test above tells the direction, the order of the shift, the density's numbers and the cut."""
    sigma = Timesteps("logit_normal", 3.0).draw(generator("ks"), COUNT).sigma
    right = distance(sigma, logit_normal, 3.0, 0, 1)
    wrong = {
        "direction": distance(sigma, lambda u: logit_normal(1 - u), 3.0, 0, 1),
        "shift": distance(sigma, logit_normal, 1 / 3, 0, 1),
        "other shift": distance(sigma, logit_normal, 4.0, 0, 1),
        "mean": distance(sigma, lambda u: logit_normal(u, mean=0.0), 3.0, 0, 1),
        "std": distance(sigma, lambda u: logit_normal(u, std=0.9), 3.0, 0, 1),
        "density": distance(sigma, mode, 3.0, 0, 1),
        "cut": distance(sigma, logit_normal, 3.0, 0, 0.875),
    }
    assert right < LIMIT and min(wrong.values()) > 2 * LIMIT, wrong
    sigma = Timesteps("mode", 3.0).draw(generator("ks"), COUNT).sigma
    assert distance(sigma, lambda u: mode(u, 1.0), 3.0, 0, 1) > 2 * LIMIT
    # Equation 7 is symmetric: it has no direction that could be wrong.
    u = np.linspace(0.01, 0.99, 99)
    np.testing.assert_allclose(mode(u), mode(1 - u), rtol=1e-6)


@pytest.mark.parametrize(("shift", "distinct", "boundary"), [(3.0, 318, 0.3), (4.0, 288, 0.364), (5.0, 270, 0.417)])
def test_parity_takes_levels_of_the_released_table(shift: float, distinct: int, boundary: float) -> None:
    sigmas, steps = released_tables(shift)
    assert len(sigmas.unique()) == distinct and sigmas.dtype == steps.dtype == torch.bfloat16
    pairs = set(zip(sigmas.tolist(), steps.tolist(), strict=True))
    for expert, span in (("high", (0.0, boundary)), ("low", (boundary, 0.999)), ("both", (0.0, 0.999))):
        timesteps = Timesteps("mode", shift, *expert_range(expert), parity=True)
        assert timesteps.positions == span
        levels = timesteps.draw(generator("parity", expert), 2000)
        assert levels.sigma.dtype == levels.timestep.dtype == torch.bfloat16
        assert set(zip(levels.sigma.tolist(), levels.timestep.tolist(), strict=True)) <= pairs
        # Rounding moves levels by up to half a percent; the distribution is that of exact ones otherwise.
        assert distance(levels.sigma, mode, shift, *expert_range(expert)) < 0.06


def test_the_exact_range_is_the_released_one_before_rounding() -> None:
    for shift in (3.0, 4.0, 5.0):
        for expert in ("high", "low"):
            low, high = expert_range(expert)
            exact, rounded = (Timesteps("mode", shift, low, high, parity=p).positions for p in (False, True))
            assert exact == pytest.approx(rounded, abs=1.001e-3)
        assert boundary_table(shift)[0] == 1 and boundary_table(shift).dtype == torch.float32
    assert Timesteps("mode", 3.0, 0.875, 1.0).positions == pytest.approx((0.0, 0.3), abs=1e-12)


def test_rejection_takes_trials_in_order_and_counts_them() -> None:
    timesteps = Timesteps("uniform", 1.0, 0.25, 0.75)
    trials = torch.tensor([0.1, 0.5, 0.9, 0.25, 0.75, 0.3], dtype=torch.float64)
    u, used = timesteps.accept(trials, 3)
    assert u.tolist() == [0.5, 0.25, 0.75] and used == 5
    u, used = timesteps.accept(trials, 9)  # not enough of them
    assert u.tolist() == [0.5, 0.25, 0.75, 0.3] and used == 6
    assert len(timesteps.draw(generator(1), 0).sigma) == 0


def test_table_4() -> None:
    image, video = {"t2i": 3.0, "i2i": 4.0}, {"t2v": 3.0, "i2v": 5.0, "r2v": 5.0, "v2v": 5.0, "rv2v": 5.0}
    for weighting, row in (("logit_normal", image), ("mode", video)):
        for task, shift in row.items():
            found = timesteps_for(task, table="paper")
            assert (found.weighting, found.shift) == (weighting, shift), task
    changed = {task for task in TABLES["release"] if TABLES["release"][task] != TABLES["paper"][task]}
    assert changed == {"r2v"} and timesteps_for("r2v").shift == 4.0
    for table in TABLES:
        assert TASKS.keys() <= TABLES[table].keys()
        for task, definition in TASKS.items():
            assert (timesteps_for(task, table=table).weighting == "logit_normal") == definition.still
    found = timesteps_for("v2v", low=0.875, parity=True)
    assert (found.low, found.high, found.parity) == (0.875, 1.0, True)
    assert expert_range("low", 0.9) == (0.0, 0.9) and expert_range("both") == (0.0, 1.0)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"weighting": "cosine"}, r"weighting 'cosine'; there are logit_normal, mode, uniform"),
        ({"shift": 0.0}, "shift must be positive, got 0.0"),
        ({"shift": math.inf}, "shift must be positive"),
        ({"low": 0.9, "high": 0.875}, r"upwards within \[0, 1\], got 0.9 to 0.875"),
        ({"low": 0.5, "high": 0.5}, "upwards within"),
        ({"low": -0.1}, "upwards within"),
        ({"high": 1.1}, "upwards within"),
        ({"low": math.nan}, "upwards within"),
        ({"std": 0.0}, "positive std"),
        ({"scale": 1.8}, r"must be in \[-1, 1.75\], got 1.8"),
    ],
)
def test_settings_without_meaning_are_refused(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Timesteps(**{"weighting": "mode", "shift": 3.0, **options})  # type: ignore[arg-type]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="no schedule for task 'understanding'; there are t2i"):
        timesteps_for("understanding")
    with pytest.raises(UserError, match="no table 'table4'; there are release, paper"):
        timesteps_for("t2v", table="table4")
    with pytest.raises(UserError, match="no expert 'middle'; there are high, low, both"):
        expert_range("middle")


def test_a_range_that_is_never_met_is_an_error_and_no_endless_loop() -> None:
    with pytest.raises(
        UserError, match=r"logit_normal at shift 1 never falls between sigma 0.9999999 and 1.0: none of .*widen"
    ):
        Timesteps("logit_normal", 1.0, 0.9999999, 1.0).draw(generator(0))


# --- names and their numbers ------------------------------------------------------------------------------------------


def numbers(*key: int | str) -> list[float]:
    return torch.rand(4, generator=generator(*key)).tolist()


def test_numbers_follow_from_the_key_alone() -> None:
    state = torch.random.get_rng_state()
    assert numbers(0, "t2v/17", 5, "noise") == numbers(0, "t2v/17", 5, "noise")
    assert torch.equal(state, torch.random.get_rng_state())
    # Written down, so that no later version of this package changes a run that goes on.
    assert generator(0, "t2v/17", 5, "noise").initial_seed() == 6736771475408453109


def test_every_part_of_the_key_matters() -> None:
    keys: list[tuple[int | str, ...]] = [
        (1, "a"), ("1", "a"), ("a", 1), (1, "a", 0), (1, "a", "0"), ("1a",), ("1", "", "a"), (-1, "a"), (2, "a"),
        (1, "ab", "c"), (1, "a", "bc"), (1, "ä"), (1, "a\u0308"), (2**80, "a"), (1, 'a","b'), (1, "a", "b"),
    ]  # fmt: skip
    assert len({generator(*key).initial_seed() for key in keys}) == len(keys)
    assert len({tuple(numbers(*key)) for key in keys}) == len(keys)


@pytest.mark.parametrize("key", [(), (1.0,), (True,), (None, 1), (b"a",)])
def test_other_keys_are_refused(key: tuple[object, ...]) -> None:
    with pytest.raises(TypeError, match="whole numbers and strings"):
        generator(*key)  # type: ignore[arg-type]


def test_neighbouring_keys_are_independent() -> None:
    values = np.array([uniform(7, f"example/{number}", 3, "drop") for number in range(2000)])
    ordered = np.sort(values)
    assert ordered[0] >= 0 and ordered[-1] < 1
    assert np.abs(ordered - (np.arange(2000) + 0.5) / 2000).max() < 1.63 / 2000**0.5
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 3 / 2000**0.5
    steps = np.array([uniform(7, "example/0", step, "drop") for step in range(2000)])
    assert abs(np.corrcoef(values, steps)[0, 1]) < 3 / 2000**0.5
