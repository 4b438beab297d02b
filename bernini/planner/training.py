"""The planner's forward in training: one packed batch -> what the three losses read (paper sections 2.1.1 and 4.1).

    masked targets -> language model -+-> text           -> next-token logits
                                      +-> masked targets -> conditions of the ViT decoder, with noisy embeddings
                                      +-> all the rest   -> the renderer's contexts

A random part of each target's embeddings is replaced by the mask token. The states at those places are what the decoder
learns from; the renderer gets the states of text, sources and the targets that were left in sight, so what it reads was
not masked. :func:`draw` takes all that is random, :func:`forward` is a function of its arguments alone.

Sources: paper table 3; facts of the released model, section E.7. Shapes: T packed tokens, B samples, S source tokens, N
target tokens, M masked ones of them, K noisy copies of each, P predicted text tokens, L tokens of a context, V width of
a ViT embedding, C text width of the renderer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from bernini.kernels import SegmentLayout
from bernini.parallel.share import ALONE, Share

from .heads import decoder_levels
from .model import Planner
from .prompt import Conversation

MASK_RATIOS: Mapping[str, tuple[float, float]] = {
    "t2i": (5.0, 1.1),
    "t2v": (8.0, 1.05),
    "i2i": (8.0, 1.05),
    "r2v": (10.0, 1.0),
    "v2v": (12.0, 0.9),
    "rv2v": (12.0, 0.9),
}
"""(alpha, beta) of the mask ratio's Beta distribution: paper table 3, whose I2V is r2v here and IV2V rv2v."""

COPIES, LEVELS = 16, 1000
"""Noisy copies of a masked token (``diffusion_batch_mul``), and noise levels to choose from, each as likely."""


@dataclass(frozen=True)
class Sample:
    """One conversation to learn from.

    Args:
        conversation: of one sample.
        learned: bool ``[T]``, the text tokens whose prediction has a loss.
        sources: ViT embeddings ``[S, V]`` of the source tokens in order.
        targets: ViT embeddings ``[N, V]`` that the target has; ``None`` without a target (understanding).
        mask_ratio: (alpha, beta), see :data:`MASK_RATIOS`; needed with a target.
    """

    conversation: Conversation
    learned: Tensor
    sources: Tensor | None = None
    targets: Tensor | None = None
    mask_ratio: tuple[float, float] | None = None


@dataclass(frozen=True)
class Batch:
    """Several samples as one packed conversation; the fields are those of :class:`Sample`, one behind the other.

    ``sources`` and ``targets`` are ``None`` where no sample has any.
    """

    conversation: Conversation
    learned: Tensor
    sources: Tensor | None
    targets: Tensor | None
    mask_ratios: tuple[tuple[float, float] | None, ...]

    @property
    def layout(self) -> SegmentLayout:
        return self.conversation.layout

    @property
    def target_tokens(self) -> tuple[int, ...]:
        """Of each sample."""
        counts = [0] * self.layout.num_samples
        for segment in self.layout.segments:
            counts[segment.sample] += segment.tokens if segment.kind == "target" else 0
        return tuple(counts)


def pack(samples: Sequence[Sample]) -> Batch:
    """Samples in a row.

    Raises:
        ValueError: no samples, embeddings that are not one for each token, or a target without a mask ratio.
    """
    if not samples:
        raise ValueError("pack: needs at least one sample")
    for number, sample in enumerate(samples):
        _check(number, sample)
    segments = [
        replace(segment, sample=number)
        for number, sample in enumerate(samples)
        for segment in sample.conversation.layout.segments
    ]
    talks = [sample.conversation for sample in samples]
    packed = Conversation(
        torch.cat([talk.ids for talk in talks]), SegmentLayout(segments),
        tuple(visual for talk in talks for visual in talk.visuals), talks[0].ticks,
    )  # fmt: skip
    return Batch(
        packed,
        torch.cat([sample.learned for sample in samples]),
        _joined([sample.sources for sample in samples]),
        _joined([sample.targets for sample in samples]),
        tuple(sample.mask_ratio for sample in samples),
    )


def _check(number: int, sample: Sample) -> None:
    layout = sample.conversation.layout
    if layout.num_samples != 1:
        raise ValueError(f"pack: sample {number} is packed already; it holds {layout.num_samples} samples")
    if sample.learned.dtype != torch.bool or len(sample.learned) != layout.tokens:
        raise ValueError(
            f"pack: learned of sample {number} must be bool [{layout.tokens}], got {sample.learned.dtype} "
            f"{list(sample.learned.shape)}"
        )
    for name, kind, given in (("sources", "source", sample.sources), ("targets", "target", sample.targets)):
        want = len(layout.indices(layout.numbers(kind)))  # type: ignore[arg-type]
        have = 0 if given is None else len(given)
        if have != want:
            raise ValueError(f"pack: sample {number} has {want} {kind} tokens and {have} embeddings in {name}")
    if sample.targets is not None and sample.mask_ratio is None:
        raise ValueError(f"pack: sample {number} has a target and no mask_ratio")


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


