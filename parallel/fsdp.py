"""A stage's weights, spread over all ranks with torch's FSDP2: a block is whole only where and while it is computed.

    every parameter      rows of it on each rank, and with them its gradient, moments and average
    a group's forward    gathers the group's parameters, computes, lets go of them again
    its backward         gathers them again, and sums the gradients of all ranks to the rows of each

Gradients are *summed*: losses are divided by counts of the whole step. What belongs to no group is gathered once, for
all of forward and backward (the root). What is not trained is never gathered with what is. A few small parameters,
those that are read outside of a group's forward or stay wide, are whole on every rank, and their gradients summed in
the order of the ranks.

With one process nothing is wrapped.

Source: facts on systems, section 6 (FSDP2 practice).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from .group import Group, Message
from .mesh import Mesh

T = TypeVar("T")
Compute = Callable[[Callable[[], Any]], Any]
"""Calls what computes with the weights, when those that belong to no group are there."""


@dataclass(frozen=True)
class Groups:
    """What of the models is gathered together.

    Args:
        groups: modules whose parameters, but for those of groups before them, are gathered for their forward; inner
            ones first. They are entered by being called, and their parameters read nowhere else.
        chains: groups that are computed one after the other: each is gathered while the one before it computes.
        whole: parameters that stay whole on every rank: small ones that are read outside of a group's forward.
        frozen: modules that compute and are no part of what is trained.
    """

    groups: tuple[tuple[nn.Module, ...], ...] = ()
    chains: tuple[tuple[nn.Module, ...], ...] = ()
    whole: tuple[nn.Parameter, ...] = ()
    frozen: tuple[nn.Module, ...] = ()

    def __add__(self, other: Groups) -> Groups:
        return Groups(
            self.groups + other.groups, self.chains + other.chains, self.whole + other.whole, self.frozen + other.frozen
        )


class Rows(NamedTuple):
    """Which rows of a parameter a rank has, and how many there are."""

    start: int
    stop: int
    total: int


class _Root(nn.Module):
    """All parts as one module, so that FSDP sees the beginning and the end of what is computed with them."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, compute: Callable[[], T]) -> T:
        return compute()


def shard(
    mesh: Mesh,
    parts: Mapping[str, nn.Module],
    groups: Groups,
    *,
    compute: torch.dtype,
    wide: torch.dtype,
    keep_wide: Callable[[str], bool],
) -> Compute:
    """Spreads the parts over the ranks of a mesh, in place.

    Args:
        compute: dtype that is gathered and computed with, of what is trained.
        wide: dtype of the rows, and in which gradients are summed.
        keep_wide: whether a part's parameter of that name is computed with in ``wide``.
    """
    if mesh.alone:
        return lambda call: call()
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    devices = init_device_mesh(mesh.device.type, (mesh.world.size,), mesh_dim_names=("world",))
    trained = {p for module in parts.values() for p in module.parameters() if p.requires_grad}
    for parameter in trained:
        parameter.data = parameter.data.to(wide)
    whole, alone = set(groups.whole), list[nn.Module]()
    if compute != wide:
        whole |= _stay_wide(parts, keep_wide, alone)
    root = _Root((*parts.values(), *groups.frozen))
    kept = {chain[-1] for chain in groups.chains}
    grouped = [*((module,) for module in alone), *groups.groups]
    inside = {p for modules in grouped for module in modules for p in module.parameters()}
    whole |= {p for p in root.parameters() if p not in inside and not p.requires_grad}
    for parameter in whole:
        parameter.data = parameter.data.to(mesh.device)

    def spread(modules: Sequence[nn.Module], dtype: torch.dtype | None, again: bool) -> None:
        narrow = None if dtype in (None, wide) else dtype
        policy = MixedPrecisionPolicy(narrow, None if narrow is None else wide, cast_forward_inputs=False)
        fully_shard(
            list(modules) if len(modules) > 1 else modules[0],
            mesh=devices, mp_policy=policy, reshard_after_forward=again, ignored_params=whole,
        )  # fmt: skip

    for modules in grouped:
        learns = any(p in trained for module in modules for p in module.parameters())
        dtype = None if not learns or modules[0] in alone else compute
        # The last block of a chain is the first that backward wants.
        spread(modules, dtype, again=modules[0] not in kept)
    spread([root], compute, again=False)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # no other sum is there on every backend
    for chain in cast("Iterable[tuple[FSDPModule, ...]]", groups.chains):
        for one, other in pairwise(chain):
            one.set_modules_to_forward_prefetch([other])
            other.set_modules_to_backward_prefetch([one])
    return root


