"""Which digit image a clip shows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="needs scikit-learn, whose digits are drawn")

from bernini.data import world
from bernini.data.scene import BACKGROUNDS, COLORS, Scene, Thing, draw
from bernini.data.world import sample
from bernini.evaluation.checks import identity, judge
from bernini.evaluation.identity import identify

HELD = world.digit_numbers(True)


@pytest.mark.parametrize("size", ["small", "large"])
def test_held_out_digits_are_told_apart(size: str) -> None:
    rng = np.random.default_rng(0)
    right = []
    for number in HELD[::15]:
        color, background = str(rng.choice(list(COLORS))), str(rng.choice(list(BACKGROUNDS)))
        start = (float(rng.uniform(12, 13)), float(rng.uniform(12, 20)))
        thing = Thing("digit", color, size, "right", start, 0.8, int(number))
        frames = draw(Scene(background, (thing,)))
        match = identify(frames, thing)
        right.append(match.number == number)
        assert match.correlation > 0.97
    assert np.mean(right) == 1


def test_the_gallery_is_the_held_out_digits() -> None:
    known = world.digit_numbers(False)
    for number in known[::200]:
        thing = Thing("digit", "red", "large", "still", (16.0, 16.0), 0.0, int(number))
        match = identify(draw(Scene("black", (thing,))), thing)
        assert match.number in HELD and match.correlation < 0.999


def test_the_wrong_image_of_the_right_digit_is_wrong() -> None:
    found = 0
    for seed in range(80):
        for task in ("r2v", "rv2v"):
            made = sample(task, seed, "test")
            assert made.scene is not None and made.target is not None
            main = made.scene.main
            if main.digit is None:
                assert identity(made, made.target) is None
                continue
            found += 1
            label = {int(n) for n in HELD if _label(n) == _label(main.digit)} - {main.digit}
            other = Thing(main.shape, main.color, main.size, main.motion, main.start, main.speed, min(label))
            verdict = judge(made, draw(Scene(made.scene.background, (*made.scene.things[:-1], other))))
            assert verdict.identity is False
        if found > 10:
            break
    assert found > 10


def _label(number: int) -> int:
    from bernini.data.scene import digits

    return int(digits()[1][number])


def test_nothing_is_no_image() -> None:
    made = next(m for seed in range(99) if (m := sample("r2v", seed, "test")).scene and m.scene.main.digit is not None)
    empty = np.full((9, 32, 32, 3), 10, np.uint8)
    match = identity(made, empty)
    assert match is not None and match.number == -1


def test_how_fast_a_thing_goes_is_free_where_no_video_tells() -> None:
    for seed in range(200):
        made = sample("r2v", seed, "test")
        assert made.scene is not None
        thing = made.scene.main
        if thing.digit is not None and thing.size == "small" and thing.motion != "still":
            break
    other = replace(thing, speed=3 - thing.speed)
    match = identity(made, draw(Scene(made.scene.background, (other,))))
    assert match is not None and match.number == thing.digit
    elsewhere = replace(thing, start=(thing.start[1], thing.start[0] + 8), motion="still", speed=0.0)
    match = identity(made, draw(Scene(made.scene.background, (elsewhere,))))
    assert match is not None and match.correlation < 0.9
