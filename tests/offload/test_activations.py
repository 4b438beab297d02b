"""Offloaded activations give the same gradients, bit for bit, whatever the model saves and however copies are delayed.
The log of every run is checked, and nothing is left of it."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bernini.offload.activations import ActivationOffload
from bernini.offload.arena import Arena
from bernini.offload.transfer_cpu import CpuTransfers

from .models import MIB, WIDTH, Block, Model, gradients, offloading, same


@pytest.mark.parametrize("seed", range(50))
def test_random_models(seed: int) -> None:
    """Two seeds of delays each: 100 in all."""
    model, chance = Model(seed), random.Random(1000 + seed)

    def plain(x: Tensor) -> None:
        model(x).backward()

    wanted = gradients(model, plain, model.x)
    for delays in (2 * seed, 2 * seed + 1):
        policy = chance.choice(["hidden", "hidden+attention", "all", "all"])
        again = policy != "all" and model.outer == "" and not model.twice and chance.random() < 0.5
        inside, retained, settled = (chance.random() < share for share in (0.5, 0.3, 0.5))
        with offloading(
            model.blocks, delay=5e-4, seed=delays, policy=policy, recompute=again, landing=chance.randint(1, 4),
            in_flight=chance.choice([1, 4096, MIB]),
        ) as offload:  # fmt: skip
            step = partial(step_of, model, offload, inside, retained, settled)
            for _ in range(2):
                assert same(gradients(model, step, model.x), wanted), (policy, again, inside, retained)
            assert offload.counts.offloaded > 0 and (offload.counts.reloaded > 0 or not settled)


def step_of(
    model: nn.Module, offload: ActivationOffload, inside: bool, retained: bool, settled: bool, x: Tensor
) -> None:
    """Args:
    inside: the backward is in the context.
    retained: it is done twice, and the second counts.
    settled: it begins when all copies are out; else some tensors are wanted back before they have left.
    """
    with offload:
        loss = model(x)
        if settled:
            offload.finish()
        if inside:
            loss.backward(retain_graph=retained)
    if not inside:
        loss.backward(retain_graph=retained)
    if retained:
        x.grad = None
        model.zero_grad(set_to_none=True)
        loss.backward()


def test_graphs_in_flight() -> None:
    """Two graphs alive at once, run backward in either order, of one context or two; the third dies unused."""
    model = Model(6)
    x = [torch.randn(9, WIDTH) for _ in range(3)]

    def both(leaf: Tensor) -> None:
        (model(leaf) + 2 * model(leaf + x[1])).backward()

    wanted = gradients(model, both, x[0])
    for order in ((0, 1), (1, 0)):
        with offloading(model.blocks, policy="all", delay=1e-3) as offload:

            def run(leaf: Tensor, offload: ActivationOffload = offload, order: tuple[int, int] = order) -> None:
                with offload:
                    losses = [model(leaf)]
                with offload:
                    losses.append(2 * model(leaf + x[1]))
                    dead = model(x[2])
                parts = []
                for number in order:
                    leaf.grad = None
                    kept = [p.grad for p in model.parameters()]
                    model.zero_grad(set_to_none=True)
                    losses[number].backward()
                    parts.append((leaf.grad, [p.grad for p in model.parameters()]))
                    del kept
                del dead
                first, second = (parts[order.index(number)] for number in (0, 1))
                leaf.grad = second[0] + first[0]  # the order in which the sum's backward adds them
                for p, a, b in zip(model.parameters(), first[1], second[1], strict=True):
                    p.grad = None if a is None else b + a

            got = gradients(model, run, x[0])
            assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(got, wanted, strict=True))


def test_compiled_blocks() -> None:
    """A compiled region saves through the hooks as one op; blocks compiled each by itself, in place or wrapped."""
    model = Model(6)
    assert model.outer == ""
    x = model.x

    def plain(leaf: Tensor) -> None:
        model(leaf).backward()

    for wrapped in (False, True):
        for number, block in enumerate(model.blocks):
            if wrapped:
                model.blocks[number] = torch.compile(block, backend="aot_eager")
            else:
                block.compile(backend="aot_eager")
        wanted = gradients(model, plain, x)
        for policy in ("hidden", "all"):
            with offloading(model.blocks, policy=policy, delay=5e-4) as offload:

                def run(leaf: Tensor, offload: ActivationOffload = offload) -> None:
                    with offload:
                        loss = model(leaf)
                    loss.backward()

                for _ in range(2):
                    assert same(gradients(model, run, x), wanted), (wrapped, policy)
                assert offload.counts.offloaded >= 2
        if not wrapped:
            for block in model.blocks:
                block._compiled_call_impl = None


class Attention(nn.Module):
    """Counts how often attention is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(0, 1)[None] for part in self.qkv(x).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1))


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def attentions(self) -> int:
        return sum("attention" in op and "backward" not in op for op in self.ops)


