"""Masked generation: cached equals uncached, what is revealed when, which branches run, and how many tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bernini.planner.decode import Prefix, ReleasedSeeded, Seeded, Whole, generate, revealed_by_step
from bernini.planner.model import Planner
from bernini.planner.prompt import Visual
from bernini.planner.settings import PlanSettings

from .tiny import REQUESTS, Request, Result, in_float64, make_planner, names_of, run, talks_of, video


@pytest.fixture(scope="module", params=["float64", "float32"])
def planner(request: pytest.FixtureRequest) -> Planner:
    made = make_planner()
    return in_float64(made) if request.param == "float64" else made


def agree(ours: Result, theirs: Result) -> None:
    """Within 1e-10 in float64 and 2e-5 in float32, as relative L2."""
    for got, want in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert got.shape == want.shape and bool(torch.isfinite(got).all())
        limit = 1e-10 if got.dtype == torch.float64 else 2e-5
        assert float((got - want).norm() / want.norm()) <= limit


# --- cached and uncached ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REQUESTS)
def test_cached_planning_is_uncached_planning(planner: Planner, name: str) -> None:
    """Every layout, with all three branches."""
    settings = PlanSettings(steps=4, decoder_steps=2, visual_cfg=1.4, text_cfg=1.2)
    cached, whole = (run(kind, planner, REQUESTS[name], settings) for kind in (Prefix, Whole))
    agree(cached, whole)
    assert not bool((cached.plan == planner.mask_embedding).all(-1).any()), "every token is filled"


@pytest.mark.parametrize("steps", [1, 2, 25, 50])
def test_any_number_of_steps(planner: Planner, steps: int) -> None:
    settings = PlanSettings(steps=steps, decoder_steps=1)
    agree(*(run(kind, planner, REQUESTS["v2v"], settings) for kind in (Prefix, Whole)))


@pytest.mark.parametrize(("visual", "text"), [(1.0, 1.0), (1.2, 1.0), (1.4, 1.2), (1.3, None), (1.2, 1.2), (1.2, 0.0)])
@pytest.mark.parametrize("name", ["t2v", "rv2v"])
def test_any_guidance(planner: Planner, name: str, visual: float, text: float | None) -> None:
    settings = PlanSettings(steps=3, decoder_steps=2, visual_cfg=visual, text_cfg=text)
    agree(*(run(kind, planner, REQUESTS[name], settings) for kind in (Prefix, Whole)))


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 1, 2), (1, 7, 1), (4, 4, 4), (5, 6, 10)])
def test_any_number_of_tokens(planner: Planner, grid: tuple[int, int, int]) -> None:
    request = REQUESTS["v2v"]._replace(target=video(*grid))
    agree(*(run(kind, planner, request, PlanSettings(3, 1)) for kind in (Prefix, Whole)))


def test_the_longest_plan() -> None:
    """4096 tokens, two steps. Full forwards hold all scores at once, so: one head, and one layer that is used."""
    request = Request("long", (), video(16, 16, 16), "t2v", "no")
    for dtype in (torch.float64, torch.float32):
        made = make_planner(layers=2, heads=1)
        made = in_float64(made) if dtype == torch.float64 else made
        agree(*(run(kind, made, request, PlanSettings(2, 1)) for kind in (Prefix, Whole)))


def test_a_wrong_cache_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison sees as little as one key of the prefix that is off."""
    made, settings = make_planner(), PlanSettings(4, 1)
    right = run(Prefix, made, REQUESTS["v2v"], settings)
    before = Prefix._states

    def spoilt(self: Prefix, *args: Any) -> Tensor:
        if not hasattr(self, "spoilt"):
            self.spoilt = True  # type: ignore[attr-defined]
            next(iter(self._caches.values()))[0][3] *= 1.01
        return before(self, *args)

    monkeypatch.setattr(Prefix, "_states", spoilt)
    with pytest.raises(AssertionError):
        agree(run(Prefix, made, REQUESTS["v2v"], settings), right)


def test_the_target_matters_only_to_itself() -> None:
    """Contexts without the target do not change with the plan; the one with it does, at the target's places only."""
    made = make_planner()
    one, other = (run(Prefix, made, REQUESTS["v2v"], PlanSettings(steps, 1)) for steps in (1, 5))
    assert not torch.equal(one.plan, other.plan)
    assert torch.equal(one.contexts.positive, other.contexts.positive)
    assert torch.equal(one.contexts.negative, other.contexts.negative)
    differs = (one.contexts.planned != other.contexts.planned).any(-1)
    (talk,) = talks_of(REQUESTS["v2v"], ["conditional"])
    assert differs.nonzero().flatten().tolist() == talk.layout.target_index.tolist()


# --- how much is run --------------------------------------------------------------------------------------------------


def refuse(*_: object) -> None:
    raise AssertionError("what only next-token logits need was run")


