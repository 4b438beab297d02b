"""The planner's forward in training, against dense masks and plain formulas, one sample at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bernini.planner import training
from bernini.planner.heads import DecoderConfig
from bernini.planner.model import Planner, PlannerConfig
from bernini.planner.prompt import Conversation, Template, Visual
from bernini.planner.training import MASK_RATIOS, Batch, Draws, Outputs, Sample, draw, forward, pack

HIDDEN, GEN, VOCABULARY, HEADS, KEY_HEADS, COPIES = 32, 12, 320, 4, 2, 3
SPECIAL = {"<|im_start|>": 300, "<|vision_start|>": 301, "<|vision_end|>": 302, "<|image_pad|>": 303,
           "<|video_pad|>": 304}  # fmt: skip
SECTIONS, THETA = (1, 1, 2), 1e4
MLLM = {
    "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-6, "rope_theta": THETA,
    "rope_scaling": {"type": "mrope", "mrope_section": [*SECTIONS]}, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1,
    "vision_config": {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24,
                      "out_hidden_size": HIDDEN, "fullatt_block_indexes": [0]},
}  # fmt: skip


class Letters:
    """A tokenizer of bytes."""

    unk_token_id = 299

    def convert_tokens_to_ids(self, token: str) -> int:
        return SPECIAL[token]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(text.encode())


def make_planner(dtype: torch.dtype = torch.float64) -> Planner:
    """Random weights. In float64 also transformers' norms, which go through float32 otherwise."""
    torch.manual_seed(0)
    planner = Planner(PlannerConfig(MLLM, GEN, DecoderConfig(HIDDEN, 24, depth=2, frequencies=16), mask_tokens=8))
    with torch.no_grad():
        for name, parameter in planner.named_parameters():
            std = 0.2 if parameter.dim() == 1 else 1.0 if "embed_tokens" in name else parameter.shape[-1] ** -0.5
            parameter.add_(torch.randn_like(parameter), alpha=std)
    planner = planner.to(dtype)
    for module in planner.modules():
        if dtype == torch.float64 and type(module).__name__.endswith("RMSNorm"):
            assert isinstance(module.weight, nn.Parameter)
            exact = nn.RMSNorm(module.weight.numel(), eps=1e-6, dtype=dtype)
            exact.weight = module.weight
            module.forward = exact.forward
    return planner


VIDEO, IMAGE = Visual("video", (2, 2, 3)), Visual("image", (1, 2, 2))


def sample(prompt: str, sources: Sequence[Visual], target: Visual | None, task: str, seed: int) -> Sample:
    """All text of it is learned."""
    talk = Template(Letters())(prompt, sources, target, system="be kind")
    generator = torch.Generator().manual_seed(seed)

    def seen(visuals: Sequence[Visual]) -> Tensor | None:
        tokens = sum(visual.tokens for visual in visuals)
        return torch.randn((tokens, HIDDEN), generator=generator, dtype=torch.float64) if tokens else None

    text = torch.zeros(talk.layout.tokens, dtype=torch.bool)
    text[torch.from_numpy(talk.layout.indices(talk.layout.numbers("text")))] = True
    targets = None if target is None else seen([target])
    return Sample(talk, text, seen(sources), targets, MASK_RATIOS.get(task))


SAMPLES = {
    "t2v": sample("a ball", (), VIDEO, "t2v", 1),
    "rv2v": sample("with this hat", (VIDEO, IMAGE), VIDEO, "rv2v", 2),
    "seen": sample("what is it? a cat", (IMAGE,), None, "understanding", 3),
    "t2i": sample("a cup", (), IMAGE, "t2i", 4),
    "read": sample("two and two is four", (), None, "understanding", 5),
}


def draws_of(batch: Batch, names: Sequence[str]) -> Draws:
    """Of each sample its own, by name; about half is masked, so that something is left in sight."""
    generators = [torch.Generator().manual_seed([*SAMPLES].index(name)) for name in names]
    ratios = tuple(ratio and (4.0, 4.0) for ratio in batch.mask_ratios)
    return draw(replace(batch, mask_ratios=ratios), HIDDEN, generators, copies=COPIES)


