"""Optimizers and learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .recipe import Optimizer

TABLES = (
    "embed_tokens", "shared", "lm_head", "mask_tokens", "scale_shift_table", "relative_attention_bias", "proj_out",
    "patch_embed", "conv_in", "conv_out",
)  # fmt: skip
"""Parts of names of what Muon leaves to AdamW though it has rows and columns: tables, and the ways in and out."""


def optimizers(settings: Optimizer, masters: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon before it where it is chosen and there are matrices for it.

    Vectors (biases, norms) and tables are never decayed.

    Raises:
        UserError: a torch without Muon.
    """
    matrices, plain, bare = [], [], []
    for name, parameter in masters.items():
        table = any(part in name for part in TABLES)
        thin = parameter.dim() < 2 or min(parameter.shape[0], parameter[0].numel()) < 2
        if settings.name == "muon" and not table and not thin:
            matrices.append(parameter)
        elif not table and not thin:
            plain.append(parameter)
        else:
            bare.append(parameter)
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((plain, settings.weight_decay), (bare, 0.0))
        if parameters
    ]
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(_muon(matrices, settings))
    if groups:
        found.append(torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return found


def _muon(matrices: Iterable[nn.Parameter], settings: Optimizer) -> torch.optim.Optimizer:
    """torch's Muon, which takes matrices alone, for convolutions as well: a filter is a row.

    Its steps are scaled to be as large as AdamW's, so one learning rate serves both (arXiv 2502.16982).
    """
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"optimizer.name = 'muon' needs torch 2.9 or newer; this is {torch.__version__}")

    class Muon(torch.optim.Muon):
        def __init__(self, parameters: Iterable[nn.Parameter], **options: Any) -> None:
            # A view shares its parameter's memory: a step on the one is a step on the other.
            self.views = {p if p.dim() == 2 else nn.Parameter(p.detach().view(len(p), -1)): p for p in parameters}
            super().__init__(list(self.views), **options)

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for view, parameter in self.views.items():
                view.grad = None if parameter.grad is None else parameter.grad.view(view.shape)
            return super().step(closure)

    return Muon(matrices, lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw")


def names_in(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[Tensor, str]:
    """What an optimizer's own parameters are called, views of other parameters among them."""
    views: Mapping[Tensor, Tensor] = getattr(optimizer, "views", {})
    own = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return {parameter: names[views.get(parameter, parameter)] for parameter in own}


def factor(settings: Optimizer, step: int, steps: int) -> float:
    """Of the learning rate at a step, counted from 0: up along a line, then as the schedule says."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return 1.0
    done = min(1.0, (step - settings.warmup) / max(1, steps - settings.warmup))
    left = 1 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return settings.final + (1 - settings.final) * left


def set_rates(found: list[torch.optim.Optimizer], value: float) -> None:
    for optimizer in found:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * value
