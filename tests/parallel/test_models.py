"""Both models and the whole pipeline on ranks that share a sequence, against one process. Ranks are threads here."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import drawings
import pytest
import torch
from torch import Tensor, nn

from bernini import Bernini
from bernini.kernels import Segment, SegmentLayout
from bernini.media import Clip
from bernini.parallel.group import Group
from bernini.parallel.share import Share
from bernini.parallel.simulated import simulate
from bernini.planner import training
from bernini.planner.decode import Prefix, Seeded, generate
from bernini.planner.prompt import Template
from bernini.planner.settings import PlanSettings
from bernini.renderer.config import RendererConfig
from bernini.renderer.model import Renderer
from bernini.toy_full import write_toy_full
from bernini.training.flow import RendererSample, pack_renderer, renderer_losses
from bernini.training.losses import decoder_losses, next_token_losses

from ..planner.tiny import HIDDEN, REQUESTS, Letters, image, in_float64, make_planner, names_of, talks_of, video

RANKS = (2, 3, 4, 8)


def cut(group: Group) -> Share:
    return Share(group, least=0)


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found, strict=True)]


def close(found: Sequence[Tensor], wanted: Sequence[Tensor], limit: float = 1e-12) -> None:
    """By the largest value of each tensor."""
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=limit, atol=limit * max(1.0, float(b.abs().max())))


# --- training ---------------------------------------------------------------------------------------------------------


def latents(seed: int) -> list[RendererSample]:
    """Three samples; the second has more sources than the first, the third is one token."""
    draws = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(shape, generator=draws, dtype=torch.float64)  # noqa: E731
    shapes = [([(2, 4, 4)], (2, 4, 6)), ([(1, 2, 4), (2, 4, 2)], (2, 2, 4)), ([], (1, 2, 2))]
    return [
        RendererSample(tuple(rand(4, *s) for s in sources), rand(4, *target), rand(5, 12), 0.4, 400.0, rand(4, *target))
        for sources, target in shapes
    ]


@pytest.mark.parametrize("ranks", RANKS)
def test_the_renderers_loss_and_gradients(ranks: int) -> None:
    torch.manual_seed(0)
    model = Renderer(
        RendererConfig(
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=2,
            ffn_dim=16,
            text_dim=12,
            freq_dim=16,
            in_channels=4,
            out_channels=4,
        )
    ).double()
    batch = pack_renderer(latents(1), (1, 2, 2))
    whole = renderer_losses(model, batch)
    wanted = gradients(whole.sum(), model)

    def work(group: Group) -> tuple[Tensor, list[Tensor]]:
        share = cut(group)
        losses = renderer_losses(model, pack_renderer(latents(1), (1, 2, 2), share), share)
        return losses.detach(), gradients(losses.sum(), model)

    parts = simulate(ranks, work)
    close([torch.stack([losses for losses, _ in parts]).sum(0)], [whole.detach()])
    close([torch.stack(grads).sum(0) for grads in zip(*(grads for _, grads in parts), strict=True)], wanted)


def conversations() -> training.Batch:
    """An edit with two sources, an answer about a picture, and a picture from text; all text is learned."""
    draws = torch.Generator().manual_seed(2)
    found = []
    for prompt, sources, target in (
        ("with this hat", (video(2, 2, 3), image(2, 2)), video(2, 2, 3)),
        ("what is it? a cat", (image(2, 3),), None),
        ("a cup", (), image(2, 2)),
    ):
        talk = Template(Letters())(prompt, sources, target, system="be kind")
        learned = torch.zeros(talk.layout.tokens, dtype=torch.bool)
        learned[torch.from_numpy(talk.layout.indices(talk.layout.numbers("text")))] = True
        seen, planned = (
            torch.randn((sum(v.tokens for v in visuals), HIDDEN), generator=draws, dtype=torch.float64)
            if visuals else None
            for visuals in (sources, [target] if target else [])
        )  # fmt: skip
        ratio = (4.0, 4.0) if target else None
        found.append(training.Sample(talk, learned, seen, planned, ratio))
    return training.pack(found)


@pytest.mark.parametrize("ranks", RANKS)
def test_the_planners_losses_contexts_and_gradients(ranks: int) -> None:
    planner = in_float64(make_planner(heads=4))
    batch = conversations()
    draws = training.draw(batch, HIDDEN, torch.Generator().manual_seed(3), copies=2)

    def work(group: Group | None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        outputs = training.forward(planner, batch, draws, **({} if group is None else {"share": cut(group)}))
        assert outputs.text is not None and outputs.flow is not None
        losses = [next_token_losses(outputs.text), decoder_losses(planner.vit_decoder, outputs.flow)]
        contexts = [context for context in outputs.contexts if context is not None]
        # What reads a context is shared as well: each rank reads another part of it.
        rank, size = (0, 1) if group is None else (group.rank, group.size)
        read = [context[rank::size].square().sum() for context in contexts]
        total = torch.stack([*(loss.sum() for loss in losses), *read]).sum()
        return [loss.detach() for loss in losses], [c.detach() for c in contexts], gradients(total, planner)

    losses, contexts, wanted = work(None)
    parts = simulate(ranks, work)
    close([torch.stack(each).sum(0) for each in zip(*(part[0] for part in parts), strict=True)], losses)
    for part in parts:
        close(part[1], contexts)
    close([torch.stack(each).sum(0) for each in zip(*(part[2] for part in parts), strict=True)], wanted, 1e-11)


# --- inference --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["t2v", "v2v", "r2v"])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_masked_generation_with_cached_prefixes(task: str, ranks: int) -> None:
    planner, request = in_float64(make_planner(heads=4)), REQUESTS[task]
    settings = PlanSettings(steps=3, decoder_steps=2, visual_cfg=1.5, text_cfg=1.2)

    @torch.no_grad()
    def work(group: Group | None) -> list[Tensor]:
        weights, names = names_of(settings, request)
        talks = talks_of(request, names)
        tokens = sum(visual.tokens for visual in request.sources)
        seen = torch.randn((tokens, HIDDEN), generator=torch.Generator().manual_seed(7)).to(planner.dtype)
        embeds = [planner.embed(talk, seen if request.sources else None) for talk in talks]
        options: dict[str, Any] = {} if group is None else {"share": cut(group)}
        engine = Prefix(planner, talks, embeds, active=len(weights), **options)
        plan = generate(planner, engine, list(weights.values()), settings, Seeded(3))
        return [plan, engine.step(plan, 1)[0], *engine.hidden]

    wanted = work(None)
    for found in simulate(ranks, work):
        close(found, wanted, 1e-11)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Bernini:
    return Bernini.from_pretrained(write_toy_full(tmp_path_factory.mktemp("model") / "full"))


def shared(model: Bernini, share: Share) -> Bernini:
    """The model as a rank has it; ranks are threads here and read the same weights, but diffusers' autoencoder keeps
    frames of its caller in itself."""
    found = copy.copy(model)
    found.vae = copy.deepcopy(model.vae)
    assert model._planner is not None
    stage = copy.copy(model._planner())
    found.share = stage.share = share
    found._planner = lambda: stage
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_an_edit_from_end_to_end(model: Bernini, ranks: int) -> None:
    drawn = drawings.draw_clip(9, 32, 48)
    source = Clip(drawn.frames, drawn.fps)

    def work(group: Group | None) -> Tensor:
        made = (model if group is None else shared(model, cut(group)))(
            "make it snow", videos=[source], steps=2, planning_steps=2, decoder_steps=1, num_frames=9, size=(32, 48)
        )
        return made.frames

    wanted = work(None)
    for found in simulate(ranks, work):
        # Rounding to bytes may tip where the two differ by 1e-6.
        assert (found.int() - wanted.int()).abs().max() <= 1


# --- what is cut, and what is not -------------------------------------------------------------------------------------


def test_short_sequences_stay_whole() -> None:
    layout = SegmentLayout([Segment("target", (2, 4, 4))])

    def work(group: Group) -> bool:
        return (
            Share(group, least=33).plan(layout, 4, 4) is None and Share(group, least=32).plan(layout, 4, 4) is not None
        )

    assert simulate(2, work) == [True, True]
    assert Share(least=0).plan(layout, 4, 4) is None
