"""End to end on a toy checkpoint: the command line, what it writes, and what it says to wrong input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bernini import cli, demo
from bernini.media import read_video, write_video
from bernini.renderer.text import MAX_TEXT_TOKENS, TextEncoder, clean_prompt
from bernini.renderer.vae import VideoAutoencoder
from bernini.toy import byte_tokenizer, write_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clip = demo.draw_clip(frames=9, height=48, width=64)
    path = tmp_path_factory.mktemp("media") / "in.mp4"
    write_video(path, clip.frames, clip.fps)
    return path


def generate(toy: Path, source: Path, output: Path, *more: str) -> int:
    return cli.main(
        [
            "generate",
            "--model",
            str(toy),
            "--prompt",
            "snow",
            "--video",
            str(source),
            "--output",
            str(output),
            "--steps",
            "2",
            *more,
        ]
    )


def test_generate_edits_a_video(toy: Path, source: Path, tmp_path: Path) -> None:
    assert generate(toy, source, tmp_path / "a.mp4") == 0
    assert generate(toy, source, tmp_path / "b.mp4") == 0
    assert generate(toy, source, tmp_path / "c.mp4", "--seed", "7") == 0
    first, again, other = (read_video(tmp_path / f"{name}.mp4").frames for name in "abc")
    assert first.shape == (9, 48, 64, 3)
    assert torch.equal(first, again), "a seed means one result"
    assert not torch.equal(first, other), "another seed means another result"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4", "c.mp4"]


def test_size_and_frames(toy: Path, source: Path, tmp_path: Path) -> None:
    assert generate(toy, source, tmp_path / "out.mp4", "--size", "32x48", "--num-frames", "7") == 0
    assert read_video(tmp_path / "out.mp4").frames.shape == (5, 32, 48, 3)


def test_the_prompt_and_the_source_matter(toy: Path, source: Path) -> None:
    from bernini import Bernini

    model = Bernini.from_pretrained(toy)
    clip = read_video(source)
    changed = type(clip)(clip.frames.flip(0), clip.fps)
    base, prompt, video = (
        model(text, videos=[media], steps=2).frames.int()
        for text, media in (("snow", clip), ("a house on fire", clip), ("snow", changed))
    )
    assert (base - prompt).abs().max() > 0
    assert (base - video).abs().max() > 0


def test_the_demo_writes_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--output", str(tmp_path / "d"), "--steps", "1"]) == 0
    assert demo.CAPTION in capsys.readouterr().out
    with Image.open(tmp_path / "d" / "demo.png") as sheet:
        picture = np.asarray(sheet.convert("RGB"))
    assert picture.shape[0] > 200 and picture.shape[1] > 600 and picture.std() > 20
    assert read_video(tmp_path / "d" / "v2v.mp4").frames.shape == (17, 96, 160, 3)
    assert read_video(tmp_path / "d" / "source.mp4").frames.float().std() > 20


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--size", "100x100"], "multiples of 16; the nearest is 96x96"),
        (["--size", "big"], "not of the form HxW"),
        (["--steps", "0"], "must be positive, got 0"),
        (["--num-frames", "x"], "'x' is not a whole number"),
    ],
)
def test_bad_options(
    toy: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        generate(toy, source, tmp_path / "out.mp4", *more)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_bad_files(toy: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence that names the file, exit code 2, nothing written."""
    text = tmp_path / "note.mp4"
    text.write_text("hello")
    out = tmp_path / "out.mp4"
    for run, message in (
        (lambda: generate(tmp_path / "none", source, out), "none: no such folder"),
        (lambda: generate(tmp_path, source, out), "config.json: no such file"),
        (lambda: generate(toy, tmp_path / "gone.mp4", out), "gone.mp4: no such file"),
        (lambda: generate(toy, text, out), "note.mp4"),
        (lambda: generate(toy, source, tmp_path / "no" / "out.mp4"), "does not exist"),
        (lambda: generate(toy, source, tmp_path / "out.txt"), "unknown suffix '.txt'"),
        (lambda: cli.main(["init", str(toy)]), "exists already"),
    ):
        assert run() == 2, message
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["note.mp4"]


def test_a_broken_part_of_a_checkpoint_is_named(
    toy: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    for part in ("vae", "text_encoder", "tokenizer"):
        broken = tmp_path / part
        shutil.copytree(toy, broken)
        shutil.rmtree(broken / part)
        assert generate(broken, source, tmp_path / "out.mp4") == 2
        assert f"{part}: no such folder" in capsys.readouterr().err


# --- text and VAE ---------------------------------------------------------------------------------------------------


def test_prompts_are_cleaned() -> None:
    assert clean_prompt("  a&amp;amp;b \n\t c ") == "a&b c"
    assert clean_prompt("â€œquotedâ€\x9d") == '"quoted"'


def test_text_is_padded_with_zeros_and_cut(toy: Path) -> None:
    from transformers import AutoTokenizer, UMT5EncoderModel

    encode = TextEncoder(
        AutoTokenizer.from_pretrained(toy / "tokenizer"), UMT5EncoderModel.from_pretrained(toy / "text_encoder").eval()
    )
    states = encode("ab", prefix="P: ")
    assert states.shape == (MAX_TEXT_TOKENS, 32)
    assert (states[:6].abs().sum(1) > 0).all() and not states[6:].any(), "'P: ab' is five bytes and the end mark"
    ids = torch.tensor([byte_tokenizer()("P: ab").input_ids])
    assert torch.allclose(states[:6], encode.model(ids).last_hidden_state[0], atol=1e-5)
    assert (encode("x" * 2000).abs().sum(1) > 0).all()


def test_any_text_survives_the_byte_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    for text in ("hello", "色调艳丽", "naïve 🙂", ""):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_latents_are_the_normalised_mode(toy: Path) -> None:
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan.from_pretrained(toy / "vae").eval()
    vae = VideoAutoencoder(model)
    pixels = torch.rand(3, 5, 16, 32) * 2 - 1
    latent = vae.encode(pixels)
    assert tuple(latent.shape) == vae.latent_shape(5, 16, 32) == (16, 2, 2, 4)
    assert torch.equal(latent, vae.encode(pixels)), "the mode, never a sample"
    with torch.no_grad():
        mode = model.encode(pixels[None]).latent_dist.mean[0]
        mean, std = (torch.tensor(v).view(16, 1, 1, 1) for v in (model.config.latents_mean, model.config.latents_std))
        assert torch.allclose(latent, (mode - mean) / std, atol=1e-6)
        assert torch.allclose(vae.decode(latent), model.decode(mode[None]).sample[0].clamp(-1, 1), atol=1e-5)
