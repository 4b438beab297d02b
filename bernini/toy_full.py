"""A complete checkpoint with a planner and random weights, in the released bundle's layout, for any machine.

What it is made of is a :class:`Spec`: :data:`FULL` has the strides of the released checkpoints, :data:`SMALL` those of
the synthetic world (:mod:`bernini.data`), in which videos are 32x32 pixels and 9 frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .checkpoint import write_json
from .layouts import BUNDLE_CONFIGS, BUNDLE_WEIGHTS
from .planner.heads import DecoderConfig
from .planner.loading import MLLM_FOLDER
from .planner.model import Planner, PlannerConfig
from .presets import SYSTEM_PROMPTS, TASK_PREFIXES
from .renderer.config import RendererConfig
from .renderer.model import Renderer
from .renderer.sampler import Which
from .toy import RENDERER, ROOT, TEXT, VAE, byte_tokenizer, new_folder, write_common_parts

SPECIALS = ("<|endoftext|>", "<|im_end|>", "<|unk|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>",
            "<|image_pad|>", "<|video_pad|>")  # fmt: skip
HIDDEN = 64
MASK_TOKENS = 4096
OLD_NAMES = {"visual.": "mllm.visual.", "text.": "mllm.model.", "lm_head.": "mllm.lm_head."}
"""Names of the language model here -> in a released bundle."""
PREFIXES: dict[Which, str] = {"high": "diff_dec.transformer.", "low": "diff_dec_low.transformer_2."}
SKIPS: dict[Which, str] = {"high": "skip_transformer_1", "low": "skip_transformer_2"}

LANGUAGE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
}
VISION: dict[str, Any] = {
    "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "patch_size": 14, "temporal_patch_size": 2,
    "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [1],
}  # fmt: skip
SMALL_VAE: dict[str, Any] = {
    "base_dim": 16, "z_dim": 16, "dim_mult": [1, 2, 4], "num_res_blocks": 1, "attn_scales": [],
    "temperal_downsample": [True, True], "scale_factor_spatial": 4, "scale_factor_temporal": 4,
}  # fmt: skip
SPOKEN = ("system\n", "user\n", "assistant\n", *SYSTEM_PROMPTS.values(), *TASK_PREFIXES.values())
"""What every conversation and every text of the renderer has."""


@dataclass(frozen=True)
class Spec:
    """Dimensions of a full checkpoint. The defaults are those of :data:`FULL`.

    Args:
        renderer: of the experts; its ``text_dim`` is the text encoder's width, too.
        experts: which there are.
        vae: arguments of ``AutoencoderKLWan``.
        text: arguments of ``UMT5Config`` beside the width and the vocabulary.
        language, vision: of the planner's Qwen2.5-VL; the decoder's channels are the language model's width.
        decoder_width, decoder_depth: of the ViT-embedding decoder.
        mask_tokens: the longest plan, in tokens.
        words: texts whose words the two tokenizers know; all else is bytes.
        text_tokens: texts are cut and contexts padded to so many.
        root: more keys of ``config.json``; see :mod:`bernini.geometry` for those that are read.
        preprocessor: more keys of ``mllm/preprocessor_config.json``.
    """

    renderer: RendererConfig = RENDERER
    experts: tuple[Which, ...] = ("high", "low")
    vae: Mapping[str, Any] = field(default_factory=lambda: VAE)
    text: Mapping[str, Any] = field(default_factory=lambda: TEXT)
    language: Mapping[str, Any] = field(default_factory=lambda: LANGUAGE)
    vision: Mapping[str, Any] = field(default_factory=lambda: VISION)
    decoder_width: int = 64
    decoder_depth: int = 2
    mask_tokens: int = MASK_TOKENS
    words: Sequence[str] = ()
    text_tokens: int = 512
    root: Mapping[str, Any] = field(default_factory=lambda: {"target_fps": 16})
    preprocessor: Mapping[str, Any] = field(default_factory=dict)

    @property
    def decoder(self) -> DecoderConfig:
        return DecoderConfig(int(self.language["hidden_size"]), self.decoder_width, self.decoder_depth)


FULL = Spec()
SMALL = Spec(
    experts=("high",),
    vae=SMALL_VAE,
    vision={**VISION, "patch_size": 4, "window_size": 32},
    mask_tokens=64,
    words=SPOKEN,
    text_tokens=64,
    root={
        "target_fps": 8,
        "vit_fps_divisor": 2,
        "defaults": {"fps": 8, "num_frames": 9, "size": [32, 32], "max_size": 32, "preset": "toy",
                     "negative_prompt": ""},
    },
    preprocessor={"bernini_min_pixels": 64, "bernini_max_pixels": 1024},
)  # fmt: skip
"""32x32 pixels and 9 frames at 8 fps: 3x8x8 latents, 48 tokens, and 2x4x4 tokens of the vision tower."""


def mllm_config(tokenizer: Any, spec: Spec = FULL) -> dict[str, Any]:
    """``config.json`` of a tiny Qwen2.5-VL, in the form of transformers 4."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    pads = {kind: tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video")}
    return {
        "model_type": "qwen2_5_vl",
        "vocab_size": len(tokenizer),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        **spec.language,
        **{f"{name}_token_id": number for name, number in (ids | pads).items()},
        "vision_config": {
            "in_channels": 3, "in_chans": 3, "out_hidden_size": spec.language["hidden_size"], "hidden_act": "silu",
            "tokens_per_second": 2, "spatial_patch_size": spec.vision["patch_size"], **spec.vision,
        },
    }  # fmt: skip


