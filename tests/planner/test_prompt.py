"""The conversation template: tokens, segments, positions, and what it refuses."""

from __future__ import annotations

import inspect
import random
from typing import Any

import pytest
import torch

from bernini.errors import UserError
from bernini.planner.prompt import Conversation, Marks, Template, Visual
from bernini.planner.settings import MAX_VISUALS
from bernini.presets import SYSTEM_PROMPTS, TASKS
from bernini.toy import byte_tokenizer
from bernini.toy_full import SPECIALS

from .tiny import SPECIAL, Letters, image, mllm, video

TURN, START, END, IMAGE, VIDEO = SPECIAL.values()


def said(text: str) -> list[int]:
    return list(text.encode())


def kinds(conversation: Conversation) -> list[tuple[str, int]]:
    return [(segment.kind, segment.tokens) for segment in conversation.layout.segments]


def test_a_conversation_token_for_token() -> None:
    talk = Template(Letters())(" go ", [video(2, 1, 2), image(1, 3)], image(2, 1), system="Be.")
    user = [START, *[VIDEO] * 4, END, START, *[IMAGE] * 3, END, *said(" go")]
    target = [START, IMAGE, IMAGE, END]
    ids = [TURN, *said("system\nBe."), TURN, *said("user\n"), *user, TURN, *said("assistant\n"), *target]
    assert talk.ids.tolist() == ids and talk.ids.dtype == torch.int64
    first, second = ids.index(VIDEO), ids.index(IMAGE)
    assert kinds(talk) == [
        ("text", first), ("source", 4), ("text", second - first - 4), ("source", 3),
        ("text", len(ids) - 3 - second - 3), ("target", 2), ("text", 1),
    ]  # fmt: skip
    assert [visual.grid for visual in talk.visuals] == [(2, 1, 2), (1, 1, 3), (1, 2, 1)]


@pytest.mark.parametrize(
    ("prompt", "with_source", "user"),
    [
        ("  a b \n", False, said("a b")),
        ("  a b \n", True, [START, IMAGE, END, *said("  a b")]),
        ("", True, [START, IMAGE, END]),
        (" \n ", True, [START, IMAGE, END]),
        ("", False, None),
        (" \t ", False, None),
    ],
)
def test_the_outer_ends_of_a_turn_are_stripped(prompt: str, with_source: bool, user: list[int] | None) -> None:
    """And a turn that is empty then is left out, its header with it."""
    talk = Template(Letters())(prompt, [image(1, 1)] if with_source else [], image(1, 1), system="S")
    turns = [] if user is None else [TURN, *said("user\n"), *user]
    want = [TURN, *said("system\nS"), *turns, TURN, *said("assistant\n"), START, IMAGE, END]
    assert talk.ids.tolist() == want


def test_without_system_or_target() -> None:
    talk = Template(Letters())("why?", [image(1, 2)], None, system="")
    assert talk.ids.tolist() == [TURN, *said("user\n"), START, IMAGE, IMAGE, END, *said("why?")]
    assert len(talk.layout.target_index) == 0


@pytest.mark.parametrize("task", TASKS)
def test_variants(task: str) -> None:
    template, sources, target = Template(Letters()), [video(1, 1, 2)], video(2, 1, 1)
    system = SYSTEM_PROMPTS.get(task, "You are a helpful assistant.")

    def made(variant: Any, negative: str) -> list[int]:
        return template.variant(variant, "go", sources, target, task=task, negative_prompt=negative).ids.tolist()

    def plain(prompt: str, sources: list[Visual]) -> list[int]:
        return template(prompt, sources, target, system=system).ids.tolist()

    for negative, kept in (("ugly", "ugly"), ("no", "no"), ("x", ""), ("", ""), ("   ", "")):
        assert made("conditional", negative) == plain("go", sources)
        assert made("text only", negative) == plain("go", [])
        assert made("unconditional", negative) == plain(kept, [])


