"""Strides, rates and defaults come from the checkpoint: a bundle of the synthetic world's geometry, end to end."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import drawings
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bernini import Bernini, cli
from bernini.checkpoint import CheckpointError
from bernini.errors import UserError
from bernini.geometry import RELEASED, Geometry, peek, vae_strides
from bernini.inspect import inspect, render
from bernini.layouts import read_layout
from bernini.media import Clip, read_image, read_video
from bernini.media_write import write_image, write_video
from bernini.planner.stage import Planned
from bernini.planner.vision import VisionRules
from bernini.presets import PRESETS, TASK_PREFIXES, TASKS
from bernini.renderer import sampler
from bernini.renderer.text import TextEncoder
from bernini.request import Request, settle
from bernini.sources import read_sources, result_shape
from bernini.toy import byte_tokenizer, write_toy
from bernini.toy_full import SMALL, SPECIALS, mllm_config, root_config, write_checkpoint

FAST: dict[str, Any] = {"steps": 1, "planning_steps": 2, "decoder_steps": 1}
VAE = {"dim_mult": [1, 2, 4], "temperal_downsample": [True, True]}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "small", SMALL)


@pytest.fixture(scope="module")
def model(small: Path) -> Bernini:
    return Bernini.from_pretrained(small)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Larger, longer and at another rate than the model's own."""
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "in.mp4", drawings.draw_clip(33, 64, 64).frames, 16)
    write_image(folder / "in.png", drawings.draw_house(48, 48))
    return folder


def sources(task: str, media: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"videos": [media / "in.mp4"]} if TASKS[task].videos[0] else {}
    return found | ({"images": [media / "in.png"]} if TASKS[task].images[0] else {})


# --- what is read -----------------------------------------------------------------------------------------------------


def test_nothing_stated_is_the_released_geometry(tmp_path: Path) -> None:
    assert Geometry.of({}, {}, {}) == RELEASED == Geometry()
    assert (RELEASED.pixel_stride, RELEASED.frame_stride, RELEASED.text_tokens) == (16, 4, 512)
    assert [RELEASED.frame_count(n) for n in (1, 80, 81, 83)] == [1, 81, 81, 81]
    assert [RELEASED.vit_rate(fps) for fps in (4, 16, 24, 30)] == [1, 2, 3, 3]
    assert (RELEASED.default_preset(True), RELEASED.default_preset(False)) == ("v2", "bernini-r")
    assert peek(write_toy(tmp_path / "toy")) == (False, RELEASED)
    assert peek(tmp_path / "nowhere") == (False, RELEASED), "what is wrong is said when it is opened"


def test_what_a_checkpoint_states(small: Path) -> None:
    expected = Geometry(
        pixel_stride=8, frame_stride=4, vit_rate_divisor=2, vit_frame_stride=2, text_tokens=64, fps=8, num_frames=9,
        size=(32, 32), max_size=32, preset="toy", negative_prompt="",
    )  # fmt: skip
    assert peek(small) == (True, expected)
    assert Geometry.read(small) == expected and Geometry.read(small / "bernini", small) == RELEASED
    mllm = {"vision_config": {"temporal_patch_size": 3}}
    other = Geometry.of(
        {"max_sequence_length": 77, "vit_fps_divisor": 4, "defaults": {"flow_shift": 3, "vit_txt_cfg": 2, "fps": None}},
        {"dim_mult": [1, 2], "temperal_downsample": [False], "patch_size": 2}, {"patch_size": (1, 4, 2)}, mllm,
    )  # fmt: skip
    assert (other.pixel_stride, other.frame_stride, other.text_tokens, other.vit_rate(16)) == (16, 1, 77, 4)
    assert (other.flow_shift, other.vit_txt_cfg, other.fps, other.vit_frame_stride) == (3, 2, 16, 3)
    assert [other.frame_count(n) for n in (1, 7)] == [2, 8] and other.frame_indices(9, 8, 8, 9, "full_vit") == [0, 4, 8]


