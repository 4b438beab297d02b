"""One training step of one rank, built and run without values: what it takes, part by part.

    recipe, ranks, settings -> models, FSDP, optimizer, as the trainer makes them, all fake
                            -> one sample of the wanted length
                            -> the trainer's own losses, backward, clip, step and average under torch's memory tracker

Collectives go to torch's fake process group, so one process stands for one rank of any number.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from bernini.kernels import SegmentLayout

from ..parallel.fsdp import Groups
from ..parallel.mesh import Mesh
from ..training.dimensions import Dimensions
from ..training.models import Models
from ..training.recipe import Offload, Recipe
from ..training.stage import Micro
from ..training.stages import assemble
from ..training.standins import BACKEND, empty_models
from ..training.trainer import Trainer
from .fakes import Device, Phantom, attention, faked, ranks
from .ledger import Ledger, Part
from .sample import Work, micro, shown
from .saved import Keeper, Policy
from .states import average_there, host, prepare

Fsdp = Literal["blocks", "keep", "whole", "none"]


@dataclass(frozen=True)
class Settings:
    """How a step is laid out over ranks and memories.

    Args:
        world: ranks; ``sequence`` of them share a packed sequence.
        fsdp: ``blocks``: a block's parameters are gathered where it is computed, as ``bernini train`` does; ``keep``:
            and stay until backward has been there; ``whole``: a model is gathered as one; ``none``: every rank has all.
        recompute: blocks are computed again in backward.
        offload: what of blocks goes to the host; see :mod:`bernini.estimate.saved`.
        average, optimizer: whether the running average and the optimizer's moments are on the device; otherwise they
            are on the host, and come for one parameter at a time.
        packer: whether a rank embeds its own rows only; otherwise all of them, of which it keeps its own.
    """

    world: int = 1
    sequence: int = 1
    fsdp: Fsdp = "blocks"
    recompute: bool = True
    offload: Policy = "none"
    average: bool = True
    optimizer: bool = True
    packer: bool = True


@dataclass(frozen=True)
class Need:
    """What a step takes.

    Args:
        parts: of the step, in order.
        tokens: of the packed sequences of renderer and planner.
        parameters: trained ones, of all ranks together.
    """

    parts: tuple[Part, ...]
    tokens: tuple[int, int]
    parameters: int

    @property
    def most(self) -> Part:
        """The part of the step that takes most."""
        return max(self.parts, key=lambda part: part.total)

    @property
    def host(self) -> int:
        """The most that is offloaded."""
        return max(part.host for part in self.parts)


def track(recipe: Recipe, sizes: Dimensions, settings: Settings, work: Work) -> Need:
    """Builds everything and runs the step.

    Raises:
        UserError: what the recipe asks for is not in the checkpoint.
    """
    recipe = replace(
        recipe, recompute=False, offload=Offload(), sequence=settings.sequence,
        batch=replace(recipe.batch, accumulate=1),
        dropout=replace(recipe.dropout, text=0.0, image=0.0, video=0.0, plan=0.0),
    )  # fmt: skip
    models = empty_models(recipe, sizes)
    keepers = {"renderer": Keeper(settings.offload, settings.recompute)}
    keepers["planner"] = Keeper(settings.offload, settings.recompute)
    attend = keepers["renderer"].attend
    with _quietly(), ranks(settings.world, settings.sequence) as mesh:
        if settings.fsdp == "none":  # a world of one has nothing to spread
            mesh = Mesh(Phantom(1), Phantom(1), mesh.sequence, mesh.device)
        with Device() as device, attention(BACKEND, attend):
            trainer = _trainer(recipe, models, settings, mesh, keepers)
            with unset_fake_temporarily():
                batch = micro(recipe, trainer.stage, models, sizes, work, device)
            if not settings.packer and models.renderer is not None:
                _concatenate(models.renderer.model, batch.layouts["renderer"])
            ledger = trainer.ledger
            _mark(ledger, models)
            with ledger:
                trainer.once(batch.micro)
    trained = sum(shape.numel() for shape in trainer.weights.shapes.values())
    tokens = tuple(batch.layouts[name].tokens if name in batch.layouts else 0 for name in ("renderer", "planner"))
    return Need(tuple(ledger.parts), cast("tuple[int, int]", tokens), trained)


class _Tracking(Trainer):
    """The trainer, whose values nobody reads."""

    ledger: Ledger
    idle: Tensor

    def _value(self, tensor: Tensor) -> float:
        return 0.0

    def once(self, found: Micro) -> None:
        self._update([found])


def _trainer(recipe: Recipe, models: Models, settings: Settings, mesh: Mesh, keepers: dict[str, Keeper]) -> _Tracking:
    idle = _without_idle(recipe, models, 1 if settings.fsdp == "none" else settings.world)
    for module in _modules(models):
        faked(module)
    stage = assemble(recipe, models, shown(models), mesh)
    for name, blocks in _stacks(models).items():
        keepers[name].treat(blocks)
    groups = stage.groups()
    if settings.fsdp == "whole":
        stage.groups = lambda: _frozen_only(groups)  # type: ignore[method-assign]
    trainer = _Tracking(recipe, stage, mesh=mesh)
    trainer.idle = torch.empty(idle // 4)
    root = trainer._compute if isinstance(trainer._compute, nn.Module) else None
    if root is not None and settings.fsdp == "keep":
        for module in root.modules():
            if hasattr(module, "set_reshard_after_forward"):
                cast(Any, module).set_reshard_after_forward(False, recurse=False)
    held = {p: None for module in _modules(models) for p in (*module.parameters(), *module.buffers())}
    masters = trainer.weights.masters.values()
    average = list(trainer.weights.ema.values())
    if average and not settings.average:
        trainer.weights.ema = {name: host(mean) for name, mean in trainer.weights.ema.items()}
        trainer.weights.average = partial(average_there, trainer)  # type: ignore[method-assign]
        average = list(trainer.weights.ema.values())
    ledger = trainer.ledger = Ledger(root, [*masters, *held, trainer.idle], average)
    for optimizer in trainer.optimizers:
        prepare(cast("Any", optimizer), ledger, settings.optimizer)
    return trainer


def _frozen_only(groups: Groups) -> Groups:
    kept = tuple(
        modules for modules in groups.groups if not any(p.requires_grad for m in modules for p in m.parameters())
    )
    return Groups(kept, (), (), groups.frozen)


def _without_idle(recipe: Recipe, models: Models, world: int) -> int:
    """Takes out blocks that change nothing but how much weights there are: those of the vision tower, whose features
    are stored, and of a text encoder that is not trained, all but the first three, as none keeps anything.

    Returns:
        bytes of a rank's rows of theirs, which count all the same.
    """
    gone: list[nn.Module] = []
    if models.planner is not None:
        tower = models.planner.model.visual
        gone += tower.blocks[1:]
        tower.blocks = tower.blocks[:1]
    if models.text is not None and not recipe.train_text_encoder:
        stack = models.text.encoder.model.encoder
        gone += stack.block[3:]
        stack.block = stack.block[:3]
    parameters = [parameter for module in gone for parameter in module.parameters()]
    return sum(-(-len(p) // world) * p[0].numel() * p.element_size() for p in parameters)


def _modules(models: Models) -> list[nn.Module]:
    opened: list[nn.Module] = [part.model for part in (models.renderer, models.planner) if part is not None]
    return opened if models.text is None else [*opened, models.text.encoder.model]


def _stacks(models: Models) -> dict[str, list[nn.Module]]:
    """The blocks whose saved tensors are treated, and at which the step is parted."""
    found: dict[str, list[nn.Module]] = {}
    if models.planner is not None:
        found["planner"] = list(models.planner.model.text.layers)
    if models.renderer is not None:
        found["renderer"] = list(models.renderer.model.blocks)
    return found


# --- the packer's peer ------------------------------------------------------------------------------------------------


def _concatenate(renderer: Any, layout: SegmentLayout) -> None:
    """Every rank embeds all segments, concatenates them and keeps its rows."""
    embed = renderer._embed_patches

    def whole(tokens_TP: Tensor) -> Tensor:
        pieces = [
            embed(torch.empty((segment.tokens, tokens_TP.shape[1]), dtype=tokens_TP.dtype))
            for segment in layout.segments
        ]
        return torch.cat(pieces)[: len(tokens_TP)].clone()

    renderer._embed_patches = whole


# --- parts of the step ------------------------------------------------------------------------------------------------


def _mark(ledger: Ledger, models: Models) -> None:
    """The step is parted where a block begins, forward and backward, and where the renderer embeds its patches."""
    stacks = _stacks(models)
    if models.renderer is not None:
        models.renderer.model.register_forward_pre_hook(lambda module, args: ledger.mark("renderer", "embedding"))
    for stack, blocks in stacks.items():
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(_begin(ledger, stack, number))
            block.register_forward_hook(_end(ledger, stack, number, len(blocks)))


def _begin(ledger: Ledger, stack: str, number: int) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        ledger.mark(stack, number, "forward")

    return hook


def _end(ledger: Ledger, stack: str, number: int, count: int) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, out: Any) -> None:
        if number == count - 1:
            ledger.mark(stack, "after")
        parts = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor) and x.requires_grad]
        if parts:
            torch.autograd.graph.register_multi_grad_hook(
                parts, lambda grad: ledger.mark(stack, number, "backward"), mode="any"
            )

    return hook


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what FSDP and torch's tracker say about views and modules that are called twice."""
    tracker = logging.getLogger("torch.distributed._tools.mod_tracker")
    level = tracker.level
    tracker.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        tracker.setLevel(level)


def layers(sizes: Dimensions) -> dict[str, int]:
    """How many blocks the stacks have."""
    found = {"renderer": next(iter(sizes.experts.values())).num_layers}
    if sizes.planner is not None:
        found["planner"] = int(_text(sizes.planner.mllm)["num_hidden_layers"])
    return found


def shallow(sizes: Dimensions, depths: dict[str, int]) -> Dimensions:
    """The same models with as many blocks."""
    experts = {name: replace(config, num_layers=depths["renderer"]) for name, config in sizes.experts.items()}
    planner = sizes.planner
    if planner is not None and "planner" in depths:
        mllm = {**planner.mllm}
        nested = isinstance(mllm.get("text_config"), dict)
        text = {**_text(mllm), "num_hidden_layers": depths["planner"]}
        text.pop("layer_types", None)
        text.pop("max_window_layers", None)
        planner = replace(planner, mllm={**mllm, "text_config": text} if nested else text)
    return replace(sizes, experts=experts, planner=planner)


def _text(mllm: Any) -> Any:
    return mllm["text_config"] if isinstance(mllm.get("text_config"), dict) else mllm
