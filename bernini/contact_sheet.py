"""Contact sheets: one picture that shows several videos, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .media import PathLike, check_frames, save_picture

_GAP, _CELL, _COLUMNS = 12, 224, 6  # pixels between cells, pixels of a cell's long edge, frames of a row


def contact_sheet(rows: Sequence[tuple[str, Tensor]], path: PathLike, title: str = "") -> None:
    """One picture that shows several videos: a captioned row each, up to six evenly spaced frames side by side.

    Args:
        rows: (caption, frames); frames are uint8 ``[F, H, W, 3]`` or an image ``[H, W, 3]``.
        title: a line above everything.

    Raises:
        ValueError: no rows, or frames of another shape or dtype.
        MediaError: the file cannot be written.
    """
    if not rows:
        raise ValueError("contact_sheet: needs at least one row")
    width = _GAP + _COLUMNS * (_CELL + _GAP)
    blocks = [_text_block(title, width, 24)] if title else []
    for caption, frames in rows:
        frames = frames[None] if frames.dim() == 3 else frames
        check_frames("contact_sheet", frames)
        blocks += [_text_block(caption, width, 15), _frame_strip(frames.cpu(), width)]
    sheet = Image.new("RGB", (width, _GAP + sum(block.height for block in blocks)), "white")
    top = _GAP
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    save_picture(Path(path), sheet)


def _text_block(text: str, width: int, size: int) -> Image.Image:
    """Text wrapped at word borders to the sheet's width."""
    font = ImageFont.load_default(size)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width - 2 * _GAP:
            lines.append(word)
        else:
            lines[-1] = longer
    line_height = round(size * 1.35)
    block = Image.new("RGB", (width, line_height * len(lines) + _GAP // 2), "white")
    ImageDraw.Draw(block).multiline_text((_GAP, 0), "\n".join(lines), fill="black", font=font, spacing=size * 0.35)
    return block


def _frame_strip(frames: Tensor, width: int) -> Image.Image:
    """Evenly spaced frames, each with its number beneath if there are several."""
    total, height, breadth = frames.shape[:3]
    shown = torch.linspace(0, total - 1, min(total, _COLUMNS)).round().long().tolist()
    scale = _CELL / max(height, breadth)
    size = (max(1, round(breadth * scale)), max(1, round(height * scale)))
    font = ImageFont.load_default(11)
    strip = Image.new("RGB", (width, size[1] + 16 + _GAP), "white")
    for column, number in enumerate(shown):
        left = _GAP + column * (size[0] + _GAP)
        strip.paste(
            Image.fromarray(frames[number].contiguous().numpy()).resize(size, Image.Resampling.LANCZOS), (left, 0)
        )
        if total > 1:
            ImageDraw.Draw(strip).text((left, size[1] + 2), f"frame {number}", fill="dimgray", font=font)
    return strip
