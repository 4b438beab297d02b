"""What a result should show and whether it does: a sample and the frames that were made for it -> named checks.

=============  =======================================================================================================
check          right where
=============  =======================================================================================================
background     it has the wanted color
color, shape,  the thing that the sample is about has them; which digit it is counts where an image of it was given,
size, digit    its size where the prompt tells it or a source shows it
motion         it goes the wanted way
gone           nothing is left where the thing was that was to be removed, and nothing of its color anywhere
others         every other thing is there, in its color and shape
count          there are as many things as there should be
=============  =======================================================================================================

Which thing of the result it is about: where a source or an edit fixes a place, the nearest to it; else the one that
has most of what is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..data import words
from ..data.scene import Frames, Scene, Thing, digits
from ..data.world import Sample, edited_region, speeds
from .identity import Match, identify
from .measure import Found, Mask, View, view

REACH = 8.0
"""Pixels between middles, averaged over frames, up to which a thing is the one that is looked for."""

FOLLOWED: Mapping[str, tuple[str, ...]] = {
    "t2i": ("color", "shape"),
    "t2v": ("color", "shape", "motion"),
    "i2v": ("motion", "color", "shape"),
    "r2v": ("color", "shape", "motion"),
    "rv2v": ("color", "shape"),
    "recolor": ("color",),
    "background": ("background",),
    "shape": ("shape",),
    "size": ("size",),
    "motion": ("motion", "color", "shape"),
    "remove": ("gone", "count"),
    "add": ("color", "shape"),
}
"""By edit, else by task: the checks that say whether the instruction was followed. All others say what was kept."""

LOCAL = ("recolor", "shape", "size", "motion", "remove", "add")
"""Edits that leave pixels outside of their region alone; rv2v is one too."""
DETERMINED = ("recolor", "background", "shape", "size", "remove")
"""Edits with one right result, to the pixel; rv2v has one too."""


@dataclass(frozen=True)
class Verdict:
    """
    Args:
        checks: those that apply.
        psnr: outside the edited region against the source, in dB; ``None`` where everything may change.
        psnr_truth: of all pixels against the only right result; ``None`` where there are many.
        identity: whether the digit's image is the wanted one; ``None`` where none was given.
    """

    checks: dict[str, bool]
    psnr: float | None = None
    psnr_truth: float | None = None
    identity: bool | None = None


def judge(sample: Sample, frames: Frames) -> Verdict:
    """Measures uint8 ``[F, 32, 32, 3]`` against what the sample wants.

    Raises:
        ValueError: a sample without a target, or frames of another shape than its.
    """
    if sample.target is None or sample.scene is None:
        raise ValueError(f"judge: a sample of {sample.task} has no picture to be made")
    if frames.shape != sample.target.shape:
        raise ValueError(f"judge: expected frames {list(sample.target.shape)}, got {list(frames.shape)}")
    seen = view(frames)
    main, others = _assigned(sample, seen)
    checks = _checks(sample, seen, main, others)
    psnr_outside = truth = None
    if sample.videos + sample.images and (sample.edit in LOCAL or sample.task == "rv2v"):
        region = edited_region(sample.sources[0], sample.scene, len(frames))
        if sample.edit in ("add", "motion") and main is not None:  # which leave the place to the model
            region |= _boxes(main, sample.scene.main)
        source = sample.videos[0] if sample.videos else sample.images[0][None]
        psnr_outside = psnr(frames, source, ~region)
    if sample.edit in DETERMINED or sample.task == "rv2v":
        truth = psnr(frames, sample.target)
    match = identity(sample, frames)
    right = None if match is None else match.number == sample.scene.main.digit
    return Verdict(checks, psnr_outside, truth, right)


def identity(sample: Sample, frames: Frames) -> Match | None:
    """The image of the digit that was to be put in, as seen in frames; ``None`` where the sample has none.

    In r2v a reference shows where the video begins, and the prompt which way it goes but not how fast: of the world's
    speeds the one counts at which the thing is most like an image.
    """
    if sample.task not in ("r2v", "rv2v") or sample.scene is None or sample.scene.main.digit is None:
        return None
    thing = sample.scene.main
    free = sample.task == "r2v" and thing.motion != "still"
    found = [identify(frames, replace(thing, speed=s)) for s in (speeds(thing.size) if free else [thing.speed])]
    return max(found, key=lambda match: match.correlation)


def psnr(frames: Frames, wanted: Frames, where: Mask | None = None) -> float:
    """In dB, over the pixels of a mask ``[F, H, W]``. Equal pixels count as rounded ones: 58.9 dB and not infinity."""
    error = (frames.astype(np.float64) - wanted) ** 2
    mean = float(error.mean() if where is None else error[where].mean())
    return float(10 * np.log10(255**2 / max(mean, 1 / 12)))


# --- which thing is which ---------------------------------------------------------------------------------------------


def _assigned(sample: Sample, seen: View) -> tuple[Found | None, list[Found | None]]:
    """What was found of the main thing (of the one that is removed: where it was) and of each other one."""
    assert sample.scene is not None
    after = sample.scene
    placed = sample.task in ("i2i", "v2v", "i2v", "rv2v")  # others stay where the source has them
    wanted = sample.sources[0].main if sample.edit == "remove" else after.main
    rest = after.things if sample.edit == "remove" else after.things[:-1]
    left = list(seen.things)

    def take(thing: Thing, *, at: bool, first: bool = False) -> Found | None:
        if at:
            near = [(_distance(found, thing, first=first), number) for number, found in enumerate(left)]
            best = min((pair for pair in near if pair[0] <= REACH), default=None)
            return None if best is None else left.pop(best[1])
        if not left:
            return None
        return left.pop(max(range(len(left)), key=lambda number: _agreement(left[number], thing)))

    if not placed or sample.edit == "add":
        kept = [take(thing, at=True) for thing in rest] if sample.edit == "add" else []
        main = take(wanted, at=False)
        return main, kept or [take(thing, at=False) for thing in rest]
    # Things that stay are told by color and shape too, so that one that went astray is not taken for them.
    kept = []
    for thing in rest:
        same = [f for f in left if f.color == thing.color and _distance(f, thing) <= REACH]
        kept.append(same[0] if same else None)
        left = [f for f in left if not same or f is not same[0]]
    return take(wanted, at=True, first=sample.edit == "motion" or sample.task == "i2v"), kept


def _distance(found: Found, thing: Thing, *, first: bool = False) -> float:
    """Pixels between middles, on average or where both begin."""
    frames = np.flatnonzero(np.isfinite(found.path).all(1))
    if not len(frames):
        return np.inf
    frames = frames[:1] if first else frames
    places = np.array([thing.place(int(frame)) for frame in frames])
    return float(np.linalg.norm(found.path[frames] - places, axis=1).mean())


def _agreement(found: Found, thing: Thing) -> tuple[int, float]:
    """How much of what is wanted a thing has; of equals the larger one counts."""
    same = (found.color == thing.color, found.look.shape == thing.shape, found.motion == thing.motion,
            found.look.size == thing.size)  # fmt: skip
    return sum(same), float(found.ink.sum())


def _boxes(found: Found, thing: Thing) -> Mask:
    """``[F, 32, 32]``: the wanted thing's box, no larger, wherever the thing was found."""
    region = np.zeros(found.ink.shape, bool)
    for frame, (x, y) in enumerate(found.path):
        if np.isfinite(x):
            left, top, right, bottom = replace(thing, start=(x, y), motion="still").box(0)
            rim = round(0.3 * thing.radius)  # so far is a triangle's middle from that of its box
            region[frame, max(top - rim, 0) : bottom + rim, max(left - rim, 0) : right + rim] = True
    return region


