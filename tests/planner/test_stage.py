"""The planner's part of a request: what comes out, reuse of plans, files and pictures of them, and what is refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bernini.errors import UserError
from bernini.media import Clip
from bernini.planner import stage as stage_module
from bernini.planner.decode import ReleasedSeeded, Seeded
from bernini.planner.model import Planner, released_frequencies
from bernini.planner.plan_file import Plan, fingerprint, load_plan, save_plan
from bernini.planner.plan_image import CELL, colours, plan_image, principal_directions
from bernini.planner.settings import PlanSettings
from bernini.planner.stage import Planned, PlannerStage
from bernini.planner.vision import VisionRules

from .tiny import GEN, HIDDEN, Letters, image, make_planner, video

FAST = PlanSettings(steps=3, decoder_steps=1)


@pytest.fixture(scope="module")
def stage() -> PlannerStage:
    return PlannerStage(make_planner(mask_tokens=64), Letters(), VisionRules())


def clip(frames: int = 9, height: int = 56, width: int = 84, seed: int = 0) -> Clip:
    generator = torch.Generator().manual_seed(seed)
    return Clip(torch.randint(0, 256, (frames, height, width, 3), generator=generator, dtype=torch.uint8), 16)


def still(height: int = 56, width: int = 56, seed: int = 1) -> Tensor:
    return clip(1, height, width, seed).frames[0]


def plan(stage: PlannerStage, *sources: Clip | Tensor, **options: Any) -> Planned:
    target = options.pop("target", None) or stage.target(9, 56, 84, 16)
    given: dict[str, Any] = {"task": "rv2v", "negative_prompt": "no", "settings": FAST, "draws": Seeded(0)}
    return stage("snow", sources, target, **{**given, **options})


def close(one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape and float((one - other).norm() / other.norm()) < 2e-5


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_target_tokens(stage: PlannerStage) -> None:
    assert stage.target(81, 96, 96, 16) == video(5, 3, 3)
    assert stage.target(1, 56, 84, 16) == image(2, 3)
    assert stage.target(9, 56, 84, 16) == video(1, 2, 3)
    assert stage.target(121, 56, 56, 24) == video(7, 2, 2), "three frames a second at 24"
    with pytest.raises(UserError, match="81 frames of 848x480 takes 300 tokens to plan, and the model has places for"):
        stage.target(81, 480, 848, 16)


def test_a_plan_with_everything(stage: PlannerStage) -> None:
    reports: list[tuple[str, int, int]] = []
    made = plan(stage, clip(), still(), progress=lambda *report: reports.append(report))
    assert made.plan.visual == video(1, 2, 3) and made.plan.embeds.shape == (6, HIDDEN)
    assert [visual for visual, _ in made.sources] == [video(1, 2, 3), image(2, 2)]
    assert [len(embeds) for _, embeds in made.sources] == [6, 4]
    planned, positive, negative = made.contexts.planned, made.contexts.positive, made.contexts.negative
    assert planned.shape[1] == GEN and len(planned) == len(positive) + 6
    assert len(negative) < len(positive), "no sources"
    assert reports[:2] == [("seeing", 0, 1), ("seeing", 1, 1)]
    assert reports[2:] == [("planning", number, 3) for number in range(4)]


def test_every_input_matters(stage: PlannerStage) -> None:
    base = plan(stage, clip(), still())
    for other in (
        plan(stage, clip(seed=5), still()),
        plan(stage, clip(), still(seed=6)),
        plan(stage, clip(), still(), task="v2v"),
        plan(stage, clip(), still(), draws=Seeded(1)),
    ):
        assert (base.plan.embeds - other.plan.embeds).abs().max() > 1e-3
    negative = plan(stage, clip(), still(), negative_prompt="never")
    assert torch.allclose(negative.plan.embeds, base.plan.embeds, atol=1e-5), "its branch cancels at the default scales"
    assert len(negative.contexts.negative) == len(base.contexts.negative) + 3
    guided = replace(FAST, visual_cfg=1.4, text_cfg=1.2)
    one, two = (plan(stage, clip(), settings=guided, negative_prompt=text) for text in ("no", "never"))
    assert (one.plan.embeds - two.plan.embeds).abs().max() > 1e-3


def test_the_frames_that_are_seen(stage: PlannerStage) -> None:
    """Two frames a second, an even number of them; a single frame twice."""
    long = clip(33, 28, 56)
    made = plan(stage, long, target=video(1, 1, 2))
    picked = long.frames[torch.tensor([0, 11, 21, 32])]
    assert torch.equal(stage_module._frames(long), picked) and made.sources[0][0].grid[0] == 2
    assert torch.equal(stage_module._frames(clip(1)), clip(1).frames.repeat(2, 1, 1, 1))
    assert torch.equal(stage_module._frames(still()), still()[None])


def test_sources_are_seen_each_by_itself(stage: PlannerStage) -> None:
    """Together in one pass of the vision tower, and none sees another."""
    together = plan(stage, clip(), still(), still(84, 28, 9)).sources
    for (visual, embeds), source in zip(together, (clip(), still(), still(84, 28, 9)), strict=True):
        ((alone, expected),) = plan(stage, source).sources
        assert visual == alone
        close(embeds, expected)


def test_no_guidance_of_a_text_alone(stage: PlannerStage) -> None:
    """A text weight of 0 leaves only the unconditional branch; the contexts are the conditional one's all the same."""
    made = plan(stage, settings=replace(FAST, text_cfg=0.0), task="t2v")
    plain = plan(stage, settings=FAST, task="t2v")
    assert (made.plan.embeds - plain.plan.embeds).abs().max() > 1e-3
    close(made.contexts.positive, plain.contexts.positive)