@pytest.mark.parametrize(
    ("name", "visual", "text", "branches"),
    [
        ("v2v", 1.2, 1.0, 2), ("v2v", 1.4, 1.2, 3), ("v2v", 1.0, 1.0, 1), ("v2v", 1.2, 1.2, 2),
        ("t2v", 1.2, 1.0, 1), ("t2v", 1.4, 1.2, 2), ("r2v", 1.2, 1.0, 2),
    ],
)  # fmt: skip
def test_only_target_tokens_run_at_each_step(name: str, visual: float, text: float, branches: int) -> None:
    made, request = make_planner(), REQUESTS[name]
    settings = PlanSettings(steps=5, decoder_steps=1, visual_cfg=visual, text_cfg=text)
    counted: list[int] = []
    made.text.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda module, inputs: counted.append(inputs[0].shape[-2])
    )
    forbidden: Sequence[nn.Module] = (
        made.lm_head, made.text.norm, made.text.layers[-1], made.text.layers[-1].self_attn.q_proj
    )  # fmt: skip
    for module in forbidden:
        module.register_forward_pre_hook(refuse)
    run(Prefix, made, request, settings)
    _, names = names_of(settings, request)
    talks, tokens = talks_of(request, names), request.target.tokens
    prefix = sum(talk.layout.tokens - tokens for talk in talks)
    assert counted == [prefix, *[tokens * branches] * settings.steps, tokens]


def test_a_step_that_reveals_nothing_is_not_run() -> None:
    made, request = make_planner(), REQUESTS["t2v"]._replace(target=video(1, 1, 2))
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    made.text.layers[0].self_attn.q_proj.register_forward_pre_hook(count)
    run(Prefix, made, request, PlanSettings(steps=50, decoder_steps=1))
    busy = sum(len(tokens) > 0 for tokens in revealed_by_step(torch.arange(2), 50))
    assert busy == 2 and calls == 1 + busy + 1


# --- guidance ---------------------------------------------------------------------------------------------------------


@given(
    visual=st.floats(0, 3), text=st.one_of(st.none(), st.floats(-1, 3)), has_sources=st.booleans(),
    values=st.tuples(*[st.floats(-2, 2)] * 3),
)  # fmt: skip
def test_weights_are_the_formula(
    visual: float, text: float | None, has_sources: bool, values: tuple[float, float, float]
) -> None:
    u, t, c = values
    t = t if has_sources else c  # without sources the text-only branch is the conditional one
    branches = {"conditional": c, "text only": t, "unconditional": u}
    want = c
    if visual > 1:
        want = u + visual * (c - u) if text is None else u + text * (t - u) + visual * (c - t)
    weights = PlanSettings(visual_cfg=visual, text_cfg=text).weights(has_sources)
    assert math.isclose(sum(w * branches[name] for name, w in weights.items()), want, abs_tol=1e-9)
    assert next(iter(weights)) == "conditional" and all(weights[name] for name in [*weights][1:])
    assert math.isclose(sum(weights.values()), 1.0, abs_tol=1e-9)
    assert has_sources or "text only" not in weights


@pytest.mark.parametrize(
    ("settings", "has_sources", "names"),
    [
        (PlanSettings(), True, ["conditional", "text only"]),
        (PlanSettings(), False, ["conditional"]),
        (PlanSettings(visual_cfg=1.0), True, ["conditional"]),
        (PlanSettings(visual_cfg=1.4, text_cfg=1.2), True, ["conditional", "text only", "unconditional"]),
        (PlanSettings(visual_cfg=1.4, text_cfg=1.4), True, ["conditional", "unconditional"]),
        (PlanSettings(visual_cfg=1.3, text_cfg=None), True, ["conditional", "unconditional"]),
        (PlanSettings(visual_cfg=1.4, text_cfg=0.0), False, ["conditional", "unconditional"]),
    ],
)  # fmt: skip
def test_branches_that_cancel_are_left_out(settings: PlanSettings, has_sources: bool, names: list[str]) -> None:
    assert list(settings.weights(has_sources)) == names


# --- what is revealed when --------------------------------------------------------------------------------------------


@given(tokens=st.integers(1, 400), steps=st.integers(1, 70), parity=st.booleans(), seed=st.integers(0, 9))
def test_every_token_is_revealed_once(tokens: int, steps: int, parity: bool, seed: int) -> None:
    order = torch.from_numpy(np.random.default_rng(seed).permutation(tokens))
    found = revealed_by_step(order, steps, parity=parity)
    assert len(found) == steps
    assert torch.cat(found).sort().values.tolist() == list(range(tokens))
    assert all(step.tolist() == sorted(step.tolist()) for step in found)
    given_order = order.flip(0).tolist() if parity else order.tolist()
    taken, left = 0, tokens
    for number, step in enumerate(found, 1):
        assert set(step.tolist()) == set(given_order[taken : taken + len(step)])
        taken += len(step)
        stay = math.floor(tokens * math.cos(math.pi / 2 * number / steps)) if number < steps else 0
        if parity and number < steps:
            stay = max(1, min(left - 1, stay))
            assert len(step) >= 1 or left == 1, "at least one, while more than one is left"
        assert tokens - taken == stay
        left = stay


