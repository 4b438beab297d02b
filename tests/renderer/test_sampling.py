"""Plans, schedule and loop, against a plain re-computation."""

from __future__ import annotations

import pytest
import torch

from bernini.kernels import Segment, SegmentLayout
from bernini.renderer.config import RendererConfig
from bernini.renderer.guidance import PLANS, Branch
from bernini.renderer.model import Renderer
from bernini.renderer.sampler import Experts, Guidance, sample
from bernini.renderer.schedule import euler_schedule

CONFIG = RendererConfig(num_attention_heads=2, attention_head_dim=16, num_layers=2, ffn_dim=64, text_dim=24)
SOURCES = [Segment("source", (2, 2, 3), 1.0), Segment("source", (1, 2, 2), 2.0), Segment("source", (1, 1, 2), 3.0)]
TARGET = Segment("target", (2, 2, 3))


def expert(seed: int) -> Renderer:
    torch.manual_seed(seed)
    return Renderer(CONFIG).eval()


def test_branches_select_and_number_the_sources() -> None:
    """One video and two images; released numbering: facts of the released model, section B."""
    full = SegmentLayout([*SOURCES, TARGET])

    def phases(branch: Branch, videos: int = 1) -> list[float]:
        return [s.phase for s in branch.layout(full, videos)[0].segments]

    assert phases(Branch("none", "negative")) == [0]
    assert phases(Branch("first video", "negative")) == [1, 0]
    assert phases(Branch("images", "negative")) == [1, 2, 0]
    assert phases(Branch("all", "positive")) == [1, 2, 3, 0]
    assert phases(Branch("first video", "negative"), videos=0) == [0]
    assert Branch("images", "negative").layout(full, 1)[1] == (1, 2, 3)


def test_every_plan_is_a_chain() -> None:
    for name, plan in PLANS.items():
        assert plan.links, name
        for new, old, scale in plan.links:
            assert 0 <= old < new < len(plan.branches) and scale in ("vid", "img", "txt"), name
        assert len(set(plan.branches)) == len(plan.branches), f"{name} evaluates a branch twice"
        assert plan.branches[-1].text == "positive", name
    assert PLANS["rv2v"].scaled({"vid": 1, "img": 2, "txt": 3}, 0.5) == [(1, 0, 0.5), (2, 1, 1.0), (3, 2, 1.5)]


def test_euler_schedule() -> None:
    schedule = euler_schedule(4, shift=3.0)
    even = torch.linspace(1, 0.001, 4, dtype=torch.float64)
    want = 3 * even / (1 + 2 * even)
    assert torch.allclose(torch.tensor(schedule.sigmas[:4], dtype=torch.float64), want)
    assert schedule.sigmas[-1] == 0 and schedule.steps == 4
    assert schedule.timesteps == pytest.approx([1000 * s for s in schedule.sigmas[:4]])
    assert euler_schedule(1).sigmas == (1.0, 0.0)
    for bad in ((0, 5.0), (3, 0.0), (3, float("nan"))):
        with pytest.raises(ValueError, match="must be positive"):
            euler_schedule(*bad)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["v2v", "rv2v"])
def test_the_loop_is_euler_over_the_chain(mode: str) -> None:
    """Two experts, the switch at 0.875 and its factor, every branch packed anew at each step."""
    high, low = expert(1), expert(2)
    full = SegmentLayout([*SOURCES, TARGET])
    source_tokens = [torch.randn(s.tokens, 64) for s in SOURCES]
    noise = torch.randn(TARGET.tokens, 64)
    texts = {"positive": torch.randn(6, 24), "negative": torch.randn(6, 24)}
    scales, schedule, plan = {"vid": 1.25, "img": 4.5, "txt": 4.0}, euler_schedule(4), PLANS[mode]
    seen: list[tuple[int, int]] = []
    got = sample(
        Experts(high, low), full, 1, source_tokens, noise, texts, plan,
        Guidance(scales, switch_factor=0.8), schedule, lambda *x: seen.append(x),
    )  # fmt: skip

    x = noise
    used = []
    for step, (time, sigma) in enumerate(zip(schedule.timesteps, schedule.sigmas, strict=False)):
        model, factor = (high, 1.0) if time >= 875 else (low, 0.8)
        used.append(model is low)
        velocities = []
        for branch in plan.branches:
            layout, kept = branch.layout(full, 1)
            tokens = torch.cat([x if number == 3 else source_tokens[number] for number in kept])
            velocities.append(model(tokens, layout, torch.tensor([time]), model.text_context(texts[branch.text])))
        v = velocities[0]
        for new, old, name in plan.links:
            v = v + factor * scales[name] * (velocities[new] - velocities[old])
        x = x + (schedule.sigmas[step + 1] - sigma) * v
    assert used == [False, False, True, True]
    assert (got - x).norm() / x.norm() < 1e-5
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


@torch.no_grad()
def test_one_expert_never_switches() -> None:
    model = expert(3)
    layout, noise = SegmentLayout([TARGET]), torch.randn(TARGET.tokens, 64)
    texts = {"positive": torch.randn(6, 24), "negative": torch.randn(6, 24)}
    scales = {"vid": 1.0, "img": 1.0, "txt": 3.0}
    one, plain = (
        sample(Experts(model), layout, 0, [], noise, texts, PLANS["t2v"], Guidance(scales, factor), euler_schedule(3))
        for factor in (0.5, 1.0)
    )
    assert torch.equal(one, plain)


@torch.no_grad()
def test_apg_changes_the_result_and_stays_finite() -> None:
    model = expert(4)
    layout, noise = SegmentLayout([SOURCES[0], TARGET]), torch.randn(TARGET.tokens, 64)
    texts = {"positive": torch.randn(6, 24), "negative": torch.randn(6, 24)}
    runs = {
        mode: sample(
            Experts(model), layout, 1, [torch.randn(12, 64, generator=torch.Generator().manual_seed(0))], noise, texts,
            PLANS[mode], Guidance({"vid": 1, "img": 1, "txt": 4}, eta=0.5, momentum=-0.5), euler_schedule(3),
        )
        for mode in ("v2v", "v2v_apg")
    }  # fmt: skip
    assert all(torch.isfinite(x).all() for x in runs.values())
    assert (runs["v2v"] - runs["v2v_apg"]).norm() / runs["v2v"].norm() > 1e-3
