"""Checkpoint folders: every layout, dimensions, dtypes, experts one by one, and what is said about broken ones."""

from __future__ import annotations

import json
import shutil
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from torch import Tensor

from bernini.checkpoint import (
    WEIGHTS,
    CheckpointError,
    CheckpointWarning,
    component_folder,
    derive,
    expected_shapes,
    load_experts,
    load_renderer,
    open_experts,
    resolve,
    save_renderer,
)
from bernini.layouts import BUNDLE_CONFIGS, has_planner
from bernini.renderer.config import RendererConfig
from bernini.renderer.model import Renderer
from bernini.renderer.sampler import OneAtATime, Which, expert_at
from bernini.weights import Stored, write_json

CONFIG = RendererConfig(num_attention_heads=2, attention_head_dim=16, num_layers=1, ffn_dim=32, text_dim=24)
RAW = RendererConfig(num_attention_heads=1, num_layers=1, ffn_dim=32, text_dim=24)  # 128 values a head, as unstated
SMALL = RendererConfig(num_attention_heads=12, num_layers=30, ffn_dim=8960)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_renderer(Renderer(CONFIG), tmp_path / "transformer")
    return tmp_path / "transformer"


@pytest.fixture
def pair(folder: Path) -> Path:
    """A checkpoint of two experts."""
    save_renderer(Renderer(CONFIG), folder.parent / "transformer_2")
    return settings(folder.parent)


def settings(root: Path, **change: object) -> Path:
    config = {"skip_transformer_1": False, "skip_transformer_2": False, "switch_dit_boundary": 0.875}
    write_json(root / "config.json", {"model_type": "bernini_renderer", **config, **change})
    return root


def raw(root: Path, high: str | None = "diff_dec.transformer.", low: str | None = "diff_dec.transformer_2.") -> Path:
    """A raw export: averaged experts, plain ones beside them, and a text encoder in the same files."""
    for name, prefix, value in (("high", high, 1.0), ("low", low, 2.0)):
        if prefix is not None:
            tensors = {f"ema.{prefix}{key}": torch.full(shape, value) for key, shape in expected_shapes(RAW).items()}
            tensors |= {f"{prefix}{key}": torch.full(shape, -1.0) for key, shape in expected_shapes(RAW).items()}
            if prefix:
                tensors |= {"diff_dec.text_encoder.shared.weight": torch.zeros(9, 4), "mask_tokens": torch.zeros(2)}
            write_shards(root / f"bernini_renderer_{name}", tensors)
    return root


def write_shards(folder: Path, tensors: dict[str, Tensor], count: int = 2) -> None:
    folder.mkdir(parents=True)
    names = sorted(tensors)
    places = {name: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, folder / file)
    write_json(folder / "model.safetensors.index.json", {"weight_map": places})


def values(model: Renderer) -> set[float]:
    return {float(value) for parameter in model.parameters() for value in parameter.unique()}


# --- one expert -----------------------------------------------------------------------------------------------------


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

    ours = dict(load_renderer(folder, dtype=torch.bfloat16).named_parameters())
    theirs = dict(WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16).named_parameters())
    assert {n: p.dtype for n, p in ours.items()} == {n: p.dtype for n, p in theirs.items()}
    assert all(torch.equal(p, theirs[n]) for n, p in ours.items())
    assert {p.dtype for p in ours.values()} == {torch.bfloat16, torch.float32}


# --- dimensions -----------------------------------------------------------------------------------------------------


def shapes_only(config: RendererConfig) -> dict[str, Stored]:
    return {name: Stored(Path("x"), "F32", shape, 0, 0) for name, shape in expected_shapes(config).items()}


@pytest.mark.parametrize(
    "config", [CONFIG, RAW, SMALL, RendererConfig(num_layers=2), RendererConfig(out_channels=8, freq_dim=64)]
)
def test_dimensions_come_from_the_tensors(config: RendererConfig) -> None:
    derived, differing = derive(shapes_only(config), config.to_dict())
    assert derived == config and not differing
    derived, _ = derive(shapes_only(config), {"attention_head_dim": config.attention_head_dim})
    assert derived == config