def test_parity_uses_the_released_frequencies(stage: PlannerStage) -> None:
    exact = stage.planner.text.rotary_emb.inv_freq.clone()
    made = plan(stage, clip(), settings=replace(FAST, parity=True), draws=ReleasedSeeded(0, 6))
    assert torch.equal(stage.planner.text.rotary_emb.inv_freq, exact), "and only for as long as it runs"
    with released_frequencies(stage.planner):
        assert not torch.equal(stage.planner.text.rotary_emb.inv_freq, exact)
        same = plan(stage, clip(), plan=made.plan)
    close(same.contexts.planned, made.contexts.planned)
    other = plan(stage, clip(), plan=made.plan)
    assert (other.contexts.planned - made.contexts.planned).abs().max() > 1e-5
    assert torch.equal(stage.planner.text.rotary_emb.inv_freq, exact)


# --- plans again ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sources", [(), (clip(), still())])
def test_a_plan_again(stage: PlannerStage, tmp_path: Path, sources: tuple[Clip | Tensor, ...]) -> None:
    """Through a file, without decoding anything: the same contexts."""
    first = plan(stage, *sources)
    save_plan(tmp_path / "p.safetensors", first.plan)
    loaded = load_plan(tmp_path / "p.safetensors")
    assert torch.equal(loaded.embeds, first.plan.embeds)
    assert (loaded.visual, loaded.model) == (first.plan.visual, fingerprint(stage.planner))
    again = plan(stage, *sources, plan=loaded, draws=None)
    assert again.plan is loaded
    for name in ("planned", "positive", "negative"):
        close(getattr(again.contexts, name), getattr(first.contexts, name))