@pytest.mark.parametrize(
    ("vae", "strides"),
    [
        ({}, (8, 4)), ({"scale_factor_spatial": 8, "scale_factor_temporal": 4}, (8, 4)), (VAE, (4, 4)),
        ({**VAE, "temperal_downsample": [False, True]}, (4, 2)), ({"dim_mult": [1]}, (1, 1)),
        ({"patch_size": 2, "scale_factor_spatial": 16}, (16, 4)), ({**VAE, "patch_size": None}, (4, 4)),
    ],
)  # fmt: skip
def test_strides_are_those_of_the_levels(vae: dict[str, Any], strides: tuple[int, int]) -> None:
    assert vae_strides(vae) == strides


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("vae/config.json", {"scale_factor_spatial": 8}, "scale_factor_spatial is 8, but its 3 levels make 4"),
        ("vae/config.json", {"scale_factor_temporal": 2}, "scale_factor_temporal is 2, but its 3 levels make 4"),
        ("config.json", {"t5_max_sequence_length": 0}, "t5_max_sequence_length: must be positive, got 0"),
        ("config.json", {"vit_fps_divisor": 2.5}, "vit_fps_divisor: 2.5 is not a whole number"),
        ("config.json", {"defaults": [8]}, "defaults must be an object, is [8]"),
        ("config.json", {"defaults": {"frames": 9}}, "defaults: unknown key 'frames'; there are fps, num_frames"),
        ("config.json", {"defaults": {"fps": 0}}, "defaults: fps: must be from 0.1 to 1000 frames per second, got 0"),
        ("config.json", {"defaults": {"num_frames": "9"}}, "defaults: num_frames: '9' is not a whole number"),
        ("config.json", {"defaults": {"size": 32}}, "defaults: size: must be [height, width], is 32"),
        ("config.json", {"defaults": {"size": [32, 36]}}, "defaults: size: both sides must be multiples of 8, got"),
        ("config.json", {"defaults": {"preset": "best"}}, "defaults: preset: unknown preset 'best'; there are b"),
        ("mllm/config.json", {"vision_config": {"temporal_patch_size": -1}}, "temporal_patch_size: must be positive"),
    ],
)  # fmt: skip
def test_values_that_cannot_be(small: Path, tmp_path: Path, file: str, change: dict[str, Any], message: str) -> None:
    """The file and the key are named, from the command line as from ``inspect``, before any weight is read."""
    folder = shutil.copytree(small, tmp_path / "m", copy_function=_linked)
    stated = json.loads((folder / file).read_text())
    (folder / file).unlink()
    (folder / file).write_text(json.dumps({**stated, **change}))
    for look in (peek, Geometry.read):
        with pytest.raises(CheckpointError) as error:
            look(folder)
        assert str(error.value).startswith(f"{folder / file}: ") and message in str(error.value)
    assert any(message in problem for problem in inspect(folder).problems)


def test_limits_that_cannot_be(small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "m", copy_function=_linked)
    file = folder / "mllm" / "preprocessor_config.json"
    file.unlink()
    file.write_text('{"bernini_max_pixels": 0}')
    with pytest.raises(CheckpointError) as error:
        Bernini.from_pretrained(folder)
    assert str(error.value) == f"{file}: bernini_max_pixels must be a positive whole number, is 0"


