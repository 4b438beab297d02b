"""How large a checkpoint's models are: the released ones by name, without network, any other by its folder.

Source: facts of the released model, sections A.1, A.3, A.4, A.5 and E.1; Qwen2.5-VL-7B's and UMT5-xxl's published
configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import component_folder, open_experts, read_json
from ..errors import UserError
from ..geometry import RELEASED as RELEASED_GEOMETRY
from ..geometry import Geometry
from ..layouts import has_planner
from ..planner.heads import DecoderConfig
from ..planner.model import PlannerConfig
from ..renderer.config import RendererConfig

UMT5_XXL: Mapping[str, Any] = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
QWEN_7B: Mapping[str, Any] = {
    "model_type": "qwen2_5_vl", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "hidden_act": "silu",
    "max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "hidden_act": "silu",
        "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "tokens_per_second": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    },
}  # fmt: skip


@dataclass(frozen=True)
class Dimensions:
    """Of a checkpoint.

    Args:
        experts: its transformers, under the names that a recipe calls them by.
        text: config of its UMT5 encoder.
        planner: ``None`` where it has none.
        boundary: timestep between the experts, 0 to 1000.
    """

    experts: Mapping[str, RendererConfig]
    text: Mapping[str, Any]
    planner: PlannerConfig | None = None
    geometry: Geometry = RELEASED_GEOMETRY
    boundary: float = 875.0


_PAIR = {"high": RendererConfig(), "low": RendererConfig()}
_PLANNER = PlannerConfig(QWEN_7B, gen_dim=4096, decoder=DecoderConfig(channels=3584, width=4096))

RELEASED: Mapping[str, Dimensions] = {
    "ByteDance/Bernini-R-1.3B-Diffusers": Dimensions(
        {"only": RendererConfig(num_attention_heads=12, num_layers=30, ffn_dim=8960)}, UMT5_XXL
    ),
    "ByteDance/Bernini-R-Diffusers": Dimensions(_PAIR, UMT5_XXL),
    "ByteDance/Bernini-Diffusers": Dimensions(_PAIR, UMT5_XXL, _PLANNER),
    "ByteDance/Bernini-Diffusers-v2": Dimensions(_PAIR, UMT5_XXL, _PLANNER),
}
"""By the name of the repository."""


def dimensions(model: str) -> Dimensions:
    """Of a checkpoint's folder, whose weights are not read, or of a released repository, which is not fetched.

    Raises:
        UserError: neither; or a folder whose checkpoint is broken.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if model in RELEASED:
            return RELEASED[model]
        raise UserError(
            f"{model}: neither a folder here nor a released model, whose sizes are known without fetching it "
            f"({', '.join(RELEASED)}); fetch it and name its folder"
        )
    files = open_experts(folder)
    configs = {which: source.config for which, source in files.experts.items()}
    planner = None
    if has_planner(folder):
        from ..planner.loading import open_planner

        planner = open_planner(folder).config
    return Dimensions(
        {str(which): config for which, config in configs.items()} if files.has_low else {"only": files.config},
        read_json(component_folder(folder, "text_encoder") / "config.json"),
        planner,
        Geometry.read(folder),
        files.boundary,
    )