def run(planner: Planner, *names: str) -> tuple[Batch, Draws, Outputs]:
    batch = pack([SAMPLES[name] for name in names])
    draws = draws_of(batch, names)
    return batch, draws, forward(planner, batch, draws)


def part(draws: Draws, batch: Batch, number: int) -> Draws:
    """The draws of one sample."""
    tokens = batch.target_tokens
    start = sum(tokens[:number])
    masked = draws.masked[start : start + tokens[number]]
    first, count = int(draws.masked[:start].sum()), int(masked.sum())
    return Draws(masked, draws.noise[:, first : first + count], draws.levels[:, first : first + count])


def losses(planner: Planner, outputs: Outputs) -> tuple[Tensor, Tensor]:
    assert outputs.text is not None and outputs.flow is not None
    flow = outputs.flow
    found = planner.vit_decoder(flow.noisy, flow.times, flow.conditions)
    return F.cross_entropy(outputs.text.logits, outputs.text.labels), F.mse_loss(found, flow.velocity.to(found.dtype))


# --- the plain way: one sample, a dense mask token by token, formulas written out -----------------------------------


def kinds_of(talk: Conversation) -> list[str]:
    return [segment.kind for segment in talk.layout.segments for _ in range(segment.tokens)]


def plain_mask(talk: Conversation) -> Tensor:
    """bool ``[T, T]``: text and sources causally among themselves, a target all of those before it and itself."""
    kinds = kinds_of(talk)
    visible = torch.zeros((len(kinds), len(kinds)), dtype=torch.bool)
    for row, mine in enumerate(kinds):
        for key, theirs in enumerate(kinds):
            visible[row, key] = theirs == mine == "target" or (theirs != "target" and key <= row)
    return visible


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def plain_rotation(x_THD: Tensor, positions_3T: Tensor) -> Tensor:
    """Angles in float32, as everywhere."""
    half = x_THD.shape[-1] // 2
    frequencies = 1 / THETA ** (torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half))
    axes = torch.tensor([axis for axis, count in enumerate(SECTIONS) for _ in range(count)])
    angles = positions_3T[axes].T.float() * frequencies
    cos, sin = (torch.cat([part, part], -1).to(x_THD.dtype)[:, None] for part in (angles.cos(), angles.sin()))
    low, high = x_THD[..., :half], x_THD[..., half:]
    return x_THD * cos + torch.cat([-high, low], -1) * sin


