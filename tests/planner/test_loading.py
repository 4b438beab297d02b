"""A planner on disk: every naming and layout of a bundle, what is preferred, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bernini.checkpoint import CheckpointError, write_json
from bernini.planner.loading import open_planner
from bernini.planner.model import Planner
from bernini.planner.plan_file import fingerprint
from bernini.toy_full import bundle_name

from .tiny import GEN, HIDDEN, make_planner, mllm

Tensors = dict[str, Tensor]
FILE = "model.safetensors"
ROOT = {"model_type": "bernini", "clip_diff_cfg": {"shift": 2.0}}


@pytest.fixture(scope="module")
def planner() -> Planner:
    return make_planner(mask_tokens=8)


def write(folder: Path, tensors: Tensors, *, shards: int = 1, config: dict[str, Any] | None = None) -> Path:
    """A bundle of a planner alone, among tensors of other parts."""
    (folder / "bernini").mkdir(parents=True)
    write_json(folder / "config.json", ROOT)
    (folder / "mllm").mkdir()
    write_json(folder / "mllm" / "config.json", mllm() if config is None else config)
    others = {"diff_dec.transformer.proj_out.bias": torch.zeros(4), "t5_text_encoder.shared.weight": torch.zeros(2, 2)}
    names = sorted({**tensors, **others})
    if shards == 1:
        save_file({**tensors, **others}, folder / "bernini" / FILE)
        return folder
    files = [f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]
    for number, file in enumerate(files):
        save_file({name: {**tensors, **others}[name] for name in names[number::shards]}, folder / "bernini" / file)
    placed = {name: files[number % shards] for number, name in enumerate(names)}
    write_json(folder / "bernini" / f"{FILE}.index.json", {"weight_map": placed})
    return folder


def released(planner: Planner) -> Tensors:
    """Tensors under the names of the released bundle."""
    return {bundle_name(name): value.contiguous() for name, value in planner.state_dict().items()}


def modern(name: str) -> str:
    """The names that newer transformers give Qwen's tensors."""
    if name.startswith("mllm.visual."):
        return name.replace("mllm.visual.", "mllm.model.visual.")
    return name.replace("mllm.model.", "mllm.model.language_model.")


def same_weights(one: Planner, other: Planner) -> None:
    theirs = dict(other.named_parameters())
    for name, value in one.named_parameters():
        assert torch.equal(value, theirs[name].detach()), name


# --- what is taken ----------------------------------------------------------------------------------------------------


def test_released_names() -> None:
    assert bundle_name("text.layers.0.mlp.up_proj.weight") == "mllm.model.layers.0.mlp.up_proj.weight"
    assert bundle_name("visual.merger.mlp.0.bias") == "mllm.visual.merger.mlp.0.bias"
    assert bundle_name("lm_head.weight") == "mllm.lm_head.weight" and bundle_name("mask_tokens") == "mask_tokens"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("rename", [str, modern])
def test_every_layout(planner: Planner, tmp_path: Path, shards: int, rename: Callable[[str], str]) -> None:
    folder = write(tmp_path / "m", {rename(n): v for n, v in released(planner).items()}, shards=shards)
    source = open_planner(folder)
    assert source.config.gen_dim == GEN and source.config.mask_tokens == 8
    decoder = source.config.decoder
    assert (decoder.channels, decoder.width, decoder.depth, decoder.frequencies) == (HIDDEN, 16, 2, 32)
    whole, lean = source.load(understanding=True), source.load()
    same_weights(whole, planner)
    same_weights(lean, planner)
    assert not hasattr(lean, "lm_head") and len(lean.text.layers) == 2 and not whole.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in whole.parameters())
    with torch.no_grad():
        assert torch.equal(lean.visual.rotary_pos_emb.inv_freq, planner.visual.rotary_pos_emb.inv_freq)
        assert torch.equal(lean.text.rotary_emb.inv_freq, planner.text.rotary_emb.inv_freq)


def test_a_config_of_transformers_5(planner: Planner, tmp_path: Path) -> None:
    """The language model's part in a ``text_config``."""
    flat = mllm()
    outer = {key: flat[key] for key in ("vision_config", "image_token_id", "video_token_id", "tie_word_embeddings",
                                        "vision_start_token_id", "vision_end_token_id")}  # fmt: skip
    inner = {key: value for key, value in flat.items() if key not in outer}
    source = open_planner(write(tmp_path / "m", released(planner), config={**outer, "text_config": inner}))
    same_weights(source.load(), planner)


def test_averaged_weights_are_preferred(planner: Planner, tmp_path: Path) -> None:
    tensors = released(planner)
    averaged = {f"ema.{name}": value + 1 for name, value in tensors.items() if name.startswith("connector.")}
    loaded = open_planner(write(tmp_path / "m", {**averaged, **tensors})).load()
    assert torch.equal(loaded.connector.proj_gen[0].weight, planner.connector.proj_gen[0].weight.detach() + 1)
    assert torch.equal(loaded.mask_tokens, planner.mask_tokens.detach()), "what has no average stays"


