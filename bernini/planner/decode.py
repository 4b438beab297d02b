"""Masked generation: the planner fills in the target's ViT embeddings, step by step (paper section 3.2).

Text and sources never see the target, so their keys and values are computed once per branch (:class:`Prefix`) and each
step runs the target's tokens only, all branches as one packed batch. A branch whose weight in the guidance is zero
is not run, and neither is a step that reveals nothing.

Shapes: N target tokens, V width of a ViT embedding (the hidden size), B branches, T packed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bernini.kernels import attention, interval_attention

from .model import Planner
from .prompt import Conversation
from .settings import PlanSettings

Progress = Callable[[int, int], None]


class Draws(Protocol):
    """Where the randomness of a plan comes from."""

    def order(self, tokens: int) -> Tensor:
        """int64 ``[N]``: the order in which tokens are revealed."""

    def noise(self, revealed: Tensor, width: int) -> Tensor:
        """float32 ``[n, V]`` for the decoder; called once per step that decodes."""


class Seeded:
    """Noise belongs to a token and not to the step that reveals it: more steps refine the same plan."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._noise: Tensor | None = None
        self._tokens = 0

    def order(self, tokens: int) -> Tensor:
        self._tokens = tokens
        return torch.from_numpy(np.random.default_rng(self._seed).permutation(tokens))

    def noise(self, revealed: Tensor, width: int) -> Tensor:
        if self._noise is None:
            generator = torch.Generator("cpu").manual_seed(self._seed)
            self._noise = torch.randn((self._tokens, width), generator=generator)
        return self._noise[revealed]


class ReleasedSeeded:
    """The released pipeline's use of its global generators for a request seed (facts, section E.8, and golden set
    ``planner_rng``): three message variants each shuffle a list of N numbers and draw noise for the packing of the
    target's latent patches; then the order is shuffled, and every decoding draws as many rows as it reveals."""

    def __init__(self, seed: int, latent_patches: int, patch_shape: Sequence[int] = (16, 1, 2, 2)) -> None:
        self._numpy = np.random.RandomState(seed)
        self._torch = torch.Generator("cpu").manual_seed(seed)
        self._packing = (latent_patches, *patch_shape)

    def order(self, tokens: int) -> Tensor:
        for _ in range(3):
            self._numpy.shuffle(list(range(tokens)))
            torch.randn(self._packing, generator=self._torch)
        order = np.arange(tokens)
        self._numpy.shuffle(order)
        return torch.from_numpy(order)

    def noise(self, revealed: Tensor, width: int) -> Tensor:
        return torch.randn((len(revealed), width), generator=self._torch)


def revealed_by_step(order: Tensor, steps: int, *, parity: bool = False) -> list[Tensor]:
    """Which tokens each step reveals, int64, ascending (the order in which they take their noise).

    After step k (from 0) ``floor(N * cos(pi / 2 * (k + 1) / K))`` tokens stay masked; the last step reveals what is
    left. ``parity`` keeps at least one masked and reveals at least one while it can, from the end of the order.
    """
    tokens = len(order)
    left, found = tokens, []
    order = order.flip(0) if not parity else order
    for step in range(steps):
        stay = math.floor(tokens * math.cos(math.pi / 2 * (step + 1) / steps))
        if parity:
            stay = max(1, min(left - 1, stay))
        stay = 0 if step == steps - 1 else min(stay, left)
        found.append(order[stay:left].sort().values)
        left = stay
    return found