def plain_layer(layer: Any, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    attn, mlp, width = layer.self_attn, layer.mlp, HIDDEN // HEADS
    normed = plain_norm(x, layer.input_layernorm.weight)
    q, k, v = (
        (normed @ made.weight.T + made.bias).reshape(len(x), -1, width)
        for made in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    q, k = plain_rotation(q, positions), plain_rotation(k, positions)
    k, v = (part.repeat_interleave(HEADS // KEY_HEADS, 1) for part in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(width)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    x = x + torch.einsum("hts,shd->thd", weights, v).flatten(1) @ attn.o_proj.weight.T
    normed = plain_norm(x, layer.post_attention_layernorm.weight)
    return x + (F.silu(normed @ mlp.gate_proj.weight.T) * (normed @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T


def plain_decoder(planner: Planner, noisy: Tensor, time: Tensor, condition: Tensor) -> Tensor:
    """Copies of one token; the sinusoid in float32, as everywhere."""
    net: Any = planner.vit_decoder.net
    half = net.time_embed.frequencies // 2
    angles = time[:, None].float() * torch.exp(-math.log(1e4) * torch.arange(half, dtype=torch.float32) / half)
    y = net.time_embed.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(noisy.dtype)) + net.cond_embed(condition)
    x = net.input_proj(noisy)
    for block in net.res_blocks:
        shift, scale, gate = block.adaLN_modulation(y).chunk(3, -1)
        x = x + gate * block.mlp(block.in_ln(x) * (1 + scale) + shift)
    shift, scale = net.final_layer.adaLN_modulation(y).chunk(2, -1)
    return net.final_layer.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


def plain_losses(planner: Planner, item: Sample, draws: Draws) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(next-token losses, squared errors ``[K, V]`` of each masked token's velocities, context or nothing)."""
    talk = item.conversation
    kinds = kinds_of(talk)
    places = {kind: [n for n, k in enumerate(kinds) if k == kind] for kind in ("text", "source", "target")}
    rows = list(planner.text.embed_tokens(talk.ids))
    for place, embedding in zip(places["source"], () if item.sources is None else item.sources, strict=True):
        rows[place] = embedding
    targets = () if item.targets is None else tuple(item.targets)
    hidden = [place for place, masked in zip(places["target"], draws.masked, strict=True) if masked]
    for place, embedding in zip(places["target"], targets, strict=True):
        rows[place] = planner.mask_tokens[0, 0] if place in hidden else embedding
    mask, x = plain_mask(talk), torch.stack(rows)
    *used, last = planner.text.layers
    for layer in used:
        x = plain_layer(layer, x, talk.positions, mask)
    normed = plain_norm(plain_layer(last, x, talk.positions, mask), planner.text.norm.weight)  # type: ignore[arg-type]
    logits = normed @ planner.lm_head.weight.T
    text = [
        F.cross_entropy(logits[place - 1], talk.ids[place])
        for place in places["text"]
        if place > 0 and kinds[place - 1] != "target"
    ]
    levels = torch.linspace(1, 0.003 / 1.002, 1001, dtype=torch.float64)[:-1]
    levels = 2 * levels / (1 + levels)
    errors = []
    for number, place in enumerate(hidden):
        sigma, noise = levels[draws.levels[:, number]], draws.noise[:, number].double()
        clean = targets[places["target"].index(place)]
        noisy = (1 - sigma[:, None]) * clean + sigma[:, None] * noise
        condition = planner.connector.pred_vit(x[place : place + 1]).expand(len(noise), -1)
        errors.append((plain_decoder(planner, noisy, sigma * 1000, condition) - (noise - clean)) ** 2)
    kept = [n for n in range(len(kinds)) if n not in hidden]
    return text, errors, [planner.connector.proj_gen(x[kept])] if targets else []


def gradients(planner: Planner, loss: Tensor) -> dict[str, Tensor | None]:
    parameters = dict(planner.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, [*parameters.values()], allow_unused=True), strict=True))


# --- tests ------------------------------------------------------------------------------------------------------------


def test_values_and_gradients_are_those_of_dense_masks_one_sample_at_a_time() -> None:
    planner = make_planner()
    batch, draws, outputs = run(planner, *SAMPLES)
    contexts = [context for context in outputs.contexts if context is not None]
    weights = [torch.randn(c.shape, generator=torch.Generator().manual_seed(n)) for n, c in enumerate(contexts)]

    def total(text: Tensor, visual: Tensor, contexts: Sequence[Tensor]) -> Tensor:
        rendered = torch.stack([(c * w).mean() for c, w in zip(contexts, weights, strict=True)])
        return 0.2 * text + visual + rendered.sum()

    text, visual = losses(planner, outputs)
    got = gradients(planner, total(text, visual, contexts))

    plain = [plain_losses(planner, item, part(draws, batch, n)) for n, item in enumerate(SAMPLES.values())]
    want_text = torch.stack([x for found, _, _ in plain for x in found]).mean()
    want_visual = torch.stack([x for _, found, _ in plain for x in found]).mean()
    want_contexts = [x for _, _, found in plain for x in found]
    want = gradients(planner, total(want_text, want_visual, want_contexts))

    torch.testing.assert_close((text, visual), (want_text, want_visual), rtol=1e-10, atol=0)
    for context, expected in zip(contexts, want_contexts, strict=True):
        torch.testing.assert_close(context, expected, rtol=1e-9, atol=1e-11)
    idle = set()
    for name, expected_grad in want.items():
        grad = got[name]
        if expected_grad is None:
            idle.add(name.partition(".")[0])
            assert grad is None, name
        else:
            assert grad is not None, name
            error = float((grad - expected_grad).norm() / expected_grad.norm())
            assert error < 1e-9, f"{name}: {error:.2g}"
    assert idle == {"visual"}, "all learns but the vision tower, whose embeddings are given here"
    mask = got["mask_tokens"]
    assert mask is not None and float(mask[0, 0].norm()) > 0 and not mask[0, 1:].any()


def test_masked_targets_are_not_seen_by_anything() -> None:
    """Their embeddings change what the decoder is to answer, and nothing that the planner computes."""
    planner = make_planner()
    batch, draws, before = run(planner, "rv2v", "t2v")
    assert batch.targets is not None and before.text is not None and before.flow is not None
    assert 0 < int(draws.masked.sum()) < len(draws.masked)
    changed = torch.where(draws.masked[:, None], batch.targets + 3, batch.targets)
    after = forward(planner, replace(batch, targets=changed), draws)
    assert after.text is not None and after.flow is not None
    assert torch.equal(after.text.logits, before.text.logits)
    assert torch.equal(after.flow.conditions, before.flow.conditions)
    for number, (new, old) in enumerate(zip(after.contexts, before.contexts, strict=True)):
        assert new is not None and old is not None and torch.equal(new, old)
        talk = [SAMPLES["rv2v"], SAMPLES["t2v"]][number].conversation
        assert len(new) == talk.layout.tokens - int(part(draws, batch, number).masked.sum())
    assert not torch.equal(after.flow.velocity, before.flow.velocity)


def test_text_and_sources_never_see_a_target() -> None:
    """Targets in sight change conditions and their own rows of the context, no text and no source."""
    planner = make_planner()
    batch, draws, before = run(planner, "rv2v")
    assert batch.targets is not None and before.text is not None and before.flow is not None
    after = forward(planner, replace(batch, targets=batch.targets + 1), draws)
    assert after.text is not None and after.flow is not None
    assert torch.equal(after.text.logits, before.text.logits)
    assert not torch.equal(after.flow.conditions, before.flow.conditions)
    new, old = after.contexts[0], before.contexts[0]
    assert new is not None and old is not None
    target = batch.layout.target_index
    kept = np.setdiff1d(np.arange(batch.layout.tokens), target[draws.masked.numpy()])
    is_target = np.isin(kept, target)
    assert is_target.any() and ((new != old).any(-1).numpy() == is_target).all()
    (grad,) = torch.autograd.grad(before.text.logits.sum(), planner.mask_tokens, allow_unused=True)
    assert grad is None or not grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@torch.no_grad()
def test_neighbours_do_not_matter(dtype: torch.dtype) -> None:
    planner, limit = make_planner(dtype), 1e-12 if dtype == torch.float64 else 1e-5
    names = list(SAMPLES)
    _, _, packed = run(planner, *names)
    assert packed.text is not None and packed.flow is not None
    for number, name in enumerate(names):
        _, _, alone = run(planner, name)
        assert alone.text is not None
        own = packed.text.samples == number
        assert torch.equal(packed.text.labels[own], alone.text.labels)
        pairs = [(packed.text.logits[own], alone.text.logits)]
        own = packed.flow.samples == number
        assert bool(own.any()) == (alone.flow is not None) == (packed.contexts[number] is not None)
        if alone.flow is not None:
            pairs.append((packed.flow.conditions[own], alone.flow.conditions))
            pairs += [(getattr(packed.flow, f)[:, own], getattr(alone.flow, f)) for f in ("noisy", "times", "velocity")]
            context, expected = packed.contexts[number], alone.contexts[0]
            assert context is not None and expected is not None
            pairs.append((context, expected))
        for got, want in pairs:
            assert got.shape == want.shape and float((got - want).norm()) <= limit * float(want.norm())


def test_one_generator_gives_a_sample_the_same_draws_whoever_its_neighbours_are() -> None:
    def second(first: str, seed: int = 9) -> Draws:
        batch = pack([SAMPLES[first], SAMPLES["t2v"]])
        return part(draw(batch, HIDDEN, torch.Generator().manual_seed(seed)), batch, 1)

    one, other = second("rv2v"), second("read")
    assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("masked", "noise", "levels"))
    assert one.noise.shape == (training.COPIES, int(one.masked.sum()), HIDDEN) and one.noise.dtype == torch.float32
    assert not torch.equal(second("rv2v", 10).noise[:, 0], one.noise[:, 0])


def test_mask_ratios_follow_the_table() -> None:
    """The mean of Beta(a, b) is a / (a + b); of a target of one token that one is masked."""
    large = sample("x", (), Visual("video", (4, 10, 10)), "t2i", 0)
    for task, (a, b) in MASK_RATIOS.items():
        batch = pack([replace(large, mask_ratio=(a, b))])
        generator = torch.Generator().manual_seed(0)
        ratios = [float(draw(batch, 1, generator, copies=1).masked.float().mean()) for _ in range(300)]
        spread = math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1)) / 300)
        assert abs(sum(ratios) / 300 - a / (a + b)) < 4 * spread + 1 / 400, task
    small = pack([replace(sample("x", (), Visual("image", (1, 1, 1)), "t2i", 0), mask_ratio=(1.0, 9.0))] * 20)
    assert bool(draw(small, 1, torch.Generator().manual_seed(0)).masked.all())