def test_the_small_checkpoint_with_the_large_ones_config() -> None:
    derived, differing = derive(shapes_only(SMALL), RendererConfig().to_dict())
    assert derived == SMALL
    assert differing == {"num_layers": (40, 30), "num_attention_heads": (40, 12), "ffn_dim": (13824, 8960)}


def test_wrong_dimensions_warn_in_one_sentence(folder: Path) -> None:
    wrong = {**CONFIG.to_dict(), "num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}
    write_json(folder / "config.json", wrong)
    with pytest.warns(CheckpointWarning) as caught:
        assert load_renderer(folder).config == CONFIG
    assert len(caught) == 1
    says = str(caught[0].message)
    assert "transformer/config.json" in says and "\n" not in says
    for part in ("num_layers 40 (tensors: 1)", "num_attention_heads 40 (tensors: 2)", "ffn_dim 13824 (tensors: 32)"):
        assert part in says


def test_a_head_dim_that_does_not_divide_the_width(folder: Path, tmp_path: Path) -> None:
    derived, differing = derive(shapes_only(RAW), {"attention_head_dim": 96})
    assert derived == RAW and differing == {"attention_head_dim": (96, 128)}
    write_json(folder / "config.json", {**CONFIG.to_dict(), "attention_head_dim": 20})
    with pytest.raises(CheckpointError, match="width of 32 is no multiple of the 128 values of a head"):
        load_renderer(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": "small"}, "eps must be a positive number, is 'small'"),
        ({"rope_max_seq_len": True}, "rope_max_seq_len must be a positive number, is True"),
        ({"image_dim": 1280}, "image-to-video variants are not Bernini's"),
        ({"rope_max_seq_len": 0}, "rope_max_seq_len must be a positive number, is 0"),
        ({"qk_norm": "rms_norm"}, "qk_norm='rms_norm'"),
    ],
)
def test_settings_that_no_renderer_has(folder: Path, change: dict[str, Any], message: str) -> None:
    write_json(folder / "config.json", {**CONFIG.to_dict(), **change})
    with pytest.raises(CheckpointError, match=message):
        load_renderer(folder)


# --- two experts, diffusers layout ----------------------------------------------------------------------------------


def test_two_experts(pair: Path) -> None:
    experts = load_experts(settings(pair, switch_dit_boundary=0.9), dtype=torch.float32, device="cpu")
    assert experts.has_low and experts.boundary == 900 and experts.config == CONFIG
    assert [expert_at(experts, timestep) for timestep in (900, 899.9)] == ["high", "low"]
    for which, name in (("high", "transformer"), ("low", "transformer_2")):
        stored = load_file(pair / name / WEIGHTS)
        assert torch.equal(experts.get(which).proj_out.weight, stored["proj_out.weight"])
    assert not torch.equal(experts.get("high").proj_out.weight, experts.get("low").proj_out.weight)


