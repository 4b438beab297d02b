"""The command line on a toy checkpoint: what it makes of options, and what it says to wrong ones."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import drawings
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from bernini import Bernini, cli, cli_options, cli_screen, demo, shipped
from bernini.cases import to_request
from bernini.media import read_image, read_video
from bernini.media_write import write_video
from bernini.request import Request
from bernini.toy import write_toy

FAST = ["--steps", "1", "--num-frames", "5"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``in.mp4`` (9 frames of 48x64) and ``in.png`` (64x96)."""
    folder = tmp_path_factory.mktemp("media")
    clip = drawings.draw_clip(frames=9, height=48, width=64)
    write_video(folder / "in.mp4", clip.frames, clip.fps)
    Image.fromarray(drawings.draw_house(64, 96).numpy()).save(folder / "in.png")
    return folder


def generate(toy: Path, output: Path | None, *more: str | Path) -> int:
    where = [] if output is None else ["--output", output]
    return cli.main([str(word) for word in ("generate", "--model", toy, "--prompt", "snow", *where, *more)])


def frames_of(folder: Path) -> Tensor:
    """What ``--frames-dir`` wrote, bit for bit."""
    return torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in sorted(folder.iterdir())])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(capsys: pytest.CaptureFixture[str], run: Any, message: str) -> None:
    """``run`` exits with 2 and one sentence that contains ``message``."""
    capsys.readouterr()
    try:
        code = run()
    except SystemExit as stop:  # argparse's way
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error, error
    assert "Traceback" not in error and len(error.strip().splitlines()) == 1, error


# --- what is made ---------------------------------------------------------------------------------------------------


def test_a_seed_means_one_result(toy: Path, media: Path, tmp_path: Path) -> None:
    for name, seed in {"a": "42", "b": "42", "c": "7"}.items():
        assert generate(toy, tmp_path / f"{name}.mp4", "--video", media / "in.mp4", "--steps", "2", "--seed", seed) == 0
    first, again, other = (read_video(tmp_path / f"{name}.mp4").frames for name in "abc")
    assert first.shape == (9, 48, 64, 3)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert names(tmp_path) == ["a.mp4", "b.mp4", "c.mp4"]


def test_where_the_time_went(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 3.0, 3.5, 5.5, 6.0, 10.0, 11.0, 20.0])
    monkeypatch.setattr(cli_screen.time, "perf_counter", lambda: next(ticks))
    seen: list[tuple[str, int, int]] = []
    watch = cli_screen.Stopwatch(lambda *report: seen.append(report))
    reports = [("seeing", 0, 1), ("seeing", 1, 1), ("planning", 0, 2), ("planning", 2, 2), ("encoding", 0, 1)]
    reports += [("sampling", 1, 2), ("sampling", 2, 2)]
    for report in reports:
        watch(*report)
    assert seen == reports
    found = watch.summary().split("; peak memory ")
    assert found[0] == (
        "seeing 2.0 s, planning 2.0 s, encoding 4.0 s, sampling 1.0 s, rest 11.0 s; 20.0 s in all, 20% of it "
        "the planner's"
    )
    assert 0.05 < float(found[1].removesuffix(" GB")) < 24


