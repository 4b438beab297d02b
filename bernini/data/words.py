"""The grammar of the synthetic world: several phrasings for every meaning, picked by the caller's generator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .scene import Scene, Thing

MOVES: dict[str, tuple[str, ...]] = {
    "still": ("stands still", "does not move", "stays where it is"),
    "left": ("moves left", "moves to the left", "goes left"),
    "right": ("moves right", "moves to the right", "goes right"),
    "up": ("moves up", "rises", "goes upwards"),
    "down": ("moves down", "sinks", "goes downwards"),
    "diagonally up": ("moves diagonally up", "moves up and to the right", "goes diagonally upwards"),
    "diagonally down": ("moves diagonally down", "moves down and to the right", "goes diagonally downwards"),
}
ORDERS: dict[str, tuple[str, ...]] = {
    motion: tuple(verb.replace("does not move", "not move").replace("goes", "go").replace("moves", "move")
                  .replace("stands", "stand").replace("stays", "stay").replace("rises", "rise").replace("sinks", "sink")
                  for verb in verbs)
    for motion, verbs in MOVES.items()
}  # fmt: skip
"""The same as something that is asked for: "make it move left"."""

EDITS: dict[str, tuple[str, ...]] = {
    "recolor": (
        "recolor the {what} to {color}", "make the {what} {color}", "change the color of the {what} to {color}",
    ),
    "background": (
        "change the background to {background}", "make the background {background}",
        "put the {what} on {ground}",
    ),
    "shape": ("turn the {what} into a {shape}", "change the {what} to a {shape}", "replace the {what} with a {shape}"),
    "size": ("make the {what} {size}", "change the size of the {what} to {size}", "let the {what} be {size}"),
    "motion": ("make the {what} {order}", "change the motion: the {what} should {order}", "let the {what} {order}"),
    "remove": ("remove the {what}", "delete the {what}", "take the {what} away"),
    "add": ("add {added}", "put {added} into the scene", "insert {added}"),
}  # fmt: skip
REPLACE = (
    "replace the {what} with the one in the reference image",
    "swap the {what} for the object of image 1",
    "put the object from the reference image in place of the {what}",
)
OPPOSITES = {"left": "right", "right": "left", "up": "down", "down": "up", "small": "large", "large": "small"}


def pick(rng: np.random.Generator, phrases: Sequence[str]) -> str:
    return phrases[int(rng.integers(len(phrases)))]


def article(words: str) -> str:
    """With "a" or "an" in front."""
    return f"{'an' if words[0] in 'aeio' else 'a'} {words}"


def full_name(thing: Thing, *, sized: bool = True) -> str:
    """``"small red circle"``."""
    return f"{thing.size} {thing.color} {thing.shape}" if sized else f"{thing.color} {thing.shape}"


def short_name(rng: np.random.Generator, thing: Thing) -> str:
    """What tells the thing from a distractor: its shape, perhaps with its color."""
    return pick(rng, (thing.shape, full_name(thing, sized=False)))


def caption(scene: Scene, moving: bool) -> str:
    """The one full description of a scene."""
    if not scene.things:
        return f"an empty {scene.background} background"
    verb = f" {MOVES[scene.main.motion][0]}" if moving else ""
    beside = "".join(f" beside {article(full_name(other))}" for other in scene.things[:-1])
    return f"{article(full_name(scene.main))}{verb}{beside} on {_ground(scene)}"


def _ground(scene: Scene) -> str:
    return article(f"{scene.background} background")


def describe(rng: np.random.Generator, scene: Scene, moving: bool) -> str:
    """A description in one of several phrasings; sizes and distractors may go unsaid."""
    thing, background = scene.main, scene.background
    name = article(full_name(thing, sized=bool(rng.integers(2))))
    others = [full_name(other, sized=False) for other in scene.things[:-1] if rng.integers(2)]
    beside = f" beside {article(others[0])}" if others else ""
    kind = "video" if moving else "picture"
    verb = pick(rng, MOVES[thing.motion])
    forms = (
        f"{name}{f' {verb}' if moving else ''}{beside} on {_ground(scene)}",
        f"{_ground(scene)} with {name}{f' that {verb}' if moving else ''}{beside}",
        f"a {kind} of {name}{f' that {verb}' if moving else ''}{beside}, {background} background",
    )
    return pick(rng, forms)


def instruct(rng: np.random.Generator, edit: str, before: Scene, after: Scene) -> str:
    """What to do to ``before`` to get ``after``."""
    spoken = after if edit == "add" else before
    thing, new = spoken.main, after.main if after.things else spoken.main
    values = {
        "what": short_name(rng, before.main) if before.things else "", "color": new.color, "shape": new.shape,
        "size": new.size, "background": after.background, "ground": _ground(after),
        "order": pick(rng, ORDERS[new.motion]), "added": article(full_name(thing)),
    }  # fmt: skip
    return pick(rng, EDITS[edit]).format(**values)


def arrange(rng: np.random.Generator, scene: Scene, references: int) -> str:
    """A video of the things in one or two reference images."""
    main = (
        "the object from image 1" if references > 1 else pick(rng, ("the object in the image", "the reference object"))
    )
    beside = " beside the object from image 2" if references > 1 else ""
    verb = pick(rng, MOVES[scene.main.motion])
    forms = (
        f"{main} {verb}{beside} on {_ground(scene)}",
        f"a video in which {main} {verb}{beside}, {scene.background} background",
        f"{_ground(scene)} where {main} {verb}{beside}",
    )
    return pick(rng, forms)


def question(rng: np.random.Generator, scene: Scene, moving: bool) -> tuple[str, str]:
    """About a picture or video: (question, answer)."""
    thing = scene.main
    asked = [
        (f"what color is the {thing.shape}?", thing.color),
        (f"what is the shape of the {thing.color} object?", thing.shape),
        ("what color is the background?", scene.background),
        (f"is the {thing.shape} small or large?", thing.size),
        ("how many objects are there?", {1: "one", 2: "two"}[len(scene.things)]),
        (pick(rng, ("what do you see?", "describe it", "what is shown?")), caption(scene, moving)),
    ]
    if moving:
        asked.append((f"where does the {thing.shape} move?", thing.motion))
    return asked[int(rng.integers(len(asked)))]


def text_only(rng: np.random.Generator) -> tuple[str, str]:
    """(question, answer) about words alone."""
    word = pick(rng, tuple(OPPOSITES))
    return pick(rng, (f"what is the opposite of {word}?", f"opposite of {word}")), OPPOSITES[word]