def test_counts_of_a_real_plan() -> None:
    """300 tokens in 25 steps: few at first, most at the end."""
    counts = [len(step) for step in revealed_by_step(torch.arange(300), 25)]
    assert sum(counts) == 300 and counts[:4] == [1, 2, 3, 4] and max(counts) == 19 and counts[-1] == 18
    assert [len(step) for step in revealed_by_step(torch.arange(300), 25, parity=True)] == counts


class Fixed:
    """Draws with a given order."""

    def __init__(self, order: list[int]) -> None:
        self._order, self.asked = torch.tensor(order), list[int]()

    def order(self, tokens: int) -> Tensor:
        return self._order

    def noise(self, revealed: Tensor, width: int) -> Tensor:
        self.asked.append(len(revealed))
        return torch.zeros(len(revealed), width)


@torch.no_grad()
@pytest.mark.parametrize(("parity", "masked"), [(True, True), (False, False)])
def test_token_0_alone_is_skipped_as_released(parity: bool, masked: bool) -> None:
    """More steps than tokens: each reveals one. Where that is token 0, the released loop takes the step for empty."""
    made, request = make_planner(), REQUESTS["t2v"]._replace(target=video(1, 2, 3))
    settings = PlanSettings(steps=9, decoder_steps=1, visual_cfg=1.0, parity=parity)
    talks = talks_of(request, ["conditional"])
    engine = Prefix(made, talks, [made.embed(talk, None) for talk in talks], active=1)
    draws = Fixed([3, 0, 5, 1, 4, 2])
    plan = generate(made, engine, [1.0], settings, draws)
    still = (plan == made.mask_embedding).all(-1)
    assert still.nonzero().flatten().tolist() == ([0] if masked else [])
    assert sum(draws.asked) == (5 if parity else 6)
    if parity:
        assert draws.asked == [1] * 5, "one each, and the empty steps at the end draw nothing"


def test_generate_reports_and_can_be_watched() -> None:
    made, request = make_planner(), REQUESTS["t2v"]
    talks = talks_of(request, ["conditional"])
    seen: list[tuple[int, int]] = []
    filled: list[int] = []

    def watch(step: int, revealed: Tensor, embeds: Tensor) -> None:
        filled.append(int((embeds != made.mask_embedding).any(-1).sum()))

    with torch.no_grad():
        engine = Prefix(made, talks, [made.embed(talk, None) for talk in talks], active=1)
        generate(made, engine, [1.0], PlanSettings(4, 1), Seeded(0), watch=watch,
                 progress=lambda done, total: seen.append((done, total)))  # fmt: skip
    assert seen == [(number, 4) for number in range(5)]
    counts = [len(step) for step in revealed_by_step(torch.arange(request.target.tokens), 4)]
    assert filled == np.cumsum(counts).tolist()


# --- random numbers ---------------------------------------------------------------------------------------------------


def test_seeded_noise_belongs_to_the_token() -> None:
    one, other, third = Seeded(5), Seeded(5), Seeded(6)
    order = one.order(10)
    assert torch.equal(order, other.order(10)) and sorted(order.tolist()) == list(range(10))
    assert not torch.equal(order, third.order(10))
    whole = one.noise(torch.arange(10), 4)
    assert whole.shape == (10, 4) and whole.dtype == torch.float32
    parts = torch.cat([other.noise(torch.tensor([number]), 4) for number in reversed(range(10))]).flip(0)
    assert torch.equal(whole, parts), "whenever and with whatever else it is revealed"
    assert not torch.equal(whole, third.noise(torch.arange(10), 4))


def test_released_draws_follow_each_other() -> None:
    """Written out: three shuffles and packings, the order, then rows as they are asked for."""
    shuffles, noises = np.random.RandomState(42), torch.Generator().manual_seed(42)
    for _ in range(3):
        shuffles.shuffle(list(range(7)))
        torch.randn((6, 16, 1, 2, 2), generator=noises)
    order = list(range(7))
    shuffles.shuffle(order)
    draws = ReleasedSeeded(42, latent_patches=6)
    assert draws.order(7).tolist() == order
    for rows in (3, 1, 2):
        assert torch.equal(draws.noise(torch.arange(rows), 5), torch.randn((rows, 5), generator=noises))


def test_a_seed_means_one_plan() -> None:
    made, settings = make_planner(), PlanSettings(4, 2)
    one, again = (run(Prefix, made, REQUESTS["rv2v"], settings) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.tensors(), again.tensors(), strict=True))


def test_visual_tokens() -> None:
    assert Visual("video", (5, 6, 10)).tokens == 300
