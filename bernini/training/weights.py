"""The weights of a run: float32 masters, the copies that compute, and the running average.

In float32 a master *is* the module's parameter. In bfloat16 the modules hold rounded copies: gradients are added up in
float32 on the masters, and after a step the copies are rounded from them again. Where a parameter is spread over
processes its master is the rows that are here, and FSDP makes the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..parallel.checkpoints import Piece, Pieces
from ..parallel.fsdp import Rows, local, rows_of, sum_gradients
from ..parallel.group import Group

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def wide_dtype(precision: str) -> torch.dtype:
    """Of weights, gradients and averages."""
    return torch.float64 if precision == "fp64" else torch.float32


class Weights:
    """
    Args:
        parts: modules that are trained, by name; their parameters are called ``part/name``.
        precision: a key of :data:`DTYPES`.
        keep_wide: whether a parameter of that name stays in float32 when the others compute in bfloat16.
        ema: decay of the average; 0 for none.
    """

    def __init__(
        self, parts: Mapping[str, nn.Module], precision: str, *, ema: float, keep_wide: Callable[[str], bool]
    ) -> None:
        self._ema_decay = ema
        self.masters: dict[str, nn.Parameter] = {}
        self.rows: dict[str, Rows | None] = {}
        """What of each master is here; ``None``: all."""
        self.shapes: dict[str, torch.Size] = {}
        """Of the whole parameters."""
        self._copies: dict[str, nn.Parameter] = {}
        self._spread: dict[str, nn.Parameter] = {}
        dtype, wide = DTYPES[precision], wide_dtype(precision)
        for part, module in parts.items():
            for name, parameter in module.named_parameters():
                if not parameter.requires_grad:
                    continue
                full = f"{part}/{name}"
                self.rows[full], self.shapes[full] = rows_of(parameter), parameter.shape
                if self.rows[full] is not None:
                    self.masters[full], self._spread[full] = nn.Parameter(local(parameter.detach())), parameter
                    continue
                own = wide if keep_wide(name) else dtype
                master = parameter.detach().to(wide, copy=True)
                parameter.data = master if own == wide else master.to(own)
                self._copies[full] = parameter
                self.masters[full] = parameter if own == wide else nn.Parameter(master)
        if not self.masters:
            raise ValueError("nothing to train: no part has a parameter that wants a gradient")
        self.ema = {name: master.detach().clone() for name, master in self.masters.items()} if ema else {}

    @property
    def names(self) -> dict[Tensor, str]:
        """Names by master."""
        return {master: name for name, master in self.masters.items()}

    def collect(self) -> None:
        """Adds what backward left at the copies to the masters' gradients."""
        for name, copy in self._copies.items():
            master = self.masters[name]
            if master is not copy and copy.grad is not None:
                grad = copy.grad.to(master.dtype)
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                copy.grad = None
        for name, parameter in self._spread.items():  # FSDP has added up
            self.masters[name].grad = None if parameter.grad is None else local(parameter.grad)

    def sum(self, world: Group) -> None:
        """Sums the gradients of what is whole on every rank; those of rows are sums already."""
        sum_gradients((self.masters[name] for name, rows in self.rows.items() if rows is None), world)

    def forget(self) -> None:
        """Drops all gradients."""
        for parameter in (*self.masters.values(), *self._spread.values()):
            parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds the copies from the masters."""
        for name, copy in self._copies.items():
            if self.masters[name] is not copy:
                copy.copy_(self.masters[name])

    @torch.no_grad()
    def average(self, step: int) -> None:
        """Moves the average. Its decay begins at 0.1 and grows with the steps, so that the start is soon forgotten."""
        decay = min(self._ema_decay, (1 + step) / (10 + step))
        for name, mean in self.ema.items():
            mean.lerp_(self.masters[name].detach(), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Masters and modules hold the averaged weights for as long as this lasts (their own, if there are none)."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, mean in self.ema.items():
            own = self.masters[name].detach().clone()  # of one tensor at a time
            self.masters[name].copy_(mean)
            mean.copy_(own)
        self.publish()

    def state(self) -> dict[str, Piece]:
        """All that a checkpoint has to hold of them."""
        return {f"weights/{name}": Piece(master, self.rows[name]) for name, master in self.masters.items()} | {
            f"ema/{name}": Piece(mean, self.rows[name]) for name, mean in self.ema.items()
        }

    @torch.no_grad()
    def restore(self, pieces: Pieces) -> None:
        """The inverse of :meth:`state`."""
        for name, master in self.masters.items():
            master.copy_(pieces.read(f"weights/{name}", self.rows[name]))
        for name, mean in self.ema.items():
            mean.copy_(pieces.read(f"ema/{name}", self.rows[name]))
        self.publish()