@pytest.mark.parametrize(
    ("skipped", "used"), [("skip_transformer_2", "transformer"), ("skip_transformer_1", "transformer_2")]
)
def test_one_expert_serves_all_timesteps(pair: Path, skipped: str, used: str) -> None:
    settings(pair, **{skipped: True}, switch_dit_boundary=0)
    shutil.rmtree(pair / ("transformer_2" if used == "transformer" else "transformer"))
    files = open_experts(pair)
    assert not files.has_low and files.config == CONFIG
    assert torch.equal(files.load("high").proj_out.bias, load_file(pair / used / WEIGHTS)["proj_out.bias"])
    assert load_experts(pair, dtype=torch.float32, device="cpu").low is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "other"}, "config.json: model_type is 'other', expected 'bernini_renderer'"),
        ({"model_type": "bernini"}, "bernini: no such folder; the checkpoint is incomplete"),
        ({"skip_transformer_1": True, "skip_transformer_2": True}, "skips both transformers"),
        ({"switch_dit_boundary": 875}, "switch_dit_boundary must be a number from 0 to 1, is 875"),
        ({"switch_dit_boundary": "0.9"}, "switch_dit_boundary must be a number from 0 to 1, is '0.9'"),
    ],
)
def test_root_config_is_checked(pair: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_experts(settings(pair, **change))


def test_what_is_no_checkpoint_folder(pair: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"transformer: the folder of one expert; give the checkpoint folder above"
    ):
        open_experts(pair / "transformer")
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        open_experts(pair / "nowhere")
    shutil.rmtree(pair / "transformer_2")
    with pytest.raises(CheckpointError, match="transformer_2: no such folder; the checkpoint is incomplete"):
        open_experts(pair)
    save_renderer(Renderer(RendererConfig(**{**vars(CONFIG), "text_dim": 8})), pair / "transformer_2")
    with pytest.raises(CheckpointError, match="do not fit together, their text_dim are 24 and 8"):
        open_experts(pair)


def test_experts_are_opened_without_their_weights_and_loaded_alone(pair: Path, monkeypatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("weights are read")

    with monkeypatch.context() as patched:
        patched.setattr("bernini.weights._read", forbidden)
        files = open_experts(pair, dtype=torch.bfloat16)
    alive: list[weakref.ref[Renderer]] = []

    def load(which):
        assert not any(reference() for reference in alive), "the other expert is still in memory"
        model = files.load(which)
        alive.append(weakref.ref(model))
        return model

    experts = OneAtATime(load, files.config, has_low=files.has_low, boundary=files.boundary)
    assert experts.get("high").dtype == torch.bfloat16
    assert experts.get("high") is experts.get("high")
    (pair / "transformer" / WEIGHTS).unlink()
    experts.get("low")
    with pytest.raises(CheckpointError, match="cannot be read"):
        experts.get("high")
    with pytest.raises(KeyError):
        open_experts(settings(pair, skip_transformer_1=True)).load("low")


def test_damage_of_the_second_expert_is_found_at_once(pair: Path) -> None:
    truncate(pair / "transformer_2")
    with pytest.raises(CheckpointError, match=r"transformer_2/.*: truncated"):
        open_experts(pair)


# --- raw exports ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("high", ["diff_dec.transformer.", "transformer.", ""])
@pytest.mark.parametrize("low", ["diff_dec.transformer_2.", "diff_dec_low.transformer_2.", "transformer_2.", ""])
def test_raw_export_takes_the_averaged_weights_of_its_prefix(tmp_path: Path, high: str, low: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = open_experts(raw(tmp_path, high, low))
    assert files.has_low and files.boundary == 875 and files.config == RAW
    assert values(files.load("high")) == {1.0}
    assert values(files.load("low")) == {2.0}


def test_raw_export_without_averages(tmp_path: Path) -> None:
    tensors = {f"diff_dec.transformer.{key}": torch.full(s, 3.0) for key, s in expected_shapes(RAW).items()}
    first = f"diff_dec.transformer.{min(expected_shapes(RAW))}"
    tensors[f"ema.{first}"] = torch.full_like(tensors[first], 4.0)  # averaged alone: the others are taken as they are
    write_shards(tmp_path / "bernini_renderer_high", tensors)
    with pytest.warns(
        CheckpointWarning, match="only bernini_renderer_high is here, so this expert serves all timesteps"
    ):
        files = open_experts(tmp_path)
    assert values(files.load("high")) == {3.0, 4.0}


def test_raw_export_with_a_config(tmp_path: Path) -> None:
    settings(raw(tmp_path, high=None), skip_transformer_1=True)
    assert values(open_experts(tmp_path).load("high")) == {2.0}
    settings(tmp_path)
    with pytest.raises(CheckpointError, match="bernini_renderer_high: no such folder; the checkpoint is incomplete"):
        open_experts(tmp_path)


def test_raw_export_of_the_other_expert_is_not_taken(tmp_path: Path) -> None:
    raw(tmp_path, low="diff_dec.transformer.")
    with pytest.raises(
        CheckpointError, match="bernini_renderer_low: its weights are not those of the low-noise expert"
    ):
        open_experts(tmp_path)


# --- other parts ----------------------------------------------------------------------------------------------------


def test_component_folders(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in ("vae", "t5_tokenizer", "text_encoder"):
        (pair / name).mkdir()
    (pair / "vae" / "config.json").touch()
    (pair / "t5_tokenizer" / "config.json").touch()
    assert component_folder(pair, "vae") == pair / "vae"
    assert component_folder(pair, "tokenizer") == pair / "t5_tokenizer", "as bundles call it"
    with pytest.raises(
        CheckpointError, match="text_encoder: no such folder, or it is empty; the checkpoint is incompl"
    ):
        component_folder(pair, "text_encoder")
    with pytest.raises(CheckpointError, match="vae: no such folder, .*take the other parts from a Bernini-R-Diffusers"):
        component_folder(raw(tmp_path_factory.mktemp("raw")), "vae")
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        component_folder(pair / "nowhere", "vae")


class Hub:
    """Stands for Hugging Face: one repository, or an error."""

    def __init__(self, folder: Path, error: Exception | None = None) -> None:
        self.folder, self.error = folder, error
        self.calls: list[tuple[str, list[str]]] = []

    def __call__(self, name: str, *, allow_patterns: list[str]) -> str:
        self.calls.append((name, allow_patterns))
        if self.error:
            raise self.error
        return str(self.folder)


def test_resolve(pair: Path, monkeypatch) -> None:
    hub = Hub(pair)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert resolve(pair) == pair and resolve(str(pair)) == pair and not hub.calls
    monkeypatch.chdir(pair.parent)
    (pair.parent / "owner" / "name").mkdir(parents=True)
    assert resolve("owner/name") == Path("owner/name") and not hub.calls, "a folder goes first"
    assert resolve("ByteDance/Bernini-R-1.3B-Diffusers") == pair
    assert [name for name, _ in hub.calls] == ["ByteDance/Bernini-R-1.3B-Diffusers"]
    assert {"*.json", "*.safetensors", "*.model", "*.txt"} <= set(hub.calls[0][1])
    hub.calls.clear()
    resolve("owner/other", parts=("vae", "tokenizer"))
    assert len(hub.calls) == 1 and "vae/*.safetensors" in hub.calls[0][1]
    assert not any(pattern.startswith(("transformer", "*")) for pattern in hub.calls[0][1])
    for wrong in ("nowhere", "./a/b", "a/b/c", "/a/b", "a/b c"):
        with pytest.raises(CheckpointError, match="no such folder"):
            resolve(wrong)
    with pytest.raises(CheckpointError, match="config.json: a file; a checkpoint is a folder"):
        resolve(pair / "config.json")


def test_a_planner_is_told_by_the_config_alone(pair: Path, monkeypatch) -> None:
    """Before any weights are fetched; and what cannot be read has none as far as one knows."""
    assert not has_planner(pair) and not has_planner(pair / "nowhere") and not has_planner("./a/b")
    hub = Hub(settings(pair, model_type="bernini"))
    assert has_planner(pair) and has_planner(str(pair))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert has_planner("ByteDance/Bernini-Diffusers")
    assert hub.calls == [("ByteDance/Bernini-Diffusers", ["config.json"])]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(pair, errors.LocalEntryNotFoundError("offline")))
    assert not has_planner("ByteDance/Bernini-Diffusers")
    (pair / "config.json").write_text("{")
    assert not has_planner(pair)


def bundled(folder: Path, *, ema: bool = False) -> Path:
    """The experts of a full bundle among tensors of its other parts, with their configs."""
    prefixes: dict[Which, str] = {"high": "diff_dec.transformer.", "low": "diff_dec_low.transformer_2."}
    tensors = {"mask_tokens": torch.zeros(1, 2, 3), "mllm.lm_head.weight": torch.zeros(2, 2)}
    for number, (which, prefix) in enumerate(prefixes.items()):
        state = {name: value.detach() + number for name, value in Renderer(CONFIG).state_dict().items()}
        tensors |= {prefix + name: value for name, value in state.items()}
        if ema:
            tensors |= {f"ema.{prefix}{name}": value + 5 for name, value in state.items()}
        write_json(folder / BUNDLE_CONFIGS[which], CONFIG.to_dict())
    (folder / "bernini").mkdir()
    save_file(tensors, folder / "bernini" / "model.safetensors")
    write_json(folder / "config.json", {"model_type": "bernini"})
    return folder


@pytest.mark.parametrize("ema", [False, True])
def test_experts_of_a_bundle(tmp_path: Path, ema: bool) -> None:
    files = open_experts(bundled(tmp_path, ema=ema))
    assert files.boundary == 875 and files.has_low and files.config == CONFIG
    stored = load_file(tmp_path / "bernini" / "model.safetensors")
    for which, prefix in (("high", "diff_dec.transformer."), ("low", "diff_dec_low.transformer_2.")):
        expected = stored[f"{'ema.' if ema else ''}{prefix}proj_out.bias"]
        assert torch.equal(files.load(which).proj_out.bias, expected)
    (tmp_path / BUNDLE_CONFIGS["low"]).unlink()
    with pytest.raises(CheckpointError, match="transformer_2_config.json: no such file"):
        open_experts(tmp_path)


def http(kind: type[Exception]) -> Exception:
    """One of the hub's errors, whose constructors want a response."""
    error = kind.__new__(kind)
    error.args = ("404 Client Error: a long story\nof several lines",)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http(errors.RepositoryNotFoundError), "neither a folder here nor a repository"),
        (http(errors.GatedRepoError), "its owner grants access on request"),
        (errors.LocalEntryNotFoundError("offline"), "Hugging Face cannot be reached"),
        (errors.OfflineModeIsEnabled("offline"), "Hugging Face cannot be reached"),
        (OSError(28, "No space left on device"), r"cannot be fetched .*OSError: .*No space left"),
        (http(errors.HfHubHTTPError), "cannot be fetched from Hugging Face"),
    ],
)
def test_resolve_errors_are_one_sentence(tmp_path: Path, monkeypatch, error: Exception, message: str) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(tmp_path, error))
    with pytest.raises(CheckpointError, match=f"^owner/name: .*{message}") as caught:
        resolve("owner/name")
    assert "\n" not in str(caught.value)


