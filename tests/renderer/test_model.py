"""The renderer against stock diffusers, against itself in float64, and with wrong input."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel

from bernini.kernels import Segment, SegmentLayout
from bernini.renderer.config import RendererConfig
from bernini.renderer.latents import patchify, unpatchify
from bernini.renderer.model import KEEP_IN_FP32, Renderer, sinusoid

CONFIG = RendererConfig(num_attention_heads=3, attention_head_dim=32, num_layers=2, ffn_dim=160, text_dim=48)
LATENT = (16, 3, 6, 10)
GRID = (3, 3, 5)


def twins(dtype: torch.dtype = torch.float32) -> tuple[Renderer, WanTransformer3DModel]:
    """Our model and diffusers' with the same weights, all of them sizeable (fresh norms would hide mistakes)."""
    torch.manual_seed(0)
    config = {k: v for k, v in CONFIG.to_dict().items() if k != "_class_name"}
    theirs = WanTransformer3DModel(**config).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    ours = Renderer(CONFIG).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            if not any(part in name.split(".") for part in KEEP_IN_FP32):
                parameter.data = parameter.data.to(dtype)
    return ours, theirs


def target_only() -> SegmentLayout:
    return SegmentLayout([Segment("target", GRID)])


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize("timestep", [999, 3])
def test_target_only_equals_diffusers(dtype: torch.dtype, limit: float, timestep: int) -> None:
    ours, theirs = twins(dtype)
    latent, text = torch.randn(LATENT), torch.randn(20, CONFIG.text_dim)
    want = theirs(latent[None].to(dtype), torch.tensor([timestep]), text[None].to(dtype)).sample[0]
    tokens = patchify(latent, CONFIG.patch_size)
    got = ours(tokens, target_only(), torch.tensor([timestep]), ours.text_context(text))
    error = (unpatchify(got, GRID, CONFIG.patch_size).float() - want.float()).abs().max()
    assert error <= limit, f"largest error {error:.2e}"


@torch.no_grad()
def test_eager_rounding_is_closer_to_diffusers_in_bf16() -> None:
    ours, theirs = twins(torch.bfloat16)
    latent, text = torch.randn(LATENT), torch.randn(20, CONFIG.text_dim)
    want = theirs(latent[None].bfloat16(), torch.tensor([500]), text[None].bfloat16()).sample[0].float()
    errors = {}
    for rounding in ("fp32", "eager"):
        ours.rounding = rounding
        got = ours(patchify(latent, CONFIG.patch_size), target_only(), torch.tensor([500]), ours.text_context(text))
        errors[rounding] = (unpatchify(got, GRID, CONFIG.patch_size).float() - want).norm() / want.norm()
    assert errors["eager"] < errors["fp32"] < 0.02


@torch.no_grad()
def test_a_wrong_segment_phase_is_seen() -> None:
    """The comparison above would not notice a rotation that is always the identity; this does."""
    ours, _ = twins()
    tokens, text = torch.randn(2 * 45, 64), ours.text_context(torch.randn(5, CONFIG.text_dim))

    def run(phase: float) -> torch.Tensor:
        layout = SegmentLayout([Segment("source", GRID, phase), Segment("target", GRID)])
        return ours(tokens, layout, torch.tensor([500]), text)

    assert (run(1.0) - run(2.0)).norm() / run(1.0).norm() > 1e-3


def batch() -> tuple[SegmentLayout, torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Two samples of different make-up, their tokens, texts and timesteps."""
    layout = SegmentLayout(
        [
            Segment("source", (2, 3, 2), 1.0, 0),
            Segment("target", (2, 3, 2), 0.0, 0),
            Segment("source", (1, 2, 2), 1.0, 1),
            Segment("source", (1, 1, 1), 2.0, 1),
            Segment("target", (1, 4, 2), 0.0, 1),
        ]
    )
    texts = [torch.randn(7, CONFIG.text_dim), torch.randn(11, CONFIG.text_dim)]
    return layout, torch.randn(layout.tokens, 64), texts, torch.tensor([900.0, 120.0])


@torch.no_grad()
def test_a_packed_batch_equals_its_samples() -> None:
    model = twins()[0].double()
    layout, tokens, texts, times = batch()
    tokens, texts = tokens.double(), [text.double() for text in texts]
    packed = model(tokens, layout, times, model.text_context(torch.cat(texts), (0, 7, 18)), targets_only=False)
    for number in range(2):
        alone = SegmentLayout([Segment(s.kind, s.grid, s.phase) for s in layout.segments if s.sample == number])
        start, stop = layout.cu_seqlens[number : number + 2]
        want = model(
            tokens[start:stop], alone, times[number : number + 1], model.text_context(texts[number]), targets_only=False
        )
        assert (packed[start:stop] - want).abs().max() < 1e-11
    only_targets = model(tokens, layout, times, model.text_context(torch.cat(texts), (0, 7, 18)))
    assert (only_targets - packed[torch.from_numpy(layout.target_index)]).abs().max() < 1e-12


def test_gradients_reach_every_parameter() -> None:
    model = twins()[0]
    layout, tokens, texts, times = batch()
    model(tokens, layout, times, model.text_context(torch.cat(texts), (0, 7, 18))).square().mean().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead


def test_compiles_without_a_break() -> None:
    model = twins()[0]
    layout, tokens, texts, times = batch()
    context = model.text_context(torch.cat(texts), (0, 7, 18))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want = model(tokens, layout, times, context)  # also builds the layout's arrays, which is host work
        assert torch.allclose(compiled(tokens, layout, times, context), want, atol=1e-5)


def test_sinusoid_is_cosines_then_sines() -> None:
    got = sinusoid(torch.tensor([3.0], dtype=torch.float64), 6)
    k = torch.arange(3, dtype=torch.float64)
    angles = 3.0 * 10000 ** (-k / 3)
    assert torch.allclose(got[0], torch.cat([angles.cos(), angles.sin()]), atol=1e-12)


def test_patches_round_trip_and_order() -> None:
    latent = torch.arange(2 * 1 * 4 * 4, dtype=torch.float32).view(2, 1, 4, 4)
    tokens = patchify(latent, (1, 2, 2))
    assert torch.equal(unpatchify(tokens, (1, 2, 2), (1, 2, 2)), latent)
    assert tokens[0].tolist() == [0, 16, 1, 17, 4, 20, 5, 21]  # (row, column, channel) of the first 2x2 patch
    with pytest.raises(ValueError, match=r"\[16, 1, 3, 4\] cannot be cut"):
        patchify(torch.zeros(16, 1, 3, 4), (1, 2, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(44, 64)}, r"tokens must be \[45, 64\], got \[44, 64\]"),
        ({"time": torch.zeros(2)}, r"timestep must be \[1\], got \[2\]"),
        ({"borders": (0, 2, 5)}, "2 texts for 1 samples"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    model = twins()[0]
    context = model.text_context(torch.zeros(5, CONFIG.text_dim), change.get("borders"))
    with pytest.raises(ValueError, match=message):
        model(change.get("tokens", torch.zeros(45, 64)), target_only(), change.get("time", torch.zeros(1)), context)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"qk_norm": "rms_norm"}, "qk_norm='rms_norm'"),
        ({"cross_attn_norm": False}, "cross_attn_norm"),
        ({"image_dim": 1280}, "image_dim=1280"),
        ({"attention_head_dim": 33}, "even"),
    ],
)
def test_bad_config(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RendererConfig.from_dict(config)