# --- what is random ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draws:
    """All that is random, on the host.

    Args:
        masked: bool ``[N]``, in the order of the target tokens; at least one of each target.
        noise: float32 ``[K, M, V]``.
        levels: int64 ``[K, M]``, number of the noise level, 0 the highest.
    """

    masked: Tensor
    noise: Tensor
    levels: Tensor


def draw(
    batch: Batch, width: int, generators: torch.Generator | Sequence[torch.Generator], *, copies: int = COPIES
) -> Draws:
    """Draws for a batch; a sample's do not depend on what is packed beside it.

    The mask ratio r is drawn from the sample's Beta distribution, and ``ceil(r * tokens)`` tokens at random are masked.

    Args:
        width: V.
        generators: one for each sample, or one from which each sample gets a seed in its turn.
    """
    if isinstance(generators, torch.Generator):
        seeds = torch.randint(2**62, (batch.layout.num_samples,), generator=generators).tolist()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    masked, noise, levels = [], [], []
    for tokens, ratio, generator in zip(batch.target_tokens, batch.mask_ratios, generators, strict=True):
        if tokens:
            assert ratio is not None
            # torch has no public way to draw from a Beta distribution with a generator.
            host = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
            count = min(tokens, max(1, int(np.ceil(host.beta(*ratio) * tokens))))
            chosen = torch.zeros(tokens, dtype=torch.bool)
            chosen[torch.from_numpy(host.permutation(tokens)[:count])] = True
            masked.append(chosen)
            noise.append(torch.randn((copies, count, width), generator=generator))
            levels.append(torch.randint(LEVELS, (copies, count), generator=generator))
    if not masked:
        none = torch.empty((copies, 0))
        return Draws(torch.empty(0, dtype=torch.bool), none[..., None].expand(-1, -1, width), none.long())
    return Draws(torch.cat(masked), torch.cat(noise, dim=1), torch.cat(levels, dim=1))


# --- the forward ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NextTokens:
    """Predictions of the learned text.

    Args:
        logits: ``[P, vocabulary]``.
        labels: int64 ``[P]``, the tokens that come.
        samples: int64 ``[P]``, whose they are.
        counts: int64 ``[B]``, how many each sample has: on all ranks, where they share the batch.
    """

    logits: Tensor
    labels: Tensor
    samples: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Flow:
    """Flow matching at the masked places, to be handed to :class:`bernini.planner.heads.VitDecoder`.

    Args:
        conditions: ``[M, V]``, from the language model; gradients go back through them.
        clean: ``[M, V]``, the embeddings that were masked.
        noisy: ``[K, M, V]``, ``(1 - sigma) * clean + sigma * noise``.
        times: ``[K, M]``, ``1000 * sigma``.
        velocity: ``[K, M, V]``, ``noise - clean``: what the decoder is to answer.
        samples: int64 ``[M]``, whose tokens they are.
        counts: int64 ``[B]``, how many each sample has: on all ranks, where they share the batch.
    """

    conditions: Tensor
    clean: Tensor
    noisy: Tensor
    times: Tensor
    velocity: Tensor
    samples: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Outputs:
    """What a step of training has.

    Args:
        text: ``None`` if no text of the batch is learned.
        flow: ``None`` if no sample has a target.
        contexts: of each sample ``[L, C]``, its projected states in order; ``None`` for samples without a target.
        given: of each of them bool ``[L]``, on the host: which are of text and sources, and not of the target.
    """

    text: NextTokens | None
    flow: Flow | None
    contexts: tuple[Tensor | None, ...]
    given: tuple[Tensor | None, ...]


def forward(planner: Planner, batch: Batch, draws: Draws, *, contexts: bool = True, share: Share = ALONE) -> Outputs:
    """One pass of the language model over the packed batch, and the connector's heads.

    Text and sources never see a target, so text that is learned is predicted from a text or source token before it in
    its sample; the first token of a sample and what directly follows a target have no such token and no loss.

    Args:
        contexts: whether the renderer will read the states; without, no sample has a context.
        share: ranks that run it together, with equal arguments. Where they cut the batch, a rank's predictions and
            masked tokens are those of its rows; contexts are whole on all of them.
    """
    layout, nothing = batch.layout, (None,) * batch.layout.num_samples
    positions = batch.conversation.positions[:, slice(*share.rows(layout.tokens))].to(planner.device)
    hidden = planner(_embeds(planner, batch, draws, share), positions, layout, share)
    return Outputs(
        _next_tokens(planner, batch, hidden, positions, share),
        _flow(planner, batch, draws, hidden, share),
        *(_contexts(planner, batch, draws, hidden, share) if contexts else (nothing, nothing)),
    )


