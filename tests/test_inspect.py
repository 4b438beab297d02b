"""The inspection of a checkpoint: what it finds in sound ones, and that it describes broken ones instead of failing."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bernini.checkpoint import WEIGHTS, CheckpointError, expected_shapes, save_renderer, write_json
from bernini.inspect import BUNDLE_PARTS, inspect, render
from bernini.renderer.config import RendererConfig
from bernini.renderer.model import Renderer

CONFIG = RendererConfig(num_attention_heads=2, attention_head_dim=16, num_layers=1, ffn_dim=32, text_dim=24)
UNSTATED = RendererConfig(num_attention_heads=1, num_layers=1, ffn_dim=32, text_dim=24)
PARAMETERS = sum(torch.Size(shape).numel() for shape in expected_shapes(CONFIG).values())


def stock(folder: Path, config: dict[str, object]) -> None:
    """A folder with the weights of some other model."""
    folder.mkdir(parents=True)
    save_file({"a": torch.zeros(10), "b": torch.zeros(5).bfloat16()}, folder / "model.safetensors")
    write_json(folder / "config.json", config)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("transformer", "transformer_2"):
        save_renderer(Renderer(CONFIG), tmp_path / name)
    stock(tmp_path / "vae", {"z_dim": 16})
    stock(tmp_path / "text_encoder", {"d_model": 24})
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    write_json(tmp_path / "config.json", {"model_type": "bernini_renderer", "switch_dit_boundary": 0.9})
    return tmp_path


def bundle(root: Path) -> Path:
    parts = {"diff_dec.transformer.": UNSTATED, "diff_dec_low.transformer_2.": UNSTATED}
    tensors = {f"{p}{name}": torch.zeros(shape) for p, c in parts.items() for name, shape in expected_shapes(c).items()}
    for prefix, (_, counts) in BUNDLE_PARTS.items():
        if prefix not in parts:
            tensors |= {f"{prefix}{number or ''}": torch.zeros(3) for number in range(counts[-1])}
    (root / "bernini").mkdir()
    save_file(tensors, root / "bernini" / "model-00001-of-00001.safetensors")
    write_json(root / "config.json", {"model_type": "bernini", "switch_dit_boundary": 0.875})
    for name in ("transformer_config.json", "transformer_2_config.json"):
        write_json(root / name, UNSTATED.to_dict())
    stock(root / "vae", {})
    stock(root / "t5_text_encoder", {})
    for name in ("t5_tokenizer", "mllm"):
        (root / name).mkdir()
        for file in ("config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json"):
            (root / name / file).write_text("{}")
    return root


# --- sound ----------------------------------------------------------------------------------------------------------


def test_sound_checkpoint(root: Path) -> None:
    report = inspect(root)
    assert report.problems == []
    assert (report.layout, report.model_type, report.boundary) == ("diffusers", "bernini_renderer", 900)
    assert [component.name for component in report.components] == [
        "transformer",
        "transformer_2",
        "vae",
        "text_encoder",
    ]
    expert, vae = report.components[0], report.components[2]
    assert expert.config == CONFIG and not expert.stated
    assert (expert.files, expert.tensors, expert.parameters) == (1, len(expected_shapes(CONFIG)), PARAMETERS)
    assert expert.bytes == (root / "transformer" / WEIGHTS).stat().st_size and expert.dtypes == {"F32": expert.tensors}
    assert (vae.tensors, vae.parameters, vae.dtypes) == (2, 15, {"F32": 1, "BF16": 1})
    assert report.parameters == 2 * PARAMETERS + 30
    text = render(report)
    assert "1 layers, 2 heads x 16, feed-forward 32, text 24, channels 16 in, 16 out" in text
    assert "experts take turns at timestep 900" in text and text.endswith("no problems found")


def test_one_expert(root: Path) -> None:
    shutil.rmtree(root / "transformer")
    write_json(root / "config.json", {"model_type": "bernini_renderer", "skip_transformer_1": True})
    report = inspect(root)
    assert not report.problems and report.boundary is None
    assert [(c.name, c.what) for c in report.components[:1]] == [("transformer_2", "the only expert")]


def test_raw_export(tmp_path: Path) -> None:
    for name, prefix in (("high", "diff_dec.transformer."), ("low", "diff_dec.transformer_2.")):
        folder = tmp_path / f"bernini_renderer_{name}"
        folder.mkdir()
        tensors = {f"ema.{prefix}{key}": torch.zeros(shape) for key, shape in expected_shapes(UNSTATED).items()}
        save_file({**tensors, "t5.weight": torch.zeros(50)}, folder / "model.safetensors")
    report = inspect(tmp_path)
    assert not report.problems and report.layout == "raw"
    assert [c.config for c in report.components] == [UNSTATED, UNSTATED]
    assert report.components[0].tensors == len(expected_shapes(UNSTATED)), "the text encoder is not counted"
    assert any("come from another checkpoint" in note for note in report.notes)
    shutil.rmtree(tmp_path / "bernini_renderer_low")
    assert any("only bernini_renderer_high is here" in note for note in inspect(tmp_path).notes)


def test_full_bundle(tmp_path: Path) -> None:
    report = inspect(bundle(tmp_path))
    assert report.problems == [] and report.layout == "bundle"
    counts = {c.name: c.tensors for c in report.components}
    assert counts["mllm"] == 729 and counts["vit_decoder.net"] == 140 and counts["mask_tokens"] == 1
    assert counts["diff_dec.transformer"] == len(expected_shapes(UNSTATED)) and counts["vae"] == 2
    assert report.notes == [] and report.boundary == 875
    assert "full Bernini bundle" in render(report)


def test_broken_bundle(tmp_path: Path) -> None:
    bundle(tmp_path)
    file = tmp_path / "bernini" / "model-00001-of-00001.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("connector.")}
    del tensors["diff_dec.transformer.proj_out.bias"], tensors["mllm.7"]
    save_file({**tensors, "surprise.weight": torch.zeros(1)}, file)
    (tmp_path / "mllm" / "config.json").unlink()
    problems = "\n".join(inspect(tmp_path).problems)
    for message in ("connector.*: no such tensors", "1 tensor is missing: 'proj_out.bias'", "surprise (1 tensors)"):
        assert message in problems
    assert "mllm/config.json: no such file" in problems
    assert any("728 tensors; the released bundles have 729" in note for note in inspect(tmp_path).notes)
    shutil.rmtree(tmp_path / "bernini")
    assert any(problem.endswith("bernini: no such folder") for problem in inspect(tmp_path).problems)


# --- broken ---------------------------------------------------------------------------------------------------------


def edit(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        file = root / "transformer" / WEIGHTS
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return apply


def truncate(root: Path) -> None:
    file = root / "transformer_2" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-5])


def lost_shard(root: Path) -> None:
    index = {"weight_map": {"proj_out.bias": WEIGHTS, "x": "gone.safetensors"}}
    write_json(root / "transformer" / f"{WEIGHTS}.index.json", index)


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (lambda r: shutil.rmtree(r / "transformer"), ["transformer: no such folder"]),
        (lambda r: shutil.rmtree(r / "vae"), ["vae: no such folder"]),
        (lambda r: shutil.rmtree(r / "tokenizer"), ["tokenizer: no such folder"]),
        (lambda r: (r / "tokenizer" / "tokenizer.json").unlink(), ["tokenizer: holds none of tokenizer.json, "]),
        (lambda r: (r / "vae" / "model.safetensors").unlink(), ["vae: holds no .safetensors weights"]),
        (lambda r: (r / "vae" / "config.json").unlink(), ["vae/config.json: no such file"]),
        (lambda r: write_json(r / "vae" / "config.json", {"z_dim": 48}), ["z_dim is 48, but the experts"]),
        (lambda r: write_json(r / "vae" / "config.json", {"z_dim": [1]}), ["z_dim is [1], but"]),
        (lambda r: write_json(r / "text_encoder" / "config.json", {"d_model": 4096}), ["d_model is 4096, but"]),
        (truncate, [f"transformer_2/{WEIGHTS}: truncated"]),
        (lost_shard, ["gone.safetensors: named in"]),
        (edit(lambda t: t.pop("proj_out.bias")), ["transformer: 1 tensor is missing: 'proj_out.bias'"]),
        (edit(lambda t: t.update(extra=torch.zeros(1))), ["1 unexpected tensor: 'extra'"]),
        (edit(lambda t: t.update({"proj_out.bias": torch.zeros(1)})), ["1 tensor has a wrong shape: 'proj_out.bias'"]),
        (edit(lambda t: t.update({"proj_out.bias": torch.zeros(64).int()})), ["not of a known floating-point type"]),
        (edit(dict.clear), ["its weights are not those of the high-noise expert"]),
        (lambda r: (r / "transformer" / "config.json").write_text("{"), ["transformer/config.json: cannot be read"]),
        (
            lambda r: write_json(r / "transformer" / "config.json", {**CONFIG.to_dict(), "num_layers": 40}),
            ["states wrong dimensions: num_layers 40 (tensors: 1)"],
        ),
        (lambda r: write_json(r / "transformer" / "config.json", {**CONFIG.to_dict(), "eps": {}}), ["eps must be"]),
        (lambda r: write_json(r / "config.json", {"model_type": "other"}), ["model_type is 'other'"]),
        (lambda r: (r / "config.json").unlink(), ["config.json: no such file"]),
        (lambda r: (truncate(r), shutil.rmtree(r / "vae")), ["truncated", "vae: no such folder"]),
    ],
)  # fmt: skip
def test_every_problem_is_listed(root: Path, damage: Callable[[Path], object], messages: list[str]) -> None:
    damage(root)
    report = inspect(root)
    for message in messages:
        assert any(message in problem for problem in report.problems), report.problems
        assert message in render(report)
    assert sum(str(root) in problem for problem in report.problems) == len(report.problems), "each names its place"


def test_unknown_layout_is_counted_all_the_same(root: Path) -> None:
    write_json(root / "config.json", {"model_type": "other"})
    report = inspect(root)
    assert (report.layout, report.model_type) == ("unknown", "other")
    assert [c.name for c in report.components] == ["text_encoder", "transformer", "transformer_2", "vae"]
    assert all(c.files == 1 for c in report.components)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        inspect(tmp_path / "nowhere")


def test_nothing_in_a_checkpoint_can_make_it_fail(root: Path) -> None:
    files = sorted(path for path in root.rglob("*") if path.suffix in (".json", ".safetensors"))
    dice = random.Random(0)
    junk = [None, True, -1, 0, 7, 1e9, "x", [], [1], {}, {"a": {}}]
    for _ in range(150):
        file = dice.choice(files)
        before = file.read_bytes()
        if file.suffix == ".json":
            value = json.loads(before)
            if isinstance(value, dict) and value:
                value[dice.choice(sorted(value))] = dice.choice(junk)
            file.write_text(json.dumps(dice.choice([value, value, value, dice.choice(junk)])))
        else:
            damaged = bytearray(before)
            for _ in range(dice.randrange(1, 4)):
                damaged[dice.randrange(min(len(damaged), 3000))] = dice.randrange(32, 127)
            file.write_bytes(damaged)
        assert render(inspect(root))
        file.write_bytes(before)
