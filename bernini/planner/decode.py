"""Masked generation: the planner fills in the target's ViT embeddings, step by step (paper section 3.2).

Text and sources never see the target, so their keys and values are computed once per branch (:class:`Prefix`) and each
step runs the target's tokens only, all branches as one packed batch. A branch whose weight in the guidance is zero
is not run, and neither is a step that reveals nothing.

Shapes: N target tokens, V width of a ViT embedding (the hidden size), B branches, T packed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bernini.kernels import attention, interval_attention
from bernini.parallel.plan import Range, clipped
from bernini.parallel.share import ALONE, Share

from .model import Planner
from .prompt import Conversation
from .settings import PlanSettings

Progress = Callable[[int, int], None]

Cached = Callable[[int, Tensor, Tensor, Tensor, Range, float], Tensor]
"""``(layer, q_THD, k_SGD, v_SGD, rows, scale) -> out_THD``: those rows' queries, with the keys of all that is run."""


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
        share: ranks that do this together, with equal arguments: where they cut it, each has its heads' part of the
            keys and values, and its part of the rows; what comes back is whole on all of them.

    ``hidden`` holds, per branch, the hidden states of the tokens that are not target, in order.
    """

    def __init__(
        self, planner: Planner, conversations: Sequence[Conversation], embeds: Sequence[Tensor], *, active: int,
        backend: str = "auto", share: Share = ALONE,
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

        def run(layer: int, q: Tensor, k: Tensor, v: Tensor, here: Range, scale: float) -> Tensor:
            buffers = tuple(x.new_empty((self._cu_k[-1], *x.shape[1:])) for x in (k, v))
            for buffer, x in zip(buffers, (k, v), strict=True):
                buffer[places] = x[stored]
            self._caches[layer] = (buffers[0], buffers[1])
            # Branch by branch: where no kernel skips what is masked, a packed batch would pay for every pair of them.
            pieces, first = [], here[0]
            for a, b in pairwise([*offsets, sum(lengths)]):
                c, d = max(a, first), min(b, here[1])  # those of the branch's rows that have queries here
                if c < d:
                    see = starts[c - a : d - a], ends[c - a : d - a]
                    pieces.append(interval_attention(q[c - first : d - first], k[a:b], v[a:b], *see, scale=scale))
            return torch.cat(pieces) if pieces else q.new_empty((0, q.shape[1], v.shape[2]))

        rows = torch.cat([x[index] for x, index in zip(embeds, rest, strict=True)])
        where = torch.cat([p[:, index] for p, index in zip(positions, rest, strict=True)], dim=1)
        # Once for all: the steps find the keys as the prefix left them.
        self._share = share if share.cuts(len(rows) + active * self.tokens) else ALONE
        self.hidden = self._run(rows, where, run).split(lengths)

    def _run(self, rows: Tensor, positions: Tensor, run: Cached, at: Tensor | None = None) -> Tensor:
        """Through the language model, shared by the ranks; the hidden states of all rows, or of those ``at`` (on the
        host, ascending)."""
        share, total = replace(self._share, least=0), len(rows)
        start, stop = share.rows(total)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            def band(q: Tensor, k: Tensor, v: Tensor, here: Range) -> Tensor:
                return run(layer, q, k, v, here, scale)

            if share.group.size == 1:
                return band(q, k, v, (0, len(q)))
            return share.attend(q, k, v, band, total, at if layer == self._last else None)

        own = None if at is None else share.own(at, total).to(rows.device)
        hidden = self._planner.hidden(rows[start:stop], positions[:, start:stop], attend, own)
        return share.gathered(hidden, total, at)

    @property
    def _last(self) -> int:
        """The layer behind which the hidden states are taken; of some rows only, if only some are wanted."""
        return self._planner.text_config.num_hidden_layers - 2

    def step(self, targets_NV: Tensor, branches: int | None = None) -> Tensor:
        """Hidden states ``[B, N, V]`` of the target's tokens, given what stands there now.

        Args:
            branches: only the first so many; by default all active ones.
        """
        return self._states(targets_NV, self.active if branches is None else branches)

    def reveal(self, targets_NV: Tensor, at: Tensor) -> Tensor:
        """``step(targets_NV)[:, at]``, without what the other tokens' states alone would take.

        Args:
            at: int64 on the host, ascending.
        """
        return self._states(targets_NV, self.active, at)

    def _states(self, targets_NV: Tensor, count: int, at: Tensor | None = None) -> Tensor:
        rows, stop = count * self.tokens, self._cu_k[count]
        slots = self._slots[:rows]

        def run(layer: int, q: Tensor, k: Tensor, v: Tensor, here: Range, scale: float) -> Tensor:
            keys, values = self._caches[layer]
            keys.index_copy_(0, slots, k)
            values.index_copy_(0, slots, v)
            each = self.tokens if at is None or layer != self._last else len(at)
            borders = clipped(range(0, count * each + 1, each), here)
            return attention(
                q, keys[:stop], values[:stop], cu_seqlens_q=borders, cu_seqlens_k=self._cu_k[: count + 1], scale=scale,
                backend=self._backend,
            )  # fmt: skip

        chosen = None if at is None else (at + self.tokens * torch.arange(count)[:, None]).flatten()
        hidden = self._run(targets_NV.repeat(count, 1), self._positions[:, :rows], run, chosen)
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
        return self.step(targets_NV)[:, at.to(targets_NV.device)]


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
            found = planner.connector.for_vit(engine.reveal(embeds, revealed))
            conditions = list(zip(weights, found, strict=True))
            noise = draws.noise(revealed, embeds.shape[1]).to(embeds.device)
            embeds[revealed.to(embeds.device)] = planner.vit_decoder.sample(
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
