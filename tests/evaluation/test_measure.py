"""The measures: right about the truth, also if it is blurred and noisy, and not fooled by wrong answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("sklearn", reason="needs scikit-learn, whose digits are drawn")

from bernini.data import world
from bernini.data.scene import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZE, Frames, Scene, Thing, draw
from bernini.data.world import Sample, sample
from bernini.evaluation.checks import FOLLOWED, judge, psnr
from bernini.evaluation.measure import connected, direction, view

KINDS = [
    *((task, None) for task in ("t2i", "t2v", "i2v", "r2v", "rv2v")),
    *(("v2v", edit) for edit in world.EDITS),
    *(("i2i", edit) for edit in ("recolor", "shape", "add")),
]
FAINT = {"digit", "identity"}
"""What blur and noise take from a digit of 9 pixels."""


def samples(count: int) -> Iterator[Sample]:
    for task, edit in KINDS:
        for split in ("test", "unseen"):
            for seed in range(count):
                yield sample(task, 700 + seed, split, edit=edit)


def spoiled(frames: Frames, seed: int) -> Frames:
    """As a renderer might: weights 1 2 1 along both axes, every color off by up to 8, noise of sigma 10."""
    rng = np.random.default_rng(seed)
    values = frames.astype(np.float64)
    for axis in (1, 2):
        values = (np.roll(values, 1, axis) + 2 * values + np.roll(values, -1, axis)) / 4
    values += rng.uniform(-8, 8, 3) + rng.normal(0, 10, values.shape)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def followed(made: Sample, frames: Frames) -> bool:
    checks = judge(made, frames).checks
    return all(checks[name] for name in FOLLOWED[made.edit or made.task])


@pytest.mark.parametrize(("spoil", "least"), [(False, 0.98), (True, 0.95)])
def test_the_truth_is_right(spoil: bool, least: float) -> None:
    right: dict[str, list[bool]] = defaultdict(list)
    for made in samples(3):
        assert made.target is not None
        verdict = judge(made, spoiled(made.target, made.seed) if spoil else made.target)
        for name, each in verdict.checks.items():
            right[name].append(each)
        if verdict.identity is not None:
            right["identity"].append(verdict.identity)
        if verdict.psnr is not None and not spoil:
            assert verdict.psnr > 58
        if verdict.psnr_truth is not None:
            assert (verdict.psnr_truth > 58) != spoil
    assert set(right) == {
        "background",
        "color",
        "shape",
        "size",
        "motion",
        "digit",
        "gone",
        "others",
        "count",
        "identity",
    }
    shares = {name: float(np.mean(each)) for name, each in right.items() if not (spoil and name in FAINT)}
    assert min(shares.values()) >= least, shares


def test_a_source_that_was_left_alone_is_wrong() -> None:
    for made in samples(2):
        if made.edit is not None or made.task == "rv2v":
            verdict = judge(made, made.videos[0] if made.videos else made.images[0][None])
            names = FOLLOWED[made.edit or made.task]
            assert not all(verdict.checks[name] for name in names) or verdict.identity is False, made.prompt
            assert verdict.psnr is None or verdict.psnr > 58
            assert verdict.psnr_truth is None or verdict.psnr_truth < 40


def test_what_answers_something_else_is_wrong() -> None:
    fooled: dict[str, list[bool]] = defaultdict(list)
    for task, edit in [("t2v", None), ("v2v", "shape"), ("v2v", "motion"), ("v2v", "recolor"), ("rv2v", None)]:
        for seed in range(12):
            made, other = (sample(task, number, "test", edit=edit) for number in (seed, seed + 50))
            assert other.target is not None
            fooled[edit or task].append(followed(made, other.target))
    # By chance an eighth has the color, a seventh the motion.
    assert fooled["t2v"].count(True) == 0 and max(each.count(True) for each in fooled.values()) <= 4, dict(fooled)


def test_noise_and_nothing_are_no_answer() -> None:
    rng = np.random.default_rng(0)
    for made in samples(1):
        assert made.target is not None
        if made.edit in ("background", "remove"):
            continue
        for frames in (rng.integers(0, 256, made.target.shape, np.uint8), np.full_like(made.target, 128)):
            assert not followed(made, frames), made.prompt


# --- single measures --------------------------------------------------------------------------------------------------


def test_touching_things_are_two() -> None:
    one = Thing("square", "red", "small", "still", (8.0, 16.0))
    other = Thing("circle", "blue", "small", "still", (24.0, 16.0))
    seen = view(draw(Scene("gray", (one, other))))
    assert {(thing.color, thing.look.shape, thing.look.size) for thing in seen.things} == {
        ("red", "square", "small"), ("blue", "circle", "small")
    }  # fmt: skip
    assert all(thing.motion == "still" for thing in seen.things)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_color_on_every_background(background: str) -> None:
    for color in COLORS:
        thing = Thing("cross", color, "small", "left", (25.0, 12.0), 1.2)
        seen = view(spoiled(draw(Scene(background, (thing,))), 1))
        assert seen.background == background
        assert [(found.color, found.look.shape, found.motion) for found in seen.things] == [(color, "cross", "left")]


def test_shapes_in_both_sizes_and_where_they_are() -> None:
    for shape in SHAPES:
        for size in ("small", "large"):
            digit = int(world.digit_numbers(True)[7]) if shape == "digit" else None
            thing = Thing(shape, "yellow", size, "diagonally down", (12.3, 12.1), 0.9, digit)
            (found,) = view(draw(Scene("navy", (thing,)))).things
            assert (found.look.shape, found.look.size, found.motion) == (shape, size, "diagonally down")
            away = [np.linalg.norm(found.path[frame] - thing.place(frame)) for frame in range(9)]
            assert max(away) < 0.3 * thing.radius, "the middle of the ink is near that of the box"


def test_what_is_not_plain_has_no_background() -> None:
    ramp = np.linspace(0, 255, SIZE).astype(np.uint8)
    frames = np.broadcast_to(ramp[:, None], (1, SIZE, SIZE, 3)).copy()
    assert view(frames).background is None
    assert view(draw(Scene("olive"))).things == ()
    assert view(spoiled(draw(Scene("olive")), 3)).things == ()


def test_frames_of_another_kind() -> None:
    with pytest.raises(ValueError, match=r"view: frames must be uint8 \[F, H, W, 3\], got float32 \[1, 4, 4, 3\]"):
        view(np.zeros((1, 4, 4, 3), np.float32))  # type: ignore[arg-type]
    made = sample("t2v", 0, "test")
    with pytest.raises(ValueError, match=r"judge: expected frames \[9, 32, 32, 3\], got \[5, 32, 32, 3\]"):
        judge(made, np.zeros((5, SIZE, SIZE, 3), np.uint8))
    with pytest.raises(ValueError, match="understanding has no picture"):
        judge(sample("understanding", 0, "test"), np.zeros((1, SIZE, SIZE, 3), np.uint8))


def path(speed: tuple[float, float], frames: int = 9) -> NDArray[np.float64]:
    return np.array([8.0, 20.0]) + np.arange(frames)[:, None] * np.array(speed)


@pytest.mark.parametrize("motion", MOTIONS)
def test_directions(motion: str) -> None:
    x, y = MOTIONS[motion]
    rng = np.random.default_rng(0)
    for speed in (0.3, 1.0, 2.0):
        walked = path((speed * x, speed * y))
        walked += rng.normal(0, 0.1, walked.shape)
        assert direction(walked) == motion
        walked[2] = np.nan
        assert direction(walked) == motion


def test_directions_that_have_no_name() -> None:
    assert direction(path((-1.0, -1.0))) is None, "both diagonals lead to the right"
    missing = path((1.0, 0.0))
    missing[:5] = np.nan
    assert direction(missing) is None, "seen in less than half of it"
    assert direction(path((0.0, 0.0), 1)) is None, "a picture has no motion"
    assert direction(path((1.0, 0.3))) == "right"


def test_connected_pieces() -> None:
    from scipy import ndimage  # which scikit-learn brings

    rng = np.random.default_rng(0)
    for share in (0.05, 0.2, 0.6, 1.0):
        mask = rng.random((4, 9, 11)) < share
        labels, count = connected(mask)
        wanted, number = ndimage.label(mask, np.ones((3, 3, 3)))
        pairs = set(zip(labels.reshape(-1).tolist(), wanted.reshape(-1).tolist(), strict=True))
        assert count == number and len(pairs) == number + (not mask.all()) and ((0, 0) in pairs) == (not mask.all())
    assert connected(np.zeros((1, 3, 3), bool))[1] == 0


def test_psnr_in_numbers() -> None:
    zero = np.zeros((1, 4, 4, 3), np.uint8)
    ten = zero + np.uint8(10)
    assert psnr(zero, ten) == pytest.approx(20 * np.log10(25.5))
    half = np.zeros((1, 4, 4), bool)
    half[:, :2] = True
    mixed = np.where(half[..., None], zero, ten).astype(np.uint8)
    assert psnr(mixed, zero, ~half) == pytest.approx(20 * np.log10(25.5))
    assert psnr(mixed, zero, half) == pytest.approx(58.92, abs=0.01), "as good as rounded values get"


def test_an_added_thing_may_stand_anywhere() -> None:
    made = next(
        m for seed in range(99) if (m := sample("v2v", seed, "test", edit="add")).scene and not m.sources[0].things
    )
    assert made.scene is not None
    main = made.scene.main
    moved = Thing(main.shape, main.color, main.size, "still", (32 - main.start[0], 32 - main.start[1]), 0, main.digit)
    verdict = judge(made, draw(Scene(made.scene.background, (moved,))))
    assert all(verdict.checks.values()) and verdict.psnr is not None and verdict.psnr > 40
    spoilt = draw(Scene(made.scene.background, (moved,)))
    spoilt[:, :4] = 255 - spoilt[:, :4]
    worse = judge(made, spoilt).psnr
    assert worse is not None and worse < 25, "what is wrong beside it still counts"
