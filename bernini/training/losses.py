"""The planner's two losses (paper section 2.2, equation 3); the renderer's is :mod:`bernini.training.flow`.

Both are means over a sample's own tokens, then over samples: as many sums are returned as there are samples, and the
caller divides by their number over the whole step. Where ranks share a batch, each has a part of every sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..planner.heads import VitDecoder
from ..planner.training import Flow, NextTokens


def next_token_losses(text: NextTokens) -> Tensor:
    """``[B]``: the mean cross entropy of each sample's answer; zero for those without one."""
    losses = F.cross_entropy(text.logits.to(_wide(text.logits)), text.labels, reduction="none")
    return _by_sample(losses, text.samples, text.counts)


def decoder_losses(decoder: VitDecoder, flow: Flow) -> Tensor:
    """``[B]``: the mean squared error of velocities, over a sample's masked tokens and their noisy copies."""
    velocity = decoder(flow.noisy, flow.times, flow.conditions)
    wide = _wide(velocity)
    error = (velocity.to(wide) - flow.velocity.to(wide)).square().mean(2).mean(0)
    return _by_sample(error, flow.samples, flow.counts)


def _by_sample(values: Tensor, owners: Tensor, counts: Tensor) -> Tensor:
    """What the values that are here add to the mean of each sample."""
    # A product with a small table of ones and zeros, and not index_add: that adds in any order on a GPU.
    mine = torch.arange(len(counts), device=values.device)[:, None] == owners
    return (mine.to(values.dtype) @ values) / counts.clamp_min(1)


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
