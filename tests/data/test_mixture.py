"""Mixtures: the tables of the paper, schedules, draws, dropped conditions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from bernini.data.example import Example, Features
from bernini.data.mixture import CURRICULUM, PAIRS, PAPER_TASKS, TABLE_2, Mixture, Part, drop_conditions
from bernini.data.worlds import WorldData, shares
from bernini.errors import UserError

pytest.importorskip("sklearn", reason="needs scikit-learn, whose digits are drawn")
SMALL = WorldData({"t2i": 10, "v2v": 20})


def test_the_papers_table() -> None:
    assert {stage: round(sum(row.values()), 1) for stage, row in TABLE_2.items()} == {
        "I": 100, "II-1": 100.1, "II-2": 100, "III-1": 100, "III-2": 100,
    }  # fmt: skip
    assert all(name in PAPER_TASKS for row in TABLE_2.values() for name in row)
    assert set(PAIRS) <= set(TABLE_2["II-1"]) and not set(PAIRS) & set(TABLE_2["II-2"])
    assert set(CURRICULUM) == set(TABLE_2["I"])
    assert CURRICULUM["T2I"] == 0 < CURRICULUM["T2V"] == CURRICULUM["V.P."] < CURRICULUM["Und."] < 1


def test_weights_over_time() -> None:
    mixture = Mixture([Part(SMALL, 3), Part(SMALL, 1, start=0.5), Part(SMALL, 4, end=0.5, decay=True)])
    weights = np.array([mixture.weights(p) for p in (0, 0.25, 0.499999, 0.5, 1)])
    expected = np.array([[3 / 7, 0, 4 / 7], [3 / 5, 0, 2 / 5], [1, 0, 0], [3 / 4, 1 / 4, 0], [3 / 4, 1 / 4, 0]])
    np.testing.assert_allclose(weights, expected, atol=1e-5)
    assert Part(SMALL, decay=True).weight_at(1) == 0 and Part(SMALL, 2, decay=True).weight_at(0.75) == 0.5
    with pytest.raises(UserError, match=r"no data set has any weight when 60\.0%"):
        Mixture([Part(SMALL, end=0.5)]).weights(0.6)


def test_picks_follow_the_weights_and_nothing_else() -> None:
    mixture = Mixture([Part(SMALL, 1), Part(SMALL, 3, {"t2i": 1, "v2v": 4}), Part(SMALL, 9, start=0.9)])
    uniforms = np.random.default_rng(0).random((20_000, 3))
    picks = [mixture.pick(u, 0.3) for u in uniforms]
    assert picks == [mixture.pick(u, 0.3) for u in uniforms]
    parts = Counter(part for part, _ in picks)
    assert set(parts) == {0, 1} and abs(parts[1] / len(picks) - 3 / 4) < 0.01
    first = Counter(index for part, index in picks if part == 0)
    assert set(first) == set(range(30)) and max(first.values()) < 1.5 * parts[0] / 30, "all examples alike"
    second = Counter(index < 10 for part, index in picks if part == 1)
    assert abs(second[True] / parts[1] - 1 / 5) < 0.01, "tasks by their shares"
    for u in ((0.0, 0.0, 0.0), (1 - 2**-53,) * 3):
        part, index = mixture.pick(u, 0.3)
        assert (part, index) in ((0, 0), (1, 29))


def test_mixtures_that_cannot_be() -> None:
    for part, words in (
        (Part(SMALL, 0), "weight must be positive"), (Part(SMALL, float("nan")), "weight must be positive"),
        (Part(SMALL, start=0.5, end=0.5), r"from 0\.5 to 0\.5"), (Part(SMALL, end=2), "parts of 1"),
        (Part(SMALL, tasks={"t2v": 1}), "no example of the task t2v"),
        (Part(SMALL, tasks={"t2i": -1}), "share of t2i"), (Part([]), "empty"),  # type: ignore[arg-type]
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            Mixture([part])
    with pytest.raises(UserError, match="at least one"):
        Mixture([])


def test_conditions_are_dropped_each_for_itself() -> None:
    video, image = Features("video"), Features("image")
    example = Example("a", "rv2v", "do it", (video, image, image), video)
    rng = np.random.default_rng(1)
    dropped = [drop_conditions(example, rng.random(3)) for _ in range(20_000)]
    seen = Counter((e.prompt, *(s.kind for s in e.sources)) for e in dropped)
    assert all(e.target is video and e.key == "a" for e in dropped)
    for text, videos, images in np.ndindex(2, 2, 2):
        left = ("do it" if text else "", *["video"] * videos, *["image", "image"] * images)
        share = np.prod([0.9 if kept else 0.1 for kept in (text, videos, images)])
        assert abs(seen[left] / len(dropped) - share) < 5 * np.sqrt(share / len(dropped))
    assert drop_conditions(example, (0.3, 0.3, 0.3), text=0.5, image=0, video=0).prompt == ""
    question = Example("q", "understanding", "what?", (image,), None, "a ring")
    assert drop_conditions(question, (0, 0, 0)) is question


def test_shares_are_whole_numbers_that_add_up() -> None:
    assert shares({"a": 2, "b": 5}, 10) == {"a": 3, "b": 7}
    assert shares(dict.fromkeys("abc", 1), 8) == {"a": 3, "b": 3, "c": 2}
    with pytest.raises(UserError, match="too few"):
        shares({"a": 1, "b": 1000}, 10)
    with pytest.raises(UserError, match="positive"):
        shares({"a": 1, "b": -1}, 10)
