"""What of the models is gathered together where they are spread over processes (see :mod:`bernini.parallel.fsdp`).

A group's parameters are there while one of its modules is being called. What the models read of a block before its turn
is a group of its own or stays whole: of the renderer the projections of the text to keys and values, of the decoder of
ViT embeddings the modulations.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import nn

from ..parallel.fsdp import Groups
from ..planner.heads import DecoderBlock
from ..planner.model import Planner
from ..renderer.model import Block, Renderer


def renderer_groups(renderer: Renderer) -> Groups:
    blocks = tuple(cast("Iterable[Block]", renderer.blocks))
    texts = tuple((block.attn2.to_k, block.attn2.to_v) for block in blocks)
    norms = tuple(block.attn2.norm_k.weight for block in blocks)
    return Groups((*texts, *((block,) for block in blocks)), (blocks,), norms)


def planner_groups(planner: Planner) -> Groups:
    """The last layer is left out: before it computes the chosen rows, its keys and values are taken of all rows. So is
    the embedding of words, which is called as often as there are runs of text."""
    net, layers, seen = planner.vit_decoder.net, tuple(planner.text.layers[:-1]), tuple(planner.visual.blocks)
    tables = tuple((block.adaLN_modulation[1],) for block in cast("Iterable[DecoderBlock]", net.res_blocks))
    whole = [planner.lm_head, *net.res_blocks, *layers, *seen]
    # What is not trained is gathered for itself, if at all.
    parts = (planner.visual, planner.connector.proj_gen, planner.connector.pred_vit, planner.vit_decoder)
    frozen = tuple((part,) for part in parts if not any(p.requires_grad for p in part.parameters()))
    return Groups((*tables, *((module,) for module in whole), *frozen), (tuple(net.res_blocks), layers, seen))


def text_groups(model: nn.Module, *, trained: bool) -> Groups:
    """Of UMT5's encoder. It is called as a whole, so what is not in blocks is a group as well."""
    blocks = tuple(model.encoder.block)  # type: ignore[union-attr, arg-type]
    groups = (*((block,) for block in blocks), (model,))
    return Groups(groups, (blocks,), frozen=() if trained else (model,))