def root_config(spec: Spec = FULL) -> dict[str, Any]:
    hidden, decoder = spec.language["hidden_size"], spec.decoder
    return {
        "model_type": "bernini",
        "switch_dit_boundary": ROOT["switch_dit_boundary"],
        **{key: True for which, key in SKIPS.items() if which not in spec.experts},
        "shift": ROOT["shift"],
        "use_src_id_rotary_emb": True,
        "num_mask_token": spec.mask_tokens,
        "max_sequence_length": spec.text_tokens,
        "t5_max_sequence_length": spec.text_tokens,
        "clip_diff_cfg": {"z_channels": hidden, "target_channels": hidden, "width": decoder.width,
                          "depth": decoder.depth, "shift": decoder.shift},
        "connector_cfg": {"out_dim_for_gen": spec.renderer.text_dim, "out_dim_for_vit": hidden},
        **spec.root,
    }  # fmt: skip


def write_toy_full(folder: str | Path, *, seed: int = 0) -> Path:
    """:func:`write_checkpoint` of :data:`FULL`."""
    return write_checkpoint(folder, FULL, seed=seed)


def write_checkpoint(folder: str | Path, spec: Spec, *, seed: int = 0) -> Path:
    """Writes a bundle with random weights; the folder appears complete or not at all.

    Raises:
        FileExistsError: ``folder`` exists and is not empty.
    """
    with new_folder(folder) as work, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = byte_tokenizer(SPECIALS, ends=False, words=spec.words)
        mllm = mllm_config(tokenizer, spec)
        planner = Planner(PlannerConfig(mllm, spec.renderer.text_dim, spec.decoder, spec.mask_tokens))
        nn.init.normal_(planner.mask_tokens, std=0.5)
        tensors: dict[str, Tensor] = {bundle_name(name): value for name, value in planner.state_dict().items()}
        for which in spec.experts:
            weights = Renderer(spec.renderer).state_dict()
            tensors |= {PREFIXES[which] + name: value for name, value in weights.items()}
            write_json(work / BUNDLE_CONFIGS[which], spec.renderer.to_dict())
        (work / BUNDLE_WEIGHTS).mkdir()
        save_file(
            {name: value.contiguous() for name, value in tensors.items()}, work / BUNDLE_WEIGHTS / "model.safetensors",
            metadata={"format": "pt"},
        )  # fmt: skip
        tokenizer.save_pretrained(work / MLLM_FOLDER)
        write_json(work / MLLM_FOLDER / "config.json", mllm)
        sides = {"patch_size": spec.vision["patch_size"], "merge_size": spec.vision["spatial_merge_size"]}
        write_json(work / MLLM_FOLDER / "preprocessor_config.json", {**sides, **spec.preprocessor})
        write_common_parts(
            work, "t5_", dim=spec.renderer.text_dim, vae=spec.vae, text=spec.text,
            tokenizer=byte_tokenizer(words=spec.words, length=spec.text_tokens),
        )  # fmt: skip
        write_json(work / "config.json", root_config(spec))
    return Path(folder)


def bundle_name(name: str) -> str:
    """A tensor's name in a released bundle."""
    prefix = next((prefix for prefix in OLD_NAMES if name.startswith(prefix)), None)
    return name if prefix is None else OLD_NAMES[prefix] + name.removeprefix(prefix)