# --- checks -----------------------------------------------------------------------------------------------------------


def _checks(sample: Sample, seen: View, main: Found | None, others: list[Found | None]) -> dict[str, bool]:
    assert sample.scene is not None
    after, task = sample.scene, sample.task
    checks = {"background": seen.background == after.background}
    free = task in ("t2i", "t2v")
    told = [thing for thing in after.things[:-1] if not free or words.full_name(thing, sized=False) in sample.prompt]
    if sample.edit == "remove":
        gone = sample.sources[0].main
        checks["gone"] = main is None and all(found.color != gone.color for found in seen.things)
        told, least = list(after.things), len(after.things)
    else:
        checks |= _looks(sample, after, main)
        least = 1 + len(told)
    pairs = zip(after.things if sample.edit == "remove" else after.things[:-1], others, strict=True)
    found = dict(pairs)
    if told:
        checks["others"] = all(_is(found[thing], thing) for thing in told)
    checks["count"] = least <= len(seen.things) <= len(after.things)
    return checks


def _looks(sample: Sample, after: Scene, main: Found | None) -> dict[str, bool]:
    """The checks of the main thing; all wrong where it was not found."""
    thing, task = after.main, sample.task
    color, look, motion = (None, None, None) if main is None else (main.color, main.look, main.motion)
    checks = {"color": color == thing.color, "shape": look is not None and look.shape == thing.shape}
    if task not in ("t2i", "t2v") or f"{words.full_name(thing)}" in sample.prompt:
        checks["size"] = look is not None and look.size == thing.size
    if task in ("t2v", "i2v", "r2v", "rv2v") or (task == "v2v" and sample.edit != "add"):
        checks["motion"] = motion == thing.motion
    if thing.digit is not None and (task in ("i2v", "r2v", "rv2v") or (task == "v2v" and sample.edit != "add")):
        checks["digit"] = look is not None and look.digit == int(digits()[1][thing.digit])
    return checks


def _is(found: Found | None, thing: Thing) -> bool:
    return found is not None and (found.color, found.look.shape) == (thing.color, thing.shape)
