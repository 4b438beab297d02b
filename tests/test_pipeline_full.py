"""A full checkpoint from end to end: all tasks, plans through files and pictures, and what it says to wrong input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import drawings
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from bernini import Bernini, cli
from bernini.cases import to_request
from bernini.checkpoint import CheckpointError
from bernini.errors import UserError
from bernini.inspect import inspect
from bernini.layouts import has_planner
from bernini.media import Clip
from bernini.media_write import write_video
from bernini.planner.plan_file import Plan, load_plan
from bernini.planner.stage import Planned
from bernini.presets import PRESETS
from bernini.request import Request, settle
from bernini.toy import byte_tokenizer, write_toy
from bernini.toy_full import write_toy_full

FAST: dict[str, Any] = {"steps": 2, "planning_steps": 2, "decoder_steps": 1, "num_frames": 9, "size": (32, 48)}
QUICK = ["--steps", "1", "--planning-steps", "2", "--decoder-steps", "1", "--num-frames", "5", "--size", "32x48"]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_full(tmp_path_factory.mktemp("model") / "full")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture(scope="module")
def model(full: Path) -> Bernini:
    return Bernini.from_pretrained(full)


def clip(shift: int = 0) -> Clip:
    drawn = drawings.draw_clip(9, 32, 48)
    return Clip(drawn.frames.roll(shift, dims=2), drawn.fps)


def still() -> Tensor:
    return drawings.draw_house(32, 32)


SOURCES: dict[str, dict[str, Any]] = {
    "t2i": {}, "t2v": {}, "i2i": {"images": [still()]}, "v2v": {"videos": [clip()]},
    "r2v": {"images": [still(), still().flip(1)]}, "rv2v": {"videos": [clip()], "images": [still()]},
}  # fmt: skip


def moved(one: Clip, other: Clip) -> int:
    return int((one.frames.int() - other.frames.int()).abs().max())


# --- all tasks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", SOURCES)
def test_every_task(model: Bernini, task: str) -> None:
    made: list[Planned] = []
    stages: dict[str, int] = {}
    request = Request("make it snow", task=task, **SOURCES[task], **FAST)
    result = model.generate(request, lambda stage, done, total: stages.update({stage: done}), made.append)
    frames = 1 if task.endswith("i") else 9
    assert result.frames.shape == (frames, 32, 32 if task == "i2i" else 48, 3)
    assert torch.equal(result.frames, model.generate(request).frames), "a seed means one result"
    (planned,) = made
    assert planned.plan.embeds.shape == (planned.plan.visual.tokens, 64)
    assert len(planned.sources) == len(request.videos) + len(request.images)
    assert stages["planning"] == 2 and stages["seeing"] == 1 and stages["sampling"] == 2


def test_the_plan_matters(model: Bernini) -> None:
    """And the sources, prompt and seed that it is made from; at once, since every run costs a second."""
    made: list[Planned] = []

    def run(**options: Any) -> Clip:
        request = {"prompt": "snow", "videos": [clip()], **FAST, **options}
        return model.generate(Request(**request), on_plan=made.append)

    base = run()
    planned = made[0].plan
    other = Plan(planned.embeds.flip(0) * 3, planned.visual, planned.model)
    assert moved(base, run(plan=other)) > 0
    assert moved(base, run(plan=other, scales={"tgt": 0.0})) > 0
    run(prompt="a house on fire")
    run(videos=[clip(shift=9)])
    run(seed=7)
    plans = [made[0].plan.embeds, *(m.plan.embeds for m in made[3:])]
    assert all(not torch.equal(a, b) for number, a in enumerate(plans) for b in plans[:number])


def test_a_plan_again_is_the_same_result(model: Bernini, tmp_path: Path) -> None:
    made: list[Planned] = []
    first = model.generate(Request("snow", videos=[clip()], **FAST), on_plan=made.append)
    again = model("snow", videos=[clip()], plan=made[0].plan, **FAST)
    assert moved(first, again) <= 1
    sixty = {**FAST, "steps": 3, "seed": 9}
    assert model("snow", videos=[clip()], plan=made[0].plan, **sixty).frames.shape == (9, 32, 48, 3), (
        "edit once, render many"
    )


def test_low_memory_is_the_same(model: Bernini, full: Path) -> None:
    request = Request("snow", videos=[clip()], images=[still()], **FAST)
    assert torch.equal(
        Bernini.from_pretrained(full, low_memory=True).generate(request).frames, model.generate(request).frames
    )


def test_the_planner_is_gone_before_the_experts_come(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    from bernini.checkpoint import ExpertFiles
    from bernini.planner.loading import PlannerSource

    alive: list[weakref.ref[Any]] = []
    order: list[str] = []
    load_planner, load_expert = PlannerSource.load, ExpertFiles.load

    def planner(self: PlannerSource, **options: Any) -> Any:
        loaded = load_planner(self, **options)
        alive.append(weakref.ref(loaded))
        order.append("planner")
        return loaded

    def expert(self: ExpertFiles, which: Any) -> Any:
        gc.collect()
        order.append(which)
        assert all(reference() is None for reference in alive)
        return load_expert(self, which)

    monkeypatch.setattr(PlannerSource, "load", planner)
    monkeypatch.setattr(ExpertFiles, "load", expert)
    lean = Bernini.from_pretrained(full, low_memory=True)
    assert order == [], "nothing is loaded before it is needed"
    lean("snow", **FAST)
    assert order[:2] == ["planner", "high"]


@pytest.mark.parametrize(
    ("mode", "sources"), [("v2v_apg", "v2v"), ("rv2v", "rv2v"), ("t2v_apg", "t2v"), ("eq12", "v2v")]
)
def test_other_modes_work_on_a_full_checkpoint(model: Bernini, mode: str, sources: str) -> None:
    plain = model("snow", mode=mode, **SOURCES[sources], **FAST)
    assert plain.frames.shape == (9, 32, 48, 3)
    assert moved(plain, model("snow", **SOURCES[sources], **FAST)) > 0, "not the default mode"


def test_every_mode_runs_with_no_guidance_at_all(model: Bernini) -> None:
    """Scales of 0 leave out all branches that may be left out."""
    zeros = {"vid": 0.0, "img": 0.0, "txt": 0.0, "tgt": 0.0}
    for mode in ("rv2v_wapg", "vae_txt_vit", "vae_txt_vit_wapg", "v2v_apg_planned", "eq12"):
        result = model("snow", mode=mode, scales=zeros, **SOURCES["rv2v"], **FAST)
        assert result.frames.shape == (9, 32, 48, 3)


def test_plan_parity(model: Bernini) -> None:
    made: list[Planned] = []
    for parity in (False, True, True):
        model.generate(Request("snow", videos=[clip()], plan_parity=parity, **FAST), on_plan=made.append)
    ours, released, again = (planned.plan.embeds for planned in made)
    assert torch.equal(released, again) and not torch.equal(ours, released)


# --- the order of source ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("videos", "images", "order", "phases"),
    [
        (1, 2, "videos-first", [1, 2, 3]), (1, 2, "images-first", [3, 1, 2]), (2, 1, "images-first", [2, 3, 1]),
        (2, 0, "images-first", [1, 2]), (0, 2, "images-first", [1, 2]), (1, 0, "videos-first", [1]),
        (1, 5, "videos-first", [1, 1.8, 2.6, 3.4, 4.2, 5]), (1, 5, "images-first", [5, 1, 1.8, 2.6, 3.4, 4.2]),
    ],
)  # fmt: skip
def test_source_ids(model: Bernini, videos: int, images: int, order: str, phases: list[float]) -> None:
    request = Request("p", videos=[clip()] * videos, images=[still()] * images, source_order=order)
    shapes = [(16, 3, 4, 6)] * videos + [(16, 1, 4, 4)] * images
    layout = model._layout(shapes, (16, 3, 4, 6), request)
    assert [segment.phase for segment in layout.segments] == pytest.approx([*phases, 0])
    assert [segment.kind for segment in layout.segments] == ["source"] * (videos + images) + ["target"]
    assert [segment.grid[0] for segment in layout.segments] == [3] * videos + [1] * images + [3], "only ids change"


def test_the_order_of_source_ids_shows(model: Bernini) -> None:
    one, other = (model("snow", source_order=o, **SOURCES["rv2v"], **FAST) for o in ("videos-first", "images-first"))
    assert moved(one, other) > 0
    same = [model("snow", source_order=o, **SOURCES["v2v"], **FAST) for o in ("videos-first", "images-first")]
    assert moved(*same) == 0, "with one kind of source there is nothing to order"


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def test_the_toy_is_a_sound_bundle(full: Path, toy: Path) -> None:
    report = inspect(full)
    assert report.problems == [] and report.layout == "bundle"
    assert has_planner(full) and not has_planner(toy) and not has_planner(full / "none")
    names = {path.name for path in full.iterdir()}
    assert names == {
        "config.json", "bernini", "mllm", "t5_text_encoder", "t5_tokenizer", "vae", "scheduler",
        "transformer_config.json", "transformer_2_config.json",
    }  # fmt: skip
    stored = load_file(full / "bernini" / "model.safetensors")
    assert tuple(stored["mask_tokens"].shape) == (1, 4096, 64) and "mllm.model.embed_tokens.weight" in stored
    assert not any(path.suffix == ".safetensors" for path in (full / "mllm").iterdir()), "mllm/ holds no weights"


def test_a_seed_means_one_checkpoint(full: Path, tmp_path: Path) -> None:
    same, other = write_toy_full(tmp_path / "same"), write_toy_full(tmp_path / "other", seed=1)
    weights = [path / "bernini" / "model.safetensors" for path in (full, same, other)]
    first, again, third = (path.read_bytes() for path in weights)
    assert first == again and first != third


def damaged(full: Path, folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    shutil.copytree(full, folder)
    file = folder / "bernini" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


def test_a_bundle_without_its_planner(full: Path, tmp_path: Path) -> None:
    for number, (change, message) in enumerate(
        (
            (lambda t: t.pop("mask_tokens"), "has no tensor 'mask_tokens'; these are not a planner's weights"),
            (lambda t: t.pop("connector.proj_gen.3.weight"), "1 tensor is missing: 'connector.proj_gen.3.weight'"),
            (lambda t: t.pop("diff_dec.transformer.proj_out.bias"), "1 tensor is missing: 'proj_out.bias'"),
        )
    ):
        with pytest.raises(CheckpointError) as error:
            Bernini.from_pretrained(damaged(full, tmp_path / str(number), change))
        assert message in str(error.value)
    without = shutil.copytree(full, tmp_path / "mllm")
    shutil.rmtree(without / "mllm")
    with pytest.raises(CheckpointError, match="mllm/config.json: no such file"):
        Bernini.from_pretrained(without)


def test_settings_with_a_planner() -> None:
    for task, sources in SOURCES.items():
        chosen = settle(Request("p", task=task, **sources), planner=True)
        assert chosen.preset_name == "v2" and chosen.mode == PRESETS["v2"][task].mode and chosen.plan.needs_planner
        assert chosen.planning is not None
        assert (chosen.planning.steps, chosen.planning.decoder_steps) == ((25, 5) if "i" in task[-1] else (50, 1))
        assert settle(Request("p", task=task, **sources)).planning is None
    chosen = settle(
        Request("p", preset="v1", planning_steps=7, decoder_steps=3, vit_txt_cfg=2, vit_img_cfg=0.5), planner=True
    )
    assert chosen.planning is not None and chosen.preset_name == "v1"
    assert chosen.planning.weights(True) == {"conditional": 2, "text only": -1.5, "unconditional": 0.5}
    assert (chosen.planning.steps, chosen.planning.decoder_steps, chosen.planning.parity) == (7, 3, False)


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "in.mp4", clip().frames, 16)
    Image.fromarray(still().numpy()).save(folder / "in.png")
    return folder


def generate(model: Path, output: Path, *more: str | Path) -> int:
    return cli.main(
        [str(word) for word in ("generate", "--model", model, "--prompt", "snow", "--output", output, *more)]
    )


def refused(capsys: pytest.CaptureFixture[str], run: Callable[[], int], message: str) -> None:
    """``run`` exits with 2 and one sentence that contains ``message``."""
    capsys.readouterr()
    try:
        code: Any = run()
    except SystemExit as stop:  # argparse's way
        code = stop.code
    error = capsys.readouterr().err
    lines = [line for line in error.strip().splitlines() if not line.startswith("result: ")]
    assert code == 2 and message in error and "Traceback" not in error, error
    assert [line for line in lines if "error" in line or line.startswith("bernini ")] == lines[-1:], error


def test_a_plan_through_the_command_line(full: Path, media: Path, tmp_path: Path, capsys: Any) -> None:
    plan, picture = tmp_path / "p.safetensors", tmp_path / "p.png"
    source = ["--video", media / "in.mp4", "--images", media / "in.png", *QUICK]
    first, again, other = (tmp_path / name for name in ("a.mp4", "b.mp4", "c.mp4"))
    assert generate(full, first, *source, "--plan-out", plan, "--plan-image", picture) == 0
    assert "mode rv2v_wapg, preset v2, 2 planning steps, 1 steps" in capsys.readouterr().err
    assert load_plan(plan).visual.grid == (1, 2, 3)
    shown = np.asarray(Image.open(picture))
    assert shown.shape[0] > 3 * 16 and len(np.unique(shown.reshape(-1, 3), axis=0)) > 8
    assert generate(full, again, *source, "--plan", plan, "--seed", "42") == 0
    assert "planning steps" not in capsys.readouterr().err
    assert (
        generate(full, other, *source, "--plan", plan, "--omega-tgt", "9", "--low-memory", "--dtype", "bfloat16") == 0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4", "c.mp4", "p.png", "p.safetensors"]


def test_planning_options_reach_the_model(full: Path, tmp_path: Path, model: Bernini) -> None:
    public = ["--planning_step", "3", "--vit_denoising_step", "2", "--vit_txt_cfg", "1.5", "--vit_img_cfg", "1.25",
              "--plan_parity", "--steps", "1", "--size", "32x32", "--source-order", "images-first"]  # fmt: skip
    plan = tmp_path / "p.safetensors"
    assert generate(full, tmp_path / "a.png", *public, "--plan-out", plan) == 0
    made: list[Planned] = []
    options: dict[str, Any] = {"planning_steps": 3, "decoder_steps": 2, "vit_txt_cfg": 1.5, "vit_img_cfg": 1.25,
                               "plan_parity": True, "source_order": "images-first"}  # fmt: skip
    model.generate(Request("snow", still=True, steps=1, size=(32, 32), **options), on_plan=made.append)
    assert torch.equal(load_plan(plan).embeds, made[0].plan.embeds)
    parser, commands = cli._parsers()
    args = cli.parse(parser, commands, ["generate", "--model", "m", "--prompt", "p", *public])
    assert to_request(cli.cli_generate.request_options(args), still=False) == Request(
        "p", steps=1, size=(32, 32), **options
    )


def test_a_list_plans_each_of_its_cases(full: Path, media: Path, tmp_path: Path, capsys: Any) -> None:
    case = {"prompt": "p", "num_frames": 5, "height": 32, "width": 48, "num_inference_steps": 1, "planning_step": 2,
            "vit_denoising_step": 1, "vit_txt_cfg": 1.4, "vit_img_cfg": 1.2}  # fmt: skip
    (tmp_path / "list.json").write_text(
        json.dumps([case, {**case, "task_type": "v2v", "video": str(media / "in.mp4")}])
    )
    words = [
        "generate",
        "--model",
        str(full),
        "--inputs",
        str(tmp_path / "list.json"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert cli.main(words) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["list_001.mp4", "list_002.mp4"]
    for option in ("--plan", "--plan-out", "--plan-image"):
        refused(capsys, lambda option=option: cli.main([*words, option, "x.png"]), f"{option} is for a single result")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--planning-steps", "3"], "planning steps need the planner, which this checkpoint has not"),
        (["--decoder-steps", "3"], "decoder steps need the planner"),
        (["--plan-parity"], "plan parity needs the planner"),
        (["--plan", "p.safetensors"], "a plan needs the planner"),
        (["--vit-txt-cfg", "2"], "vit-txt-cfg needs the planner"),
        (["--vit-img-cfg", "2"], "vit-img-cfg needs the planner"),
        (["--plan-out", "p.safetensors"], "p.safetensors: there will be no plan; this checkpoint has no planner"),
        (["--plan-image", "p.png"], "p.png: there will be no plan"),
        (["--guidance-mode", "vae_txt_vit"], "guidance mode vae_txt_vit needs the planner"),
    ],
)
def test_a_renderer_alone_does_not_plan(toy: Path, tmp_path: Path, capsys: Any, more: list[str], message: str) -> None:
    refused(capsys, lambda: generate(toy, tmp_path / "out.mp4", *more), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--planning-steps", "0"], "--planning-step: must be positive, got 0"),
        (["--decoder-steps", "x"], "'x' is not a whole number"),
        (["--vit-txt-cfg", "nan"], "must be a finite number, got nan"),
        (["--plan-parity", "--seed", "4294967296"], "plan parity needs a seed below 2^32"),
        (["--preset", "paper", "--task", "t2i"], "the preset paper has no task t2i; it has t2v"),
        (["--source-order", "mine"], "argument --source-order: invalid choice: 'mine'"),
        (["--plan-out", "plan.bin"], "plan.bin: must end in .safetensors"),
        (["--plan-image", "plan.jpg"], "plan.jpg: must end in .png"),
        (["--plan-out", "none/p.safetensors"], "the folder none does not exist"),
        (["--plan-image", "out.png"], "out.png: is the --output as well"),
        (["--image", "in.png", "--plan-image", "in.png"], "in.png: is a source"),
        (["--plan", "gone.safetensors"], "gone.safetensors: no such file"),
        (["--plan", "text.safetensors"], "text.safetensors: not a plan of Bernini"),
        (["--plan", "nan.safetensors"], "nan.safetensors: 2 of its values are not finite numbers"),
        (["--plan", "good.safetensors", "--size", "48x48"], "ask for the size and the number of frames that it was"),
        (["--plan", "other.safetensors"], "the plan was made by another model"),
        (["--images", *["in.png"] * 64], "takes 64 images and videos in all, the result included; got 65"),
        (["--num-frames", "4001", "--task", "t2v", "--output", "out.mp4", "--size", "224x224"],
         "of 224x224 takes 16000 tokens to plan, and the model has places for 4096; ask for fewer frames"),
    ],
)  # fmt: skip
def test_wrong_input(
    full: Path, model: Bernini, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any,
    more: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copy(media / "in.png", tmp_path)
    (tmp_path / "text.safetensors").write_text("hello")
    about = {"format": "bernini plan 1", "kind": "image", "grid": [1, 2, 3], "model": "abc"}
    planner = model._planner
    assert planner is not None
    from bernini.planner.plan_file import fingerprint

    embeds, mine = torch.ones(6, 64), {**about, "model": fingerprint(planner().planner)}
    bad = embeds.clone()
    bad[0, :2] = torch.nan
    for name, values, what in (("nan", bad, mine), ("good", embeds, mine), ("other", embeds, about)):
        save_file({"embeds": values}, tmp_path / f"{name}.safetensors", metadata={"bernini": json.dumps(what)})
    before = sorted(path.name for path in tmp_path.iterdir())
    size = [] if "--size" in more else ["--size", "32x48"]
    output = [] if "--output" in more else ["--output", "out.png"]
    words = ["generate", "--model", str(full), "--prompt", "snow", *size, "--steps", "1", *output, *more]
    refused(capsys, lambda: cli.main(words), message)
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "nothing is left behind"


def test_sources_that_the_planner_cannot_see(model: Bernini) -> None:
    with pytest.raises(UserError, match="8x32 pixels is smaller than a patch of the planner's vision tower"):
        model("snow", images=[torch.zeros(32, 8, 3, dtype=torch.uint8)], task="r2v", **FAST)


def test_a_tokenizer_without_the_special_tokens(full: Path, tmp_path: Path, capsys: Any) -> None:
    folder = shutil.copytree(full, tmp_path / "m")
    for path in (folder / "mllm").glob("*token*"):
        path.unlink()
    byte_tokenizer().save_pretrained(folder / "mllm")
    refused(
        capsys, lambda: generate(folder, tmp_path / "o.png", *QUICK),
        "the planner's tokenizer has no token <|im_start|>; it must be that of Qwen2.5-VL",
    )  # fmt: skip


def test_init_writes_a_full_checkpoint(tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["init", str(tmp_path / "m"), "--size", "toy-full", "--seed", "3"]) == 0
    assert "m: a toy-full checkpoint with random weights" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path / "m")]) == 0
    assert "full Bernini bundle" in capsys.readouterr().out
    refused(capsys, lambda: cli.main(["init", str(tmp_path / "m"), "--size", "toy-full"]), "exists already")
