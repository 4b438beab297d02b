"""What is said when offload is used wrongly or interrupted, and that nothing is lost."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bernini.offload.activations import ActivationOffload
from bernini.offload.arena import Arena
from bernini.offload.transfer_cpu import CpuTransfers

from .models import MIB, WIDTH, Model, gradients, offloading, same


class Overwrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).exp()  # saves its output
        y.add_(1)
        return y


@pytest.mark.parametrize("policy", ["hidden", "all"])
@pytest.mark.parametrize("bandwidth", [None, 5e4])
def test_changed_in_place(policy: str, bandwidth: float | None) -> None:
    """The error of autograd, whether the copy was done or under way when the tensor was changed."""
    block = Overwrites()
    x = torch.randn(32, WIDTH)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        block(x).sum().backward()
    with offloading([block], policy=policy, bandwidth=bandwidth) as offload:
        with offload:
            y = block(x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        del y
        fine = nn.Linear(WIDTH, 1)
        with offload:  # and it goes on
            block(x)
            fine(x).sum().backward()
        assert fine.weight.grad is not None


def test_changed_parameter() -> None:
    block = nn.Linear(WIDTH, WIDTH)
    with offloading([block], policy="all") as offload:
        with offload:
            loss = block(torch.randn(8, WIDTH, requires_grad=True)).sum()
        with torch.no_grad():
            block.weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        del loss


def test_blocks_that_do_not_cover_the_model() -> None:
    model, other = Model(6), Model(7)
    x = model.x.clone().requires_grad_()
    with offloading(model.blocks[:1], policy="hidden") as offload:
        with (
            pytest.raises(ValueError, match=r"does not cover the model: beside its 1, \d more modules of class Block"),
            offload,
        ):
            loss = model(x)
        loss.backward()  # nothing is lost
        assert x.grad is not None
        del loss
    with offloading([*model.blocks, *other.blocks], policy="hidden") as offload:
        with pytest.raises(ValueError, match="were not called in the context"), offload:
            loss = model(x)
        loss.backward()
        del loss
        with pytest.raises(KeyError), offload:  # an exception of the forward is not covered up
            raise KeyError
    for block in model.blocks:
        assert "forward" not in block.__dict__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "some"}, "there are hidden, hidden\\+attention, all"),
        ({"policy": "all", "recompute": True}, "nothing left to recompute"),
        ({"landing": 0}, "landing=0"),
        ({"gpu_budget": -1}, "gpu_budget=-1"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationOffload([nn.Identity()], arena=Arena(MIB), transfers=CpuTransfers(), **options)


def test_wrong_blocks() -> None:
    block = nn.Identity()
    with pytest.raises(ValueError, match="no blocks"):
        ActivationOffload([], arena=Arena(MIB), transfers=CpuTransfers())
    with pytest.raises(ValueError, match="twice"):
        ActivationOffload([block, block], arena=Arena(MIB), transfers=CpuTransfers())
    offload = ActivationOffload([block], policy="all", arena=Arena(MIB), transfers=CpuTransfers())
    with offload, pytest.raises(ValueError, match="entered already"), offload:
        pass


def test_full_arena() -> None:
    """What does not fit stays on the device, with one warning; or an error that loses nothing."""
    model = Model(6)

    def plain(leaf: Tensor) -> None:
        model(leaf).backward()

    wanted = gradients(model, plain, model.x)
    for limit in (4096, 16 * 4096):  # smaller than a tensor, and than all
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with offloading(model.blocks, policy="all", arena=Arena(limit)) as offload:

                def run(leaf: Tensor, offload: ActivationOffload = offload) -> None:
                    with offload:
                        loss = model(leaf)
                    loss.backward()

                assert same(gradients(model, run, model.x), wanted)
                assert offload.counts.refused > 0
        assert len([one for one in told if "stays on the device" in str(one.message)]) == 1
    with offloading(model.blocks, policy="all", arena=Arena(4096), full="raise") as offload:
        with pytest.raises(ValueError, match="raise the limit"), offload:
            model(model.x)
        assert same(gradients(model, plain, model.x), wanted)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_exceptions(where: str) -> None:
    """A step that fails half way leaves nothing behind, and the next is right."""
    model = Model(6)
    wanted = gradients(model, lambda leaf: model(leaf).backward(), model.x)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            if where == "forward":
                raise KeyError("on purpose")
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise KeyError("on purpose")

    with offloading(model.blocks, policy="all", delay=1e-3) as offload:

        def fail() -> None:
            with offload:
                x = model.blocks[0](model.x.clone().requires_grad_())
                loss = model.head(model.blocks[1](Fails.apply(x))).sum()
                for block in model.blocks[2:]:
                    block(x)
                loss.backward()

        with pytest.raises(KeyError):
            fail()

        def run(leaf: Tensor) -> None:
            with offload:
                loss = model(leaf)
            loss.backward()

        assert same(gradients(model, run, model.x), wanted)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell starts what runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_interrupted_copy(where: str) -> None:
    """Ctrl-C while the compute waits for a copy: everything is given back, and the next step is right."""
    model = Model(6)
    wanted = gradients(model, lambda leaf: model(leaf).backward(), model.x)
    with offloading(model.blocks, policy="all", in_flight=1, landing=1) as offload:
        slow = offload.transfers
        assert isinstance(slow, CpuTransfers)

        def run(leaf: Tensor) -> None:
            with offload:
                loss = model(leaf)
            if where == "backward":
                worker = slow.stream("back").native
                worker._delay = 0.5
                worker._chance.random = lambda: 1.0
                threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            loss.backward()

        if where == "forward":
            worker = slow.stream("out").native
            worker._delay = 0.5
            worker._chance.random = lambda: 1.0
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            gradients(model, run, model.x)
        worker = slow.stream("out" if where == "forward" else "back").native
        worker._delay = 0.0
        where = "neither"
        assert same(gradients(model, run, model.x), wanted)
