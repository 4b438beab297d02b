"""Activations that the backward will want, kept in host memory meanwhile (facts, systems, section 2).

    offload = ActivationOffload(model.blocks, policy="hidden", recompute=True)
    for batch in data:
        with offload:
            loss = model(batch)
        loss.backward()                      # inside or outside, as one likes

Autograd hands over every tensor that it saves. What the policy names is copied out beside the compute and let go of
when it is out. The backward asks in the opposite order, so what was saved before the tensor that is asked for is
fetched ahead, into a bounded number of places, each as late as the step before allows. Gradients are those of the same
step without offload, bit for bit. ``store.py`` moves the bytes; this decides which.

Nothing lives in the context but the hooks: a graph keeps what it needs in the arena for as long as it exists.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .arena import Arena, ArenaFull
from .cover import Cover
from .pace import Budget
from .recompute import attention_kept
from .saved import Counts, Handle, Interval, Kept, interval, is_weight, plain, span
from .store import Store
from .transfer import Transfers, make

Policy = Literal["hidden", "hidden+attention", "all"]


class ActivationOffload:
    """Offloads what is saved for backward inside of ``with``. Enter it again for every step; it may be left and entered
    while graphs of earlier forwards are alive. A tensor that is changed in place after it was saved raises autograd's
    own error in the backward, as it does without.

    Left alone are parameters and their views, tensors below ``minimum``, those that are in the arena already or on no
    device of the backend, subclasses of Tensor, slices of much larger storages, and what a backward saves for a second
    one.

    Args:
        blocks: the model's repeated modules, all of them; each must be called in the context.
        gpu_budget: bytes of saved tensors that may stay on the device. None: all that the policy names leaves. Else the
            first step offloads all of it and is recorded, and from then on ``budget.py`` decides what must leave;
            nothing does if it fits.
        arena: where to. By default one of half of the machine's memory.
        policy: ``hidden``: inputs of the blocks. ``hidden+attention``: attention's outputs, too. ``all``: everything.
        transfers: backend; by default that of the machine.
        recompute: the blocks keep nothing but what the policy names and compute the rest again in backward (not with
            ``all``). False where the model has checkpoints of its own; for ``hidden+attention`` these need
            ``context_fn=offload.contexts``.
        minimum: bytes; smaller tensors stay.
        others: modules of the blocks' class that may be called beside them; what they keep stays, but with ``all``.
        in_flight: most bytes on their way out at once.
        landing: most tensors fetched ahead at once.
        full: what a full arena means: ``keep`` the tensor on the device and warn once, or ``raise``.

    Raises:
        ValueError: no blocks, one twice, a policy that does not exist, or sizes below 1. On leaving the context after a
            forward without an exception: the blocks were not all called, or are not all that the model has. What was
            computed is still there.
    """

    store_type = Store

    def __init__(
        self, blocks: Iterable[nn.Module], *, gpu_budget: int | None = None, arena: Arena | None = None,
        policy: Policy = "hidden", transfers: Transfers | None = None, recompute: bool = False,
        minimum: int = 1 << 20, in_flight: int = 1 << 30, landing: int = 4, full: Literal["keep", "raise"] = "keep",
        others: Iterable[nn.Module] = (),
    ) -> None:  # fmt: skip
        if policy not in get_args(Policy):
            raise ValueError(f"ActivationOffload: policy {policy!r}; there are {', '.join(get_args(Policy))}")
        if recompute and policy == "all":
            raise ValueError("ActivationOffload: policy 'all' keeps everything; there is nothing left to recompute")
        if min(minimum, in_flight, landing) < 1 or (gpu_budget is not None and gpu_budget < 0):
            raise ValueError(
                f"ActivationOffload: minimum={minimum}, in_flight={in_flight} and landing={landing} must be at least "
                f"1, and gpu_budget={gpu_budget} not negative"
            )
        self.policy, self.recompute, self.minimum, self.full = policy, recompute, minimum, full
        self.cover = Cover(list(blocks), self._call, list(others))
        self.arena = arena or Arena(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
        self.transfers = transfers or make()
        self.store = self.store_type(self.arena, self.transfers, in_flight, landing)
        self._budget: Budget | None = None
        if gpu_budget is not None:
            self._budget = Budget(gpu_budget, self.arena.limit, self.store.pace, self.transfers.rate)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._inputs: dict[int, StorageWeakRef] = {}  # of blocks called in this context, by storage
        self._warned = False

    @property
    def counts(self) -> Counts:
        return self.store.counts

    def __enter__(self) -> ActivationOffload:
        with self.store.lock:
            self.store.begin()
            if self._budget is not None:
                self._budget.begin()
        self.cover.install(check=self.policy != "all")
        self._hooks.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._hooks.__exit__(kind, *error)
        self._inputs.clear()
        wrong = self.cover.remove()
        if wrong and kind is None and self.policy != "all":
            raise ValueError(f"ActivationOffload: {wrong}")

    def contexts(self) -> Any:
        """For ``torch.utils.checkpoint.checkpoint(..., context_fn=offload.contexts)``: keeps attention's outputs."""
        return attention_kept(lambda tensor: self._pack(tensor, "attention"), self._unpack)

    def finish(self) -> None:
        """Waits for the copies under way. Graphs that are alive can still be run backward."""
        with self.store.lock:
            self.store.finish()

    @property
    def live(self) -> int:
        """Intervals of storages that some graph may still ask for."""
        with self.store.lock:
            self.store.collect()
            return self.store.live

    # --- the blocks -------------------------------------------------------------------------------------------------

    def _call(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A block is called: its inputs are the hidden states."""
        with self.store.lock:
            for gone in [storage for storage, weak in self._inputs.items() if weak.expired()]:
                del self._inputs[gone]
            self._see((args, kwargs))
        return self._recomputed(call, args, kwargs) if self.recompute else call(*args, **kwargs)

    def _see(self, args: Any) -> None:
        for leaf in torch.utils._pytree.tree_leaves(args):
            if not isinstance(leaf, Tensor) or not plain(leaf) or is_weight(leaf):
                continue
            storage = leaf.untyped_storage()
            self._inputs[storage._cdata] = StorageWeakRef(storage)  # a checkpoint may save it after the block has run
            for known in self.store.of_storage(storage._cdata):  # or before it
                if known.kind == "other":
                    known.kind = "hidden"
                    self._depart(known)

    def _recomputed(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A checkpoint that saves every tensor of the arguments, also those in tuples, and holds none itself."""
        from torch.utils._pytree import tree_flatten, tree_unflatten
        from torch.utils.checkpoint import checkpoint

        leaves, spec = tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[place] for place in places]
        for place in places:
            leaves[place] = None

        def run(*inputs: Tensor) -> Any:
            again = list(leaves)
            for place, tensor in zip(places, inputs, strict=True):
                again[place] = tensor
            args, kwargs = tree_unflatten(again, spec)
            return call(*args, **kwargs)

        if self.policy == "hidden":
            return checkpoint(run, *tensors, use_reentrant=False)
        return checkpoint(run, *tensors, use_reentrant=False, context_fn=self.contexts)

    # --- the hooks --------------------------------------------------------------------------------------------------

    def _pack(self, tensor: Tensor, kind: str = "") -> Handle | Kept:
        if torch._C._current_graph_task_id() != -1:  # a backward's own graph, or what a checkpoint computes again
            return Kept(tensor)
        if not plain(tensor) or is_weight(tensor) or not self.transfers.holds(tensor) or self.arena.holds(tensor):
            return Kept(tensor)
        start, stop = span(tensor)
        keep = interval(tensor) if stop - start >= self.minimum else None
        if keep is None or self.cover.is_weight(tensor):
            return Kept(tensor)
        with self.store.lock:
            self.store.collect()
            handle = self.store.save(tensor, keep, kind or self._kind(tensor))
            known = handle.interval
            if self.policy == "all" or known.kind in self.policy.split("+"):
                self._depart(known)
        return handle

    def _unpack(self, packed: Handle | Kept) -> Tensor:
        if isinstance(packed, Kept):
            return packed.give()
        with self.store.lock:
            self.store.collect()
            return self.store.give(packed)

    def _kind(self, tensor: Tensor) -> str:
        if tensor.untyped_storage()._cdata in self._inputs:
            return "hidden"
        return "attention" if self.cover.inside and _of_attention(tensor) else "other"

    def _depart(self, known: Interval) -> None:
        if known.copied is not None or known.stays:
            return
        if self._budget is not None and not self._budget.leaves(known.place, known.nbytes):
            known.stays = True
            return
        try:
            self.store.depart(known)
        except ArenaFull as error:
            known.stays = True
            self.counts.refused += 1
            if self.full == "raise":
                raise ValueError(f"ActivationOffload: {error}") from error
            if not self._warned:
                self._warned = True
                text = f"ActivationOffload: what does not fit into the arena stays on the device: {error}"
                warnings.warn(text, stacklevel=2)


def _of_attention(tensor: Tensor) -> bool:
    """Whether an attention made a tensor, or what it is a view of: by the name of its node."""
    for maker in (tensor.grad_fn, None if tensor._base is None else tensor._base.grad_fn):
        if maker is not None and ("attention" in (name := maker.name().lower()) or "flashattn" in name):
            return True
    return False