def test_levels_are_uniform_and_those_of_the_sampler() -> None:
    planner = make_planner()
    batch = pack([replace(SAMPLES["t2v"], mask_ratio=(50.0, 0.1))] * 20)
    draws = draw(batch, HIDDEN, torch.Generator().manual_seed(0))
    masked = int(draws.masked.sum())
    assert draws.levels.shape == (16, masked) and int(draws.levels.min()) >= 0 and int(draws.levels.max()) < 1000
    counts = torch.histc(draws.levels.float(), 10, 0, 999)
    assert float((counts - counts.mean()).abs().max()) < 5 * math.sqrt(float(counts.mean()))
    flow = forward(planner, batch, draws).flow
    assert flow is not None and flow.times.shape == draws.levels.shape
    clean = flow.noisy - flow.times[..., None] / 1000 * flow.velocity  # x0 = z - sigma * v
    torch.testing.assert_close(clean, flow.clean.expand_as(clean), atol=1e-12, rtol=0)
    highest = forward(planner, batch, replace(draws, levels=torch.zeros_like(draws.levels))).flow
    assert highest is not None and torch.equal(highest.noisy, draws.noise.double())
    assert bool((highest.times == 1000).all())


def test_what_has_no_loss_is_not_there() -> None:
    planner = make_planner()
    _, _, read = run(planner, "read", "seen")
    assert read.flow is None and read.contexts == (None, None) and read.text is not None
    own = [SAMPLES[name] for name in ("read", "seen")]
    counts = [int(item.learned.sum()) - 1 for item in own]  # all but the first token of each
    assert torch.bincount(read.text.samples).tolist() == counts
    assert read.text.labels[: counts[0]].tolist() == own[0].conversation.ids[1:].tolist()

    silent = replace(SAMPLES["t2v"], learned=torch.zeros_like(SAMPLES["t2v"].learned))
    outputs = forward(planner, pack([silent]), draws_of(pack([silent]), ["t2v"]))
    assert outputs.text is None and outputs.flow is not None
    some = torch.zeros_like(silent.learned)
    some[[3, -1]] = True  # the last token follows the target: what would predict it has seen that
    few = pack([replace(silent, learned=some)])
    outputs = forward(planner, few, draws_of(few, ["t2v"]))
    assert outputs.text is not None and outputs.text.labels.tolist() == [int(silent.conversation.ids[3])]


