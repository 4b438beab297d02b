"""Who holds how many bytes, and when: torch's memory trackers with a peak for every part of the step.

    weights      float32 rows of parameters, and parameters that are not spread
    gathered     parameters that are whole for a while, and what they are gathered in
    gradients    of rows, and on their way there
    optimizer    moments, and what a step of the optimizer takes beside them
    average      the running average of the weights
    activations  what forward makes: kept for backward, or on its way
    working      what backward makes: blocks that are computed again, gradients of activations
    host         what is offloaded

Source: ``torch.distributed._tools`` (FSDPMemTracker); facts on practice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.distributed._tools.mem_tracker import _RefType

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

HOST, DEVICE = torch.device("meta"), torch.device("cpu")
CATEGORIES = ("weights", "gathered", "gradients", "optimizer", "average", "activations", "working")


class Own(_RefType):
    """What torch's tracker has no kind for."""

    AVERAGE = "Average"


_KINDS: Mapping[Enum, str] = {
    _FSDPRefType.SHARDED_PARAM: "weights", _FSDPRefType.BUFFER: "weights",
    _FSDPRefType.UNSHARDED_PARAM: "gathered", _FSDPRefType.ALL_GATHER: "gathered",
    _FSDPRefType.SHARDED_GRAD: "gradients", _FSDPRefType.UNSHARDED_GRAD: "gradients",
    _FSDPRefType.REDUCE_SCATTER: "gradients", _FSDPRefType.OPT: "optimizer", Own.AVERAGE: "average",
    _FSDPRefType.ACT: "activations", _FSDPRefType.INP: "activations", _FSDPRefType.TEMP: "working",
}  # fmt: skip

Bytes = Mapping[str, int]
"""By category; all of :data:`CATEGORIES`."""


@dataclass
class Part:
    """A part of the step.

    Args:
        name: what it is; see :meth:`Ledger.mark`.
        bytes: by category, when they were most.
        host: the most that was offloaded.
    """

    name: tuple[str | int, ...]
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0))
    host: int = 0

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


class _Modules:
    """In place of torch's ``ModTracker``, of which only this much is needed. Its own hooks collect the gradients of a
    module's inputs until all are there; with recomputed blocks some never come, so it would keep the others alive to
    the end, a few gradients as long as the sequence for every block, and they would be counted.
    """

    parents: frozenset[str] = frozenset()

    @property
    def is_bw(self) -> bool:
        return bool(torch._C._current_graph_task_id() != -1)

    def get_known_fqn(self, module: nn.Module) -> str:
        return type(module).__name__

    def __enter__(self) -> None: ...

    def __exit__(self, *args: object) -> None: ...


class Ledger(FSDPMemTracker):
    """torch's tracker, which knows what FSDP gathers, sums and keeps; of models that are not spread as well.

    Args:
        root: what FSDP wraps; without any wrapping, all modules.
    """

    def __init__(self, root: nn.Module | None, weights: Iterable[Tensor], average: Iterable[Tensor]) -> None:
        if root is None:
            super(FSDPMemTracker, self).__init__()
            self._alone = True
        else:
            super().__init__(root)
            self._alone = False
        self._ref_class = [*_FSDPRefType, *Own]  # type: ignore[assignment]
        self._mod_tracker = _Modules()  # type: ignore[assignment]
        self.parts = [Part(("before",))]
        self.note(weights, _FSDPRefType.SHARDED_PARAM)
        self.note(average, Own.AVERAGE)

    def note(self, tensors: Iterable[Tensor], kind: _RefType = _FSDPRefType.OPT) -> None:
        """Counts tensors that are there already."""
        for tensor in tensors:
            self._update_and_maybe_create_winfos(tensor, kind)

    def mark(self, *name: str | int) -> None:
        """A part of the step begins."""
        self.parts.append(Part(name))
        self._see()

    def optimizing(self, now: bool) -> None:
        """Whether what is made from here on is the optimizer's."""
        self._in_opt = now

    def _see(self) -> None:
        part = self.parts[-1]
        here = self._curr_mem_snap.get(DEVICE)
        if here is not None and here["Total"] > part.total:
            part.bytes = dict.fromkeys(CATEGORIES, 0)
            for kind, count in here.items():
                if isinstance(kind, Enum):
                    part.bytes[_KINDS[kind]] += count
        there = self._curr_mem_snap.get(HOST)
        if there is not None:
            part.host = max(part.host, there["Total"])

    # --- what torch's trackers do otherwise ---

    def _update_peak_stats(self, peak_state: Any) -> None:
        self._see()  # modules have no peaks of their own here: parts have

    def get_tracker_snapshot(self, type: str = "current") -> dict[torch.device, dict[str, int]]:
        return {device: {"Total": snap["Total"]} for device, snap in self._curr_mem_snap.items()}

    def _register_module_and_optimizer_hooks(self) -> None:
        if self._alone:
            self._ref_class = [*_FSDPRefType, *Own]  # type: ignore[assignment]
        else:
            super()._register_module_and_optimizer_hooks()

    def _deregister_module_and_optimizer_hooks(self) -> None:
        if not self._alone:
            super()._deregister_module_and_optimizer_hooks()

    def _fsdp_param_group_post_backward(self, fsdp_mod: Any, orig_fsdp_param_group_post_backward: Any) -> Any:
        """Groups that are never computed with (a vision tower whose features are stored) have nothing to look at."""
        followed = super()._fsdp_param_group_post_backward(fsdp_mod, orig_fsdp_param_group_post_backward)
        group: FSDPParamGroup = fsdp_mod._get_fsdp_state()._fsdp_param_group

        def inner(*args: Any, **kwargs: Any) -> None:
            used = all(hasattr(parameter, "_unsharded_param") for parameter in group.fsdp_params)
            (followed if used else orig_fsdp_param_group_post_backward)(*args, **kwargs)

        return inner
