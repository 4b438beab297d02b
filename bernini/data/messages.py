"""The release's way to write a sample down: a list of messages, in JSON in the column ``inputs``.

=================  ================================================================  ==================================
type               further fields                                                    meaning
=================  ================================================================  ==================================
``text``           ``text``; ``has_loss`` 0 (default): asked, 1: to be answered      prompt, or answer
``cot_text``       ``text``                                                          reasoning; part of the prompt
``image``          ``has_loss`` 0 (default) or 1                                     the next of the row's images
``image_gen``      ``has_loss`` 1 (default) or 0                                     the next of the row's images
``video``          ``has_loss`` 0 (default) or 1                                     the next of the row's videos
``frame_gen``      ``has_loss`` 1 (default) or 0                                     the next of the row's videos
``video_gen``      ``has_loss`` 1 (default) or 0                                     the next of the row's videos
``special_token``  anything                                                          ignored
=================  ================================================================  ==================================

A picture with ``has_loss`` 1 is the target, one without is a source. The release's documentation lets every ``*_gen``
default to 1, its training code only ``video_gen``; both readings agree here: an ``image_gen`` or ``frame_gen`` that
says nothing is the target where nothing else is, and a source beside one that is.

``cot_text`` joins the prompt where it stands, whatever its ``has_loss``: so the released renderer is trained. Planning
with reasoning is not released; :attr:`Talk.reasoning` keeps the text apart for it.

Sources: facts section F; the release's ``docs/bernini_r_train.md`` and ``bernini/training/data.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bernini.presets import TASKS, infer_task

from .example import Example
from .skips import Bad

IMAGE_TYPES, VIDEO_TYPES, TEXT_TYPES = ("image", "image_gen"), ("video", "frame_gen", "video_gen"), ("text", "cot_text")
GENERATED = {"video_gen": 1, "image_gen": None, "frame_gen": None}
"""What ``has_loss`` is of those that do not say: ``None`` is settled by the others."""

RELEASED_TASKS: Mapping[str, str] = {"r2i": "i2i", "vi2v": "rv2v", "vr2v": "rv2v", "vrc2v": "rv2v"}
"""Tasks of the release that have another name here: an image from references, and videos edited by references."""
TASK_NAMES = (*TASKS, "i2v", "understanding")


@dataclass(frozen=True)
class Slot:
    """A picture of a row: the ``number``-th of its images or of its videos."""

    kind: Literal["image", "video"]
    number: int


@dataclass(frozen=True)
class Talk:
    """A message list, understood.

    Args:
        prompt: all texts without loss, reasoning among them, joined by spaces in order, as the release does.
        sources: videos, then images, each in the order of the messages.
        answer: texts with loss, joined by spaces; ``None`` if there is none.
        reasoning: the ``cot_text`` alone.
        images, videos: how many pictures the row must have.
    """

    prompt: str
    sources: tuple[Slot, ...]
    target: Slot | None
    answer: str | None
    reasoning: str
    images: int
    videos: int


def read_messages(inputs: Any) -> Talk:
    """Understands the column ``inputs``: JSON text, or the list itself.

    Raises:
        Bad: ``wrong schema``, ``two targets``, ``no target`` or ``empty text``.
    """
    prompt: list[str] = []
    answer: list[str] = []
    reasoning: list[str] = []
    slots: list[tuple[Slot, int | None]] = []
    counts = {"image": 0, "video": 0}
    for number, message in enumerate(_listed(inputs)):
        kind = message.get("type")
        if kind == "special_token":
            continue
        loss = message.get("has_loss")
        if loss is None:
            loss = GENERATED.get(kind, 0) if isinstance(kind, str) else 0
        if loss is not None and (not isinstance(loss, int) or loss not in (0, 1)):
            raise Bad("wrong schema", f"message {number}: has_loss is {loss!r}, expected 0 or 1")
        if kind in TEXT_TYPES:
            text = message.get("text", "")
            if not isinstance(text, str):
                raise Bad("wrong schema", f"message {number}: its text is {type(text).__name__}")
            (answer if kind == "text" and loss else prompt).append(text)
            if kind == "cot_text":
                reasoning.append(text)
        elif kind in IMAGE_TYPES or kind in VIDEO_TYPES:
            what: Literal["image", "video"] = "image" if kind in IMAGE_TYPES else "video"
            slots.append((Slot(what, counts[what]), loss))
            counts[what] += 1
        else:
            raise Bad("wrong schema", f"message {number} has the unknown type {kind!r}")
    target = _target(slots)
    sources = [slot for slot, _ in slots if slot != target]
    talk = Talk(
        prompt=" ".join(text for text in prompt if text),
        sources=tuple(sorted(sources, key=lambda slot: slot.kind == "image")),
        target=target,
        answer=" ".join(answer) if answer else None,
        reasoning=" ".join(reasoning),
        images=counts["image"],
        videos=counts["video"],
    )
    _check(talk)
    return talk


def _listed(inputs: Any) -> Sequence[Mapping[str, Any]]:
    if isinstance(inputs, str):
        try:
            inputs = json.loads(inputs)
        except (ValueError, RecursionError) as error:
            raise Bad("wrong schema", f"inputs is not JSON ({error})") from None
    if not isinstance(inputs, list) or not inputs:
        raise Bad("wrong schema", f"inputs must hold a list of messages, holds {_short(inputs)}")
    for number, message in enumerate(inputs):
        if not isinstance(message, dict):
            raise Bad("wrong schema", f"message {number} is {_short(message)}, expected an object with a type")
    return inputs


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:36]}..."


def _target(slots: Sequence[tuple[Slot, int | None]]) -> Slot | None:
    sure = [slot for slot, loss in slots if loss == 1]
    found = sure or [slot for slot, loss in slots if loss is None]
    if len(found) > 1:
        raise Bad("two targets", f"{len(found)} pictures are to be made: " + ", ".join(slot.kind for slot in found))
    return found[0] if found else None


def _check(talk: Talk) -> None:
    if talk.target is None and talk.answer is None:
        raise Bad("no target", "no picture and no text has a loss")
    if talk.answer is not None and not talk.answer.strip():
        raise Bad("empty text", "the answer is empty")
    if talk.target is not None and not talk.prompt.strip():
        raise Bad("empty text", "the prompt is empty")


def task_name(named: str | None, talk: Talk) -> str:
    """Our name of a row's task; where the row has none, what its pictures mean.

    Args:
        named: a task's name, the release's or ours, or a data set's name ``<task>$<name>``.

    Raises:
        Bad: ``unknown task``, or ``wrong schema`` where the task and the target do not go together.
    """
    task = known_task(named)
    still = talk.target is not None and talk.target.kind == "image"
    if task is None:
        videos = sum(slot.kind == "video" for slot in talk.sources)
        images = len(talk.sources) - videos
        task = "understanding" if talk.target is None else infer_task(videos, images, still=still)
    if (task == "understanding") != (talk.target is None):
        raise Bad("wrong schema", f"the task {task} with {'a' if talk.target else 'no'} picture to make")
    if talk.target is not None and still != (task in TASKS and TASKS[task].still):
        raise Bad("wrong schema", f"the target of {task} is of the kind {talk.target.kind}")
    return task


def known_task(named: str | None) -> str | None:
    """Our name for ``<task>`` or ``<task>$<name>``; ``None`` for none and for ``default``. Names that begin with
    ``und`` are understanding, as in the release.

    Raises:
        Bad: ``unknown task``.
    """
    name = (named or "").split("$")[0].strip().lower()
    if name in ("", "default"):
        return None
    task = "understanding" if name.startswith("und") else RELEASED_TASKS.get(name, name)
    if task not in TASK_NAMES:
        raise Bad("unknown task", f"{name!r} is none of {', '.join((*TASK_NAMES, *RELEASED_TASKS))}")
    return task


def write_messages(example: Example) -> list[dict[str, Any]]:
    """An example as messages: the prompt, videos, images, the target, the answer. Pictures of a kind are numbered in
    this order, so a target comes after the sources of its kind."""
    messages: list[dict[str, Any]] = [{"type": "text", "text": example.prompt}] if example.prompt else []
    messages += [{"type": source.kind} for source in example.sources]
    if example.target is not None:
        messages.append({"type": f"{example.target.kind}_gen", "has_loss": 1})
    if example.answer is not None:
        messages.append({"type": "text", "text": example.answer, "has_loss": 1})
    return messages
