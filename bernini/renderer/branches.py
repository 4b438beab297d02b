"""The branches of a plan as the model sees them, where each is computed, and what all of them say at a step.

Shapes: the target's latent and what a branch predicts for it are ``[target tokens, values of a patch]``; a branch's own
input has a row for each token that this rank has of its sources and target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from bernini.kernels import SegmentLayout, scatter_rows
from bernini.parallel.branches import MACHINES, Costs, Model, Placement, Work, owned, place, spread, together
from bernini.parallel.group import Alone, Group
from bernini.parallel.packer import Packer
from bernini.parallel.plan import Cut, LocalLayout, SPPlan
from bernini.parallel.share import Share
from bernini.parallel.ulysses import Ulysses

from .config import RendererConfig
from .guidance import Plan
from .model import Renderer, SelfAttend, TextContext, attend_here

HELD = 0.5
"""Of a GPU's free memory, what the tokens of a branch may take when it is placed."""


class _Distinct(NamedTuple):
    """A branch that differs from the others: its layout, the numbers of the segments it keeps, its text."""

    layout: SegmentLayout
    kept: tuple[int, ...]
    text: str


class _Input(NamedTuple):
    """One branch as the model sees it here: only the target's rows of ``tokens`` change from step to step.

    Where ranks share it, layout and tokens are this rank's, and ``here`` are its rows of the target.
    """

    number: int
    layout: SegmentLayout | LocalLayout
    tokens: Tensor
    text: str
    here: slice = slice(None)
    attend: SelfAttend = attend_here


class Branches:
    """The distinct branches of a plan. Two of them may be one: without images, "first video" and "all" see the same.

    Args:
        plan: what is evaluated.
        layout: one sample: source videos, source images, target.
        videos: how many sources are videos.
        source_tokens: clean patches ``[tokens, values]`` of each source, in layout order.
        latent: the target's, ``[target tokens, values]``.
        texts: text states ``[L, text_dim]`` by the plan's names.
        share: the ranks that make this together, with equal arguments.
    """

    placement: Placement
    """Which ranks compute which."""

    def __init__(
        self, plan: Plan, layout: SegmentLayout, videos: int, source_tokens: Sequence[Tensor], latent: Tensor,
        texts: Mapping[str, Tensor], share: Share, config: RendererConfig,
    ) -> None:  # fmt: skip
        every = [_Distinct(*branch.layout(layout, videos), branch.text) for branch in plan.branches]
        distinct = list(dict.fromkeys(every))
        self._number = [distinct.index(branch) for branch in every]
        self._texts, self._contexts = texts, dict[str, TextContext]()
        self._share, rank = share, share.group.rank
        self.placement = _placed(distinct, texts, latent, share, config)
        groups: dict[range, Group | None] = {range(share.group.size): share.group}
        if needed := self.placement.groups:
            groups |= zip(needed, share.group.parts(needed), strict=True)
        self._inputs: list[_Input] = []
        self._owned: list[Cut | None] = [None] * len(distinct)
        for number, ranks in self.placement.pieces:
            one, heads = distinct[number], config.num_attention_heads
            cut = len(ranks) > 1 and share.cuts(one.layout.tokens)
            sp = SPPlan.make(one.layout, heads, heads, len(ranks)) if cut else None
            if sp is not None or len(ranks) < share.group.size:
                targets = sp.targets if sp is not None else Cut((0, len(latent)))
                self._owned[number] = owned(ranks, targets, share.group.size)
            if rank in ranks:
                group = groups.get(ranks) or Alone()
                sources = [source_tokens[segment] for segment in one.kept[:-1]]
                self._inputs.append(_input(number, one, sources, latent, replace(share, group=group), sp))

    def forget(self) -> None:
        """Another model comes: what was computed from the texts is its predecessor's."""
        self._contexts.clear()

    def velocities(self, model: Renderer, timestep: float, latent: Tensor) -> list[Tensor]:
        """What each branch of the plan says of the target, ``[target tokens, values]``, on every rank.

        Args:
            model: the expert of this step.
            latent: the target's state, ``[target tokens, values]``.
        """
        time = torch.tensor([timestep], device=latent.device)
        parts: list[Tensor | None] = [None] * len(self._owned)
        for branch in self._inputs:
            if branch.text not in self._contexts:
                self._contexts[branch.text] = model.text_context(self._texts[branch.text])
            scatter_rows(branch.tokens, [latent[branch.here]], [branch.layout.on(latent.device).target_index])
            context = self._contexts[branch.text]
            parts[branch.number] = model(branch.tokens, branch.layout, time, context, attend=branch.attend)
        found = spread(self._share.group, self._owned, parts, latent.new_empty((0, latent.shape[1]), dtype=model.dtype))
        return [found[number] for number in self._number]


def _placed(
    distinct: Sequence[_Distinct], texts: Mapping[str, Tensor], latent: Tensor, share: Share, config: RendererConfig
) -> Placement:
    """Decided alike by all ranks, which first tell each other what they know."""
    group = share.group
    machine = MACHINES.get(latent.device.type)
    if group.size == 1 or not share.branches or len(distinct) < 2 or machine is None:
        return together(len(distinct), group.size)
    itemsize = next(iter(texts.values())).element_size()
    works = tuple(Work(one.layout.tokens, len(texts[one.text]), latent.numel() * itemsize) for one in distinct)
    told = group.tell((works, _most_tokens(latent.device, config, itemsize)))
    if any(theirs != works for theirs, _ in told):
        raise ValueError(f"branches: ranks have different ones: {[theirs for theirs, _ in told]}")
    model = Model(config.num_layers, config.width, config.ffn_dim, config.num_attention_heads, itemsize)
    return place(Costs(works, group.size, model, machine, share.least, min(cap for _, cap in told)))


def _most_tokens(device: torch.device, config: RendererConfig, itemsize: int) -> float:
    """Tokens of a branch for which a GPU has room: the residual stream in float32 twice, q, k, v, result, norm, and the
    feed-forward's hidden values twice. No limit on a CPU, which swaps before it fails.

    Room is what no tensor has now, whatever torch keeps for later: equal requests find the same.
    """
    if device.type != "cuda":
        return float("inf")
    each = config.width * (2 * 4 + 5 * itemsize) + 2 * config.ffn_dim * itemsize
    room = torch.cuda.mem_get_info(device)[1] - torch.cuda.memory_allocated(device)
    return HELD * room / each


def _input(
    number: int, one: _Distinct, sources: list[Tensor], latent: Tensor, share: Share, sp: SPPlan | None
) -> _Input:
    """``share`` is of the ranks that ``sp`` is made for."""
    rank = share.group.rank
    packer = Packer(one.layout, None if sp is None else sp.cut.part(rank))
    tokens = latent.new_zeros(packer.tokens, latent.shape[-1])
    packer.write(tokens, {"source": sources})
    if sp is None:
        return _Input(number, one.layout, tokens, one.text)
    here = slice(*packer.rows("target"))
    return _Input(number, sp.local(rank), tokens, one.text, here, Ulysses(share.group, sp, share.policy))