def test_losses_go_down() -> None:
    """Thirty steps of Adam on one batch with the same draws."""
    planner = make_planner(torch.float32)
    batch = pack([SAMPLES[name] for name in ("t2i", "t2v")])
    draws = draw(batch, HIDDEN, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(planner.parameters(), lr=3e-3)
    history = []
    for _ in range(30):
        optimizer.zero_grad()
        text, visual = losses(planner, forward(planner, batch, draws))
        (0.2 * text + visual).backward()
        optimizer.step()
        history.append((text.item(), visual.item()))
    assert history[-1][0] < 0.6 * history[0][0] and history[-1][1] < 0.6 * history[0][1], history[::10]


def test_bad_samples_are_refused() -> None:
    good = SAMPLES["rv2v"]
    assert good.targets is not None
    wrong = {
        "12 target tokens and 11 embeddings": replace(good, targets=good.targets[1:]),
        "16 source tokens and 0 embeddings": replace(good, sources=None),
        "no mask_ratio": replace(good, mask_ratio=None),
        "learned of sample 0 must be bool": replace(good, learned=good.learned[1:]),
        "is packed already": Sample(pack([good, good]).conversation, good.learned),
    }
    with pytest.raises(ValueError, match="at least one sample"):
        pack([])
    for message, item in wrong.items():
        with pytest.raises(ValueError, match=message):
            pack([item])
