"""The pipeline, the text encoder and the VAE on a toy checkpoint. The command line: test_cli.py."""

from __future__ import annotations

from pathlib import Path

import drawings
import pytest
import torch

from bernini.media import read_video
from bernini.media_write import write_video
from bernini.renderer.text import MAX_TEXT_TOKENS, TextEncoder, clean_prompt
from bernini.renderer.vae import VideoAutoencoder
from bernini.toy import byte_tokenizer, write_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clip = drawings.draw_clip(frames=9, height=48, width=64)
    path = tmp_path_factory.mktemp("media") / "in.mp4"
    write_video(path, clip.frames, clip.fps)
    return path


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
