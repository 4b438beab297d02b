"""What blocks keep for backward, as a recipe says: everything, or their inputs (``recompute``), here or on the host.

Offload moves bytes and changes none, so a run may go on with another setting.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import nn

from .models import recompute
from .recipe import Recipe

if TYPE_CHECKING:
    from ..offload.arena import Arena

LEAST = 1 << 20
"""Bytes; smaller tensors stay where they are."""


class Keeping:
    """
    Args:
        stacks: blocks by name of the model, all of which its forward calls.
        sometimes: blocks that not every forward calls; what they keep is not offloaded.
    """

    def __init__(self, recipe: Recipe, *, sometimes: Sequence[nn.Module] = (), **stacks: Iterable[nn.Module]) -> None:
        self._offloads: dict[str, AbstractContextManager[Any]] = {}
        if recipe.recompute:
            recompute(sometimes)
        if recipe.offload.policy == "none":
            for blocks in stacks.values() if recipe.recompute else ():
                recompute(blocks)
            return
        from ..offload.activations import ActivationOffload
        from ..offload.transfer import make

        arena, transfers = _arena(recipe.offload.host_gib), make()
        for name, blocks in stacks.items():
            self._offloads[name] = ActivationOffload(
                blocks, policy=recipe.offload.policy, recompute=recipe.recompute, arena=arena, transfers=transfers,
                minimum=LEAST, others=sometimes,
            )  # fmt: skip

    def __call__(self, name: str) -> AbstractContextManager[Any]:
        """Around a forward that calls all of these blocks. Backward may come behind it."""
        return self._offloads[name] if self._offloads else nullcontext()


def _arena(gib: float) -> Arena:
    """By default the processes of a machine have half of its memory, in equal parts."""
    from ..offload.arena import Arena

    if gib > 0:
        return Arena(int(gib * 2**30))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Arena(memory // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