# --- damage ---------------------------------------------------------------------------------------------------------


def edit(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
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


def several(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".attn1." in name]:
        del tensors[name]
    tensors |= {name: torch.zeros(2) for name in ("blocks.0.attn3.bias", "blocks.0.attn3.weight")}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit(lambda t: t.pop("proj_out.bias")), "transformer: 1 tensor is missing: 'proj_out.bias'"),
        (edit(lambda t: t.update(extra=torch.zeros(2))), "1 unexpected tensor: 'extra'"),
        (edit(several), r"10 tensors are missing: 'blocks.0.attn1.norm_k.*and 7 more; 2 unexpected tensors: "),
        (edit(lambda t: t.update({"proj_out.bias": torch.zeros(3)})), r"'proj_out.bias' is \[3\], expected \[64\]"),
        (edit(lambda t: t.update({"proj_out.bias": torch.zeros(64).int()})), "floating-point type: '.*' is I32"),
        (edit(lambda t: t.update({"blocks.3.ffn.net.2.bias": torch.zeros(32)})), "are missing: 'blocks.1.attn1"),
        (edit(dict.clear), "its weights are not those of the high-noise expert"),
        (truncate, f"{WEIGHTS}: truncated, "),
        (lost_shard, "model-00001.safetensors: named in .*index.json"),
        (lambda f: (f / WEIGHTS).unlink(), "holds no .safetensors weights"),
        (lambda f: (f / "config.json").write_text("[1]"), "must hold a JSON object, holds a list"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    ],
)  # fmt: skip
def test_damage_is_named(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_renderer(folder)