def test_the_dtype_is_chosen(planner: Planner, tmp_path: Path) -> None:
    loaded = open_planner(write(tmp_path / "m", released(planner))).load(dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.text.rotary_emb.inv_freq.dtype == torch.float32, "frequencies are not weights"


def test_the_fingerprint_tells_models_and_not_dtypes_apart(planner: Planner, tmp_path: Path) -> None:
    source = open_planner(write(tmp_path / "fp32", released(planner)))
    prints = {fingerprint(source.load(dtype=dtype)) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    assert prints == {fingerprint(planner)}
    halved = {name: value.bfloat16() for name, value in released(planner).items()}
    assert fingerprint(open_planner(write(tmp_path / "bf16", halved)).load()) == fingerprint(planner)
    other = make_planner(mask_tokens=8, seed=1)
    assert fingerprint(other) != fingerprint(planner)


# --- what is refused --------------------------------------------------------------------------------------------------


def edit(name: str, change: Callable[[Tensor], Tensor] | None) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        value = tensors.pop(name)
        if change is not None:
            tensors[name] = change(value).contiguous()

    return apply


NET, UP = "vit_decoder.net.", "mllm.model.layers.{}.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit("mask_tokens", None), "has no tensor 'mask_tokens'"),
        (edit("mask_tokens", lambda x: x[0]), "'mask_tokens' has the shape [8, 32], and should have 3 dimensions"),
        (edit("mask_tokens", lambda x: x[..., :5]), "1 tensor has a wrong shape: 'mask_tokens' is [1, 8, 5]"),
        (edit("connector.proj_gen.0.weight", None), "the planner's tensor 'connector.proj_gen.0.weight' is missing"),
        (edit("connector.proj_gen.3.bias", None), "1 tensor is missing: 'connector.proj_gen.3.bias'"),
        (edit("connector.pred_vit.4.weight", lambda x: x[:4]), "pred_vit.4.weight' is [4, 32], expected [32, 32]"),
        (edit("connector.pred_vit.4.bias", lambda x: x.int()), "not of a known floating-point type"),
        (edit(f"{NET}input_proj.weight", lambda x: x.flatten()[0]), "has the shape [], and should have 2 dimensions"),
        (edit(f"{NET}res_blocks.0.in_ln.weight", None), "1 tensor is missing: 'vit_decoder.net.res_blocks.0.in_ln."),
        (edit(UP.format(1), None), "1 tensor is missing: 'text.layers.1.mlp.up_proj.weight'"),
        (edit("mllm.visual.merger.mlp.0.bias", lambda x: x[:3]), "'visual.merger.mlp.0.bias' is [3]"),
        (lambda t: t.update({UP.format(7): torch.zeros(2)}), "1 unexpected tensor: 'text.layers.7.mlp.up_proj"),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith("mllm.")], "tensors are missing: "),
    ],
)  # fmt: skip
def test_damaged_weights(planner: Planner, tmp_path: Path, damage: Callable[[Tensors], Any], message: str) -> None:
    tensors = released(planner)
    damage(tensors)
    refused(write(tmp_path / "m", tensors), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, "wrong shape"),
        ({"num_hidden_layers": 5}, "tensors are missing"),
        ({"num_attention_heads": 0}, "mllm/config.json: no Qwen2.5-VL can have it"),
        ({"hidden_size": "wide"}, "mllm/config.json: no Qwen2.5-VL can have it"),
        ({"vision_config": 7}, "mllm/config.json: no Qwen2.5-VL can have it"),
        ({"vocab_size": -1}, "mllm/config.json: no Qwen2.5-VL can have it"),
    ],
)
def test_wrong_configs(planner: Planner, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    refused(write(tmp_path / "m", released(planner), config={**mllm(), **change}), message)


def test_missing_files(planner: Planner, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", released(planner), shards=3)
    for file, message in (
        ("bernini/model-00002-of-00003.safetensors", "model-00002-of-00003.safetensors: named in"),
        ("mllm/config.json", "mllm/config.json: no such file"),
        ("config.json", "config.json: no such file"),
    ):
        kept = (folder / file).read_bytes()
        (folder / file).unlink()
        refused(folder, message)
        (folder / file).write_bytes(kept)
    open_planner(folder)
    (folder / "mllm" / "config.json").write_text("{")
    refused(folder, "mllm/config.json: cannot be read as JSON")


def refused(folder: Path, message: str) -> None:
    """One sentence that names the place."""
    with pytest.raises(CheckpointError) as error:
        open_planner(folder)
    text = str(error.value)
    assert message in text and str(folder) in text and "\n" not in text, text


def test_the_decoders_shift_is_the_bundles(planner: Planner, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", released(planner))
    (folder / "config.json").write_text(json.dumps({"clip_diff_cfg": {"shift": 3.5}}))
    assert open_planner(folder).config.decoder.shift == 3.5
    (folder / "config.json").write_text("{}")
    assert open_planner(folder).config.decoder.shift == 2.0
    for junk in ({"clip_diff_cfg": 3}, {"clip_diff_cfg": {"shift": "x"}}, {"clip_diff_cfg": {"shift": None}}):
        (folder / "config.json").write_text(json.dumps(junk))
        refused(folder, "config.json: clip_diff_cfg")
