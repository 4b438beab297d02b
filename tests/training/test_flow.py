"""The renderer's loss: packed against one by one, against the formula, and the latents it starts from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from bernini.kernels import Segment, SegmentLayout
from bernini.renderer.config import RendererConfig
from bernini.renderer.latents import patch_grid, patchify, unpatchify
from bernini.renderer.model import Renderer
from bernini.training.draws import generator
from bernini.training.flow import RendererSample, mix, pack_renderer, renderer_losses, sample_latent
from bernini.training.noise import timesteps_for

CONFIG = RendererConfig(
    num_attention_heads=2, attention_head_dim=16, num_layers=2, ffn_dim=48, in_channels=4, out_channels=4,
    text_dim=12, freq_dim=16,
)  # fmt: skip
PATCH = CONFIG.patch_size
IMAGE, WIDE, VIDEO = (1, 4, 4), (1, 4, 6), (3, 4, 4)
# task -> sources, target, length of the context; of different sizes each
TASKS: dict[str, tuple[list[tuple[int, int, int]], tuple[int, int, int], int]] = {
    "t2i": ([], IMAGE, 9),
    "i2i": ([WIDE], WIDE, 5),
    "t2v": ([], VIDEO, 1),
    "v2v": ([VIDEO], VIDEO, 14),
    "r2v": ([IMAGE, WIDE, IMAGE, IMAGE, IMAGE, WIDE], (2, 4, 6), 3),
    "rv2v": ([VIDEO, IMAGE, WIDE], VIDEO, 21),
}


def renderer(dtype: torch.dtype) -> Renderer:
    torch.manual_seed(0)
    model = Renderer(CONFIG)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def samples(dtype: torch.dtype) -> list[RendererSample]:
    made = []
    for task, (sources, target, words) in TASKS.items():
        numbers = generator("flow", task)

        def normal(*shape: int, numbers: torch.Generator = numbers) -> Tensor:
            return torch.randn(shape, generator=numbers, dtype=torch.float64).to(dtype)

        sigma, timestep = timesteps_for(task).draw(numbers)
        clean = tuple(normal(4, *size) for size in sources)
        context = normal(words, CONFIG.text_dim)
        made.append(RendererSample(clean, normal(4, *target), context, sigma, timestep, normal(4, *target)))
    return made


def gradients(model: Renderer, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_packed_is_one_by_one(dtype: torch.dtype, limit: float) -> None:
    model = renderer(dtype)
    alone, summed, contexts = [], dict[str, Tensor](), []
    for sample in samples(dtype):
        context = sample.context.requires_grad_()
        loss = renderer_losses(model, pack_renderer([sample], PATCH))
        alone.append(loss.item())
        for name, gradient in gradients(model, loss.sum()).items():
            summed[name] = summed.get(name, torch.zeros_like(gradient)) + gradient
        contexts += torch.autograd.grad(renderer_losses(model, pack_renderer([sample], PATCH)).sum(), [context])
    for order in (range(6), (3, 5, 0, 2, 4, 1)):
        picked = [samples(dtype)[number] for number in order]
        leaves = [sample.context.requires_grad_() for sample in picked]
        losses = renderer_losses(model, pack_renderer(picked, PATCH))
        assert losses.dtype == dtype
        assert losses.tolist() == pytest.approx([alone[number] for number in order], rel=limit)
        for got, number in zip(torch.autograd.grad(losses.sum(), leaves, retain_graph=True), order, strict=True):
            assert (got - contexts[number]).norm() <= limit * contexts[number].norm()
        for name, gradient in gradients(model, losses.sum()).items():
            assert (gradient - summed[name]).norm() <= limit * summed[name].norm(), name


@torch.no_grad()
def test_the_loss_is_its_formula() -> None:
    """Computed on latents, sample by sample: mean of (prediction - (noise - clean))^2 over the target."""
    model = renderer(torch.float64)
    chosen = samples(torch.float64)
    batch = pack_renderer(chosen, PATCH)
    losses = renderer_losses(model, batch)
    for sample, got in zip(chosen, losses, strict=True):
        # More than five are squeezed into 1..5, in float32.
        ids = torch.linspace(1, 5, 6).tolist() if len(sample.sources) > 5 else [1.0, 2.0, 3.0]
        sigma = float(sample.sigma)
        noisy = (1 - sigma) * sample.target + sigma * sample.noise
        grid = patch_grid(tuple(noisy.shape), PATCH)
        layout = SegmentLayout(
            [
                *(
                    Segment("source", patch_grid(tuple(source.shape), PATCH), phase)
                    for source, phase in zip(sample.sources, ids, strict=False)
                ),
                Segment("target", grid),
            ]
        )
        tokens = torch.cat([patchify(latent, PATCH) for latent in (*sample.sources, noisy)])
        time = torch.tensor([1000 * sigma], dtype=torch.float64)
        answer = model(tokens, layout, time, model.text_context(sample.context))
        want = (unpatchify(answer, grid, PATCH) - (sample.noise - sample.target)).square().mean()
        assert float(got) == pytest.approx(float(want), rel=1e-10)
    # A mean over all tokens of the pack is another number: long targets would weigh more.
    weights = torch.tensor(batch.target_tokens, dtype=torch.float64)
    assert abs(float((losses * weights).sum() / weights.sum() - losses.mean())) > 1e-3


def test_what_the_loss_must_notice() -> None:
    model = renderer(torch.float64)
    right = samples(torch.float64)[5]
    two = replace(right, sources=right.sources[:2])
    wrong = {
        "timestep": replace(right, timestep=float(right.timestep) / 2),
        "sigma": replace(right, sigma=1 - float(right.sigma)),
        "swapped": replace(right, target=right.noise, noise=right.target),
        "ids": replace(right, phases=(2.0, 1.0, 3.0)),
        "no ids": replace(right, phases=(0.0, 0.0, 0.0)),
        "source dropped": two,
        "source changed": replace(right, sources=(right.sources[0] + 0.1, *right.sources[1:])),
        "context": replace(right, context=right.context[:-1]),
    }
    with torch.no_grad():
        want = float(renderer_losses(model, pack_renderer([right], PATCH)))
        for name, sample in wrong.items():
            got = float(renderer_losses(model, pack_renderer([sample], PATCH)))
            assert abs(got - want) > 1e-5 * want, name


def test_a_perfect_answer_has_no_loss() -> None:
    batch = pack_renderer(samples(torch.float32), PATCH)

    class Knows:
        def text_context(self, *_: Any) -> None: ...

        def __call__(self, *_: Any) -> Tensor:
            return batch.velocity.bfloat16()

    losses = renderer_losses(Knows(), replace(batch, velocity=batch.velocity.bfloat16().float()))  # type: ignore[arg-type]
    assert losses.tolist() == [0.0] * 6 and losses.dtype == torch.float32


def test_packing_keeps_sources_clean_and_tokens_in_place() -> None:
    chosen = samples(torch.float32)
    batch = pack_renderer(chosen, PATCH)
    layout = batch.layout
    assert layout.num_samples == 6 and batch.target_tokens == (4, 6, 12, 12, 12, 12)
    assert batch.context_borders == (0, 9, 14, 15, 29, 32, 53) and batch.timestep.dtype == torch.float32
    sources = torch.cat([patchify(source, PATCH) for sample in chosen for source in sample.sources])
    assert torch.equal(batch.tokens[torch.from_numpy(layout.indices(layout.numbers("source")))], sources)
    assert all(layout.segments[number].phase == 0 for number in layout.numbers("target"))
    assert batch.tokens.dtype == batch.velocity.dtype == torch.float32
    moved = batch.to("meta")
    assert {moved.tokens.device.type, moved.timestep.device.type, moved.velocity.device.type} == {"meta"}


def test_mixing() -> None:
    clean, noise = torch.randn(2, 4, 3, 4, 4).unbind()
    assert torch.equal(mix(clean, noise, 0.0), clean) and torch.equal(mix(clean, noise, 1.0), noise)
    sigma = torch.tensor(0.2021484375, dtype=torch.bfloat16)
    exact = mix(clean, noise, float(sigma))
    torch.testing.assert_close(exact, mix(clean, noise, sigma.double()))
    assert mix(clean, noise, sigma.double()).dtype == torch.float32
    # The slope is the velocity.
    torch.testing.assert_close(mix(clean, noise, 0.7) - mix(clean, noise, 0.2), 0.5 * (noise - clean))
    # The released rounding of 1 - sigma is not hidden: 0.7978515625 becomes 0.796875.
    rounded = mix(clean, noise, sigma)
    torch.testing.assert_close(rounded, exact - 0.0009765625 * clean)
    assert rounded.dtype == torch.float32 and not torch.allclose(rounded, exact)


def test_latents_are_sampled_as_the_library_does_and_normalised() -> None:
    mean, logvar = torch.randn(2, 4, 3, 4, 4).unbind()
    logvar[0, 0], logvar[0, 1] = 50.0, -50.0  # clamped
    centre, spread = [0.1, -0.2, 0.3, 0.0], [1.5, 2.0, 0.5, 1.0]
    got = sample_latent(mean, logvar, generator("posterior"), centre, spread)
    library = DiagonalGaussianDistribution(torch.cat([mean, logvar])[None])
    want = library.sample(generator("posterior"))[0]
    shape = (-1, 1, 1, 1)
    torch.testing.assert_close(got, (want - torch.tensor(centre).view(shape)) / torch.tensor(spread).view(shape))
    assert not torch.equal(got, sample_latent(mean, logvar, generator("other"), centre, spread))
    still = sample_latent(mean, torch.full_like(mean, -60.0), generator("posterior"), [0.0] * 4, [1.0] * 4)
    torch.testing.assert_close(still, mean)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"noise": torch.zeros(4, 3, 4, 6)}, r"sample 1: noise is \[4, 3, 4, 6\], the target \[4, 3, 4, 4\]"),
        ({"sources": (torch.zeros(3, 1, 4, 4),)}, r"sample 1: latents must be .* got \[3, 1, 4, 4\], \[4, 3, 4, 4\]"),
        ({"sources": (torch.zeros(4, 1, 3, 4),)}, r"cannot be cut into patches"),
        ({"phases": (1.0, 2.0)}, "sample 1: 2 phases for 1 sources"),
        ({"context": torch.zeros(0, 12)}, r"context must be \[L, text_dim\] with L > 0, got \[0, 12\]"),
        ({"sigma": 1.5}, "sigma must be in"),
        ({"sigma": torch.tensor(float("nan"))}, "sigma must be in"),
        ({"timestep": -1.0}, "timestep in"),
    ],
)
def test_samples_that_do_not_fit_are_refused(change: dict[str, Any], complaint: str) -> None:
    good = samples(torch.float32)
    with pytest.raises(ValueError, match=complaint):
        pack_renderer([good[0], replace(good[3], **change)], PATCH)
    with pytest.raises(ValueError, match="at least one sample"):
        pack_renderer([], PATCH)