# What goes where is worked out on the host: reading a mask back would wait for the device.


def _embeds(planner: Planner, batch: Batch, draws: Draws, share: Share = ALONE) -> Tensor:
    """``[T, V]`` of this rank's rows, the masked targets replaced."""
    targets = batch.targets
    if targets is None:
        return planner.embed(batch.conversation, batch.sources, share=share)

    def seen(start: int, stop: int) -> Tensor:
        masked = draws.masked[start:stop, None].to(planner.device)
        return torch.where(masked, planner.mask_embedding, targets[start:stop].to(planner.device, planner.dtype))

    return planner.embed(batch.conversation, batch.sources, seen, share)


def _masked_places(layout: SegmentLayout, draws: Draws) -> Tensor:
    return torch.from_numpy(layout.target_index)[draws.masked]


def _owners(layout: SegmentLayout, places: Tensor) -> tuple[Tensor, Tensor]:
    """(sample of each place, how many places each sample has)."""
    owners = torch.from_numpy(layout.timestep_rows).long()[places]
    return owners, torch.bincount(owners, minlength=layout.num_samples)


def _flow(planner: Planner, batch: Batch, draws: Draws, hidden: Tensor, share: Share = ALONE) -> Flow | None:
    if batch.targets is None:
        return None
    device, places = hidden.device, _masked_places(batch.layout, draws)
    mine = share.mine(places, batch.layout.tokens)
    clean = batch.targets.to(device)[draws.masked.nonzero().flatten()[mine].to(device)]
    clean = clean.to(torch.promote_types(clean.dtype, torch.float32))
    # The levels are those that the sampler would take with as many steps.
    sigmas, times = decoder_levels(LEVELS, planner.config.decoder.shift, parity=False)
    levels = draws.levels[:, mine]
    sigma, time = (torch.tensor(x, dtype=torch.float64)[levels].to(clean) for x in (sigmas, times))
    noise = draws.noise[:, mine].to(clean)
    noisy = (1 - sigma[..., None]) * clean + sigma[..., None] * noise
    owners, counts = _owners(batch.layout, places)
    conditions = planner.connector.for_vit(hidden[share.own(places, batch.layout.tokens).to(device)])
    return Flow(conditions, clean, noisy, time, noise - clean, owners[mine].to(device), counts.to(device))


def _next_tokens(
    planner: Planner, batch: Batch, hidden: Tensor, positions: Tensor, share: Share
) -> NextTokens | None:  # fmt: skip
    layout = batch.layout
    text, given = (torch.zeros(layout.tokens, dtype=torch.bool) for _ in range(2))
    text[torch.from_numpy(layout.indices(layout.numbers("text")))] = True
    given[torch.from_numpy(layout.indices(layout.numbers("text", "source")))] = True
    owner = torch.from_numpy(layout.timestep_rows).long()
    predicted = (batch.learned.cpu() & text)[1:] & given[:-1] & (owner[1:] == owner[:-1])
    at = predicted.nonzero().flatten()
    if not len(at):
        return None
    logits = planner.logits(hidden, positions, layout, at, share)
    owners, counts = _owners(layout, at)
    mine = share.mine(at, layout.tokens)
    labels = batch.conversation.ids[at[mine] + 1]
    return NextTokens(logits, *(x.to(hidden.device) for x in (labels, owners[mine], counts)))


def _contexts(
    planner: Planner, batch: Batch, draws: Draws, hidden: Tensor, share: Share = ALONE
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    layout, tokens = batch.layout, batch.target_tokens
    in_sight, given = (torch.ones(layout.tokens, dtype=torch.bool) for _ in range(2))
    in_sight[_masked_places(layout, draws)] = False
    given[torch.from_numpy(layout.target_index)] = False
    rows = [
        start + in_sight[start:stop].nonzero().flatten()
        for (start, stop), count in zip(pairwise(layout.cu_seqlens), tokens, strict=True)
        if count
    ]
    if not rows:
        return (None,) * len(tokens), (None,) * len(tokens)
    whole = torch.cat(rows)
    projected = planner.connector.for_gen(hidden[share.own(whole, layout.tokens).to(hidden.device)])
    projected = share.gathered(projected, layout.tokens, whole)
    pieces = iter(zip(projected.split([len(part) for part in rows]), rows, strict=True))
    pairs = [next(pieces) if count else None for count in tokens]
    contexts = tuple(None if pair is None else pair[0] for pair in pairs)
    return contexts, tuple(None if pair is None else given[pair[1]] for pair in pairs)
