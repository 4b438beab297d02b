"""Moments and average in an estimate: as they are after the first step, on the device or on the host."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..training.trainer import Trainer
from .ledger import Ledger


def host(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def prepare(optimizer: Any, ledger: Ledger, on_device: bool) -> None:
    """The optimizer as it is after the first step: its moments exist. A GPU's AdamW works on all parameters at once."""
    if isinstance(optimizer, torch.optim.AdamW):
        for group in optimizer.param_groups:
            group["foreach"] = on_device
    step = optimizer.step
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not on_device:
        moments = [host(p) for p in parameters for _ in range(2)]
        ledger.note(moments)
        optimizer.step = partial(_step_there, optimizer, ledger, moments)
        return
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    step()
    for parameter in parameters:
        parameter.grad = None
    ledger.note(value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))

    def stepped() -> None:
        ledger.mark("optimizer")
        ledger.optimizing(True)
        step()
        ledger.optimizing(False)

    optimizer.step = stepped


def _step_there(optimizer: Any, ledger: Ledger, moments: list[Tensor]) -> None:
    """A step whose moments come from the host for one parameter at a time, and go back."""
    ledger.mark("optimizer")
    ledger.optimizing(True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                one = torch.optim.AdamW([parameter], lr=group["lr"], foreach=False)
                one.step()
    ledger.optimizing(False)


def average_there(trainer: Trainer, step: int) -> None:
    with torch.no_grad():
        for name, mean in trainer.weights.ema.items():
            torch.empty(mean.shape, dtype=mean.dtype).lerp_(trainer.weights.masters[name].detach(), 0.5)