def test_plans_that_do_not_fit(stage: PlannerStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is computed."""
    good = plan(stage).plan
    monkeypatch.setattr(Planner, "see", None)
    monkeypatch.setattr(stage_module, "Prefix", None)
    other = PlannerStage(make_planner(mask_tokens=64, seed=1), Letters(), VisionRules())
    with_nan = good.embeds.clone()
    with_nan[1, 2] = torch.nan
    for where, bad, target, message in (
        (other, good, None, "made by another model; plan again, or render with that model"),
        (stage, good, stage.target(9, 84, 56, 16), "the plan is of video tokens 1x2x3 (time x height x width), and"),
        (stage, good, stage.target(1, 56, 84, 16), "this result has image tokens 1x2x3"),
        (stage, replace(good, embeds=with_nan), None, "the plan: 1 of its values are not finite numbers"),
        (stage, replace(good, embeds=good.embeds[:, :5]), None, "6 tokens of this model take [6, 32]"),
    ):
        with pytest.raises(UserError) as error:
            plan(where, clip(), plan=bad, target=target)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_sources_that_cannot_be_seen(stage: PlannerStage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "see", None)
    with pytest.raises(UserError, match="5x200 pixels is smaller than a patch"):
        plan(stage, still(200, 5))
    with pytest.raises(UserError, match="one side is more than 200 times the other"):
        plan(stage, still(14, 2900))
    with pytest.raises(UserError, match="64 images and videos in all, the result included; got 65"):
        plan(stage, *[still()] * 64)


def test_a_plan_of_no_numbers_is_not_rendered(stage: PlannerStage) -> None:
    broken = make_planner(mask_tokens=64)
    with torch.no_grad():
        broken.connector.pred_vit[4].bias[0] = torch.inf
    with pytest.raises(UserError, match="the plan came out with values that are not finite"):
        plan(PlannerStage(broken, Letters(), VisionRules()))


# --- files ------------------------------------------------------------------------------------------------------------


def stored(**changes: Any) -> tuple[Tensor, dict[str, Any]]:
    embeds = changes.pop("embeds", torch.ones(6, 4))
    return embeds, {"format": "bernini plan 1", "kind": "video", "grid": [1, 2, 3], "model": "abc", **changes}


def written(path: Path, embeds: Tensor, about: Any) -> Path:
    save_file({"embeds": embeds}, path, metadata={"bernini": about if isinstance(about, str) else json.dumps(about)})
    return path


def test_plan_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    good = load_plan(written(path, *stored()))
    assert torch.equal(good.embeds, torch.ones(6, 4)) and (good.visual, good.model) == (video(1, 2, 3), "abc")
    nan = torch.ones(6, 4)
    nan[2, 1:3] = torch.tensor([torch.nan, torch.inf])
    for content, message in (
        (stored(format="bernini plan 2"), "not a plan of Bernini (ValueError: format 'bernini plan 2')"),
        (stored(embeds=torch.ones(5, 4)), "[5, 4] embeddings for the grid (1, 2, 3)"),
        (stored(embeds=torch.ones(24)), "[24] embeddings"),
        (stored(grid=[1, 2]), "not a plan of Bernini"),
        (stored(grid=["a", 2, 3]), "not a plan of Bernini"),
        (stored(grid=None), "not a plan of Bernini"),
        (stored(kind="sound"), "not a plan of Bernini"),
        ((torch.ones(6, 4), "{"), "not a plan of Bernini (JSONDecodeError"),
        ((torch.ones(6, 4), "[]"), "not a plan of Bernini"),
        (stored(embeds=nan), "p.safetensors: 2 of its values are not finite numbers"),
    ):
        with pytest.raises(UserError) as error:
            load_plan(written(path, *content))
        assert str(path) in str(error.value) and message in str(error.value)
    save_file({"embeds": torch.ones(6, 4)}, path)
    with pytest.raises(UserError, match="not a plan of Bernini"):
        load_plan(path)
    path.write_bytes(b"hello")
    with pytest.raises(UserError, match="not a plan of Bernini"):
        load_plan(path)
    for gone in (tmp_path / "gone.safetensors", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            load_plan(gone)


def test_a_plan_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, first = tmp_path / "p.safetensors", Plan(torch.ones(2, 3), image(1, 2), "a")
    save_plan(path, first)
    before = path.read_bytes()

    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(UserError, match=r"p.safetensors: the plan cannot be written \(disk full\)"):
        save_plan(path, Plan(torch.zeros(2, 3), image(1, 2), "b"))
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["p.safetensors"]
    with pytest.raises(UserError, match="cannot be written"):
        save_plan(tmp_path / "none" / "p.safetensors", first)


def test_plans_in_bfloat16_lose_nothing(tmp_path: Path) -> None:
    made = Plan(torch.randn(2, 3).bfloat16(), image(1, 2), "a")
    save_plan(tmp_path / "p.safetensors", made)
    assert torch.equal(load_plan(tmp_path / "p.safetensors").embeds.bfloat16(), made.embeds)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_principal_directions_are_those_of_a_decomposition() -> None:
    generator = torch.Generator().manual_seed(1)
    scales = torch.tensor([9.0, 5.0, 3.0, *[1.0] * 17], dtype=torch.float64)
    rows = torch.randn((200, 20), generator=generator, dtype=torch.float64) * scales
    rows = (rows - rows.mean(0)) @ torch.linalg.qr(torch.randn((20, 20), generator=generator, dtype=torch.float64)).Q
    ours, theirs = principal_directions(rows, 3), torch.linalg.svd(rows, full_matrices=False).Vh[:3].T
    assert torch.allclose((ours * theirs).sum(0).abs(), torch.ones(3, dtype=torch.float64), atol=1e-6)
    assert (ours.gather(0, ours.abs().argmax(0, keepdim=True)) > 0).all(), "the same colours on every machine"


def test_equal_embeddings_have_equal_colours() -> None:
    torch.manual_seed(0)
    rows = torch.randn(7, 16)
    first, second = colours([rows, rows.flip(0)])
    assert first.dtype == torch.uint8 and first.shape == (7, 3)
    assert torch.equal(first, second.flip(0)) and len(first.unique(dim=0)) == 7
    for few in (torch.ones(1, 16), torch.ones(4, 16), torch.randn(2, 2)):
        (found,) = colours([few])
        assert found.shape == (len(few), 3)


def test_a_picture_shows_every_frame() -> None:
    torch.manual_seed(0)
    target, source = video(2, 3, 4), image(2, 5)
    picture = np.asarray(plan_image((target, torch.randn(24, 8)), [(source, torch.randn(10, 8))]))
    painted = (picture != 255).any(-1)
    assert int(painted.sum()) > (24 + 10) * CELL * CELL * 0.9
    assert picture.shape[1] >= 2 * 4 * CELL and picture.shape[0] >= (3 + 2) * CELL
