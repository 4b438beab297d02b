"""Optimizers and learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..parallel.fsdp import Rows, rows_of_all
from ..parallel.group import Group, Message
from .recipe import Optimizer

if TYPE_CHECKING:
    from .weights import Weights

TABLES = (
    "embed_tokens", "shared", "lm_head", "mask_tokens", "scale_shift_table", "relative_attention_bias", "proj_out",
    "patch_embed", "conv_in", "conv_out",
)  # fmt: skip
"""Parts of names of what Muon leaves to AdamW though it has rows and columns: tables, and the ways in and out."""


class Stepper(Protocol):
    """What the trainer and checkpoints ask of an optimizer."""

    param_groups: list[dict[str, Any]]

    @property
    def state(self) -> Mapping[Tensor, dict[str, Any]]: ...

    def step(self) -> Any: ...


def optimizers(settings: Optimizer, weights: Weights, world: Group) -> list[Stepper]:
    """AdamW, and Muon before it where it is chosen and there are matrices for it.

    Vectors (biases, norms) and tables are never decayed.

    Raises:
        UserError: a torch without Muon.
    """
    matrices, plain, bare = dict[str, nn.Parameter](), [], []
    for name, parameter in weights.masters.items():
        shape = weights.shapes[name]
        table = any(part in name for part in TABLES)
        thin = len(shape) < 2 or min(shape[0], shape[1:].numel()) < 2
        if settings.name == "muon" and not table and not thin:
            matrices[name] = parameter
        elif not table and not thin:
            plain.append(parameter)
        else:
            bare.append(parameter)
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((plain, settings.weight_decay), (bare, 0.0))
        if parameters
    ]
    found: list[Stepper] = []
    if matrices:
        found.append(_muon(matrices, settings) if world.size == 1 else SpreadMuon(matrices, weights, settings, world))
    if groups:
        found.append(torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return found


def _muon(matrices: Mapping[str, nn.Parameter], settings: Optimizer) -> torch.optim.Optimizer:
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

    return Muon(matrices.values(), lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw")


class SpreadMuon:
    """Muon for matrices whose rows are spread over ranks. Each matrix has an owner, which has its momentum.

        gradient's rows -> owner: the whole gradient -> torch's Muon -> the whole step -> everyone's rows of it

    The owner's Muon moves a matrix that is zero before each step: what it is then is the step. Owners take turns from
    the largest matrix down, so that all have as much to do.
    """

    def __init__(
        self, matrices: Mapping[str, nn.Parameter], weights: Weights, settings: Optimizer, world: Group
    ) -> None:
        self._matrices, self._world, self._decay = matrices, world, settings.weight_decay
        self.rows: dict[str, Rows | None] = {name: weights.rows[name] for name in matrices}
        shapes = {name: weights.shapes[name] for name in matrices}
        # sorted() is stable: every rank finds the same order.
        largest = sorted(matrices, key=lambda name: -shapes[name].numel())
        self._owners = {name: number % world.size for number, name in enumerate(largest)}
        self.steps: dict[str, nn.Parameter] = {}
        for name, parameter in matrices.items():
            if self._owners[name] == world.rank:
                shape = (shapes[name][0], shapes[name][1:].numel())
                self.steps[name] = nn.Parameter(torch.zeros(shape, dtype=parameter.dtype, device=parameter.device))
        self._muon = _muon(self.steps, replace(settings, weight_decay=0.0)) if self.steps else None
        own = [] if self._muon is None else self._muon.param_groups
        self.param_groups: list[dict[str, Any]] = own or [{"params": [], "lr": settings.lr}]

    @property
    def state(self) -> Mapping[Tensor, dict[str, Any]]:
        return {} if self._muon is None else self._muon.state

    @torch.no_grad()
    def step(self) -> None:
        """One step of every matrix that has a gradient; it has one on all ranks or on none."""
        moved = [name for name, parameter in self._matrices.items() if parameter.grad is not None]
        for name, step in self.steps.items():
            step.grad = torch.empty_like(step) if name in moved else None
            step.zero_()
        self._trade(moved, {name: _flat(self._matrices[name].grad) for name in moved}, back=False)
        if self._muon is not None:
            self._muon.step()
        own = {name: torch.empty_like(_flat(self._matrices[name])) for name in moved}
        self._trade(moved, own, back=True)
        kept = 1 - self.param_groups[0]["lr"] * self._decay
        for name in moved:
            self._matrices[name].mul_(kept).add_(own[name].view_as(self._matrices[name]))

    def _trade(self, names: Sequence[str], own: Mapping[str, Tensor], *, back: bool) -> None:
        """Rows of gradients to the owners, or rows of steps back; ``own``: what is here of each."""
        here, there = list[Message](), list[Message]()
        for name in names:
            owner, rows = self._owners[name], self.rows[name]
            if owner != self._world.rank:
                if rows is not None or back:
                    here.append(Message(owner, own[name]))
                continue
            step = self.steps[name]
            whole = step if back else step.grad
            assert whole is not None
            for rank, part in enumerate(self._parts(name)):
                rank_rows = whole[part.start : part.stop]
                if rank == self._world.rank:
                    (own[name] if back else rank_rows).copy_(rank_rows if back else own[name])
                elif rows is not None or back:
                    there.append(Message(rank, rank_rows))
        self._world.exchange(*((there, here) if back else (here, there)))

    def _parts(self, name: str) -> list[Rows]:
        """What each rank has of a matrix."""
        rows = self.rows[name]
        if rows is not None:
            return rows_of_all(rows, self._world.size)
        total = len(self._matrices[name])
        return [Rows(0, total, total)] * self._world.size


def _flat(tensor: Tensor | None) -> Tensor:
    """As a matrix: a filter is a row."""
    assert tensor is not None
    return tensor.detach().reshape(len(tensor), -1) if len(tensor) else tensor.detach().flatten(1)


def names_in(optimizer: Stepper, names: Mapping[Tensor, str]) -> dict[Tensor, str]:
    """What an optimizer's own parameters are called, views of other parameters among them."""
    if isinstance(optimizer, SpreadMuon):
        return {step: name for name, step in optimizer.steps.items()}
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


def set_rates(found: Sequence[Stepper], value: float) -> None:
    for optimizer in found:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * value
