"""The blocks that an offload is told about: it sees them being called, and whether they are all there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Cover:
    """Puts itself around the forward of blocks for as long as a context lasts.

    It goes inside of FSDP's hooks, which gather the weights first, and around a checkpoint that is the block's own. A
    compiled block is entered from outside; inside of a larger compiled region nothing is seen and nothing is changed.

    Args:
        call: is called instead of a block, with what computes it, its arguments and its keyword arguments.
        others: modules that may look like blocks and are none.

    Raises:
        ValueError: no blocks, or one of them twice.
    """

    def __init__(self, blocks: Sequence[nn.Module], call: Call, others: Sequence[nn.Module] = ()) -> None:
        self.blocks, self._call, self._others = list(blocks), call, list(others)
        if not self.blocks:
            raise ValueError("ActivationOffload: no blocks; give it the list of the model's repeated modules")
        if len({id(block) for block in self.blocks}) < len(self.blocks):
            raise ValueError(f"ActivationOffload: one of the {len(self.blocks)} blocks is in the list twice")
        self._installed = False
        self._called: set[int] = set()
        self._stack: list[nn.Module] = []
        self._strays: set[nn.Module] = set()
        self._checked = False
        self._watch: Any = None
        self._before: list[tuple[nn.Module, str, Any]] = []

    @property
    def inside(self) -> bool:
        """Whether a block is being computed."""
        return bool(self._stack)

    def install(self, check: bool) -> None:
        """Args:
        check: the first time, whether modules like the blocks run beside them.
        """
        if self._installed:
            raise ValueError("ActivationOffload: it is entered already; leave it first, or make another one")
        self._installed = True
        self._called.clear()
        self._strays.clear()
        self._stack.clear()
        compiled = False
        for number, block in enumerate(self.blocks):
            name = "forward" if getattr(block, "_compiled_call_impl", None) is None else "_compiled_call_impl"
            # not isinstance: that would import the compiler, which takes seconds and a hundred megabytes
            compiled |= name != "forward" or type(block).__name__ == "OptimizedModule"
            self._before.append((block, name, block.__dict__.get(name)))
            object.__setattr__(block, name, partial(self._enter, number, getattr(block, name)))
        if check and not self._checked and not compiled:
            self._watch = nn.modules.module.register_module_forward_pre_hook(self._see)

    def remove(self) -> str:
        """Puts everything back. Says what is wrong with the list of blocks, or nothing."""
        for block, name, before in self._before:
            if before is None:
                block.__dict__.pop(name, None)
            else:
                object.__setattr__(block, name, before)
        self._before.clear()
        self._installed = False
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        total = len(self.blocks)
        missing = [number for number in range(total) if number not in self._called]
        if missing:
            return (
                f"the list of blocks does not fit the model: {len(missing)} of {total} were not called in the context, "
                f"the first of them number {missing[0]}; give the blocks of the model that runs, and enter around its "
                "forward"
            )
        self._checked = True
        if self._strays:
            name = type(next(iter(self._strays))).__name__
            return (
                f"the list of blocks does not cover the model: beside its {total}, {len(self._strays)} more modules of "
                f"class {name} were called; give all of them"
            )
        return ""

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor shares the storage of a weight or buffer of the block that is being computed."""
        if not self._stack:
            return False
        storage, block = tensor.untyped_storage()._cdata, self._stack[-1]
        return any(
            type(own) in (Tensor, nn.Parameter) and own.untyped_storage()._cdata == storage
            for own in (*block.parameters(), *block.buffers())
        )

    def _enter(self, number: int, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return call(*args, **kwargs)  # traced by an outer region; or computed again, in a backward
        self._called.add(number)
        self._stack.append(self.blocks[number])
        try:
            return self._call(call, args, kwargs)
        finally:
            self._stack.pop()

    def _see(self, module: nn.Module, args: Any) -> None:
        if self._stack or type(module).__module__.startswith("torch.") or torch._C._current_graph_task_id() != -1:
            return
        if any(module is known for known in (*self.blocks, *self._others)):
            return
        if any(type(module) is type(block) for block in self.blocks):
            self._strays.add(module)
