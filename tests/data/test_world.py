"""The synthetic world: pure, in agreement with what it says about itself, and without what it withholds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bernini.data import words, world
from bernini.data.scene import BACKGROUNDS, COLORS, FRAMES, GRID, MOTIONS, SHAPES, SIZE, Scene, Thing, draw
from bernini.data.world import EDITS, SPLITS, TASKS, WITHHELD, Sample, sample

pytest.importorskip("sklearn", reason="needs scikit-learn, whose digits are drawn")

FEW = range(60)


def things_of(made: Sample) -> list[Thing]:
    scenes = [*made.sources, *([made.scene] if made.scene is not None else [])]
    return [thing for scene in scenes for thing in scene.things]


def same(a: Sample, b: Sample) -> bool:
    arrays = [(x.videos, y.videos) for x, y in [(a, b)]] + [(a.images, b.images)]
    equal = all(np.array_equal(x, y) for left, right in arrays for x, y in zip(left, right, strict=True))
    targets = (a.target is None and b.target is None) or np.array_equal(a.target, b.target)  # type: ignore[arg-type]
    return equal and targets and (a.prompt, a.scene, a.sources, a.answer) == (b.prompt, b.scene, b.sources, b.answer)


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_a_function_of_its_arguments(task: str) -> None:
    for seed in range(10):
        first = sample(task, seed)
        sample(task, seed + 1)
        assert same(first, sample(task, seed))
    assert len({sample(task, seed).prompt for seed in FEW}) > 15
    assert not same(sample(task, 3), sample(task, 3, "test"))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_what_a_sample_has(task: str, split: str) -> None:
    videos, images, frames = {
        "t2i": (0, (0,), 1), "t2v": (0, (0,), FRAMES), "i2i": (0, (1,), 1), "v2v": (1, (0,), FRAMES),
        "i2v": (0, (1,), FRAMES), "r2v": (0, (1, 2), FRAMES), "rv2v": (1, (1,), FRAMES),
        "understanding": (0, (0, 1), 0),
    }[task]  # fmt: skip
    for seed in FEW:
        made = sample(task, seed, split)
        assert made.prompt and "{" not in made.prompt and "  " not in made.prompt
        if task == "understanding":
            assert made.target is None and made.answer and len(made.videos) + len(made.images) <= 1
            continue
        assert made.target is not None and made.scene is not None
        assert (len(made.videos), len(made.images) in images) == (videos, True)
        assert made.target.shape == (frames, SIZE, SIZE, 3) and made.target.dtype == np.uint8
        assert np.array_equal(made.target, draw(made.scene, frames))
        pictures = [*made.videos, *(image[None] for image in made.images)]
        for picture, scene in zip(pictures, made.sources, strict=True):
            assert np.array_equal(picture, draw(scene, len(picture)))
        assert (made.edit is not None) == (task in ("i2i", "v2v"))
        for thing in things_of(made):
            r, path = thing.radius, [thing.place(frame) for frame in range(FRAMES)]
            moving = thing.motion != "still"
            if task in ("t2i", "i2i"):
                assert not moving
            assert all(r - 1e-9 <= at <= SIZE - r + 1e-9 for place in path for at in place)
            assert (thing.speed > 0.3) == moving
            edges = [at - r for place in (path[0], path[-1]) for at in place]
            # Edits of size and motion find one middle, or one start, for both things: on half the grid at least.
            step = GRID / 2 if made.edit in ("size", "motion") else GRID
            assert all(edge % step == pytest.approx(0) for edge in edges)


@pytest.mark.parametrize("split", SPLITS)
def test_what_is_withheld(split: str) -> None:
    digits = set(world.digit_numbers(split != "train").tolist())
    for task in TASKS:
        for seed in FEW:
            made = sample(task, seed, split)
            looks = [(thing.color, thing.shape) in WITHHELD for thing in things_of(made)]
            assert {thing.digit for thing in things_of(made) if thing.digit is not None} <= digits
            if split != "unseen":
                assert not any(looks)
            elif made.scene is not None:
                spoken = made.sources[0].main if made.edit == "remove" else made.scene.main
                assert (spoken.color, spoken.shape) in WITHHELD
    assert len(WITHHELD) / (len(COLORS) * len(SHAPES)) == pytest.approx(0.1, abs=0.01)


def test_a_quarter_of_each_digit_is_held_out() -> None:
    seen, held = world.digit_numbers(False), world.digit_numbers(True)
    assert not set(seen.tolist()) & set(held.tolist()) and len(seen) + len(held) == 1797
    assert len(held) / 1797 == pytest.approx(0.25, abs=0.005)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_changes_what_it_says_and_nothing_else(edit: str) -> None:
    fields = {"recolor": "color", "shape": "shape", "size": "size", "motion": "motion"}
    for split in SPLITS:
        for seed in FEW:
            made = sample("v2v", seed, split, edit=edit)
            assert made.edit == edit and made.scene is not None and made.target is not None
            before, after = made.sources[0], made.scene
            if edit in fields:
                one, other = vars(before.main), vars(after.main)
                changed = {name for name in one if one[name] != other[name]} - {"speed"}
                assert changed == {fields[edit]} and before.things[:-1] == after.things[:-1]
                assert str(one[fields[edit]]) != other[fields[edit]]
            elif edit == "background":
                assert before.things == after.things and before.background != after.background
                assert after.background in made.prompt
            else:
                more, fewer = (before, after) if edit == "remove" else (after, before)
                assert more.things[:-1] == fewer.things and more.background == fewer.background
            region = world.edited_region(before, after, FRAMES)
            assert np.array_equal(made.videos[0][~region], made.target[~region])
            assert not np.array_equal(made.videos[0], made.target)


def test_what_is_hard_comes_up_more_often_in_training() -> None:
    shares = {split: [sample("i2i", seed, split).edit for seed in range(300)].count("shape") / 300 for split in SPLITS}
    assert shares["train"] == pytest.approx(3 / 8, abs=0.09)
    assert shares["test"] == pytest.approx(1 / 6, abs=0.07) and shares["unseen"] == pytest.approx(1 / 6, abs=0.07)


def test_references_show_digits_more_often_in_training() -> None:
    for task in ("r2v", "rv2v"):
        for split, share in (("train", 0.6), ("test", 0.3)):
            scenes = [made.scene for seed in range(300) if (made := sample(task, seed, split)).scene is not None]
            assert [scene.main.shape for scene in scenes].count("digit") / 300 == pytest.approx(share, abs=0.09)


def test_a_reference_is_what_is_put_in() -> None:
    for seed in FEW:
        made = sample("rv2v", seed)
        assert made.scene is not None
        (before, reference), after = made.sources, made.scene
        wanted, old, new = reference.main, before.main, after.main
        assert (new.shape, new.color, new.digit) == (wanted.shape, wanted.color, wanted.digit)
        assert (new.size, new.motion, new.start, new.speed) == (old.size, old.motion, old.start, old.speed)
        assert (wanted.size, wanted.start) == (old.size, old.start), "shown where the video begins"
        assert before.background == after.background and before.things[:-1] == after.things[:-1]
        for name in ("color", "shape", "digit"):
            assert name == "digit" or getattr(wanted, name) not in made.prompt or getattr(old, name) in made.prompt
        referred = sample("r2v", seed)
        assert referred.scene is not None
        for scene, thing in zip(referred.sources, reversed(referred.scene.things), strict=True):
            assert scene.main == replace(thing, motion="still", speed=0.0), "shown where the video begins"


def test_pixels_are_those_of_the_scene() -> None:
    thing = Thing("square", "red", "large", "right", (11.0, 16.0), 1.25)
    frames = draw(Scene("navy", (thing,)))
    for frame in range(FRAMES):
        x, y = thing.place(frame)
        assert tuple(frames[frame, int(y), int(x)]) == COLORS["red"]
        left, top, right, bottom = thing.box(frame)
        outside = np.ones((SIZE, SIZE), bool)
        outside[top:bottom, left:right] = False
        assert (frames[frame][outside] == BACKGROUNDS["navy"]).all()
        covered = (frames[frame].astype(float) - BACKGROUNDS["navy"])[..., 0].sum() / (220 - 15)
        assert covered == pytest.approx((0.9 * 2 * thing.radius) ** 2, rel=0.03), "edges are smooth"
    circle = draw(Scene("black", (Thing("circle", "blue", "large", "still", (16.0, 16.0)),)), 1)[0]
    assert np.array_equal(circle, circle[::-1]) and np.array_equal(circle, circle[:, ::-1])
    areas = {}
    for shape in SHAPES:
        digit = int(world.digit_numbers(False)[5]) if shape == "digit" else None
        made = draw(Scene("black", (Thing(shape, "cyan", "large", "still", (16.0, 16.0), 0.0, digit),)), 1)
        areas[shape] = int((made[0, ..., 1] > 100).sum())
    assert len(set(areas.values())) == len(SHAPES) and min(areas.values()) > 30, areas


def test_answers_are_true() -> None:
    kinds = set()
    for seed in range(300):
        made = sample("understanding", seed)
        assert made.answer is not None
        if made.scene is None:
            assert words.OPPOSITES[made.answer] in made.prompt
            continue
        main = made.scene.main
        truth = {
            "what color is the background?": made.scene.background,
            "how many objects are there?": "two" if len(made.scene.things) == 2 else "one",
            f"what color is the {main.shape}?": main.color,
            f"what is the shape of the {main.color} object?": main.shape,
            f"is the {main.shape} small or large?": main.size,
            f"where does the {main.shape} move?": main.motion,
        }
        kinds.add(made.prompt if made.prompt in truth else "caption")
        assert made.answer == truth.get(made.prompt, words.caption(made.scene, bool(made.videos)))
    assert "caption" in kinds and len(kinds) > 15


def test_motion_is_in_the_prompt() -> None:
    for seed in FEW:
        made = sample("t2v", seed)
        assert made.scene is not None
        main = made.scene.main
        assert main.color in made.prompt and main.shape in made.prompt and made.scene.background in made.prompt
        assert any(verb in made.prompt for verb in words.MOVES[main.motion])
    assert set(words.MOVES) == set(words.ORDERS) == set(MOTIONS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("t3v", 0), "unknown task 't3v'; there are t2i,"),
        (("t2v", 0, "all"), "unknown split 'all'; there are train, test, unseen"),
        (("t2v", -1), "a seed is not negative, got -1"),
    ],
)
def test_bad_arguments(arguments: tuple[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(*arguments)


@pytest.mark.parametrize(("task", "edit"), [("i2i", "motion"), ("v2v", "blur"), ("t2v", "recolor")])
def test_bad_edits(task: str, edit: str) -> None:
    with pytest.raises(ValueError, match=f"{task} has no edit '{edit}'"):
        sample(task, 0, edit=edit)
