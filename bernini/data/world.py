"""The synthetic world: samples of every task with exact ground truth, made on demand.

``sample(task, seed, split)`` is a pure function. Every sample carries the scenes that its pictures were drawn from.

=========  ====================================================================================================
split      what is different
=========  ====================================================================================================
train      nothing in it is of a withheld combination; three quarters of the handwritten digits
test       the same combinations; the other digits, and draws of its own
unseen     what is asked for is of a :data:`WITHHELD` combination of color and shape; digits as in test
=========  ====================================================================================================
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from . import words
from .scene import (
    BACKGROUNDS,
    COLORS,
    FRAMES,
    GRID,
    MOTIONS,
    RADII,
    SHAPES,
    SIZE,
    SPEEDS,
    Frames,
    Scene,
    Thing,
    digits,
    draw,
)

TASKS = ("t2i", "t2v", "i2i", "v2v", "i2v", "r2v", "rv2v", "understanding")
SPLITS = ("train", "test", "unseen")
EDITS = ("recolor", "background", "shape", "size", "motion", "remove", "add")
"""Of videos; pictures have no motion to change."""

STRESSED = ("shape", "shape")
"""Edits that come up so many times more in training: the ones that are hardest to learn."""

WITHHELD = frozenset(
    {("red", "circle"), ("blue", "square"), ("green", "ring"), ("yellow", "cross"), ("purple", "triangle")}
)
"""(color, shape): a tenth of the 48, never drawn in training, neither in targets nor in sources."""

DISTRACTED, DIGIT = 0.3, 0.3
"""Shares of scenes with a second thing, and of things that are a digit where any shape may be."""

REFERRED = 0.6
"""The share of digits in place of :data:`DIGIT` among the things of references in training: there an image of hundreds
is to be copied, and of other things only one of five shapes."""


@dataclass(frozen=True)
class Sample:
    """One task with its solution.

    Args:
        prompt: what is asked for.
        videos, images: the sources: uint8 ``[F, 32, 32, 3]`` and ``[32, 32, 3]``.
        target: uint8 ``[F, 32, 32, 3]``, one frame for pictures; ``None`` for understanding.
        scene: what the target shows; in understanding, what is asked about (``None``: text alone).
        sources: what the videos and then the images show.
        edit: one of :data:`EDITS` in i2i and v2v.
        answer: in understanding.
    """

    task: str
    seed: int
    split: str
    prompt: str
    videos: tuple[Frames, ...] = ()
    images: tuple[Frames, ...] = ()
    target: Frames | None = None
    scene: Scene | None = None
    sources: tuple[Scene, ...] = ()
    edit: str | None = None
    answer: str | None = None


def sample(task: str, seed: int, split: str = "train", *, edit: str | None = None) -> Sample:
    """The sample of that number.

    Args:
        edit: which edit, for i2i and v2v; by default any.

    Raises:
        ValueError: an unknown task, split or edit, or a negative seed.
        ImportError: scikit-learn, whose digits are used, is not installed.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; there are {', '.join(TASKS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    if seed < 0:
        raise ValueError(f"a seed is not negative, got {seed}")
    possible = {"i2i": tuple(e for e in EDITS if e != "motion"), "v2v": EDITS}.get(task, ())
    if edit is not None and edit not in possible:
        raise ValueError(
            f"{task} has no edit {edit!r}; " + (f"there are {', '.join(possible)}" if possible else "it has none")
        )
    rng = np.random.default_rng([SPLITS.index(split), TASKS.index(task), seed])
    maker = _Maker(rng, split)
    if possible:
        often = STRESSED if split == "train" else ()
        chosen = words.pick(rng, (*possible, *often))  # drawn in any case, so that asking for one changes nothing else
        return _edited(maker, task, seed, edit or chosen)
    made = {"t2i": _from_text, "t2v": _from_text, "i2v": _animated, "r2v": _referred, "rv2v": _replaced}
    return made.get(task, _understood)(maker, task, seed)


def edited_region(before: Scene, after: Scene, frames: int) -> NDArray[np.bool_]:
    """``[F, 32, 32]``: where the two scenes may differ: boxes of things that one of them has alone; or everywhere."""
    region = np.full((frames, SIZE, SIZE), before.background != after.background)
    for thing in set(before.things) ^ set(after.things):
        for frame in range(frames):
            left, top, right, bottom = thing.box(frame)
            region[frame, top:bottom, left:right] = True
    return region


@functools.cache
def digit_numbers(held_out: bool) -> NDArray[np.int64]:
    """Which digits are for training, or a quarter of each kind that is not."""
    labels = digits()[1]
    chosen = []
    for label in range(10):
        numbers = np.random.default_rng(label).permutation(np.flatnonzero(labels == label))
        quarter = len(numbers) // 4
        chosen.append(numbers[:quarter] if held_out else numbers[quarter:])
    return np.sort(np.concatenate(chosen))


# --- scenes -----------------------------------------------------------------------------------------------------------


class _Maker:
    """Draws things and scenes that the split allows."""

    def __init__(self, rng: np.random.Generator, split: str) -> None:
        self.rng, self.split = rng, split

    def allowed(self, thing: Thing) -> bool:
        return (thing.color, thing.shape) not in WITHHELD

    def look(
        self, shapes: Sequence[str] = SHAPES, *, asked_for: bool = False, referred: bool = False
    ) -> tuple[str, str, int | None]:
        """(shape, color, digit); what is asked for is of a withheld combination in the split for these."""
        rng = self.rng
        if asked_for and self.split == "unseen":
            pairs = sorted(pair for pair in WITHHELD if pair[1] in shapes)
            color, shape = pairs[int(rng.integers(len(pairs)))]
            return shape, color, None
        plain = [shape for shape in shapes if shape != "digit"]
        share = REFERRED if referred and self.split == "train" else DIGIT
        shape = "digit" if "digit" in shapes and (not plain or rng.random() < share) else words.pick(rng, plain)
        colors = [color for color in COLORS if (color, shape) not in WITHHELD]
        numbers = digit_numbers(self.split != "train")
        return shape, words.pick(rng, colors), int(rng.choice(numbers)) if shape == "digit" else None

    def thing(
        self, motion: str | None = None, *, size: str | None = None, shapes: Sequence[str] = SHAPES,
        asked_for: bool = False, referred: bool = False,
    ) -> Thing:  # fmt: skip
        """One that stays in the picture with all of it in every frame."""
        rng = self.rng
        shape, color, digit = self.look(shapes, asked_for=asked_for, referred=referred)
        motion = words.pick(rng, tuple(MOTIONS)) if motion is None else motion
        size = words.pick(rng, tuple(RADII)) if size is None else size
        return self.placed(Thing(shape, color, size, motion, (0.0, 0.0), _speed(rng, motion, size), digit))

    def placed(self, thing: Thing) -> Thing:
        """Somewhere else on the grid."""
        start = []
        for step in MOTIONS[thing.motion]:
            way = step * thing.speed * (FRAMES - 1)
            start.append(_on_grid(self.rng, thing.radius - min(way, 0), SIZE - thing.radius - max(way, 0)))
        return replace(thing, start=(start[0], start[1]))

    def background(self, other_than: str = "") -> str:
        return words.pick(self.rng, [name for name in BACKGROUNDS if name != other_than])

    def scene(self, main: Thing, *, shares: float = DISTRACTED) -> Scene:
        """Perhaps with a small still thing of another shape and color beside it."""
        background = self.background()
        if self.rng.random() < shares:
            other = self.beside(main)
            if other is not None:
                return Scene(background, (other, main))
        return Scene(background, (main,))

    def beside(self, main: Thing) -> Thing | None:
        """``None`` where nothing found a place clear of the other's way."""
        for _ in range(20):
            other = self.thing("still", size="small")
            clear = all(_apart(main.box(frame), other.box(frame)) for frame in range(FRAMES))
            if clear and other.shape != main.shape and other.color != main.color:
                return other
        return None


def speeds(size: str) -> list[float]:
    """Those with which a thing of that size can cross the picture and stay in it."""
    return [speed for speed in SPEEDS if speed * (FRAMES - 1) <= SIZE - 2 * RADII[size]]


def _speed(rng: np.random.Generator, motion: str, size: str) -> float:
    fitting = speeds(size)
    return fitting[int(rng.integers(len(fitting)))] if motion != "still" else 0.0


def _on_grid(rng: np.random.Generator, low: float, high: float) -> float:
    """``low`` or some steps of the grid behind it, at most ``high``."""
    return low + GRID * int(rng.integers(int((high - low) // GRID) + 1))


def _apart(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


# --- tasks ------------------------------------------------------------------------------------------------------------


def _from_text(maker: _Maker, task: str, seed: int) -> Sample:
    moving = task == "t2v"
    scene = maker.scene(maker.thing(None if moving else "still", asked_for=True))
    prompt = words.describe(maker.rng, scene, moving)
    return Sample(task, seed, maker.split, prompt, target=draw(scene, FRAMES if moving else 1), scene=scene)


def _animated(maker: _Maker, task: str, seed: int) -> Sample:
    scene = maker.scene(maker.thing(asked_for=True))
    target = draw(scene)
    what, rng = words.short_name(maker.rng, scene.main), maker.rng
    prompt = words.pick(rng, (f"the {what} {{}}", f"a video in which the {what} {{}}")).format(
        words.pick(rng, words.MOVES[scene.main.motion])
    )
    return Sample(
        task, seed, maker.split, prompt, images=(target[0],), target=target, scene=scene, sources=(scene,)
    )  # fmt: skip


def _edited(maker: _Maker, task: str, seed: int, edit: str) -> Sample:
    rng, video = maker.rng, task == "v2v"
    motion = None if video else "still"
    unseen = maker.split == "unseen"
    if edit in ("recolor", "shape"):
        # The result is what is asked for, so it is what the split decides about; the source is of any allowed look.
        plain = tuple(shape for shape in SHAPES if shape != "digit")
        result = maker.thing(motion, shapes=plain if unseen or edit == "shape" else SHAPES, asked_for=True)
        if edit == "recolor":
            colors = [c for c in COLORS if c != result.color and (c, result.shape) not in WITHHELD]
            start = replace(result, color=words.pick(rng, colors))
        else:
            shapes = [s for s in plain if s != result.shape and (result.color, s) not in WITHHELD]
            start = replace(result, shape=words.pick(rng, shapes))
    else:
        start = result = maker.thing(motion, asked_for=True)
    before = maker.scene(start)
    others = before.things[:-1]
    if any(result.color == o.color or result.shape == o.shape for o in others):  # would be hard to tell apart
        others, before = (), replace(before, things=(start,))
    after = replace(before, things=(*others, result))
    if edit == "background":
        after = replace(after, background=maker.background(before.background))
    elif edit == "size":
        other = {"small": "large", "large": "small"}[start.size]
        start = replace(start, speed=_speed(rng, start.motion, "large"))  # at which both sizes stay in the picture
        result = _inside(replace(start, size=other))
        start = _inside(replace(start, start=result.start))  # in one place, where there is room for both
        before, after = replace(before, things=(start,)), replace(before, things=(result,))
    elif edit == "motion":
        motions = [m for m in MOTIONS if m != start.motion]
        moved = replace(start, motion=words.pick(rng, motions))
        moved = replace(moved, speed=_speed(rng, moved.motion, moved.size))
        # Both begin at one place, from which both ways stay in the picture.
        start, moved = _together(rng, start, moved)
        before, after = replace(before, things=(start,)), replace(before, things=(moved,))
    elif edit == "remove":
        after = replace(before, things=others)
    elif edit == "add":
        # Beside what is there; a second thing that found no place leaves an empty scene to add to.
        before = replace(before, things=others)
    prompt = words.instruct(rng, edit, before, after)
    frames = FRAMES if video else 1
    pictures = draw(before, frames)
    return Sample(
        task,
        seed,
        maker.split,
        prompt,
        videos=(pictures,) if video else (),
        images=() if video else (pictures[0],),
        target=draw(after, frames),
        scene=after,
        sources=(before,),
        edit=edit,
    )


def _inside(thing: Thing) -> Thing:
    """Moved as little as needed to be in the picture from the first frame to the last."""
    start = []
    for at, step in zip(thing.start, MOTIONS[thing.motion], strict=True):
        way = step * thing.speed * (FRAMES - 1)
        start.append(min(max(at, thing.radius - min(way, 0)), SIZE - thing.radius - max(way, 0)))
    return replace(thing, start=(start[0], start[1]))


def _together(rng: np.random.Generator, one: Thing, other: Thing) -> tuple[Thing, Thing]:
    """Both at one place from which both stay in the picture; at half the speed, and again, until there is one."""
    while True:
        rooms = []
        for steps in zip(MOTIONS[one.motion], MOTIONS[other.motion], strict=True):
            ways = (0.0, *(s * thing.speed * (FRAMES - 1) for s, thing in zip(steps, (one, other), strict=True)))
            rooms.append((one.radius - min(ways), SIZE - one.radius - max(ways)))
        if all(low <= high for low, high in rooms):
            break
        one, other = replace(one, speed=one.speed / 2), replace(other, speed=other.speed / 2)
    x, y = (_on_grid(rng, low, high) for low, high in rooms)
    return replace(one, start=(x, y)), replace(other, start=(x, y))


def _referred(maker: _Maker, task: str, seed: int) -> Sample:
    """Things of one or two reference pictures, each on a background of its own, together in a scene. A picture shows
    its thing where the video begins with it."""
    main = maker.thing(asked_for=True, referred=True)
    scene = maker.scene(main, shares=0.5)
    references = []
    for thing in reversed(scene.things):  # the main one is image 1
        still = replace(thing, motion="still", speed=0.0)
        references.append(Scene(maker.background(), (still,)))
    prompt = words.arrange(maker.rng, scene, len(references))
    images = tuple(draw(reference, 1)[0] for reference in references)
    return Sample(
        task, seed, maker.split, prompt, images=images, target=draw(scene), scene=scene, sources=tuple(references)
    )


def _replaced(maker: _Maker, task: str, seed: int) -> Sample:
    """A thing of a video gives its motion to the one in a reference picture, which has its size and first place."""
    start = maker.thing()
    before = maker.scene(start)
    for _ in range(100):
        new = replace(maker.thing("still", size=start.size, asked_for=True, referred=True), start=start.start)
        others = before.things[:-1]
        if (new.shape, new.color, new.digit) != (start.shape, start.color, start.digit) and all(
            new.shape != other.shape and new.color != other.color for other in others
        ):
            break
        before = replace(before, things=(start,))
    result = replace(start, shape=new.shape, color=new.color, digit=new.digit)
    after = replace(before, things=(*before.things[:-1], result))
    reference = Scene(maker.background(), (new,))
    prompt = words.pick(maker.rng, words.REPLACE).format(what=words.short_name(maker.rng, start))
    return Sample(
        task, seed, maker.split, prompt, videos=(draw(before),), images=(draw(reference, 1)[0],), target=draw(after),
        scene=after, sources=(before, reference),
    )  # fmt: skip


def _understood(maker: _Maker, task: str, seed: int) -> Sample:
    kind = int(maker.rng.integers(5))
    if kind == 0:
        prompt, answer = words.text_only(maker.rng)
        return Sample(task, seed, maker.split, prompt, answer=answer)
    moving = kind > 2
    scene = maker.scene(maker.thing(None if moving else "still", asked_for=True))
    prompt, answer = words.question(maker.rng, scene, moving)
    pictures = draw(scene, FRAMES if moving else 1)
    return Sample(
        task, seed, maker.split, prompt, videos=(pictures,) if moving else (), images=() if moving else (pictures[0],),
        scene=scene, sources=(scene,), answer=answer,
    )  # fmt: skip
