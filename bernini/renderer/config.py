"""Dimensions of the renderer, under the names of the released ``transformer/config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class RendererConfig:
    """A Wan2.1/2.2 text-to-video transformer. The defaults are those of the 14B experts.

    Raises:
        ValueError: a setting that no released renderer has (the message names it).
    """

    num_attention_heads: int = 40
    attention_head_dim: int = 128
    num_layers: int = 40
    ffn_dim: int = 13824
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    qk_norm: str = "rms_norm_across_heads"
    cross_attn_norm: bool = True
    rope_max_seq_len: int = 1024

    def __post_init__(self) -> None:
        if self.qk_norm != "rms_norm_across_heads":
            raise ValueError(f"renderer config: qk_norm={self.qk_norm!r}; only 'rms_norm_across_heads' is known")
        if not self.cross_attn_norm:
            raise ValueError("renderer config: cross_attn_norm must be true, as in every released checkpoint")
        if self.attention_head_dim % 2:
            raise ValueError(f"renderer config: attention_head_dim must be even, got {self.attention_head_dim}")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch_values(self) -> int:
        """Values of one latent patch, i.e. of one token before the patch embedding."""
        t, h, w = self.patch_size
        return t * h * w * self.in_channels

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> RendererConfig:
        """From a diffusers ``config.json``; keys of other features must be null."""
        for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
            if config.get(key) is not None:
                raise ValueError(f"renderer config: {key}={config[key]!r}; image-to-video variants are not Bernini's")
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in config.items() if key in known and value is not None}
        if "patch_size" in values:
            values["patch_size"] = tuple(values["patch_size"])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The diffusers ``config.json`` of this model."""
        return {
            "_class_name": "WanTransformer3DModel",
            **asdict(self),
            "patch_size": list(self.patch_size),
            "image_dim": None,
            "added_kv_proj_dim": None,
        }
