"""Checkpoint folders: round trips, shards, dtypes, and what is said about broken ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bernini.checkpoint import WEIGHTS, CheckpointError, load_experts, load_renderer, save_renderer
from bernini.renderer.config import RendererConfig
from bernini.renderer.model import Renderer

CONFIG = RendererConfig(num_attention_heads=2, attention_head_dim=16, num_layers=1, ffn_dim=32, text_dim=24)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_renderer(Renderer(CONFIG), tmp_path / "transformer")
    return tmp_path / "transformer"


def test_round_trip(folder: Path) -> None:
    model = load_renderer(folder)
    assert model.config == CONFIG
    stored = load_file(folder / WEIGHTS)
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


def test_stock_diffusers_reads_what_we_write_and_back(folder: Path, tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert (tmp_path / "again" / f"{WEIGHTS}.index.json").is_file(), "the shards of this test"
    again = load_renderer(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), load_renderer(folder).parameters(), strict=True))


def test_bfloat16_keeps_the_released_parts_in_float32(folder: Path) -> None:
    from diffusers import WanTransformer3DModel

    ours = {n: p.dtype for n, p in load_renderer(folder, dtype=torch.bfloat16).named_parameters()}
    theirs = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert ours == {n: p.dtype for n, p in theirs.named_parameters()}
    assert set(ours.values()) == {torch.bfloat16, torch.float32}


def test_experts(folder: Path) -> None:
    root = folder.parent
    root.joinpath("config.json").write_text('{"model_type": "bernini_renderer", "skip_transformer_2": true}')
    assert load_experts(root, dtype=torch.float32, device="cpu").low is None
    root.joinpath("config.json").write_text('{"model_type": "bernini_renderer", "switch_dit_boundary": 0.9}')
    with pytest.raises(CheckpointError, match=r"transformer_2.config.json: no such file"):
        load_experts(root, dtype=torch.float32, device="cpu")
    save_renderer(Renderer(CONFIG), root / "transformer_2")
    experts = load_experts(root, dtype=torch.float32, device="cpu")
    assert experts.at(900) is experts.high and experts.at(899.9) is experts.low
    root.joinpath("config.json").write_text('{"model_type": "other"}')
    with pytest.raises(CheckpointError, match="model_type is 'other'"):
        load_experts(root, dtype=torch.float32, device="cpu")


def edit(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def lost_shard(folder: Path) -> None:
    index = {"weight_map": {"proj_out.bias": "model-00001.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit(lambda t: t.pop("proj_out.bias")), "1 tensors are missing, the first is 'proj_out.bias'"),
        (edit(lambda t: t.update(extra=torch.zeros(2))), r"unexpected tensor 'extra' \[2\]"),
        (edit(lambda t: t.update({"proj_out.bias": torch.zeros(3)})), r"proj_out.bias is \[3\], expected \[64\]"),
        (truncate, "damaged or not a safetensors file"),
        (lost_shard, "model-00001.safetensors: named in .*index.json"),
        (lambda f: (f / WEIGHTS).unlink(), "holds no .safetensors weights"),
        (lambda f: (f / "config.json").write_text("[1]"), "must hold a JSON object, holds a list"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    ],
)
def test_damage_is_named(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_renderer(folder)
