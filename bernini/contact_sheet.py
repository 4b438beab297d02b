"""Contact sheets: one picture that shows several videos, or what became of sources, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .media import PathLike, check_frames
from .media_write import save_picture

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


# --- sources beside what was made of them ---------------------------------------------------------------------------

_TILE, _SOURCES, _RESULTS = (168, 112), 3, 4  # (width, height) a frame is fitted into; frames of either side
_ARROW, _LABEL, _HEAD = 56, 18, 34  # pixels: between the sides, under a tile, above a panel's tiles
_PAPER, _CARD, _LINE, _INK, _FAINT = "#ffffff", "#f3f5f8", "#d9dee6", "#1c2430", "#6a7482"


@dataclass(frozen=True)
class Panel:
    """One task of a :func:`task_sheet`: (name, frames) of each source, and the frames of the result."""

    name: str
    prompt: str
    sources: Sequence[tuple[str, Tensor]]
    result: Tensor


def task_sheet(panels: Sequence[Panel], path: PathLike, title: str) -> None:
    """One picture with a panel per task: its prompt, its sources on the left, its result on the right.

    Raises:
        ValueError: no panels, or frames of another shape or dtype.
        MediaError: the file cannot be written.
    """
    if not panels:
        raise ValueError("task_sheet: needs at least one panel")
    inner = _tiles_width(_SOURCES) + _ARROW + _tiles_width(_RESULTS)
    width = inner + 4 * _GAP
    blocks = [_panel(panel, width) for panel in panels]
    top = 64
    sheet = Image.new("RGB", (width, top + sum(block.height + _GAP for block in blocks)), _PAPER)
    ImageDraw.Draw(sheet).text((_GAP, 20), title, fill=_INK, font=ImageFont.load_default(26))
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height + _GAP
    save_picture(Path(path), sheet)


def _tiles_width(count: int) -> int:
    return count * (_TILE[0] + _GAP) - _GAP


def _panel(panel: Panel, width: int) -> Image.Image:
    left, middle = 2 * _GAP, _HEAD + _GAP + _TILE[1] // 2
    image = Image.new("RGB", (width, _HEAD + _GAP + _TILE[1] + _LABEL + _GAP), _PAPER)
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((_GAP, 0, width - _GAP - 1, image.height - 1), 8, fill=_CARD, outline=_LINE)
    name = ImageFont.load_default(20)
    draw.text((left, _GAP), panel.name, fill=_INK, font=name)
    draw.text((left + 64, _GAP + 4), panel.prompt, fill=_FAINT, font=ImageFont.load_default(15))

    tiles = _source_tiles(panel.sources)
    left += _tiles_width(_SOURCES) - _tiles_width(len(tiles)) if tiles else 0  # up against the arrow
    for label, frame in tiles:
        _tile(image, left, label, frame)
        left += _TILE[0] + _GAP
    if not tiles:
        box = (left, _HEAD + _GAP, left + _tiles_width(_SOURCES) - 1, _HEAD + _GAP + _TILE[1] - 1)
        draw.rectangle(box, fill=_PAPER, outline=_LINE)
        centre = ((box[0] + box[2]) // 2, middle)
        draw.text(centre, "no source: the text alone", fill=_FAINT, font=ImageFont.load_default(15), anchor="mm")

    left = 2 * _GAP + _tiles_width(_SOURCES)
    tip, back = left + _ARROW - 14, left + 14
    draw.line((back, middle, tip - 8, middle), fill=_FAINT, width=3)
    draw.polygon(((tip, middle), (tip - 11, middle - 7), (tip - 11, middle + 7)), fill=_FAINT)
    left += _ARROW
    for label, frame in _spread("", panel.result, _RESULTS):
        _tile(image, left, label, frame)
        left += _TILE[0] + _GAP
    return image


def _source_tiles(sources: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """A tile for each image, and what is left of the row for the videos; what does not fit is left out."""
    stills = sum(frames.dim() == 3 or len(frames) == 1 for _, frames in sources)
    moving = len(sources) - stills
    each = max(1, (_SOURCES - stills) // moving) if moving else 1
    return [tile for name, frames in sources for tile in _spread(name, frames, each)][:_SOURCES]


def _spread(name: str, frames: Tensor, count: int) -> list[tuple[str, Tensor]]:
    """Up to ``count`` evenly spaced frames with their labels."""
    frames = frames[None] if frames.dim() == 3 else frames
    check_frames("task_sheet", frames)
    total = len(frames)
    if total == 1:
        return [(name or "image", frames[0])]
    shown = torch.linspace(0, total - 1, min(total, count)).round().long().tolist()
    return [(f"{name}, frame {number}".removeprefix(", "), frames[number]) for number in shown]


def _tile(image: Image.Image, left: int, label: str, frame: Tensor) -> None:
    """A frame fitted into its tile, with a label under it."""
    height, breadth = frame.shape[:2]
    scale = min(_TILE[0] / breadth, _TILE[1] / height)
    size = (max(1, round(breadth * scale)), max(1, round(height * scale)))
    picture = Image.fromarray(frame.contiguous().cpu().numpy()).resize(size, Image.Resampling.LANCZOS)
    at = (left + (_TILE[0] - size[0]) // 2, _HEAD + _GAP + (_TILE[1] - size[1]) // 2)
    image.paste(picture, at)
    place = (left, _HEAD + _GAP + _TILE[1] + 4)
    ImageDraw.Draw(image).text(place, label, fill=_FAINT, font=ImageFont.load_default(12))