def test_at_most_64_visuals_with_the_target() -> None:
    template = Template(Letters())
    talk = template("p", [image(1, 1)] * (MAX_VISUALS - 1), image(1, 1), system="S")
    assert len(talk.visuals) == 64
    template("p", [image(1, 1)] * MAX_VISUALS, None, system="S")
    with pytest.raises(UserError, match="takes 64 images and videos in all, the result included; got 65"):
        template("p", [image(1, 1)] * MAX_VISUALS, image(1, 1), system="S")


def test_tokenizers() -> None:
    """A real one with the special tokens, one that answers None for them, and one that answers its unknown token."""
    full = byte_tokenizer(SPECIALS, ends=False)
    marks = Marks.of(full)
    assert full.convert_ids_to_tokens(list(marks)) == [
        "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
    ]  # fmt: skip
    talk = Template(full)("ä 1", [image(1, 2)], image(1, 1), system="S")
    assert full.decode(talk.ids) == (
        "<|im_start|>system\nS<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>ä 1"
        "<|im_start|>assistant\n<|vision_start|><|image_pad|><|vision_end|>"
    )
    with pytest.raises(UserError, match=r"has no token <\|im_start\|>; it must be that of Qwen2.5-VL"):
        Template(byte_tokenizer())
    without = [token for token in SPECIALS if token != "<|video_pad|>"]
    with pytest.raises(UserError, match=r"has no token <\|video_pad\|>"):
        Template(byte_tokenizer(without, ends=False))

    class Nothing(Letters):
        def convert_tokens_to_ids(self, token: str) -> int:
            return None  # type: ignore[return-value]

    with pytest.raises(UserError, match="has no token"):
        Template(Nothing())


# --- positions --------------------------------------------------------------------------------------------------------


def rope_index(model: Any, talk: Conversation, longest_edge_counts: bool) -> torch.Tensor:
    """int64 ``[3, T]`` by transformers' own function."""
    grids = {
        kind: torch.tensor([(v.grid[0], 2 * v.grid[1], 2 * v.grid[2]) for v in talk.visuals if v.kind == kind])
        for kind in ("image", "video")
    }
    options: dict[str, Any] = {f"{kind}_grid_thw": grid if len(grid) else None for kind, grid in grids.items()}
    if longest_edge_counts:
        options["mm_token_type_ids"] = ((talk.ids == IMAGE) + 2 * (talk.ids == VIDEO))[None]
    return model.get_rope_index(talk.ids[None], **options)[0][:, 0]


def test_positions_are_those_of_transformers() -> None:
    """On random conversations.

    Newer transformers go on behind a visual from its longer edge, older ones (and the released model, which was trained
    so) from its largest position: the two differ for a long video of small frames, which then is left out here. The
    golden set ``planner_layouts`` has those.
    """
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    with torch.device("meta"):
        model = Qwen2_5_VLModel(Qwen2_5_VLConfig(**mllm()))
    longest_edge_counts = "mm_token_type_ids" in inspect.signature(Qwen2_5_VLModel.get_rope_index).parameters
    dice, template = random.Random(0), Template(Letters(), ticks=2)
    long_videos = 0
    for _ in range(40):
        sources: list[Visual] = []
        for _ in range(dice.randrange(4)):
            t, h, w = (dice.randrange(1, 6) for _ in range(3))
            if longest_edge_counts:
                t = min(t, (max(h, w) - 1) // 2 + 1)
            sources.append(video(t, h, w) if dice.random() < 0.5 else image(h, w))
            long_videos += 2 * (t - 1) > max(h, w) - 1
        text = "x" * dice.randrange(5)
        talk = template(text, sources, dice.choice([image(2, 3), video(2, 3, 3)]), system="S" * dice.randrange(1, 4))
        assert torch.equal(talk.positions, rope_index(model, talk, longest_edge_counts))
    assert longest_edge_counts or long_videos


def test_text_goes_on_behind_the_largest_position() -> None:
    talk = Template(Letters())("ab", [video(3, 1, 2)], None, system="")
    start = len(said("user\n")) + 2
    assert talk.positions[:, start : start + 6].tolist() == [
        [start, start, start + 2, start + 2, start + 4, start + 4], [start] * 6, [start, start + 1] * 3
    ]  # fmt: skip
    assert talk.positions[:, start + 6 :].tolist() == [[start + 5, start + 6, start + 7]] * 3