class Prefix:
    """Keys and values of everything that is not target, for several branches at once.

    Args:
        conversations: one per branch, all with the same target.
        embeds: input embeddings ``[T, N]`` of each (what stands at the target's positions does not matter).
        active: how many of the branches take part in the steps; of the others only ``hidden`` is wanted.
        backend: of :func:`bernini.kernels.attention`, for the steps.

    ``hidden`` holds, per branch, the hidden states of the tokens that are not target, in order.
    """

    def __init__(
        self, planner: Planner, conversations: Sequence[Conversation], embeds: Sequence[Tensor], *, active: int,
        backend: str = "auto",
    ) -> None:  # fmt: skip
        self._planner, self._backend, self.active = planner, backend, active
        self._caches: dict[int, tuple[Tensor, Tensor]] = {}
        device = embeds[0].device
        rest = [
            torch.from_numpy(c.layout.indices(c.layout.numbers("text", "source"))).to(device) for c in conversations
        ]
        targets = [c.layout.on(device).target_index for c in conversations]
        self.tokens = len(targets[0])
        # Tokens behind the target (its closing mark) do not see it, and it does not see them.
        before = [int(target[0]) for target in targets[:active]]
        bounds = np.cumsum([0, *(count + self.tokens for count in before)])
        self._cu_k = tuple(bounds.tolist())
        self._slots = torch.cat([torch.arange(stop - self.tokens, stop) for stop in self._cu_k[1:]]).to(device)
        positions = [c.positions.to(device) for c in conversations]
        self._positions = torch.cat([p[:, t] for p, t in zip(positions, targets[:active], strict=False)], dim=1)

        lengths = [len(index) for index in rest]
        offsets = np.cumsum([0, *lengths[:-1]]).tolist()
        keep = [torch.arange(offset, offset + count) for offset, count in zip(offsets, before, strict=False)]
        stored = torch.cat(keep).to(device)
        places = torch.cat(
            [torch.arange(start, start + count) for start, count in zip(bounds, before, strict=False)]
        ).to(device)
        # Row t of a prefix sees its keys [0, t + 1).
        ends = torch.arange(1, max(lengths) + 1, dtype=torch.int32, device=device)
        starts = torch.zeros_like(ends)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            buffers = tuple(x.new_empty((self._cu_k[-1], *x.shape[1:])) for x in (k, v))
            for buffer, x in zip(buffers, (k, v), strict=True):
                buffer[places] = x[stored]
            self._caches[layer] = (buffers[0], buffers[1])
            # Branch by branch: where no kernel skips what is masked, a packed batch would pay for every pair of them.
            pieces = [
                interval_attention(q[a:b], k[a:b], v[a:b], starts[: b - a], ends[: b - a], scale=scale)
                for a, b in pairwise([*offsets, len(q)])
            ]
            return torch.cat(pieces)

        rows = torch.cat([x[index] for x, index in zip(embeds, rest, strict=True)])
        where = torch.cat([p[:, index] for p, index in zip(positions, rest, strict=True)], dim=1)
        self.hidden = planner.hidden(rows, where, attend).split(lengths)

    def step(self, targets_NV: Tensor, branches: int | None = None) -> Tensor:
        """Hidden states ``[B, N, V]`` of the target's tokens, given what stands there now.

        Args:
            branches: only the first so many; by default all active ones.
        """
        return self._states(targets_NV, self.active if branches is None else branches)

    def reveal(self, targets_NV: Tensor, at: Tensor) -> Tensor:
        """``step(targets_NV)[:, at]``, without what the other tokens' states alone would take."""
        return self._states(targets_NV, self.active, at)

    def _states(self, targets_NV: Tensor, count: int, at: Tensor | None = None) -> Tensor:
        rows, stop = count * self.tokens, self._cu_k[count]
        slots = self._slots[:rows]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            keys, values = self._caches[layer]
            keys.index_copy_(0, slots, k)
            values.index_copy_(0, slots, v)
            cu_q = [len(q) // count * number for number in range(count + 1)]
            return attention(
                q, keys[:stop], values[:stop], cu_seqlens_q=cu_q, cu_seqlens_k=self._cu_k[: count + 1], scale=scale,
                backend=self._backend,
            )  # fmt: skip

        if at is not None:
            at = (at + self.tokens * torch.arange(count, device=at.device)[:, None]).flatten()
        hidden = self._planner.hidden(targets_NV.repeat(count, 1), self._positions[:, :rows], attend, at)
        return hidden.unflatten(0, (count, -1))


class Whole:
    """The same as :class:`Prefix` without any cache: full forwards, one per branch and step. For comparisons."""

    def __init__(
        self, planner: Planner, conversations: Sequence[Conversation], embeds: Sequence[Tensor], *, active: int
    ) -> None:
        self._planner, self._conversations, self._embeds, self.active = planner, conversations, embeds, active
        self.tokens = len(conversations[0].layout.target_index)
        self.hidden = tuple(
            self._full(c, x)[torch.from_numpy(c.layout.indices(c.layout.numbers("text", "source")))]
            for c, x in zip(conversations, embeds, strict=True)
        )

    def _full(self, conversation: Conversation, embeds: Tensor) -> Tensor:
        return self._planner(embeds, conversation.positions.to(embeds.device), conversation.layout)

    def step(self, targets_NV: Tensor, branches: int | None = None) -> Tensor:
        """As :meth:`Prefix.step`."""
        found = []
        count = self.active if branches is None else branches
        for conversation, embeds in zip(self._conversations[:count], self._embeds, strict=False):
            index = conversation.layout.on(embeds.device).target_index
            found.append(self._full(conversation, embeds.index_copy(0, index, targets_NV))[index])
        return torch.stack(found)

    def reveal(self, targets_NV: Tensor, at: Tensor) -> Tensor:
        """As :meth:`Prefix.reveal`."""
        return self.step(targets_NV)[:, at]


@torch.no_grad()
def generate(
    planner: Planner,
    engine: Prefix | Whole,
    weights: Sequence[float],
    settings: PlanSettings,
    draws: Draws,
    *,
    progress: Progress | None = None,
    watch: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Target ViT embeddings ``[N, V]``, from all masked to all filled.

    Args:
        engine: of the branches; ``weights`` has one number for each of its active branches, in order.
        progress: called with (steps done, steps).
        watch: called after each step with (step, tokens revealed, embeddings ``[N, V]``).
    """
    report = progress or (lambda done, total: None)
    embeds = planner.mask_embedding.detach().expand(engine.tokens, -1).clone()
    order = draws.order(engine.tokens)
    for step, revealed in enumerate(revealed_by_step(order, settings.steps, parity=settings.parity)):
        report(step, settings.steps)
        if len(revealed) and not (settings.parity and int(revealed.sum()) == 0):
            at = revealed.to(embeds.device)
            found = planner.connector.for_vit(engine.reveal(embeds, at))
            conditions = list(zip(weights, found, strict=True))
            noise = draws.noise(revealed, embeds.shape[1]).to(embeds.device)
            embeds[at] = planner.vit_decoder.sample(
                noise, conditions, settings.decoder_steps, parity=settings.parity
            ).to(embeds.dtype)
        if watch is not None:
            watch(step, revealed, embeds)
    report(settings.steps, settings.steps)
    return embeds


@dataclass(frozen=True)
class Contexts:
    """The planner's states in the renderer's text width, before the text's own are put in front of them (facts, C.2).

    ``planned`` has every position of the conditional conversation, ``positive`` the same without the target, and
    ``negative`` those of the unconditional one without the target.
    """

    planned: Tensor
    positive: Tensor
    negative: Tensor


@torch.no_grad()
def contexts(
    planner: Planner, conversation: Conversation, conditional: Tensor, unconditional: Tensor, target_hidden: Tensor
) -> Contexts:
    """Projects hidden states: ``conditional`` and ``unconditional`` are those of the tokens that are not target."""
    layout = conversation.layout
    device = conditional.device
    whole = conditional.new_empty((layout.tokens, conditional.shape[1]))
    rest = torch.from_numpy(layout.indices(layout.numbers("text", "source"))).to(device)
    whole[rest], whole[layout.on(device).target_index] = conditional, target_hidden
    planned = planner.connector.for_gen(whole)
    return Contexts(planned, planned[rest], planner.connector.for_gen(unconditional))
