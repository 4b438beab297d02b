"""Which processes work on what: data x sequence.

    rank = data rank * sequence size + sequence rank

The ranks of a *sequence* group have the same samples and share their tokens; *data* ranks have different samples. One
process is the trivial mesh of the same code: nothing above this file asks whether there are several.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from bernini.errors import UserError

from .group import Alone, Group, Processes

PATIENCE = timedelta(minutes=10)
"""How long a rank waits for another that is alive. Ranks that died or disagree are found out within seconds, see
:mod:`bernini.parallel.launch`; one that loads or writes what the others do not may take its time."""


@dataclass(frozen=True)
class Mesh:
    """
    Args:
        world, data, sequence: this process's groups.
        device: what it computes on.
        devices: torch's mesh of all processes, for FSDP; ``None`` for one process.
    """

    world: Group
    data: Group
    sequence: Group
    device: torch.device
    devices: Any = None

    @property
    def alone(self) -> bool:
        return self.world.size == 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks and writes."""
        return self.world.rank == 0


def alone(device: str | torch.device = "cpu") -> Mesh:
    """One process."""
    return Mesh(Alone(), Alone(), Alone(), torch.device(device))


def torchrun() -> bool:
    """Whether this process was started by torchrun."""
    return "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def start(
    device: str = "cpu",
    *,
    sequence: int = 1,
    store: Any = None,
    wrap: Callable[[str, Group, list[int]], Group] | None = None,
) -> Mesh:
    """The mesh of the processes that torchrun started, or of this one alone.

    NCCL between GPUs, gloo between CPUs; with GPUs each process takes the one of its local rank. Commands do not call
    this, but :func:`bernini.parallel.launch.running`.

    Args:
        device: ``cpu`` or ``cuda``.
        sequence: ranks that share a sequence.
        store: where the processes meet; by default where torchrun says.
        wrap: makes of each group, from its name and its ranks as numbered in the world, the one that is handed out.

    Raises:
        UserError: they cannot meet, or are no multiple of ``sequence``.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if torchrun() else 1
    if sequence < 1 or size % sequence:
        raise UserError(
            f"{size} process{'' if size == 1 else 'es'} cannot share sequences in groups of {sequence}; choose a "
            f"number that divides {size}"
        )
    if not torchrun():
        return alone(device)
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    own, rank = torch.device(device), int(os.environ["RANK"])
    if own.type == "cuda":
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(own)
    place = {} if store is None else {"store": store, "rank": rank, "world_size": size}
    try:
        dist.init_process_group("nccl" if own.type == "cuda" else "gloo", timeout=PATIENCE, **place)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"rank {rank} of {size} could not meet the others at {address()}: {error}") from None
    devices = init_device_mesh(own.type, (size // sequence, sequence), mesh_dim_names=("data", "sequence"))
    at, along = divmod(rank, sequence)
    groups: dict[str, tuple[Group, list[int]]] = {
        "world": (Processes(), list(range(size))),
        "data": (Processes(devices["data"].get_group()), list(range(along, size, sequence))),
        "sequence": (Processes(devices["sequence"].get_group()), list(range(at * sequence, (at + 1) * sequence))),
    }
    made = {name: group if wrap is None else wrap(name, group, ranks) for name, (group, ranks) in groups.items()}
    return Mesh(**made, device=own, devices=devices)


def address() -> str:
    """Where torchrun says that processes meet."""
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def stop() -> None:
    """Lets go of the others; nothing to do for one process."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
