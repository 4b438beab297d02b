"""Plans, schedule and loop, against a plain re-computation."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from bernini.kernels import Segment, SegmentLayout
from bernini.renderer.config import RendererConfig
from bernini.renderer.guidance import NEEDS_PLANNER, PLANS, Branch
from bernini.renderer.latents import patchify, unpatchify
from bernini.renderer.model import Renderer
from bernini.renderer.sampler import Experts, Guidance, OneAtATime, sample
from bernini.renderer.schedule import SIGMA_SCHEDULES, Solver, UniPC, make_solver, schedule

CONFIG = RendererConfig(num_attention_heads=2, attention_head_dim=16, num_layers=2, ffn_dim=64, text_dim=24)
SOURCES = [Segment("source", (2, 2, 3), 1.0), Segment("source", (1, 2, 2), 2.0), Segment("source", (1, 1, 2), 3.0)]
TARGET = Segment("target", (2, 2, 3))


def euler(steps: int) -> Solver:
    return make_solver("euler", "diffusers-0.42", steps, 5.0)


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
    assert phases(Branch("videos", "negative"), videos=2) == [1, 2, 0], "all of them, as the full model has it"
    assert phases(Branch("videos", "negative"), videos=0) == [0]
    assert Branch("images", "negative").layout(full, 1)[1] == (1, 2, 3)


def test_every_plan_is_a_chain() -> None:
    for name, plan in PLANS.items():
        assert plan.links, name
        for new, old, scale in plan.links:
            assert 0 <= old < new < len(plan.branches) and scale in ("vid", "img", "txt", "tgt"), name
        assert len(set(plan.branches)) == len(plan.branches), f"{name} names a branch twice"
        assert plan.branches[-1].text != "negative", name
        alone = plan.without_planner()
        assert plan.needs_planner == (alone != plan) and not alone.needs_planner
        if plan.needs_planner:  # it speaks in the last branch only
            assert (alone.branches, alone.links) == (plan.branches[:-1], plan.links[:-1])
        assert (name in NEEDS_PLANNER) == (plan.needs_planner and name != "eq12")
    assert PLANS["rv2v"].scaled({"vid": 1, "img": 2, "txt": 3}, 0.5) == [(1, 0, 0.5), (2, 1, 1.0), (3, 2, 1.5)]


def test_branches_whose_scale_is_not_positive_are_skipped() -> None:
    """Facts of the released model, section K.7: the next difference is taken from the last branch that is left."""
    one = dict.fromkeys(("vid", "img", "txt", "tgt"), 1.0)
    for name, plan in PLANS.items():
        assert plan.evaluated(one) == plan, name
    plan = PLANS["rv2v_wapg"]
    less = plan.evaluated({**one, "img": 0.0, "txt": -1.0})
    assert less.branches == (plan.branches[0], plan.branches[1], plan.branches[4])
    assert less.links == ((1, 0, "vid"), (2, 1, "tgt"))
    assert plan.evaluated(dict.fromkeys(one, 0.0)).links == ()
    chain = PLANS["vae_txt_vit_wapg"]
    always = chain.evaluated(dict.fromkeys(one, 0.0))
    assert always.branches == (chain.branches[0], chain.branches[3]), "the planner's branch is always evaluated"
    assert always.links == ((1, 0, "tgt"),) and always.apg == chain.apg
    assert PLANS["rv2v"].evaluated(dict.fromkeys(one, 0.0)) == PLANS["rv2v"], "the renderer's modes skip nothing"


def test_numbers_of_projections() -> None:
    """Some modes fix them, others leave them to the request."""
    numbers = Guidance({}, eta=0.3, thresholds=(9.0, 8.0, 7.0))
    own, fixed, mixed = (PLANS[name].apg for name in ("r2v_apg", "vae_txt_vit_wapg", "v2v_apg_planned"))
    assert (numbers.eta_of(own), numbers.thresholds_of(own, 2)) == (0.3, [9.0, 8.0])
    assert (numbers.eta_of(fixed), numbers.thresholds_of(fixed, 3)) == (0.2, [0.0] * 3)
    assert (numbers.eta_of(mixed), numbers.thresholds_of(mixed, 1)) == (1.0, [50.0])
    assert (numbers.eta_of(None), numbers.thresholds_of(None, 3)) == (1.0, None)


def test_schedules_against_the_library_that_is_installed() -> None:
    """``diffusers-0.42`` is checked against diffusers where that version is installed; ``release`` has golden runs."""
    import diffusers

    if tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 42):
        pytest.skip(f"needs diffusers 0.42, found {diffusers.__version__}")
    for steps in (1, 5, 40):
        for shift in (3.0, 5.0):
            theirs = diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
            )
            theirs.set_timesteps(steps)
            ours = schedule("unipc", "diffusers-0.42", steps, shift)
            assert list(ours.timesteps) == theirs.timesteps.tolist()
            assert ours.sigmas == pytest.approx(theirs.sigmas.tolist(), abs=1e-6)
            flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
            flow.set_timesteps(steps)
            ours = schedule("euler", "diffusers-0.42", steps, shift)
            assert ours.sigmas == pytest.approx(flow.sigmas.tolist(), abs=1e-6)
            assert ours.timesteps == pytest.approx(flow.timesteps.tolist(), abs=1e-3)


def test_schedules_run_from_noise_to_nothing() -> None:
    for solver in ("unipc", "euler"):
        for name in SIGMA_SCHEDULES:
            levels = schedule(solver, name, 7, 5.0)
            assert levels.steps == 7 and len(levels.sigmas) == 8 and levels.sigmas[-1] == 0
            assert all(a > b for a, b in pairwise(levels.sigmas[:7])), (solver, name)
            assert levels.sigmas[0] > 0.999
    assert schedule("unipc", "release", 6, 5.0).timesteps == (999, 961, 908, 833, 713, 499)
    assert schedule("unipc", "diffusers-0.42", 6, 5.0).timesteps == (999, 961, 909, 833, 714, 501)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("unipc", "release", 0, 5.0), "steps must be positive, got 0"),
        (("unipc", "release", 3, 0.0), "shift must be positive"),
        (("euler", "release", 3, float("nan")), "shift must be positive, got nan"),
        (("heun", "release", 3, 5.0), "solver 'heun'; expected one of unipc, euler"),
        (("unipc", "0.36", 3, 5.0), "sigma schedule '0.36'"),
    ],
)
def test_bad_schedules(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(*arguments)


def test_unipc_is_exact_on_a_straight_path() -> None:
    """With a constant velocity every solver must land on x - v, whatever the levels."""
    x, v = torch.randn(6, 8), torch.randn(6, 8)
    for name in SIGMA_SCHEDULES:
        solver = UniPC(schedule("unipc", name, 9, 5.0))
        state = x
        for step in range(9):
            state = solver.step(step, v, state)
        assert torch.allclose(state, x - solver.schedule.sigmas[0] * v, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["v2v", "rv2v"])
def test_the_loop_is_euler_over_the_chain(mode: str) -> None:
    """Two experts, the switch at 0.875 and its factor, every branch packed anew at each step."""
    high, low = expert(1), expert(2)
    full = SegmentLayout([*SOURCES, TARGET])
    source_tokens = [torch.randn(s.tokens, 64) for s in SOURCES]
    noise = torch.randn(TARGET.tokens, 64)
    texts = {"positive": torch.randn(6, 24), "negative": torch.randn(6, 24)}
    scales, levels, plan = {"vid": 1.25, "img": 4.5, "txt": 4.0}, euler(4).schedule, PLANS[mode]
    seen: list[tuple[int, int]] = []
    got = sample(
        Experts(high, low), full, 1, source_tokens, noise, texts, plan,
        Guidance(scales, switch_factor=0.8), euler(4), progress=lambda *x: seen.append(x),
    )  # fmt: skip

    x = noise
    used = []
    for step, (time, sigma) in enumerate(zip(levels.timesteps, levels.sigmas, strict=False)):
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
        x = x + (levels.sigmas[step + 1] - sigma) * v
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
        sample(Experts(model), layout, 0, [], noise, texts, PLANS["t2v"], Guidance(scales, factor), euler(3))
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
            PLANS[mode], Guidance({"vid": 1, "img": 1, "txt": 4}, eta=0.5, momentum=-0.5), euler(3),
        )
        for mode in ("v2v", "v2v_apg")
    }  # fmt: skip
    assert all(torch.isfinite(x).all() for x in runs.values())
    assert (runs["v2v"] - runs["v2v_apg"]).norm() / runs["v2v"].norm() > 1e-3


class Counting(Renderer):
    """Counts how often it is run and how often it reads a text."""

    forwards = texts = 0

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.forwards += 1
        return super().forward(*args, **kwargs)

    def text_context(self, *args: Any) -> Any:
        self.texts += 1
        return super().text_context(*args)


@torch.no_grad()
@pytest.mark.parametrize(
    ("mode", "sources", "videos", "branches", "texts"),
    [
        ("rv2v", SOURCES, 1, 4, 2),
        ("rv2v", SOURCES[:1], 1, 3, 2),  # no images: "first video" and "all" are one branch
        ("v2v_chain", [], 0, 2, 2),  # no sources at all
        ("r2v_apg", SOURCES[1:2], 0, 3, 2),
        ("v2v", SOURCES, 1, 2, 2),
    ],
)
def test_each_distinct_branch_runs_once(
    mode: str, sources: list[Segment], videos: int, branches: int, texts: int
) -> None:
    """And texts are turned into keys and values once per run, not once per step."""
    torch.manual_seed(0)
    model = Counting(CONFIG).eval()
    layout = SegmentLayout([*sources, TARGET])
    states = {"positive": torch.randn(6, 24), "negative": torch.randn(6, 24)}
    sample(
        Experts(model), layout, videos, [torch.randn(s.tokens, 64) for s in sources], torch.randn(TARGET.tokens, 64),
        states, PLANS[mode], Guidance({"vid": 1, "img": 1, "txt": 4}), make_solver("unipc", "release", 3, 5.0),
    )  # fmt: skip
    assert (model.forwards, model.texts) == (3 * branches, texts)


@torch.no_grad()
def test_one_expert_at_a_time_is_the_same_run() -> None:
    high, low = expert(1), expert(2)
    layout, noise = SegmentLayout([TARGET]), torch.randn(TARGET.tokens, 64)
    texts = {"positive": torch.randn(6, 24), "negative": torch.randn(6, 24)}
    loaded: list[str] = []

    def load(which: str) -> Renderer:
        loaded.append(which)
        return high if which == "high" else low

    def run(experts: Any) -> torch.Tensor:
        guidance = Guidance({"vid": 1, "img": 1, "txt": 3}, 0.8)
        return sample(experts, layout, 0, [], noise, texts, PLANS["t2v"], guidance, euler(5))

    both = run(Experts(high, low))
    assert torch.equal(run(OneAtATime(load, CONFIG, has_low=True, boundary=875.0)), both)
    assert loaded == ["high", "low"]


@torch.no_grad()
def test_text_to_video_equals_diffusers_pipeline() -> None:
    """The same noise, levels and plain guidance through diffusers' Wan pipeline: the same latents."""
    import diffusers

    if tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 42):
        pytest.skip(f"needs the schedule of diffusers 0.42, found {diffusers.__version__}")
    theirs = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        config = {k: v for k, v in CONFIG.to_dict().items() if k != "_class_name"}
        theirs.append(diffusers.WanTransformer3DModel(**config).eval())
    ours = [Renderer(CONFIG).eval() for _ in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        mine.load_state_dict(other.state_dict())
    vae = diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler,
        transformer=theirs[0], transformer_2=theirs[1], boundary_ratio=0.875,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    texts = {"positive": torch.randn(9, 24), "negative": torch.randn(9, 24)}
    noise = torch.randn(16, 2, 4, 6)
    want = pipe(
        prompt_embeds=texts["positive"][None], negative_prompt_embeds=texts["negative"][None], latents=noise[None],
        height=32, width=48, num_frames=5, num_inference_steps=6, guidance_scale=4.0, output_type="latent",
    ).frames[0]  # fmt: skip
    layout = SegmentLayout([Segment("target", (2, 2, 3))])
    solver = make_solver("unipc", "diffusers-0.42", 6, 3.0)
    tokens = sample(
        Experts(*ours), layout, 0, [], patchify(noise, (1, 2, 2)), texts, PLANS["t2v"], Guidance({"txt": 4.0}), solver
    )
    assert (unpatchify(tokens, (2, 2, 3), (1, 2, 2)) - want).abs().max() < 1e-4