def _stay_wide(
    parts: Mapping[str, nn.Module], keep_wide: Callable[[str], bool], alone: list[nn.Module]
) -> set[nn.Parameter]:
    """Parameters to keep whole; layers that can be gathered by themselves are added to ``alone`` instead."""
    found: set[nn.Parameter] = set()
    for part in parts.values():
        for name, module in part.named_modules():
            own = {f"{name}.{n}".lstrip("."): p for n, p in module.named_parameters(recurse=False) if p.requires_grad}
            kept = [parameter for n, parameter in own.items() if keep_wide(n)]
            if kept and len(kept) == len(own) and isinstance(module, nn.Linear):
                alone.append(module)
            else:
                found |= set(kept)
    return found


# --- the rows of a rank -----------------------------------------------------------------------------------------------


def rows_of(parameter: Tensor) -> Rows | None:
    """The rows that this rank has of a parameter; ``None`` where it is whole."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return None
    size, rank, total = parameter.device_mesh.size(), parameter.device_mesh.get_local_rank(), parameter.shape[0]
    each = -(-total // size)
    start = min(rank * each, total)
    return Rows(start, min(start + each, total), total)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, in the same memory; the tensor itself where it is whole."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of_all(rows: Rows, size: int) -> list[Rows]:
    """What each of ``size`` ranks has, if it is spread as FSDP spreads."""
    each = -(-rows.total // size)
    return [Rows(min(r * each, rows.total), min((r + 1) * each, rows.total), rows.total) for r in range(size)]


def whole(own: Tensor, rows: Rows | None, world: Group) -> Tensor | None:
    """The whole of a tensor on rank 0; ``None`` on the others, which have no more than their rows at any time."""
    if rows is None:
        return own if world.rank == 0 else None
    if world.rank:
        world.exchange([Message(0, own.contiguous())], [])
        return None
    full = own.new_empty((rows.total, *own.shape[1:]))
    pieces = rows_of_all(rows, world.size)
    full[pieces[0].start : pieces[0].stop] = own
    world.exchange([], [Message(r, full[piece.start : piece.stop]) for r, piece in enumerate(pieces) if r])
    return full


# --- over all ranks, in their order -----------------------------------------------------------------------------------


def sums(values: Sequence[float], mesh: Mesh) -> list[float]:
    """Of each value, over all ranks."""
    own = torch.tensor([values], dtype=torch.float64, device=mesh.device)
    table = mesh.world.gather(own, [1] * mesh.world.size)
    found = table[0]
    for row in table[1:]:
        found = found + row
    return cast("list[float]", found.tolist())


def sum_gradients(parameters: Iterable[nn.Parameter], world: Group) -> None:
    """Of parameters that are whole on every rank; those without a gradient have none on any rank."""
    if world.size == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        table = world.gather(flat[None], [1] * world.size)
        total = table[0]
        for row in table[1:]:
            total = total + row
        for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def clip(
    parameters: Mapping[str, nn.Parameter], rows: Mapping[str, Rows | None], largest: float, world: Group
) -> Tensor:
    """Scales all gradients so that their norm together is at most ``largest``; returns the norm that it was."""
    own = [
        p.grad for name, p in parameters.items() if p.grad is not None and (rows[name] is not None or world.rank == 0)
    ]
    norm = torch.nn.utils.get_total_norm(own)
    if world.size > 1:
        device = next(iter(parameters.values())).device
        norm = torch.linalg.vector_norm(world.gather(norm.to(device)[None], [1] * world.size))
    torch.nn.utils.clip_grads_with_norm_(parameters.values(), largest, norm)
    return norm
