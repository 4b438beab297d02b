"""Optimizers and learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from ..errors import UserError
from .recipe import Optimizer

EMBEDDINGS = ("embed_tokens", "shared", "lm_head", "mask_tokens", "scale_shift_table", "proj_out", "patch_embed")
"""Parts of names of matrices that Muon leaves to AdamW: tables of rows, and the ways in and out."""


def optimizers(settings: Optimizer, masters: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon before it where it is chosen and there are matrices for it.

    Vectors (biases, norms) and tables are never decayed.

    Raises:
        UserError: a torch without Muon.
    """
    matrices, plain, bare = [], [], []
    for name, parameter in masters.items():
        table = any(part in name for part in EMBEDDINGS)
        if settings.name == "muon" and parameter.dim() == 2 and not table:
            matrices.append(parameter)
        elif parameter.dim() > 1 and not table:
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
        if not hasattr(torch.optim, "Muon"):
            raise UserError(f"optimizer.name = 'muon' needs torch 2.9 or newer; this is {torch.__version__}")
        # Its steps are scaled to be as large as AdamW's, so one learning rate serves both (arXiv 2502.16982).
        found.append(
            torch.optim.Muon(
                matrices, lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    if groups:
        found.append(torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return found


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
