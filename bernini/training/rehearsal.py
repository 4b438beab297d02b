"""One step of a recipe at full size without its memory: what it will train, and what that takes.

    recipe -> models and weights on torch's meta device, which has shapes and no values
           -> a micro-batch as full as the budgets allow, of made-up features
           -> the stage's losses, backward, clip, optimizer and average, by the trainer's own code

A shape, dtype or device that does not fit is found here as it would be in the run, and so is a value that is read back
from the device in the middle of a step: there is none to read. Memory is counted as tensors come and go. Only the
conversations, masks and noise of the micro-batch are real, as they are made on the host.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import UserError
from .data import FEATURES
from .dimensions import dimensions
from .models import Models
from .recipe import Offload, Recipe
from .stage import Micro
from .stages import assemble
from .standins import empty_models, fused_attention, shown_examples
from .trainer import Trainer


@dataclass(frozen=True)
class Rehearsal:
    """What a step takes. Bytes, but for the numbers.

    Args:
        parameters: that are trained, by part.
        frozen: bytes of the parameters that are only used.
        tasks: examples of the micro-batch by task.
        tokens: of the micro-batch, of all models together.
        weights: float32 masters, and the copies that compute where they are others.
        gradients, optimizer, average: as they stay from step to step.
        working: the most that all other tensors hold at a time: activations, the batch, and gradients on their way.
        seconds: that the rehearsal took; the real step takes another time.
    """

    parameters: Mapping[str, int]
    tasks: Mapping[str, int]
    tokens: int
    frozen: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    working: int
    seconds: float

    @property
    def total(self) -> int:
        return self.frozen + self.weights + self.gradients + self.optimizer + self.average + self.working

    def describe(self) -> str:
        """A few lines for people."""
        trained = ", ".join(f"{part} {count / 1e9:.3f} B" for part, count in self.parameters.items())
        tasks = ", ".join(f"{count} {task}" for task, count in self.tasks.items())
        memory = ("frozen", "weights", "gradients", "optimizer", "average", "working", "total")
        lines = [f"trains      {trained} parameters", f"micro-batch {self.tokens:,} tokens: {tasks}"]
        lines += [f"{name:11} {getattr(self, name) / 2**30:8.1f} GiB" for name in memory]
        return "\n".join(lines)


def rehearse(recipe: Recipe) -> Rehearsal:
    """One step with one micro-batch, on one device, nothing sharded, nothing offloaded; conditions are never dropped.

    Host memory: the micro-batch; a masked token of a plan takes ``copies`` rows of float32 noise.

    Raises:
        UserError: a model whose sizes are not known, an expert that it has not, or a stage that reads pixels.
    """
    if not FEATURES[recipe.stage]:
        raise UserError(f"stage {recipe.stage!r} cannot be rehearsed: it reads pixels, and these are not made up here")
    started = time.perf_counter()
    recipe = replace(
        recipe,
        batch=replace(recipe.batch, accumulate=1, window=1, balance=False, split=1, fit=0),
        dropout=replace(recipe.dropout, text=0.0, image=0.0, video=0.0),
        offload=Offload(),
    )
    sizes = dimensions(recipe.model)
    models = empty_models(recipe, sizes)
    trainer = _Rehearsing(recipe, assemble(recipe, models, shown_examples(recipe, sizes, models)))  # type: ignore[arg-type]
    weights, parts = trainer.weights, trainer.stage.parts
    used = [p for module in _modules(models) for p in (*module.parameters(), *module.buffers())]
    ledger = _Ledger([*weights.masters.values(), *weights.ema.values(), *used])
    with fused_attention(), ledger:
        micro = trainer.once()
    gradients = [master.grad for master in weights.masters.values() if master.grad is not None]
    moments = [
        value for optimizer in trainer.optimizers for state in optimizer.state.values() for value in state.values()
        if isinstance(value, Tensor)
    ]  # fmt: skip
    trained = [p for module in parts.values() for p in module.parameters() if p.requires_grad]
    frozen = _bytes(used) - _bytes(trained)
    return Rehearsal(
        {part: sum(p.numel() for p in module.parameters() if p.requires_grad)
         for part, module in parts.items()},
        Counter(key.split("/")[0] for key in micro.keys),
        micro.tokens,
        frozen=frozen,
        weights=_bytes([*weights.masters.values(), *used]) - frozen,
        gradients=_bytes(gradients),
        optimizer=_bytes(moments),
        average=_bytes(weights.ema.values()),
        working=ledger.peak(without=[*gradients, *moments]),
        seconds=time.perf_counter() - started,
    )  # fmt: skip


class _Rehearsing(Trainer):
    def _value(self, tensor: Tensor) -> float:
        return 0.0  # there is nothing to read

    def once(self) -> Micro:
        (micro,) = batch = self._micros(self.step)
        self._update(batch)
        return micro


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each counted once."""
    return sum({s._cdata: s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


class _Ledger(TorchDispatchMode):
    """Bytes on the meta device, as storages come and go between operations."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        """``there``: older tensors, which do not count, though they are changed in place and seen through views."""
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata: 0 for tensor in there}
        self._events: list[tuple[int, int]] = []
        self._number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._enter(tensor.untyped_storage())
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place not in self._known:
            self._number += 1
            self._known[place] = self._number
            self._events.append((self._number, size))
            weakref.finalize(storage, self._leave, place, size)

    def _leave(self, place: int, size: int) -> None:
        self._events.append((self._known.pop(place), -size))

    def peak(self, *, without: Iterable[Tensor]) -> int:
        """The most bytes at a time of the storages that were made, but for those of ``without``."""
        left_out = {self._known.get(tensor.untyped_storage()._cdata) for tensor in without}
        held = most = 0
        for number, size in self._events:
            if number not in left_out:
                held += size
                most = max(most, held)
        return most


def _modules(models: Models) -> list[nn.Module]:
    opened: list[nn.Module] = [part.model for part in (models.renderer, models.planner) if part is not None]
    return opened if models.text is None else [*opened, models.text.encoder.model]
