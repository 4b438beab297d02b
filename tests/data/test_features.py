"""Pixels to features: against the models called one by one, and what no model can take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bernini.data.example import Example, Features, Skip
from bernini.data.features import (
    FeatureEncoder,
    check_features,
    released_frames,
    vae_fingerprint,
    vit_fingerprint,
)
from bernini.data.parquet import ParquetData
from bernini.data.prepare import prepare
from bernini.data.world import sample
from bernini.data.worlds import WorldData, example_of
from bernini.errors import UserError
from bernini.media import to_model
from bernini.planner.vision import VisionRules
from bernini.renderer.vae import VideoAutoencoder


def usable(world: Any) -> list[Example]:
    examples = [world[n] for n in range(len(world))]
    assert all(isinstance(example, Example) for example in examples)
    return examples


def test_every_picture_gets_what_the_models_say_of_it_alone(world: WorldData, encoder: FeatureEncoder) -> None:
    examples = usable(world)
    done = encoder([*examples, Skip("s", "no target", "")], world.fps)
    assert isinstance(done[-1], Skip) and len(done) == len(examples) + 1
    assert encoder.vae is not None and encoder.see is not None and encoder.rules is not None
    for before, after in zip(examples, done, strict=False):
        assert isinstance(after, Example) and (after.key, after.task) == (before.key, before.task)
        assert (after.prompt, after.answer) == (before.prompt, before.answer)
        for raw, made in zip(before.visuals, after.visuals, strict=True):
            assert raw.pixels is not None and made.pixels is None and made.kind == raw.kind
            posterior = encoder.vae.model.encode(to_model(raw.pixels)[None]).latent_dist
            torch.testing.assert_close(made.vae_mean, posterior.mean[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(made.vae_logvar, posterior.logvar[0], rtol=1e-4, atol=1e-5)
            seen = raw.pixels if raw.kind == "image" else raw.pixels[[0, 3, 5, 8]]
            patches, (t, h, w) = encoder.rules.patches(seen)
            torch.testing.assert_close(made.vit, encoder.see(patches, [(t, h, w)]))
            assert made.vit_grid == (t, h // 2, w // 2) == ((1, 4, 4) if raw.kind == "image" else (2, 4, 4))
            assert made.vae_mean is not None and made.vae_mean.shape[1] == (1 if raw.kind == "image" else 3)


def test_equal_shapes_are_encoded_together(world: WorldData, encoder: FeatureEncoder, see: Any) -> None:
    calls: list[int] = []

    def counted(patches: Tensor, grids: Any) -> Tensor:
        calls.append(len(grids))
        return see(patches, grids)

    examples = usable(world)
    pictures = sum(len(list(example.visuals)) for example in examples)
    replace(encoder, see=counted, vae=None, batch=8)(examples, 8)
    assert sum(calls) == pictures and calls[:-1] == [8] * (len(calls) - 1)


def test_features_that_are_there_stay(world: WorldData, encoder: FeatureEncoder) -> None:
    half = replace(encoder, see=None, rules=None)
    assert half.parts == ("vae",)
    one = half(usable(world)[:4], 8, keep_pixels=True)
    both = encoder(one, 8)
    for first, second in zip(one, both, strict=True):
        assert isinstance(first, Example) and isinstance(second, Example)
        for a, b in zip(first.visuals, second.visuals, strict=True):
            assert a.vit is None and b.vit is not None and b.vae_mean is a.vae_mean


def test_the_released_planner_sees_an_even_number_of_frames() -> None:
    assert released_frames(81, 16) == [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]


NAN = torch.full((9, 32, 32, 3), torch.nan)


@pytest.mark.parametrize(
    ("visual", "reason", "words"),
    [
        (Features("video", torch.zeros(0, 32, 32, 3, dtype=torch.uint8)), "empty clip", "no frames"),
        (Features("video", NAN), "not finite", "pixels of a video: 27648"),
        (Features("video", torch.zeros(9, 32, 32, 3)), "bad pixels", "torch.float32"),
        (Features("image", torch.zeros(1, 32, 32, 4, dtype=torch.uint8)), "bad pixels", "[1, 32, 32, 4]"),
        (Features("image", torch.zeros(2, 32, 32, 3, dtype=torch.uint8)), "bad pixels", "an image of 2 frames"),
        (Features("video", torch.zeros(8, 32, 32, 3, dtype=torch.uint8)), "bad pixels", "multiple of 4"),
        (Features("video", torch.zeros(9, 32, 36, 3, dtype=torch.uint8)), "bad pixels", "36x32 pixels"),
        (Features("video", torch.zeros(9, 0, 32, 3, dtype=torch.uint8)), "bad pixels", "32x0 pixels"),
        (Features("image", torch.zeros(1, 8, 1608, 3, dtype=torch.uint8)), "bad pixels", "200 times"),
        (Features("video"), "wrong schema", "without pixels"),
    ],
)  # fmt: skip
def test_what_no_model_can_take_is_skipped(encoder: FeatureEncoder, visual: Features, reason: str, words: str) -> None:
    fine = example_of(sample("i2v", 1))
    bad = replace(fine, key="bad", sources=(*fine.sources, visual))
    alone, skip, after = *encoder([fine], 8), *encoder([bad, fine], 8)
    assert isinstance(skip, Skip) and (skip.key, skip.reason) == ("bad", reason) and words in skip.detail
    assert isinstance(alone, Example) and isinstance(after, Example) and alone.target and after.target
    torch.testing.assert_close(alone.target.vae_mean, after.target.vae_mean)


def test_a_model_that_makes_no_numbers_makes_no_features(world: WorldData, encoder: FeatureEncoder, see: Any) -> None:
    def broken(patches: Tensor, grids: Any) -> Tensor:
        made = see(patches, grids)
        made[0] = torch.inf
        return made

    done = replace(encoder, see=broken, batch=100)(usable(world)[:3], 8)
    assert [isinstance(example, Skip) for example in done] == [True, False, False]
    assert done[0].reason == "not finite" and "ViT" in done[0].detail  # type: ignore[union-attr]


def test_fingerprints_tell_models_apart(vae: VideoAutoencoder) -> None:
    import copy

    first, rules = vae_fingerprint(vae), VisionRules()
    other = VideoAutoencoder(copy.deepcopy(vae.model))
    with torch.no_grad():
        other.model.decoder.conv_in.weight.add_(1)
    assert vae_fingerprint(other) == first, "only what makes latents counts"
    with torch.no_grad():
        other.model.encoder.conv_in.weight[0, 0, 0, 0, 0].add_(0.01)
    assert vae_fingerprint(other) != first
    torch.manual_seed(0)
    tower = nn.Linear(4, 4).bfloat16()
    mark = vit_fingerprint(tower, rules)
    assert mark == vit_fingerprint(copy.deepcopy(tower).float(), rules), "not the type the weights are held in"
    wide = nn.Linear(4, 4)
    assert vit_fingerprint(wide, rules) == vit_fingerprint(copy.deepcopy(wide).bfloat16(), rules)
    assert mark != vit_fingerprint(nn.Linear(4, 4).bfloat16(), rules)
    assert mark != vit_fingerprint(tower, replace(rules, max_pixels=99))


def test_features_of_another_model_are_refused_up_front(
    world: WorldData, encoder: FeatureEncoder, tmp_path: Path, torch_bytes: Any
) -> None:
    mine = {"vae": "a" * 16, "vit": "b" * 16}
    prepare(world, tmp_path / "both", encoder, mine)
    data = ParquetData(tmp_path / "both")
    check_features(data, vae_fingerprint="a" * 16, vit_fingerprint="b" * 16)
    check_features(data, vae_fingerprint="a" * 16)
    for part in ("vae", "vit"):
        with pytest.raises(UserError, match=f"{part.upper()} features.*{mine[part]}.*{'c' * 16}"):
            check_features(data, **{f"{part}_fingerprint": "c" * 16})
    half = replace(encoder, see=None, rules=None)
    prepare(world, tmp_path / "vae", half, {"vae": "a" * 16})
    with pytest.raises(UserError, match="no VIT features, and no pictures.*--parts vit"):
        check_features(ParquetData(tmp_path / "vae"), vit_fingerprint="b" * 16)
    check_features(world, vae_fingerprint="c" * 16, vit_fingerprint="c" * 16)


def test_features_that_do_not_say_whose_they_are(table: Any, torch_bytes: Any) -> None:
    blob = torch_bytes(torch.zeros(4, 6))
    data = ParquetData(table([{"inputs": "[]", "image_embeds": [blob], "image_grid_thw": [[1, 4, 4]]}]))
    with pytest.raises(UserError, match="does not say which model.*fingerprint bbb"):
        check_features(data, vit_fingerprint="bbb")
    check_features(data, vit_fingerprint="bbb", trust_unmarked=True)
