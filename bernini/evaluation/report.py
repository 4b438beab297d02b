"""Results as people read them: the bars with their intervals, a table of every task, a picture of every task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data.scene import Frames
from .suite import Result, Results, Shown

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import RenderableType

Z = 1.96
"""Of a 95 % interval."""


@dataclass(frozen=True)
class Bar:
    """One thing that must hold.

    Args:
        figure, low, high: the measured share (or dB, or points) and its 95 % interval; ``None`` without samples.
        bound: at least this; at most this for a gap.
    """

    name: str
    figure: float | None
    low: float | None
    high: float | None
    samples: int
    bound: float
    unit: str = "%"
    at_most: bool = False
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """By the figure itself, whatever its interval."""
        if self.figure is None:
            return None
        return self.figure <= self.bound if self.at_most else self.figure >= self.bound


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927); (0, 1) without samples."""
    if total == 0:
        return 0.0, 1.0
    share, extra = right / total, Z * Z / total
    middle = (share + extra / 2) / (1 + extra)
    half = Z * math.sqrt(share * (1 - share) / total + extra / total / 4) / (1 + extra)
    # Rounding must not put the share itself outside.
    return min(max(middle - half, 0.0), share), max(min(middle + half, 1.0), share)


def bars(results: Results) -> list[Bar]:
    """The figures that the shipped model is held to; those without samples are left out."""
    found = [
        _share("v2v recolor followed", results.of("v2v", "recolor", "test"), 85),
        _share("v2v background followed", results.of("v2v", "background", "test"), 85),
        _share("v2v shape followed", results.of("v2v", "shape", "test"), 75),
        _share("t2v color, shape and motion", results.of("t2v", split="test"), 75),
        *(_identity(task, results.of(task, "digit", "test")) for task in ("r2v", "rv2v")),
        _background(results),
        _gap(results),
    ]
    return [bar for bar in found if bar.samples]


def _share(name: str, rows: Sequence[Result], bound: float) -> Bar:
    right, total = sum(row.followed for row in rows), len(rows)
    return _percent(name, right, total, bound)


def _percent(name: str, right: int, total: int, bound: float, note: str = "") -> Bar:
    low, high = wilson(right, total)
    figure = 100 * right / total if total else None
    return Bar(name, figure, 100 * low, 100 * high, total, bound, note=note)


def _identity(task: str, rows: Sequence[Result]) -> Bar:
    """65 %, or 85 % of what the autoencoder leaves of the truth if that is less."""
    rows = [row for row in rows if row.identity is not None]
    ceilings = [row.ceiling for row in rows if row.ceiling is not None]
    bound, note = 65.0, ""
    if ceilings:
        ceiling = 100 * sum(ceilings) / len(ceilings)
        bound, note = min(bound, 0.85 * ceiling), f"ceiling {ceiling:.1f} %"
    return _percent(f"{task} right digit image", sum(bool(row.identity) for row in rows), len(rows), bound, note)


def _background(results: Results) -> Bar:
    values = [row.psnr for row in results.rows if row.psnr is not None and row.task in ("v2v", "rv2v") and
              row.split == "test"]  # fmt: skip
    if not values:
        return Bar("background PSNR in local edits", None, None, None, 0, 24, "dB")
    mean, half = float(np.mean(values)), Z * float(np.std(values)) / math.sqrt(len(values))
    note = f"v2v and rv2v; worst tenth below {np.quantile(values, 0.1):.1f} dB"
    return Bar("background PSNR in local edits", mean, mean - half, mean + half, len(values), 24, "dB", note=note)


def _gap(results: Results) -> Bar:
    """Seen minus withheld combinations in points, every task and edit counting alike; digits are of neither."""
    gaps, variances, total = [], [], 0
    for task, kind in sorted({(row.task, row.kind) for row in results.rows}):
        seen, unseen = _sides(results, task, kind)
        if seen and unseen:
            shares = [sum(row.followed for row in rows) / len(rows) for rows in (seen, unseen)]
            gaps.append(shares[0] - shares[1])
            # One more of each outcome, so that a share of 0 or 1 is not taken for certain.
            smooth = [(sum(row.followed for row in rows) + 1, len(rows) + 2) for rows in (seen, unseen)]
            variances.append(sum(right / n * (1 - right / n) / n for right, n in smooth))
            total += len(seen) + len(unseen)
    name = "seen minus held-out combinations"
    if not gaps:
        return Bar(name, None, None, None, 0, 10, "points", at_most=True)
    mean, half = 100 * float(np.mean(gaps)), 100 * Z * math.sqrt(sum(variances)) / len(gaps)
    note = f"mean of {len(gaps)} tasks and edits"
    return Bar(name, mean, mean - half, mean + half, total, 10, "points", at_most=True, note=note)


def _sides(results: Results, task: str, kind: str) -> tuple[list[Result], list[Result]]:
    """Of a task's kind those with seen and with withheld combinations."""
    seen = [row for row in results.of(task, kind, "test") if row.shape != "digit"]
    return seen, results.of(task, kind, "unseen")


# --- tables -----------------------------------------------------------------------------------------------------------

_BARS = ("", "figure", "95 % interval", "samples", "bar", "holds", "")
_TASKS = (
    "",
    "followed",
    "95 % interval",
    "samples",
    "held-out",
    "samples",
    "all right",
    "PSNR outside",
    "PSNR",
    "wrong",
)


def _bar_row(bar: Bar) -> tuple[str, ...]:
    assert bar.figure is not None and bar.low is not None and bar.high is not None
    holds = "yes" if bar.holds else "NO"
    bound = f"{'at most' if bar.at_most else 'at least'} {bar.bound:.4g} {bar.unit}"
    return (bar.name, f"{bar.figure:.1f} {bar.unit}", f"{bar.low:.1f} to {bar.high:.1f}", str(bar.samples), bound,
            holds, bar.note)  # fmt: skip


