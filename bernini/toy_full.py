"""A complete checkpoint with a planner and random weights, in the released bundle's layout, for any machine."""

from __future__ import annotations

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
from .renderer.model import Renderer
from .toy import RENDERER, ROOT, TEXT_DIM, byte_tokenizer, new_folder, write_common_parts

SPECIALS = ("<|endoftext|>", "<|im_end|>", "<|unk|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>",
            "<|image_pad|>", "<|video_pad|>")  # fmt: skip
HIDDEN = 64
DECODER = DecoderConfig(HIDDEN, 64, depth=2)
MASK_TOKENS = 4096
OLD_NAMES = {"visual.": "mllm.visual.", "text.": "mllm.model.", "lm_head.": "mllm.lm_head."}
"""Names of the language model here -> in a released bundle."""


def mllm_config(tokenizer: Any) -> dict[str, Any]:
    """``config.json`` of a tiny Qwen2.5-VL, in the form of transformers 4."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    pads = {kind: tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video")}
    return {
        "model_type": "qwen2_5_vl",
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        **{f"{name}_token_id": number for name, number in (ids | pads).items()},
        "vision_config": {
            "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "patch_size": 14,
            "temporal_patch_size": 2, "in_channels": 3, "in_chans": 3, "spatial_merge_size": 2,
            "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1], "out_hidden_size": HIDDEN,
            "hidden_act": "silu", "tokens_per_second": 2,
        },
    }  # fmt: skip


def root_config() -> dict[str, Any]:
    return {
        "model_type": "bernini",
        "switch_dit_boundary": ROOT["switch_dit_boundary"],
        "shift": ROOT["shift"],
        "use_src_id_rotary_emb": True,
        "num_mask_token": MASK_TOKENS,
        "max_sequence_length": 512,
        "t5_max_sequence_length": 512,
        "clip_diff_cfg": {"z_channels": HIDDEN, "target_channels": HIDDEN, "width": DECODER.width,
                          "depth": DECODER.depth, "shift": DECODER.shift},
        "connector_cfg": {"out_dim_for_gen": TEXT_DIM, "out_dim_for_vit": HIDDEN},
        "target_fps": 16,
    }  # fmt: skip


def write_toy_full(folder: str | Path, *, seed: int = 0) -> Path:
    """Writes the checkpoint; the folder appears complete or not at all.

    Raises:
        FileExistsError: ``folder`` exists and is not empty.
    """
    with new_folder(folder) as work, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = byte_tokenizer(SPECIALS, ends=False)
        mllm = mllm_config(tokenizer)
        planner = Planner(PlannerConfig(mllm, TEXT_DIM, DECODER, MASK_TOKENS))
        nn.init.normal_(planner.mask_tokens, std=0.5)
        tensors: dict[str, Tensor] = {bundle_name(name): value for name, value in planner.state_dict().items()}
        for which, prefix in (("high", "diff_dec.transformer."), ("low", "diff_dec_low.transformer_2.")):
            tensors |= {prefix + name: value for name, value in Renderer(RENDERER).state_dict().items()}
            write_json(work / BUNDLE_CONFIGS[which], RENDERER.to_dict())  # type: ignore[index]
        (work / BUNDLE_WEIGHTS).mkdir()
        save_file(
            {name: value.contiguous() for name, value in tensors.items()}, work / BUNDLE_WEIGHTS / "model.safetensors",
            metadata={"format": "pt"},
        )  # fmt: skip
        tokenizer.save_pretrained(work / MLLM_FOLDER)
        write_json(work / MLLM_FOLDER / "config.json", mllm)
        write_json(work / MLLM_FOLDER / "preprocessor_config.json", {"patch_size": 14, "merge_size": 2})
        write_common_parts(work, "t5_")
        write_json(work / "config.json", root_config())
    return Path(folder)


def bundle_name(name: str) -> str:
    """A tensor's name in a released bundle."""
    prefix = next((prefix for prefix in OLD_NAMES if name.startswith(prefix)), None)
    return name if prefix is None else OLD_NAMES[prefix] + name.removeprefix(prefix)
