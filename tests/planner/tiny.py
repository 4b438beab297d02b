"""What the planner's tests share: a tiny Qwen2.5-VL with everything around it, conversations, a run of the loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bernini.planner.decode import Contexts, Prefix, Seeded, Whole, contexts, generate
from bernini.planner.heads import DecoderConfig
from bernini.planner.model import Planner, PlannerConfig
from bernini.planner.prompt import Conversation, Template, Visual
from bernini.planner.settings import PlanSettings, Variant

SPECIAL = {"<|im_start|>": 300, "<|vision_start|>": 301, "<|vision_end|>": 302, "<|image_pad|>": 303,
           "<|video_pad|>": 304}  # fmt: skip
HIDDEN, GEN, VOCABULARY = 32, 12, 320


class Letters:
    """A tokenizer of bytes."""

    unk_token_id = 299

    def convert_tokens_to_ids(self, token: str) -> int:
        return SPECIAL[token]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return list(text.encode())


def mllm(layers: int = 3, heads: int = 2) -> dict[str, Any]:
    """``config.json`` of a Qwen2.5-VL."""
    head = HIDDEN // heads
    return {
        "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 1, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "max_position_embeddings": 4096, "hidden_act": "silu", "use_sliding_window": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [head // 8, head // 8, head // 4]},
        "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
        "image_token_id": SPECIAL["<|image_pad|>"], "video_token_id": SPECIAL["<|video_pad|>"],
        "vision_start_token_id": SPECIAL["<|vision_start|>"], "vision_end_token_id": SPECIAL["<|vision_end|>"],
        "vision_config": {
            "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": 14,
            "temporal_patch_size": 2, "in_channels": 3, "in_chans": 3, "spatial_merge_size": 2,
            "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [0], "out_hidden_size": HIDDEN,
            "hidden_act": "silu", "tokens_per_second": 2,
        },
    }  # fmt: skip


def make_planner(
    *, layers: int = 3, heads: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0, understanding: bool = True,
    mask_tokens: int = 4096,
) -> Planner:  # fmt: skip
    """Random weights, large enough that every token, position and norm shows in the result."""
    decoder = DecoderConfig(HIDDEN, 16, depth=2, frequencies=32)
    planner = Planner(PlannerConfig(mllm(layers, heads), GEN, decoder, mask_tokens), understanding=understanding)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in planner.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            else:
                std = 1.0 if "embed_tokens" in name or name == "mask_tokens" else 1.3 * parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return planner.to(dtype).eval()


def in_float64(planner: Planner) -> Planner:
    """The planner in float64, and the norms of transformers too, which go through float32 otherwise: two ways to the
    same numbers cannot be sure to agree to 1e-10 through a rounding to 1e-7."""
    planner = planner.double()
    for module in planner.modules():
        if type(module).__name__.endswith("RMSNorm"):
            assert isinstance(module.weight, nn.Parameter)
            exact = nn.RMSNorm(module.weight.numel(), eps=1e-6, dtype=torch.float64)
            exact.weight = module.weight
            module.forward = exact.forward
    return planner


class Request(NamedTuple):
    """What is asked of the loop."""

    prompt: str
    sources: tuple[Visual, ...]
    target: Visual
    task: str
    negative_prompt: str = "blurry, static"


def video(t: int, h: int, w: int) -> Visual:
    return Visual("video", (t, h, w))


def image(h: int, w: int) -> Visual:
    return Visual("image", (1, h, w))


EIGHT = tuple(image(1 + number % 3, 1 + number % 4) for number in range(8))
REQUESTS = {
    "t2i": Request("a red ball", (), image(3, 4), "t2i"),
    "t2v": Request("a red ball bounces", (), video(3, 2, 4), "t2v"),
    "i2i": Request("make it blue", (image(2, 3),), image(2, 3), "i2i"),
    "v2v": Request("make it snow", (video(3, 2, 3),), video(3, 2, 3), "v2v"),
    "r2v": Request("all of them dance", EIGHT, video(4, 2, 2), "r2v"),
    "rv2v": Request("with the hat from the image", (video(2, 2, 3), image(2, 2), image(1, 3)), video(2, 2, 3), "rv2v"),
    "nothing said": Request("", (), video(2, 2, 2), "t2v", negative_prompt=""),
    "nothing said of a video": Request("", (video(2, 2, 2),), video(2, 2, 2), "v2v", negative_prompt=""),
}


class Result(NamedTuple):
    plan: Tensor
    contexts: Contexts

    def tensors(self) -> Sequence[Tensor]:
        return (self.plan, self.contexts.planned, self.contexts.positive, self.contexts.negative)


def talks_of(request: Request, names: Sequence[Variant]) -> list[Conversation]:
    template = Template(Letters())
    return [
        template.variant(
            name, request.prompt, request.sources, request.target, task=request.task,
            negative_prompt=request.negative_prompt,
        )
        for name in names
    ]  # fmt: skip


def names_of(settings: PlanSettings, request: Request) -> tuple[dict[Variant, float], list[Variant]]:
    """Weights of the branches, and all that are needed: those, and the one whose prefix is a context."""
    weights = settings.weights(bool(request.sources))
    return weights, [*weights, *(name for name in ("unconditional",) if name not in weights)]


@torch.no_grad()
def run(kind: type[Prefix] | type[Whole], planner: Planner, request: Request, settings: PlanSettings) -> Result:
    """A plan and its contexts, through one of the two engines."""
    weights, names = names_of(settings, request)
    talks = talks_of(request, names)
    tokens = sum(visual.tokens for visual in request.sources)
    seen = torch.randn((tokens, HIDDEN), generator=torch.Generator().manual_seed(7)).to(planner.dtype)
    embeds = [planner.embed(talk, seen if request.sources else None) for talk in talks]
    engine = kind(planner, talks, embeds, active=len(weights))
    plan = generate(planner, engine, list(weights.values()), settings, Seeded(3))
    states = engine.step(plan, 1)[0]
    hidden = dict(zip(names, engine.hidden, strict=True))
    return Result(plan, contexts(planner, talks[0], hidden["conditional"], hidden["unconditional"], states))
