"""Which bytes of a saved tensor leave the device, how many at once, and what stays: by rule, and by a budget."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bernini.offload.activations import ActivationOffload
from bernini.offload.saved import Handle, interval, own_bytes, span

from .models import WIDTH, Model, gradients, offloading, same


def handles(offload: ActivationOffload, *tensors: Tensor) -> list[Any]:
    with offload:
        offload.cover._called.update(range(len(offload.cover.blocks)))
        return [offload._pack(tensor) for tensor in tensors]


def test_one_copy_of_shared_bytes() -> None:
    """Views at offsets, transposed and broadcast ones, share the bytes of the first that has them all."""
    base = torch.randn(64, 32)
    inner = base[8:40]
    views = [base.detach(), base.t(), inner, inner[3].expand(64, 32), base[:, 4:20], base.flatten()[17:900]]
    with offloading([nn.Identity()], policy="all") as offload:
        packed = handles(offload, *views)
        assert offload.counts.intervals == 1 and offload.counts.offloaded_bytes == base.numel() * 4
        for view, handle in zip(views, packed, strict=True):
            back = offload._unpack(handle)
            assert back.stride() == view.stride() and back.shape == view.shape and torch.equal(back, view)
        assert offload.counts.saved == len(views)
        del packed, handle


def test_own_bytes_only() -> None:
    """A dense part of a large storage takes its own bytes along, a part with gaps the storage, a thin one nothing."""
    large = torch.randn(1000, 64)
    assert interval(large[100:200]) == (100 * 256 // 512 * 512, 200 * 256)
    assert interval(large[:, 8:40]) == (0, 256_000)
    assert interval(large[:, 8:10]) is None
    assert interval(torch.randn(64).expand(1000, 64)) == (0, 256)
    assert span(large[2:4, 1:]) == (2 * 256 + 4, 4 * 256) and own_bytes(large[:, :1].expand(1000, 64)) == 4000


def test_left_alone() -> None:
    """Parameters and their views, small tensors, what is in the arena, and what is not plain."""
    block = nn.Linear(64, 64)
    with offloading([block], policy="all", minimum=1024) as offload:
        there = offload.arena.take(4096)
        kept = [
            block.weight, block.weight.t(), block.weight[3:], torch.randn(64, 64, requires_grad=True), torch.randn(255),
            there.tensor((32, 32), torch.float32), torch.randn(32, 32, dtype=torch.complex64).conj(),
            torch.randn(32, 32).to_sparse(),
        ]  # fmt: skip
        packed = handles(offload, *kept, torch.randn(256))
        assert [isinstance(one, Handle) for one in packed] == [False] * len(kept) + [True]
        for tensor, one in zip(kept, packed[:-1], strict=True):
            back = offload._unpack(one)
            assert back.shape == tensor.shape and (tensor.is_sparse or back.data_ptr() == tensor.data_ptr())
        del packed, one, kept, back, tensor
        there.free()


def test_weights_inside_a_block_are_left_alone() -> None:
    """Also views of a weight that autograd does not know to be one."""

    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return x.sin() @ self.weight.detach().t()

    block = Detached()
    with offloading([block], policy="all") as offload:

        def run(leaf: Tensor) -> None:
            with offload:
                loss = block(leaf).sum()
            loss.backward()

        gradients(block, run, torch.randn(8, WIDTH))
        assert offload.counts.saved == 0  # sin saves the leaf, the product the weight: nothing is left


def test_bytes_in_flight_are_bounded() -> None:
    model = Model(6)
    with offloading(model.blocks, policy="all", bandwidth=20e6, in_flight=8192) as offload:
        with offload:
            loss = model(model.x.clone().requires_grad_())
        largest = 16 * 32 * WIDTH * 4
        assert 0 < offload.counts.peak_flight <= max(8192, largest)
        loss.backward()
        del loss


@pytest.mark.parametrize("landing", [1, 3])
def test_landing_slots_are_bounded_and_foreseen(landing: int) -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(8))
    most = 0

    class Watched(ActivationOffload):
        def _unpack(self, packed: Any) -> Tensor:
            nonlocal most
            back = super()._unpack(packed)
            most = max(most, len(self.store._ahead))
            return back

    with offloading(blocks, policy="all", landing=landing, type=Watched, in_flight=1) as offload:
        with offload:
            x = torch.randn(8, WIDTH, requires_grad=True)
            for block in blocks:
                x = block(x)
        x.sum().backward()
        del x
        assert most == landing
        assert offload.counts.unforeseen <= 2 < offload.counts.reloaded


@pytest.mark.parametrize("ahead", [False, True])
def test_deadlines(ahead: bool) -> None:
    """From the second step on a tensor is fetched when its copy, by the link's rate, would else be late: not before."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(6))
    waiting: list[int] = []

    class Slow(torch.autograd.Function):
        """Ten milliseconds of backward."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            waiting.append(len(offload.store._ahead))
            time.sleep(0.01)
            return grad

    with offloading(blocks, policy="all", landing=5, in_flight=1) as offload:
        # 32 KiB in 1 us: there is time for each when the one before is used; in 40 ms: several must be on their way
        offload.transfers.rate = 32768 / (0.04 if ahead else 1e-6)
        for _ in range(2):
            waiting.clear()
            with offload:
                x = torch.randn(512, WIDTH, requires_grad=True)
                for block in blocks:
                    x = Slow.apply(block(x))
            offload.finish()
            x.sum().backward()
        del x
    assert max(waiting[1:]) >= 3 if ahead else max(waiting[1:]) <= 1, waiting


def test_budget() -> None:
    """After one step that is recorded nothing leaves if all fits; less leaves than without a budget if it does not."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(8))
    x = torch.randn(256, WIDTH)

    def plain(leaf: Tensor) -> None:
        for block in blocks:
            leaf = block(leaf)
        leaf.sum().backward()

    wanted = gradients(blocks, plain, x)
    size = x.numel() * 4
    left = {}
    for budget in (100 * size, 5 * size):
        with offloading(blocks, policy="all", gpu_budget=budget) as offload:

            def run(leaf: Tensor, offload: ActivationOffload = offload) -> None:
                with offload:
                    for block in blocks:
                        leaf = block(leaf)
                    loss = leaf.sum()
                time.sleep(0.02)
                loss.backward()

            seen = []
            for _ in range(3):
                before = offload.counts.offloaded
                assert same(gradients(blocks, run, x), wanted)
                seen.append(offload.counts.offloaded - before)
            left[budget] = seen
    assert left[100 * size][0] == 8 and left[100 * size][1:] == [0, 0]
    assert left[5 * size][0] == 8 and all(0 < count < 8 for count in left[5 * size][1:])


def test_budget_that_cannot_be_met() -> None:
    block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    with offloading([block], policy="all", gpu_budget=0) as offload:
        with offload:
            loss = block(torch.randn(8, WIDTH)).sum()
        loss.backward()
        del loss
        with pytest.raises(ValueError, match="raise the budget"), offload:
            pass
