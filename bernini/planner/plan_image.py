"""A plan as a picture: every token as a patch of colour, beside those of the sources.

The colours are the first three principal components of all embeddings together, so that equal colours mean similar
embeddings, across pictures as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .prompt import Visual

CELL, GAP, LABEL = 16, 8, 14
"""Pixels: side of a token, space between pictures, height of a line of text."""


def colours(embeds: Sequence[Tensor]) -> list[Tensor]:
    """uint8 ``[n, 3]`` for each of several ``[n, V]``, on one scale."""
    rows = torch.cat([x.detach().double().cpu() for x in embeds])
    centred = rows - rows.mean(0)
    parts = centred @ principal_directions(centred, 3)
    parts = torch.nn.functional.pad(parts, (0, 3 - parts.shape[1]))
    low, high = (torch.quantile(parts, share, dim=0) for share in (0.02, 0.98))
    scaled = ((parts - low) / (high - low).clamp_min(1e-12)).clamp(0, 1) * 255
    return list(scaled.round().to(torch.uint8).split([len(x) for x in embeds]))


def principal_directions(centred_NV: Tensor, count: int) -> Tensor:
    """``[V, count]``: the first right singular vectors, each with its largest entry positive.

    By subspace iteration: a whole decomposition of a real plan takes half a minute.
    """
    width = centred_NV.shape[1]
    start = torch.randn(width, min(count + 5, width), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(start).Q
    for _ in range(30):
        basis = torch.linalg.qr(centred_NV.T @ (centred_NV @ basis)).Q
    within = torch.linalg.svd(centred_NV @ basis, full_matrices=False).Vh[:count]
    directions = basis @ within.T
    return directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()


def plan_image(plan: tuple[Visual, Tensor], sources: Sequence[tuple[Visual, Tensor]]) -> Image.Image:
    """A row of frames for the plan, then one for every source."""
    rows = [("plan", *plan), *((f"source {number}", *source) for number, source in enumerate(sources, 1))]
    painted = colours([embeds for _, _, embeds in rows])
    widths = [visual.grid[0] * (visual.grid[2] * CELL + GAP) + GAP for _, visual, _ in rows]
    heights = [LABEL + visual.grid[1] * CELL + GAP for _, visual, _ in rows]
    sheet = Image.new("RGB", (max(*widths, 120), sum(heights) + GAP), "white")
    draw, top = ImageDraw.Draw(sheet), GAP // 2
    for (name, visual, _), colour, height in zip(rows, painted, heights, strict=True):
        t, h, w = visual.grid
        draw.text((GAP, top), f"{name}: {visual.kind} {t}x{h}x{w}", fill="black")
        for number, frame in enumerate(colour.reshape(t, h, w, 3)):
            picture = Image.fromarray(frame.numpy()).resize((w * CELL, h * CELL), Image.Resampling.NEAREST)
            sheet.paste(picture, (GAP + number * (w * CELL + GAP), top + LABEL))
        top += height
    return sheet