@pytest.mark.parametrize("own", [False, True])
def test_attention_is_not_recomputed(own: bool) -> None:
    """By a checkpoint of the model's own with the offload's contexts, and by the offload's."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(Attention() for _ in range(3))
    x = torch.randn(24, WIDTH)

    def model(leaf: Tensor, **options: Any) -> Tensor:
        for block in blocks:
            leaf = checkpoint(block, leaf, use_reentrant=False, **options) if options else block(leaf)
        return leaf.square().mean()

    wanted = gradients(blocks, lambda leaf: model(leaf).backward(), x)
    counts = {}
    for policy in ("hidden", "hidden+attention"):
        with offloading(blocks, policy=policy, recompute=not own, delay=1e-3) as offload:
            options: dict[str, Any] = {}
            if own:
                options = {"context_fn": offload.contexts} if policy != "hidden" else {"preserve_rng_state": False}

            def run(leaf: Tensor, offload: ActivationOffload = offload, options: dict[str, Any] = options) -> None:
                with offload:
                    loss = model(leaf, **options)
                loss.backward()

            with Counted() as counted:
                assert same(gradients(blocks, run, x), wanted)
            counts[policy] = counted.attentions, offload.counts.offloaded
    assert counts["hidden"] == (6, 2)  # inputs of three blocks; the first is a leaf that the caller has
    assert counts["hidden+attention"][0] == 3 and counts["hidden+attention"][1] >= 5


def test_file_arena(tmp_path: Path) -> None:
    model = Model(6)
    wanted = gradients(model, lambda leaf: model(leaf).backward(), model.x)
    with offloading(model.blocks, policy="all", arena=Arena(64 * MIB, file=tmp_path / "arena")) as offload:

        def run(leaf: Tensor) -> None:
            with offload:
                loss = model(leaf)
            loss.backward()

        assert same(gradients(model, run, model.x), wanted)


def test_a_stream_that_changes() -> None:
    """Forward on two compute streams, backward on a third: every copy is ordered with the right one."""
    model = Model(6)
    wanted = gradients(model, lambda leaf: model(leaf).backward(), model.x)
    with offloading(model.blocks, policy="all", delay=1e-3, in_flight=4096) as offload:
        streams = offload.transfers
        assert isinstance(streams, CpuTransfers)

        def run(leaf: Tensor) -> None:
            with offload:
                x = model.blocks[0](leaf)
                with streams.using("side"):
                    for block in model.blocks[1:]:
                        x = block(x)
                loss = model.head(x).square().mean()
            with streams.using("third"):
                loss.backward()

        assert same(gradients(model, run, model.x), wanted)


def test_block_used_twice_is_seen() -> None:
    """A random model of every kind of wrap exists among the fifty, so none is left untested."""
    models = [Model(seed) for seed in range(50)]
    assert {model.outer for model in models} == {"", "inner", "nested", "outer", "reentrant"}
    assert sum(model.twice for model in models) >= 5 and sum(model.shared for model in models) >= 5
    assert isinstance(models[0].blocks[0], Block)
