"""The release's messages: what they mean, and every way in which they can be wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bernini.data.example import Example, Features
from bernini.data.messages import RELEASED_TASKS, Slot, known_task, read_messages, task_name, write_messages
from bernini.data.skips import Bad, SkipLog

TEXT = {"type": "text", "text": "make it snow"}
ANSWER = {"type": "text", "text": "two birds", "has_loss": 1}


def test_the_parts_of_a_sample() -> None:
    talk = read_messages(
        [{"type": "special_token", "text": "<x>"}, {"type": "image"}, TEXT, {"type": "video", "has_loss": 0},
         {"type": "cot_text", "text": "snow falls", "has_loss": 1}, {"type": "image"}, {"type": "video_gen"}]
    )  # fmt: skip
    assert talk.prompt == "make it snow snow falls" and talk.reasoning == "snow falls" and talk.answer is None
    assert talk.sources == (Slot("video", 0), Slot("image", 0), Slot("image", 1)), "videos, then images"
    assert talk.target == Slot("video", 1) and (talk.images, talk.videos) == (2, 2)
    assert task_name(None, talk) == "rv2v"


def test_json_and_lists_say_the_same() -> None:
    messages = [TEXT, {"type": "image"}, ANSWER]
    assert read_messages(json.dumps(messages)) == read_messages(messages)
    talk = read_messages(messages)
    assert (talk.prompt, talk.answer, talk.target) == ("make it snow", "two birds", None)
    assert task_name(None, talk) == task_name("und_caption$set", talk) == "understanding"


@pytest.mark.parametrize(
    ("messages", "target"),
    [
        ([{"type": "image_gen"}], Slot("image", 0)),
        ([{"type": "image_gen", "has_loss": 1}, {"type": "image_gen", "has_loss": 0}], Slot("image", 0)),
        ([{"type": "frame_gen"}, {"type": "video_gen"}], Slot("video", 1)),
        ([{"type": "frame_gen"}, {"type": "video"}], Slot("video", 0)),
        ([{"type": "image"}, {"type": "image", "has_loss": 1}], Slot("image", 1)),
        ([{"type": "image"}, {"type": "image_gen", "has_loss": None}], Slot("image", 1)),
    ],
)
def test_what_is_to_be_made(messages: list[dict[str, Any]], target: Slot) -> None:
    talk = read_messages([TEXT, *messages])
    assert talk.target == target and target not in talk.sources and len(talk.sources) == len(messages) - 1


@pytest.mark.parametrize(
    ("inputs", "reason", "words"),
    [
        ("{not json", "wrong schema", "not JSON"),
        ("[" * 100_000, "wrong schema", "not JSON"),
        ('{"type": "text"}', "wrong schema", "list of messages"),
        ("[]", "wrong schema", "list of messages"),
        (None, "wrong schema", "list of messages"),
        (["text"], "wrong schema", "message 0"),
        ([TEXT, {"type": "audio_gen"}], "wrong schema", "message 1 has the unknown type 'audio_gen'"),
        ([TEXT, {"type": ["image"]}], "wrong schema", "unknown type"),
        ([TEXT, {"text": "no type"}], "wrong schema", "unknown type None"),
        ([{"type": "text", "text": 3}, {"type": "video_gen"}], "wrong schema", "its text is int"),
        ([TEXT, {"type": "video_gen", "has_loss": "yes"}], "wrong schema", "has_loss is 'yes'"),
        ([TEXT, {"type": "video_gen"}, {"type": "image_gen", "has_loss": 1}], "two targets", "video, image"),
        ([TEXT, {"type": "image_gen"}, {"type": "image_gen"}], "two targets", "2 pictures"),
        ([TEXT, {"type": "video_gen", "has_loss": 0}], "no target", "has a loss"),
        ([TEXT, {"type": "image"}], "no target", "has a loss"),
        ([{"type": "text", "text": " \n"}, {"type": "video_gen"}], "empty text", "prompt"),
        ([{"type": "video_gen"}], "empty text", "prompt"),
        ([TEXT, {"type": "text", "text": "", "has_loss": 1}], "empty text", "answer"),
    ],
)
def test_what_is_wrong_has_a_reason(inputs: Any, reason: str, words: str) -> None:
    with pytest.raises(Bad, match=".") as caught:
        read_messages(inputs)
    assert caught.value.reason == reason and words in caught.value.detail


def test_names_of_tasks() -> None:
    image, video = read_messages([TEXT, {"type": "image_gen"}]), read_messages([TEXT, {"type": "video_gen"}])
    assert known_task("T2V$movies-2024") == "t2v" and known_task(None) is known_task("default$x") is None
    assert {known_task(name) for name in RELEASED_TASKS} == {"i2i", "rv2v"}
    assert (
        task_name("r2i$x", image) == "i2i" and task_name("mv2v", video) == "mv2v" and task_name("i2v", video) == "i2v"
    )
    assert (task_name("", image), task_name(None, video)) == ("t2i", "t2v")
    for name, talk, reason in (("x2y", video, "unknown task"), ("t2i", video, "wrong schema"),
                               ("t2v", image, "wrong schema"), ("und", image, "wrong schema")):  # fmt: skip
        with pytest.raises(Bad) as caught:
            task_name(name, talk)
        assert caught.value.reason == reason


def test_what_is_written_reads_the_same() -> None:
    video, image = Features("video"), Features("image")
    for example in (
        Example("a", "rv2v", "put it there", (video, image, image), video),
        Example("b", "i2i", "make it blue", (image,), image),
        Example("c", "understanding", "what is it?", (video,), None, "a ring"),
        Example("d", "understanding", "", (), None, "a text"),
    ):
        talk = read_messages(json.dumps(write_messages(example)))
        assert (talk.prompt, talk.answer) == (example.prompt, example.answer)
        assert [slot.kind for slot in talk.sources] == [source.kind for source in example.sources]
        assert (talk.target is None) == (example.target is None) and task_name(None, talk) == example.task
        if talk.target is not None:
            assert talk.target.number == sum(s.kind == talk.target.kind for s in talk.sources)


def test_skips_are_counted_and_the_first_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    log = SkipLog()
    skips = [Bad("empty text", f"number {n}").skip(f"key {n}") for n in range(9)]
    kept = log.usable([*skips, Example("e", "t2i", "x"), Bad("no target", "x").skip("other"), skips[0]])
    assert [example.key for example in kept] == ["e"]
    assert str(log) == "10 skipped: 9 empty text, 1 no target", "one that comes again is not counted again"
    assert len(caplog.records) == 6 and "key 0: empty text (number 0)" in caplog.text
    again = SkipLog(quiet=True)
    again.restore(json.loads(json.dumps(log.state())))
    again.add(skips[3])
    assert again.counts == log.counts and str(SkipLog()) == ""
