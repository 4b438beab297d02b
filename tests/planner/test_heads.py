"""Connector and ViT-embedding decoder: shapes and names of the released bundle, the sampler, the silent start."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from bernini.planner import heads
from bernini.planner.heads import Connector, DecoderConfig, VitDecoder, decoder_levels, sinusoid, zero_init


def test_names_and_shapes_are_those_of_the_bundle() -> None:
    """12 and 140 tensors, as listed in the facts of the released model, section A.4."""
    with torch.device("meta"):
        connector, decoder = Connector(3584, 4096, 3584), VitDecoder(DecoderConfig(3584, 4096))
    shapes = {name: list(value.shape) for name, value in connector.state_dict().items()}
    assert shapes == {
        "proj_gen.0.weight": [4096, 3584], "proj_gen.0.bias": [4096], "proj_gen.2.weight": [4096],
        "proj_gen.3.weight": [4096, 4096], "proj_gen.3.bias": [4096],
        "pred_vit.0.weight": [3584, 3584], "pred_vit.0.bias": [3584],
        "pred_vit.2.weight": [3584, 3584], "pred_vit.2.bias": [3584], "pred_vit.3.weight": [3584],
        "pred_vit.4.weight": [3584, 3584], "pred_vit.4.bias": [3584],
    }  # fmt: skip
    shapes = {name.removeprefix("net."): list(value.shape) for name, value in decoder.state_dict().items()}
    assert len(shapes) == 140
    assert shapes["time_embed.mlp.0.weight"] == [4096, 256] and shapes["time_embed.mlp.2.weight"] == [4096, 4096]
    assert shapes["cond_embed.weight"] == shapes["input_proj.weight"] == [4096, 3584]
    block = {name.removeprefix("res_blocks.15."): shape for name, shape in shapes.items() if "res_blocks.15." in name}
    assert block == {
        "in_ln.weight": [4096], "in_ln.bias": [4096], "mlp.0.weight": [4096, 4096], "mlp.0.bias": [4096],
        "mlp.2.weight": [4096, 4096], "mlp.2.bias": [4096], "adaLN_modulation.1.weight": [12288, 4096],
        "adaLN_modulation.1.bias": [12288],
    }  # fmt: skip
    assert shapes["final_layer.linear.weight"] == [3584, 4096]
    assert shapes["final_layer.adaLN_modulation.1.weight"] == [8192, 4096]


def test_a_silent_start() -> None:
    connector = Connector(8, 6, 8)
    zero_init(connector)
    x = torch.randn(5, 8, requires_grad=True)
    assert not connector.for_gen(x).any() and connector.for_vit(x).any()
    connector.for_gen(x).sum().backward()
    assert connector.proj_gen[3].weight.grad is not None and connector.proj_gen[3].weight.grad.any(), "it can learn"


def small() -> VitDecoder:
    torch.manual_seed(0)
    return VitDecoder(DecoderConfig(6, 16, depth=2, frequencies=8)).double().eval()


@torch.no_grad()
def test_the_network_is_its_formula() -> None:
    """Written out with torch's own layers; and every token by itself."""
    net, functional = small().net, torch.nn.functional
    x, c = torch.randn(5, 6).double(), torch.randn(5, 6).double()
    ladder = [math.exp(-math.log(10000) * k / 4) for k in range(4)]
    waves = torch.tensor([[*(math.cos(700 * f) for f in ladder), *(math.sin(700 * f) for f in ladder)]])
    assert torch.allclose(sinusoid(torch.tensor([700.0]), 8), waves, atol=1e-4)
    y = net.time_embed(torch.tensor([700.0])) + net.cond_embed(c)
    h = net.input_proj(x)
    for block in net.res_blocks:
        shift, scale, gate = block.adaLN_modulation(y).chunk(3, -1)
        normed = functional.layer_norm(h, (16,), block.in_ln.weight, block.in_ln.bias, 1e-6)
        h = h + gate * block.mlp(normed * (1 + scale) + shift)
    shift, scale = net.final_layer.adaLN_modulation(y).chunk(2, -1)
    want = net.final_layer.linear(functional.layer_norm(h, (16,), eps=1e-6) * (1 + scale) + shift)
    assert torch.allclose(net(x, torch.tensor([700.0]), c), want, atol=1e-12)
    alone = torch.cat([net(x[i : i + 1], torch.tensor([700.0]), c[i : i + 1]) for i in range(5)])
    assert torch.allclose(alone, want, atol=1e-12)
    times = torch.tensor([700.0, 3.0, 500.0, 1.0, 999.0])
    each = torch.cat([net(x[i : i + 1], times[i : i + 1], c[i : i + 1]) for i in range(5)])
    assert torch.allclose(net(x, times, c), each, atol=1e-12), "a time per token"


@pytest.mark.parametrize("steps", [1, 5, 25])
@pytest.mark.parametrize("weights", [(1.0,), (1.2, -0.2), (1.4, -0.2, -0.2)])
def test_sampling_is_eulers_method(steps: int, weights: tuple[float, ...]) -> None:
    decoder = small()
    noise = torch.randn(5, 6)
    conditions = [torch.randn(5, 6).double() for _ in weights]
    got = decoder.sample(noise, list(zip(weights, conditions, strict=True)), steps)
    even = [1 - number / steps * (1 - 0.003 / 1.002) for number in range(steps)]
    sigmas = [*(2 * s / (1 + s) for s in even), 0.0]
    x = noise.double()
    with torch.no_grad():
        for sigma, following in itertools.pairwise(sigmas):
            velocities = [decoder.net(x, torch.tensor([sigma * 1000]), condition) for condition in conditions]
            x = x + (following - sigma) * sum(w * v for w, v in zip(weights, velocities, strict=True))
    assert torch.allclose(got, x, atol=1e-5), "float32 times"


@torch.no_grad()
def test_tokens_are_sampled_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one token's tables, and with room for all."""
    decoder = small()
    noise, conditions = torch.randn(7, 6).double(), [(w, torch.randn(7, 6).double()) for w in (1.4, -0.2, -0.2)]
    whole = decoder.sample(noise, conditions, 3)
    for room in (1, 3 * 3 * 8 * 16 * 4):
        monkeypatch.setattr(heads, "TABLES", room)
        torch.testing.assert_close(decoder.sample(noise, conditions, 3), whole, rtol=1e-12, atol=1e-12)
    copies, times = torch.randn(4, 7, 6).double(), torch.rand(4, 7) * 1000
    found = decoder(copies, times, conditions[0][1])
    for got, x, time in zip(found, copies, times, strict=True):
        torch.testing.assert_close(got, decoder.net(x, time, conditions[0][1]), rtol=1e-12, atol=1e-12)


def test_released_levels_are_coarse() -> None:
    exact, _ = decoder_levels(25, 2.0, parity=False)
    coarse, times = decoder_levels(25, 2.0, parity=True)
    assert exact[0] == coarse[0] == 1.0 and exact[-1] == coarse[-1] == 0.0 and times[0] == 1000.0
    assert all(torch.tensor(value).bfloat16().item() == value for value in (*coarse, *times))
    assert 1e-4 < max(abs(a - b) for a, b in zip(exact, coarse, strict=True)) < 2e-2