def test_a_repository_s_configs_are_fetched(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(name: str, patterns: list[str]) -> Path:
        asked.append(patterns)
        if name == "owner/gone":
            raise CheckpointError("gone")
        return small

    monkeypatch.setattr("bernini.layouts._download", download)
    assert peek("owner/name") == (True, Geometry.read(small))
    assert peek("owner/gone") == (False, RELEASED) and peek("./owner/name") == (False, RELEASED)
    assert len(asked) == 2 and all(pattern.endswith("config.json") for pattern in asked[0])


def test_a_raw_export_takes_its_autoencoder_from_elsewhere(small: Path, tmp_path: Path) -> None:
    (tmp_path / "raw" / "bernini_renderer_high").mkdir(parents=True)
    assert peek(tmp_path / "raw") == (False, RELEASED)
    assert peek(tmp_path / "raw", small) == (False, Geometry(pixel_stride=8))
    other = tmp_path / "parts" / "vae"
    other.mkdir(parents=True)
    (other / "config.json").write_text('{"dim_mult": []}')
    with pytest.raises(CheckpointError) as error:
        peek(tmp_path / "raw", other.parent)
    assert str(error.value) == f"{other / 'config.json'}: dim_mult must be a list of numbers, is []"


def _linked(source: str, target: str) -> None:
    Path(target).symlink_to(source)


def test_limits_of_the_vision_tower() -> None:
    vision = mllm_config(byte_tokenizer(SPECIALS, ends=False), SMALL)["vision_config"]
    from types import SimpleNamespace

    rules = VisionRules.of(SimpleNamespace(**vision), SMALL.preprocessor)
    assert (rules.patch, rules.merge, rules.min_pixels, rules.max_pixels) == (4, 2, 64, 1024)
    assert rules.visual("video", 4, 32, 32).grid == (2, 4, 4) and rules.visual("image", 1, 32, 32).grid == (1, 4, 4)
    assert rules.size(30, 18) == (32, 16) and rules.size(64, 64) == (32, 32)
    for wrong, message in (
        ({"bernini_min_pixels": 0}, "bernini_min_pixels must be a positive whole number, is 0"),
        ({"bernini_max_pixels": "many"}, "bernini_max_pixels must be a positive whole number"),
        ({"bernini_min_pixels": 99999}, "bernini_min_pixels is 99999, more than the 50176 of bernini_max_pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            VisionRules.of(SimpleNamespace(), wrong)


# --- what follows from it ---------------------------------------------------------------------------------------------


def test_a_request_takes_what_the_checkpoint_says(small: Path, media: Path) -> None:
    _, geometry = peek(small)
    plain = settle(Request("p"), planner=True, geometry=geometry)
    assert (plain.frames, plain.fps, plain.max_size, plain.preset_name, plain.negative_prompt) == (9, 8, 32, "toy", "")
    assert plain.planning is not None and (plain.planning.steps, plain.planning.decoder_steps) == (8, 4)
    assert result_shape(Request("p"), plain) == (9, 32, 32)
    asked = Request("p", num_frames=6, fps=4, max_size=64, preset="v2", negative_prompt="n", size=(24, 40))
    chosen = settle(asked, planner=True, geometry=geometry)
    assert (chosen.frames, chosen.fps, chosen.max_size, chosen.preset_name) == (5, 4, 64, "v2")
    assert chosen.negative_prompt == "n" and result_shape(asked, chosen) == (5, 24, 40)
    other = replace(asked, size=None)
    assert result_shape(other, settle(other, planner=True, geometry=geometry))[1:] == (32, 32), "before the preset's"
    with pytest.raises(UserError, match="size 20x32: both sides must be positive multiples of 8; the nearest is 16x32"):
        settle(Request("p", size=(20, 32)), geometry=geometry)
    released = settle(Request("p"))
    assert (released.frames, released.fps, released.max_size, released.flow_shift) == (81, 16, 848, 5)
    assert result_shape(Request("p"), released) == (81, 480, 848)


def test_sources_are_read_at_the_checkpoint_s_strides(small: Path, media: Path) -> None:
    _, geometry = peek(small)
    request = Request("p", videos=[media / "in.mp4"], images=[media / "in.png"])
    read = read_sources(request, settle(request, planner=True, geometry=geometry))
    clip, image = read.videos[0], read.images[0]
    assert isinstance(clip, Clip) and isinstance(image, Tensor)
    assert clip.frames.shape == (9, 32, 32, 3) and clip.fps == 8 and image.shape == (32, 32, 3)
    assert read_image(media / "in.png", max_size=40, geometry=geometry).shape == (40, 40, 3), "a multiple of 8, not 16"
    assert read_image(media / "in.png", max_size=40).shape == (32, 32, 3)
    seen = read_video(media / "in.mp4", fps=8, num_frames=9, max_size=24, rule="full_vit", geometry=geometry)
    assert seen.fps == 4 and seen.frames.shape == (8, 24, 24, 3)


def test_presets_for_the_toy() -> None:
    assert set(PRESETS["toy"]) == {"t2i", "i2i", "t2v", "v2v", "r2v", "rv2v"}
    for task, preset in PRESETS["toy"].items():
        given = {"videos": ["v"] * TASKS[task].videos[0], "images": ["i"] * TASKS[task].images[0]}
        full, alone = (
            settle(Request("p", task=task, preset="toy", **given), planner=planner)  # type: ignore[arg-type]
            for planner in (True, False)
        )
        links = [name for _, _, name in full.plan.evaluated(preset.scales).links]
        assert links == ["vid"] * TASKS[task].videos[0] + ["img"] * TASKS[task].images[0] + ["txt", "tgt"]
        assert not alone.plan.needs_planner and alone.planning is None
        assert [name for _, _, name in alone.plan.evaluated(preset.scales).links] == links[:-1]


def test_a_tokenizer_that_knows_words() -> None:
    words = byte_tokenizer(words=["move the circle left"], length=64)
    plain = byte_tokenizer()
    text = "move the circle left"
    assert len(words(text).input_ids) == 5 and words.decode(words(text).input_ids[:-1]) == text
    assert len(words("the red circle").input_ids) == 3 + 4 + 1 + 1, "unknown words are bytes"
    assert words.decode(words("ein Kätzchen").input_ids[:-1]) == "ein Kätzchen"
    assert len(plain(text).input_ids) == len(text) + 1 and words.model_max_length == 64


# --- end to end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", PRESETS["toy"])
def test_every_task(model: Bernini, media: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing asked for but the task: 48 target tokens, 32 to plan, contexts of 64 and the plan behind them."""
    made: list[Planned] = []
    seen: dict[str, Any] = {}
    sample = sampler.sample

    def spy(experts: Any, layout: Any, **options: Any) -> Tensor:
        seen.update(layout=layout, **options)
        return sample(experts, layout, **options)

    monkeypatch.setattr("bernini.pipeline.sample", spy)
    request = Request("recolor the circle to blue", task=task, **sources(task, media), **FAST)
    result = model.generate(request, on_plan=made.append)
    still = TASKS[task].still
    assert result.frames.shape == (1 if still else 9, 32, 32, 3) and result.fps == 8
    *given, target = seen["layout"].segments
    assert target.tokens == len(seen["noise_tokens"]) == (16 if still else 48)
    videos, images = TASKS[task].videos[0], TASKS[task].images[0]
    assert [segment.tokens for segment in given] == [48] * videos + [16] * images
    assert made[0].plan.visual.grid == ((1, 4, 4) if still else (2, 4, 4))
    assert [visual.grid for visual, _ in made[0].sources] == [(2, 4, 4)] * videos + [(1, 4, 4)] * images
    text = model.text.states(request.prompt, prefix=TASK_PREFIXES[task])
    contexts = made[0].contexts
    for name, tokens in (
        ("planned", len(text) + len(contexts.planned)),
        ("positive", len(text) + len(contexts.positive)),
        ("negative", 1 + len(contexts.negative)),
    ):
        assert len(seen["texts"][name]) == max(64, tokens), "contexts are padded to 64, and never cut"


def test_the_default_request(small: Path, model: Bernini) -> None:
    clip = model("a red circle moves left on a gray background", **FAST)
    assert clip.frames.shape == (9, 32, 32, 3) and clip.fps == 8
    assert model.geometry == peek(small)[1] and model.has_planner
    assert len(model.text("p")) == 64 and isinstance(model.text, TextEncoder)


def test_the_command_line_takes_those_defaults(small: Path, media: Path, tmp_path: Path, capsys: Any) -> None:
    quick = ["--steps", "1", "--planning-steps", "1", "--decoder-steps", "1"]
    words = ["generate", "--model", str(small), "--prompt", "p", *quick]
    assert cli.main([*words, "--video", str(media / "in.mp4"), "--output", str(tmp_path / "a.mp4")]) == 0
    out = capsys.readouterr()
    assert "preset toy, 1 planning steps, 1 steps, 9 frames of 32x32" in out.err and "9 frames of 32x32" in out.out
    assert cli.main([*words, "--size", "36x36", "--output", str(tmp_path / "b.mp4")]) == 2
    assert "multiples of 8; the nearest is 32x32" in capsys.readouterr().err


# --- one expert -------------------------------------------------------------------------------------------------------


def test_a_bundle_of_one_expert(small: Path, model: Bernini) -> None:
    layout, report = read_layout(small), inspect(small)
    assert layout.kind == "bundle" and list(layout.experts) == ["high"]
    assert report.problems == [] and report.boundary is None and report.geometry == Geometry.read(small)
    names = [component.name for component in report.components if component.what == "the only expert"]
    assert names == ["diff_dec.transformer"] and not any("low" in c.name for c in report.components)
    text = render(report)
    assert "sizes are multiples of 8, frames 4n + 1, texts up to 64 tokens" in text and "no problems found" in text
    assert "default: 9 frames of 32x32 at 8 fps, preset toy" in text
    assert not (small / "transformer_2_config.json").exists() and not model.experts.has_low


def test_low_memory_with_one_expert(small: Path, model: Bernini) -> None:
    lean = Bernini.from_pretrained(small, low_memory=True)
    options: dict[str, Any] = {**FAST, "steps": 2}
    assert torch.equal(lean("p", **options).frames, model("p", **options).frames)


def test_only_the_low_noise_expert(small: Path, tmp_path: Path) -> None:
    """It is stored as such, and serves all timesteps; and a stored one that is skipped is noted, not used."""
    folder = write_checkpoint(tmp_path / "low", replace(SMALL, experts=("low",)))
    assert root_config(replace(SMALL, experts=("low",)))["skip_transformer_1"] is True
    assert inspect(folder).problems == []
    assert Bernini.from_pretrained(folder)("p", **FAST, still=True).frames.shape == (1, 32, 32, 3)
    both = write_checkpoint(tmp_path / "both", replace(SMALL, experts=("high", "low")))
    root = json.loads((both / "config.json").read_text())
    (both / "config.json").write_text(json.dumps({**root, "skip_transformer_2": True}))
    report = inspect(both)
    assert report.problems == [] and any("not used; config.json skips the low-noise" in note for note in report.notes)
    assert not Bernini.from_pretrained(both).experts.has_low
    (both / "config.json").write_text(json.dumps({**root, "skip_transformer_1": True, "skip_transformer_2": True}))
    with pytest.raises(CheckpointError, match="skips both transformers"):
        Bernini.from_pretrained(both)


def test_one_expert_that_is_not_there(small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "m")
    file = folder / "bernini" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("diff_dec.")}
    save_file(kept, file)
    assert any("no such tensors (high-noise expert)" in problem for problem in inspect(folder).problems)
    with pytest.raises(CheckpointError, match="not those of the high-noise expert"):
        Bernini.from_pretrained(folder)