def _task_rows(results: Results) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for task, kind in dict.fromkeys((row.task, row.kind) for row in results.rows):
        test, unseen = results.of(task, kind, "test"), results.of(task, kind, "unseen")
        both = [*test, *unseen]
        right = sum(row.followed for row in test)
        low, high = wilson(right, len(test))
        wrong = {name: sum(not row.checks.get(name, True) for row in both) for row in both for name in row.checks}
        listed = sorted((name for name in wrong if wrong[name]), key=lambda name: -wrong[name])
        rows.append((
            f"{task} {kind}".rstrip(),
            f"{100 * right / len(test):.1f} %" if test else "",
            f"{100 * low:.0f} to {100 * high:.0f}" if test else "",
            str(len(test)),
            f"{100 * sum(row.followed for row in unseen) / len(unseen):.1f} %" if unseen else "",
            str(len(unseen)),
            f"{100 * sum(all(row.checks.values()) for row in both) / len(both):.1f} %",
            _decibels([row.psnr for row in both]),
            _decibels([row.psnr_truth for row in both]),
            ", ".join(f"{name} {100 * wrong[name] / len(both):.0f} %" for name in listed[:4]),
        ))  # fmt: skip
    return rows


def _decibels(values: Sequence[float | None]) -> str:
    given = [value for value in values if value is not None]
    return f"{np.mean(given):.1f} dB" if given else ""


def markdown(results: Results, title: str) -> str:
    """Both tables, for a file."""
    parts = [f"# {title}", "", *_markdown(_BARS, [_bar_row(bar) for bar in bars(results)]), ""]
    parts += [
        "Followed: what the instruction is about is right, in samples with seen combinations of color and shape; ",
        "held-out: with withheld ones. All right: every check, also of what was to be kept. PSNR outside: outside of ",
        "the edited region against the source. PSNR: all pixels against the only right result. Wrong: checks that ",
        "failed, in both splits. Handwritten digits are held-out ones in all of them.", "",
    ]  # fmt: skip
    return "\n".join([*parts, *_markdown(_TASKS, _task_rows(results)), ""])


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def tables(results: Results) -> list[RenderableType]:
    """The same for a terminal."""
    from rich.table import Table

    made: list[RenderableType] = []
    for head, rows in ((_BARS, [_bar_row(bar) for bar in bars(results)]), (_TASKS, _task_rows(results))):
        if rows:
            table = Table(*head, box=None, header_style="bold", pad_edge=False)
            for row in rows:
                style = "red" if head is _BARS and row[5] == "NO" else None
                table.add_row(*row, style=style)
            made.append(table)
    return made


# --- picture ----------------------------------------------------------------------------------------------------------

_SCALE, _GAP, _LINE = 3, 6, 18  # times, pixels between tiles, pixels of a line of text
_FRAMES = 4  # of each video, evenly spaced
_COLUMNS = (("sources", 6), ("result", _FRAMES), ("truth", _FRAMES))  # and tiles of each
_MARGIN = 20


def grid(shown: Sequence[Shown], path: Path) -> None:
    """A picture with a row for each task: sources, result and truth, a few frames of each, three times enlarged.

    Raises:
        ValueError: nothing to show. MediaError: the file cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    from ..media_write import save_picture

    if not shown:
        raise ValueError("grid: needs at least one sample")
    tile = _SCALE * shown[0].frames.shape[1]
    lefts, left = [], _MARGIN
    for _, tiles in _COLUMNS:
        lefts.append(left)
        left += tiles * (tile + _GAP) + _MARGIN
    height = _LINE + _GAP + tile + _MARGIN
    sheet = Image.new("RGB", (left, _MARGIN + _LINE + len(shown) * height), "white")
    draw, font, bold = ImageDraw.Draw(sheet), ImageFont.load_default(12), ImageFont.load_default(14)
    for (name, _), at in zip(_COLUMNS, lefts, strict=True):
        draw.text((at, _GAP), name, fill="dimgray", font=bold)
    for number, each in enumerate(shown):
        top = _MARGIN + _LINE + number * height
        draw.text((_MARGIN, top), f"{each.name}: {each.sample.prompt}", fill="black", font=bold)
        assert each.sample.target is not None
        sources = _source_tiles(each)
        for frames, at in zip((sources, _spread(each.frames, _FRAMES), _spread(each.sample.target, _FRAMES)), lefts,
                              strict=True):  # fmt: skip
            for column, frame in enumerate(frames):
                sheet.paste(_enlarged(frame), (at + column * (tile + _GAP), top + _LINE + _GAP // 2))
        if not sources:
            draw.text((_MARGIN, top + _LINE + tile // 2), "the text alone", fill="dimgray", font=font)
    save_picture(path, sheet)


def _source_tiles(each: Shown) -> list[Frames]:
    return [
        *(frame for video in each.sample.videos for frame in _spread(video, _FRAMES)),
        *each.sample.images,
    ][: _COLUMNS[0][1]]


def _spread(frames: Frames, count: int) -> list[Frames]:
    chosen = np.linspace(0, len(frames) - 1, min(len(frames), count)).round().astype(int)
    return [frames[number] for number in chosen]


def _enlarged(frame: Frames) -> Image.Image:
    from PIL import Image

    small = Image.fromarray(np.ascontiguousarray(frame))
    return small.resize((_SCALE * small.width, _SCALE * small.height), Image.Resampling.NEAREST)
