"""A tiny checkpoint in the toy's geometry, features of the synthetic world for it, and recipes of a few steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bernini.data.encoder import load_encoder
from bernini.data.prepare import prepare
from bernini.data.worlds import WorldData
from bernini.renderer.config import RendererConfig
from bernini.toy_full import SMALL, write_checkpoint
from bernini.training.recipe import Part, Recipe

SPEC = replace(
    SMALL,
    renderer=RendererConfig(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=48, text_dim=32, freq_dim=32
    ),
    vae={**SMALL.vae, "base_dim": 4},
    text={"d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    decoder_width=32,
    text_tokens=48,
)
TASKS = {"t2i": 4, "t2v": 4, "i2i": 4, "v2v": 4, "r2v": 4, "rv2v": 4, "i2v": 4, "understanding": 6}


def write_model(folder: Path) -> Path:
    return write_checkpoint(folder, SPEC, seed=1)


def write_features(folder: Path, model: Path) -> Path:
    encoder, fingerprints = load_encoder(str(model), parts=["vae", "vit"])
    prepare(WorldData(TASKS), folder, encoder, fingerprints, rows=16)
    return folder


def recipe(stage: str, model: Path, output: Path, features: Path, **changes: object) -> Recipe:
    """Seven steps of a stage, a checkpoint after every one."""
    pixels = stage in ("vae", "understanding")
    tasks = {"vae": ["t2i", "t2v"], "understanding": ["understanding"]}.get(stage)
    part = (
        Part("world", tasks=dict.fromkeys(tasks or (), 1.0), count=20)
        if pixels
        else Part(str(features), tasks={} if stage in ("planner", "joint") else dict.fromkeys(list(TASKS)[:-1], 1.0))
    )
    values: dict[str, object] = {
        "steps": 7, "save_every": 1, "data": (part,), "copies": 2, "ema": 0.9,
        "train_text_encoder": stage in ("renderer", "joint"),
    }  # fmt: skip
    made = Recipe(stage=stage, model=str(model), output=str(output), **{**values, **changes})  # type: ignore[arg-type]
    small = 2 if stage == "vae" else 4
    optimizer = replace(made.optimizer, name="muon" if stage in ("vae", "renderer") else "adamw", lr=1e-3, warmup=2)
    return replace(made, batch=replace(made.batch, samples=small, accumulate=2), optimizer=optimizer)
