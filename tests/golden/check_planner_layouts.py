"""Golden set ``planner_layouts``: the template token for token, positions, and the hybrid mask. All exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bernini.kernels import SegmentLayout
from bernini.kernels.attention.reference import interval_mask
from bernini.planner.prompt import Template, Visual
from bernini.presets import SYSTEM_PROMPTS

from . import compare

SPECIAL = {"<|im_start|>": 151644, "<|vision_start|>": 151652, "<|vision_end|>": 151653,
           "<|image_pad|>": 151655, "<|video_pad|>": 151656}  # fmt: skip
VARIANTS = {"cond": "conditional", "textonly": "text only", "uncond": "unconditional", "uncond_noneg": "unconditional"}
KINDS = {"text": 0, "source": 2, "target": 3}


class Letters:
    """The tokenizer that the set was made with: a token per character."""

    unk_token_id = None

    def convert_tokens_to_ids(self, token: str) -> int:
        return SPECIAL[token]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) % 5000 for letter in text]


def check(files: dict[str, Path]) -> int:
    cases, meta = compare.load(files["cases"])
    compare.same("system prompts", dict(SYSTEM_PROMPTS), meta["system_prompts"])
    template = Template(Letters(), meta["tokens_per_second"])
    done = 1
    for name, case in meta["cases"].items():
        for variant, form in VARIANTS.items():
            prefix = f"{name}.{variant}."
            want = {key.removeprefix(prefix): value for key, value in cases.items() if key.startswith(prefix)}
            if want:
                done += _variant(prefix, want, template, form, case, negative=variant != "uncond_noneg")
    for name in sorted({key.rpartition(".")[0] for key in cases if key.startswith("random_kinds")}):
        used = cases[f"{name}.token_type"] != 1  # a kind that the rule knows and nothing uses
        want = cases[f"{name}.mask_visible"].bool()
        compare.same(f"{name} mask", _mask_of_kinds(cases, name)[used][:, used], want[used][:, used])
        done += 1
    return done


def _variant(
    prefix: str, want: dict[str, Tensor], template: Template, form: Any, case: dict[str, Any], negative: bool
) -> int:
    def visuals(kind: Any, grids: list[list[int]]) -> list[Visual]:
        return [Visual(kind, (t, h // 2, w // 2)) for t, h, w in grids]

    videos, images = visuals("video", case["vid"]), visuals("image", case["img"])
    target = (images if case["target"] == "image" else videos).pop()
    conversation = template.variant(
        form, case["prompt"], [*videos, *images], target, task=case["task"],
        negative_prompt=case["negative_prompt"] if negative else "",
    )  # fmt: skip
    layout = conversation.layout
    kinds = torch.cat([torch.full((s.tokens,), KINDS[s.kind], dtype=torch.int32) for s in layout.segments])
    compare.same(f"{prefix}input_ids", conversation.ids, want["input_ids"])
    compare.same(f"{prefix}token_type", kinds, want["token_type"])
    compare.same(f"{prefix}position_ids", conversation.positions, want["position_ids"])
    masks = {"mask_visible": lambda mask: mask.bool(), "mask_additive_f32": lambda mask: mask == 0}
    found = [key for key in masks if key in want]
    for key in found:
        compare.same(f"{prefix}{key}", _mask(layout), masks[key](want[key]))
    compare.same(f"{prefix}sources", kinds == 2, want["visual_input_mask"])
    compare.same(f"{prefix}targets", kinds == 3, want["visual_output_mask"])
    return 5 + len(found)


def _mask(layout: SegmentLayout) -> Tensor:
    starts, ends, second = layout.on("cpu").intervals
    return interval_mask(starts, ends, *(second or (None, None)), layout.tokens)


def _mask_of_kinds(cases: dict[str, Tensor], name: str) -> Tensor:
    """The rule itself, on arbitrary kinds: no layout has them all, so it is applied token by token."""
    kinds, numbers = cases[f"{name}.token_type"], cases[f"{name}.segment_ids"]
    place = torch.arange(len(kinds))
    key_is_given, causal = (kinds != 3)[None], place[:, None] >= place[None]
    own = (kinds == 3)[:, None] & (kinds == 3)[None] & (numbers[:, None] == numbers[None])
    return (key_is_given & causal) | own