def test_a_run_tells_its_stages(toy: Path, media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(toy, tmp_path / "out.mp4", "--video", media / "in.mp4", *FAST) == 0
    told = next(line for line in capsys.readouterr().err.splitlines() if "in all" in line)
    stages = r"result: reading \S+ s, encoding \S+ s, sampling \S+ s, decoding \S+ s, rest \S+ s"
    assert re.fullmatch(stages + r"; \S+ s in all; peak memory \S+ GB", told), told


@pytest.mark.parametrize(
    ("output", "options", "task", "shape"),
    [
        ("out.png", ["--size", "32x48"], "t2i", (1, 32, 48, 3)),
        ("out.mp4", ["--size", "32x48"], "t2v", (5, 32, 48, 3)),
        ("out.jpg", ["--image", "in.png"], "i2i", (1, 64, 96, 3)),
        ("out.mp4", ["--image", "in.png", "--size", "32x48", "--max-size", "32"], "r2v", (5, 32, 48, 3)),
        ("out.mp4", ["--images", "in.png", "in.png", "--image", "in.png", "--size", "32x32"], "r2v", (5, 32, 32, 3)),
        ("out.mkv", ["--video", "in.mp4"], "v2v", (5, 48, 64, 3)),
        ("out.mov", ["--video", "in.mp4", "--image", "in.png", "--size", "32x48"], "rv2v", (5, 32, 48, 3)),
        ("out.mp4", ["--video", "in.mp4", "--video", "in.mp4", "--task", "ads2v"], "ads2v", (5, 48, 64, 3)),
    ],
)
def test_the_task_follows_from_the_inputs(
    toy: Path,
    media: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    output: str,
    options: list[str],
    task: str,
    shape: tuple[int, ...],
) -> None:
    monkeypatch.chdir(media)
    assert generate(toy, tmp_path / output, *FAST, *options) == 0
    made = tmp_path / output
    got = read_image(made)[None] if made.suffix in (".png", ".jpg") else read_video(made).frames
    assert tuple(got.shape) == shape
    said = capsys.readouterr()
    count = f"{shape[0]} frame{'s' if shape[0] > 1 else ''} of {shape[1]}x{shape[2]}"
    assert said.out == f"{made}: {count}\n"
    assert f"task {task}, mode " in said.err and f"preset bernini-r, 1 steps, {count}, seed 42; cpu float32" in said.err
    assert "attention sdpa, kernels " in said.err and "qk_rope" in said.err


def test_options_reach_the_model(toy: Path, media: Path, tmp_path: Path) -> None:
    """The same bits as the Python interface with the same request, in both spellings."""
    public = [
        "--task_type", "rv2v", "--guidance_mode", "r2v_apg", "--num_inference_steps", "3", "--seed", "5",
        "--num_frames", "7", "--fps", "8", "--max_image_size", "32", "--neg_prompt", "rain", "--omega_vid", "1.5",
        "--omega_img", "2", "--omega_txt", "3", "--omega_tgt", "0.1", "--omega_scale", "0.5", "--eta", "0.25",
        "--norm_threshold", "40", "30", "20", "--momentum", "-0.5", "--flow_shift", "3", "--no-use_unipc",
    ]  # fmt: skip
    dashed = [word.replace("_", "-") if word.startswith("--") else word for word in public]
    sources = ["--video", media / "in.mp4", "--image", media / "in.png"]
    assert generate(toy, None, "--frames-dir", tmp_path / "public", *sources, *public) == 0
    assert generate(toy, None, "--frames-dir", tmp_path / "dashed", *sources, *dashed) == 0
    request = Request(
        "snow", videos=[media / "in.mp4"], images=[media / "in.png"], task="rv2v", mode="r2v_apg", steps=3, seed=5,
        num_frames=7, fps=8, max_size=32, negative_prompt="rain", scales={"vid": 1.5, "img": 2, "txt": 3, "tgt": 0.1},
        switch_factor=0.5, eta=0.25, thresholds=(40, 30, 20), momentum=-0.5, flow_shift=3, solver="euler",
    )  # fmt: skip
    model = Bernini.from_pretrained(toy)
    expected = model.generate(request).frames
    assert torch.equal(frames_of(tmp_path / "public"), expected)
    assert torch.equal(frames_of(tmp_path / "dashed"), expected)
    parser, commands = cli._parsers()
    args = cli_options.parse(parser, commands, ["generate", "--model", "m", "--prompt", "snow", *public])
    assert to_request(cli_options.request_options(args), still=False) == Request(
        **{**request.__dict__, "videos": (), "images": ()}
    )


def test_options_with_defaults_leave_the_request_alone() -> None:
    parser, commands = cli._parsers()
    for words in (["--prompt", "p"], ["--prompt=p", "--use_unipc"], ["--prompt", "p", "--sigma_schedule=release"]):
        args = cli_options.parse(parser, commands, ["generate", "--model", "m", *words])
        assert to_request(cli_options.request_options(args), still=False) == Request("p")
    args = cli_options.parse(
        parser, commands, ["generate", "--model", "m", "--prompt=--a_b", "--height=32", "--width=48"]
    )
    request = to_request(cli_options.request_options(args), still=True)
    assert (request.prompt, request.size, request.still) == ("--a_b", (32, 48), True), "a value keeps its underscores"


@pytest.mark.parametrize(
    "options",
    [
        ["--low-memory"],
        ["--attention", "reference"],
        ["--components", "."],
        ["--dtype", "bfloat16"],
        ["--dtype", "float16"],
        ["--solver", "euler", "--sigma-schedule", "diffusers-0.42"],
    ],
)
def test_ways_to_run(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    monkeypatch.chdir(toy)
    size = ["--size", "32x32", "--device", "cpu", "--steps", "2"]
    assert generate(toy, tmp_path / "plain.png", *size) == 0
    assert generate(toy, tmp_path / "other.png", *size, *options) == 0
    plain, other = (read_image(tmp_path / f"{name}.png").int() for name in ("plain", "other"))
    difference = int((plain - other).abs().max())
    assert (difference > 0) if "euler" in options else (difference <= (30 if "--dtype" in options else 1))


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png", "a.webp"])
def test_one_frame_goes_into_every_kind_of_file(toy: Path, tmp_path: Path, name: str) -> None:
    assert generate(toy, tmp_path / name, "--size", "32x48", "--num-frames", "1", "--steps", "1") == 0
    read = read_image(tmp_path / name)[None] if name.endswith(("png", "webp")) else read_video(tmp_path / name).frames
    assert read.shape == (1, 32, 48, 3)


def test_an_animation_and_a_folder_of_frames(toy: Path, tmp_path: Path) -> None:
    both = ["--size", "32x48", "--frames-dir", tmp_path / "frames"]
    assert generate(toy, tmp_path / "a.gif", *FAST, *both) == 0
    assert names(tmp_path / "frames") == [f"{number:05d}.png" for number in range(5)]
    frames, shown = frames_of(tmp_path / "frames"), read_video(tmp_path / "a.gif", fps=16).frames
    assert frames.shape == shown.shape == (5, 32, 48, 3)
    assert (frames.float() - shown.float()).abs().mean() < 12, "256 colours"
    assert names(tmp_path) == ["a.gif", "frames"]


def odd_image(folder: Path, kind: str) -> Path:
    base = Image.fromarray(drawings.draw_house(75, 101).numpy())
    path = folder / f"{kind}.png"
    if kind == "alpha":
        base.putalpha(128)
    elif kind == "grey":
        base = base.convert("L")
    elif kind == "sixteen":
        base = Image.fromarray(np.array(base.convert("L")).astype(np.uint16) * 257)
    elif kind == "turned":
        path = folder / "turned.jpg"
        exif = Image.Exif()
        exif[0x0112] = 6
        base.save(path, exif=exif)
        return path
    base.save(path)
    return path


@pytest.mark.parametrize(
    ("kind", "shape"), [("alpha", (80, 96)), ("grey", (80, 96)), ("sixteen", (80, 96)), ("turned", (96, 80))]
)
def test_images_of_every_kind(toy: Path, tmp_path: Path, kind: str, shape: tuple[int, int]) -> None:
    assert generate(toy, tmp_path / "out.png", "--image", odd_image(tmp_path, kind), "--steps", "1") == 0
    assert tuple(read_image(tmp_path / "out.png").shape) == (*shape, 3)


def encode(path: Path, frames: Tensor, times: list[float]) -> Path:
    """Frames at arbitrary times in seconds, of any size."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for pixels, time in zip(frames, times, strict=True):
            picture = av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24")
            picture.pts, picture.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("name", "times", "frames"),
    [("odd.mp4", [n / 25 for n in range(9)], 5), ("uneven.mkv", [0, 0.1, 0.4, 0.45, 0.6], 13), ("one.mkv", [0], 1)],
)
def test_videos_of_every_kind(toy: Path, tmp_path: Path, name: str, times: list[float], frames: int) -> None:
    """Odd sizes, a variable rate, a single frame."""
    path = encode(tmp_path / name, drawings.draw_clip(len(times), 51, 67).frames, times)
    assert generate(toy, None, "--video", path, "--steps", "1", "--frames-dir", tmp_path / "frames") == 0
    assert frames_of(tmp_path / "frames").shape == (frames, 48, 64, 3)


# --- wrong input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--size", "100x100"], "multiples of 16; the nearest is 96x96"),
        (["--size", "big"], "argument --size: 'big' is not of the form HxW"),
        (["--size", "0x0"], "multiples of 16; the nearest is 16x16"),
        (["--height", "32"], "height and width belong together"),
        (["--height", "32", "--width", "32", "--size", "32x32"], "give one of them"),
        (["--height", "30", "--width", "32"], "size 30x32: both sides must be positive multiples of 16"),
        (["--steps", "0"], "must be positive, got 0"),
        (["--num_frames", "-3"], "argument --num-frames: must be positive, got -3"),
        (["--num-frames", "x"], "'x' is not a whole number"),
        (["--num-frames", "9999999"], "must be at most 1000000"),
        (["--seed", "-1"], "argument --seed: must be a whole number from 0"),
        (["--fps", "0"], "argument --fps: must be from 0.1 to 1000"),
        (["--omega-txt", "nan"], "argument --omega-txt: must be a finite number, got nan"),
        (["--omega_vid", "inf"], "argument --omega-vid: must be a finite number, got inf"),
        (["--norm-threshold", "1", "2", "3", "4"], "--norm-threshold: takes 1 to 3 numbers, got 4"),
        (["--norm-threshold", "1", "nan"], "must be a finite number"),
        (["--flow-shift", "0"], "argument --flow-shift: must be positive, got 0"),
        (["--task", "v3v"], "unknown task 'v3v'; there are t2i"),
        (["--guidance-mode", "v3v"], "unknown guidance mode 'v3v'; there are t2v"),
        (["--guidance-mode", "rv2v_wapg"], "needs the planner"),
        (["--preset", "best"], "unknown preset 'best'; there are bernini-r"),
        (["--task", "v2v"], "task v2v needs a source video"),
        (["--task", "rv2v", "--video", "in.mp4"], "task rv2v needs a source image"),
        (["--task", "t2v", "--video", "in.mp4"], "task t2v takes no source video"),
        (["--device", "tpu"], "unknown device 'tpu'; there are cpu, cuda"),
        (["--device", "cpu:3"], "unknown device 'cpu:3'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--attention", "magic"], "backend='magic' is unknown"),
        (["--solver", "heun"], "argument --solver: invalid choice: 'heun'"),
        (["--solver", "unipc", "--no-use-unipc"], "not allowed with argument"),
        (["--sigma-schedule", "mine"], "argument --sigma-schedule: invalid choice: 'mine'"),
        (["--promt", "x"], "unknown option '--promt'; did you mean '--prompt'?"),
        (["stray"], "unknown option 'stray'"),
        (["--case", "a.json", "--inputs", "b.json"], "not allowed with argument --case"),
    ],
)
def test_bad_options(
    toy: Path, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, more: list[str], message: str
) -> None:
    monkeypatch.chdir(media)
    refused(capsys, lambda: generate(toy, tmp_path / "out.mp4", *more), message)
    assert not names(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:9"])
def test_a_gpu_that_is_not_there(toy: Path, tmp_path: Path, capsys: Any, device: str) -> None:
    refused(capsys, lambda: generate(toy, tmp_path / "out.mp4", "--device", device), f"device {device}: ")


def test_a_forced_kernel_that_is_not_there(
    toy: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BERNINI_KERNELS", "fastest")
    refused(capsys, lambda: generate(toy, tmp_path / "out.mp4"), "BERNINI_KERNELS='fastest': expected one of quack")


def test_bad_sources(toy: Path, media: Path, tmp_path: Path, capsys: Any) -> None:
    """One sentence that names the file, and nothing written; the model, which is not there, is not missed before."""
    whole = (media / "in.mp4").read_bytes()
    for name, data in {"text.mp4": b"hello", "empty.mp4": b"", "cut.mp4": whole[: len(whole) // 3]}.items():
        (tmp_path / name).write_bytes(data)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream: Any = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    before = names(tmp_path)
    for name, message in {
        "gone.mp4": "gone.mp4: no such file",
        "text.mp4": "text.mp4: cannot be read as a video",
        "empty.mp4": "empty.mp4: is empty",
        "cut.mp4": "cut.mp4: ",
        "sound.mp4": "sound.mp4: holds sound but no pictures",
        "": "is a directory",
    }.items():
        video = tmp_path / name
        refused(capsys, lambda video=video: generate(Path("no"), tmp_path / "o.mp4", "--video", video), message)
    refused(
        capsys,
        lambda: generate(Path("no"), tmp_path / "o.png", "--image", media / "in.mp4"),
        "in.mp4: is not an image that can be read",
    )
    assert names(tmp_path) == before


def test_bad_outputs(toy: Path, media: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copy(media / "in.mp4", tmp_path / "in.mp4")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    video = ["--video", tmp_path / "in.mp4"]
    for output, more, message in (
        (tmp_path / "no" / "out.mp4", video, "does not exist"),
        (tmp_path / "out.txt", video, "unknown suffix '.txt'; expected one of .mp4, .mov, .mkv, .gif, .png"),
        (tmp_path / "out.png", video, "81 frames do not fit into a picture"),
        (tmp_path / "out.png", ["--task", "t2v"], "81 frames do not fit into a picture"),
        (tmp_path, video, "expected one of .mp4"),
        (tmp_path / "in.mp4", video, "is a source; the result would take its place"),
        (Path("/proc/out.mp4"), video, "cannot be written"),
        (None, video, "give an --output"),
        (None, [*video, "--frames-dir", tmp_path / "full"], "exists and is not empty"),
        (None, [*video, "--frames-dir", tmp_path / "in.mp4"], "exists and is no folder"),
        (None, [*video, "--frames-dir", tmp_path / "no" / "frames"], "does not exist"),
    ):
        refused(capsys, lambda output=output, more=more: generate(Path("no"), output, *more), message)
    assert names(tmp_path) == ["full", "in.mp4"] and names(tmp_path / "full") == ["note"]


def test_no_prompt(toy: Path, capsys: Any) -> None:
    refused(capsys, lambda: cli.main(["generate", "--model", str(toy), "--output", "o.mp4"]), "give a --prompt")


def test_bad_checkpoints(toy: Path, tmp_path: Path, capsys: Any) -> None:
    folder, out = tmp_path / "bad", tmp_path / "out.png"
    weights = "transformer/diffusion_pytorch_model.safetensors"
    name = "blocks.0.attn1.norm_q.weight"

    def change(edit: Any) -> None:
        tensors = load_file(folder / weights)
        edit(tensors)
        save_file(tensors, folder / weights, metadata={"format": "pt"})

    def cut() -> None:
        data = (folder / weights).read_bytes()
        (folder / weights).write_bytes(data[: len(data) // 2])

    for harm, message in (
        (lambda: shutil.rmtree(folder), "bad: no such folder"),
        (lambda: (folder / "config.json").unlink(), "config.json: no such file"),
        (lambda: (folder / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
        (lambda: shutil.rmtree(folder / "vae"), "vae: no such folder"),
        (lambda: shutil.rmtree(folder / "text_encoder"), "text_encoder: no such folder"),
        (lambda: shutil.rmtree(folder / "tokenizer"), "tokenizer: no such folder"),
        (lambda: shutil.rmtree(folder / "transformer_2"), "transformer_2"),
        (lambda: change(lambda tensors: tensors.pop(name)), name),
        (lambda: change(lambda tensors: tensors.update(extra=torch.zeros(2))), "extra"),
        (lambda: change(lambda tensors: tensors.update({name: torch.zeros(3)})), name),
        (cut, "diffusion_pytorch_model.safetensors"),
    ):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(toy, folder)
        harm()
        refused(capsys, lambda: generate(folder, out, "--steps", "1", "--size", "32x32"), message)
    assert names(tmp_path) == ["bad"]
    refused(capsys, lambda: cli.main(["init", str(toy)]), "exists already")


def test_numbers_that_blow_up(toy: Path, tmp_path: Path, capsys: Any) -> None:
    def run() -> int:
        return generate(toy, tmp_path / "out.png", "--size", "32x32", "--omega-txt", "1e300", "--guidance-mode", "t2v")

    assert run() == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not finite; smaller guidance scales" in error
    assert not names(tmp_path)


def test_too_much_for_the_memory(toy: Path, tmp_path: Path, capsys: Any) -> None:
    assert generate(toy, tmp_path / "out.mp4", "--size", "80000x80000", "--num-frames", "40000") == 2
    assert "out of memory; fewer --num-frames" in capsys.readouterr().err
    assert not names(tmp_path)


# --- what is seen ---------------------------------------------------------------------------------------------------


def test_our_warnings_are_one_line_and_others_are_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: Any) -> int:
        warnings.warn("from somebody else", RuntimeWarning, stacklevel=1)
        source = "import warnings\ndef say(): warnings.warn('from us', RuntimeWarning, stacklevel=3)"
        ours: dict[str, Any] = {"__name__": "bernini.kernels.dispatch"}
        exec(source, ours)
        ours["say"]()
        return 0

    monkeypatch.setattr(cli, "_doctor", run)
    monkeypatch.setattr(sys, "warnoptions", [])
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().err == "warning: from us\n"


def test_an_interrupt_leaves_nothing(toy: Path, media: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of sampling."""
    command = [
        sys.executable, "-m", "bernini", "generate", "--model", toy, "--prompt", "x", "--video", media / "in.mp4",
        "--steps", "100000", "--output", tmp_path / "out.mp4", "--frames-dir", tmp_path / "frames",
    ]  # fmt: skip
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    # In the background of a script, where these tests may run, Ctrl-C would be ignored.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path, preexec_fn=heed
    ) as process:
        assert process.stderr is not None
        while "task v2v" not in (line := process.stderr.readline()):
            assert line, "ended before it began"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130
    assert said.strip().splitlines()[-1] == "bernini generate: interrupted" and "Traceback" not in said
    assert not names(tmp_path)


def test_help_is_there_before_torch() -> None:
    code = "import sys\nfrom bernini import cli\ntry: cli.main(['generate', '--help'])\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert "--omega-vid" in done.stdout and done.stdout.strip().endswith("False False")


# --- other commands -------------------------------------------------------------------------------------------------


def test_inspect_tells_good_from_bad(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(toy)]) == 0
    assert "transformer_2" in capsys.readouterr().out
    shutil.copytree(toy, tmp_path / "bad")
    shutil.rmtree(tmp_path / "bad" / "vae")
    assert cli.main(["inspect", str(tmp_path / "bad")]) == 1
    assert "vae: no such folder" in capsys.readouterr().out
    refused(capsys, lambda: cli.main(["inspect", str(tmp_path / "none")]), "none: no such folder")


def test_the_demo_shows_every_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--output", str(tmp_path / "d"), "--steps", "1"]) == 0
    assert demo.CAPTION in capsys.readouterr().out
    picture = read_image(tmp_path / "d" / "demo.png", max_size=4000)
    assert picture.shape[0] > 6 * 150 and picture.shape[1] > 1200 and picture.float().std() > 20
    for part in demo.PARTS:
        path = tmp_path / "d" / f"{part.task}{part.suffix}"
        shape = read_image(path)[None].shape if part.suffix == ".png" else read_video(path, fps=8).frames.shape
        assert shape == (1 if part.suffix == ".png" else 9, 32, 32, 3)
    assert read_video(tmp_path / "d" / "circle.mp4").frames.float().std() > 20
    (tmp_path / "file").touch()
    refused(capsys, lambda: cli.main(["demo", "--output", str(tmp_path / "file")]), "file: cannot be made a folder")


def test_without_a_model_the_shipped_one_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ["--prompt", "a large red circle moves right on a gray background"]
    assert cli.main(["generate", *prompt, "--output", str(tmp_path / "a.mp4"), "--steps", "2"]) == 0
    assert shipped.SAYS in capsys.readouterr().err
    assert read_video(tmp_path / "a.mp4", fps=8).frames.shape == (9, 32, 32, 3)


def test_an_installation_without_the_toy_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "toy")
    for command in (["generate", "--prompt", "x", "--output", str(tmp_path / "x.mp4")], ["demo"], ["eval", "toy"]):
        refused(capsys, lambda command=command: cli.main(command), "no model is shipped")
    assert not list(tmp_path.iterdir())


def test_cases_of_the_readme_are_json() -> None:
    from bernini import cases

    line = next(line for line in (cases.__doc__ or "").splitlines() if line.strip().startswith("{"))
    assert set(json.loads(line)) <= set(cases._KEYS)
