"""Pictures of a data set: how large, how many frames, how fast; and reading one, or saying why not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bernini.geometry import RELEASED, Geometry
from bernini.media import MediaError, read_image, read_video

from .example import Features
from .skips import Bad

CROPS = ("left", "center", "right")


@dataclass(frozen=True)
class Reading:
    """How files become pixels, by the rules of :mod:`bernini.media`. The defaults are those of the release's stage at
    480p: 16 frames a second, at most 97 of them, the long side at most 848 pixels (facts F; its own tool takes 96 + 1
    frames in steps of 16, we in steps of 4 as for inference).

    Args:
        max_size, min_size: limits in pixels of the long and the short side.
        size: exact (width, height) instead.
        geometry: of the checkpoint that it is read for.
    """

    fps: float = 16
    num_frames: int = 97
    max_size: int = 848
    min_size: int = 240
    size: tuple[int, int] | None = None
    geometry: Geometry = RELEASED

    @classmethod
    def of(cls, geometry: Geometry, **given: Any) -> Reading:
        """As a checkpoint wants it; its rate, size and number of frames where it states other ones than the release.

        Args:
            given: other fields, which go before that.
        """
        stated: dict[str, Any] = {
            name: getattr(geometry, name)
            for name in ("fps", "num_frames", "max_size")
            if getattr(geometry, name) != getattr(RELEASED, name)
        }
        if geometry.size is not None and not {"max_size", "min_size"} & set(given):
            stated["size"] = (geometry.size[1], geometry.size[0])
        return cls(**{**stated, **given}, geometry=geometry)

    def load(self, kind: Literal["image", "video"], cell: Any, folder: Path) -> Features:
        """
        Args:
            cell: the path of an image; of a video the path or a mapping of ``video_path``, ``duration`` in seconds
                (of the clip that is cut from it) and ``crop_method`` (where it lies: ``left``, ``center``, ``right``).
            folder: where relative paths begin.

        Raises:
            Bad: ``unreadable image``, ``unreadable video``, ``empty clip`` or ``wrong schema``.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a video cut off: what is left is used
            return self._image(cell, folder) if kind == "image" else self._video(cell, folder)

    def _image(self, cell: Any, folder: Path) -> Features:
        path = _path(cell, folder, "unreadable image")
        try:
            pixels = read_image(
                path, max_size=self.max_size, min_size=self.min_size, size=self.size, geometry=self.geometry
            )
        except MediaError as error:
            raise Bad("unreadable image", str(error)) from None
        return Features("image", pixels[None])

    def _video(self, cell: Any, folder: Path) -> Features:
        about = cell if isinstance(cell, dict) else {"video_path": cell}
        path = _path(about.get("video_path"), folder, "unreadable video")
        try:
            clip = read_video(
                path, fps=self.fps, num_frames=self.num_frames, max_size=self.max_size, min_size=self.min_size,
                size=self.size, window=_window(about), geometry=self.geometry,
            )  # fmt: skip
        except MediaError as error:
            raise Bad("unreadable video", str(error)) from None
        return Features("video", clip.frames)


def _path(cell: Any, folder: Path, reason: str) -> Path:
    if not isinstance(cell, str) or not cell:
        raise Bad("wrong schema", f"expected the name of a file, found {type(cell).__name__}")
    if "://" in cell[:12] or cell.startswith("data:") or len(cell) > 4096:
        raise Bad(reason, f"{cell[:60]}...: only files of this machine are read")
    return folder / cell  # an absolute path stays as it is


def _window(about: dict[str, Any]) -> Callable[[int, float], tuple[int, int]] | None:
    """Which of the frames of a file count, as the release cuts them; ``None`` for all."""
    duration, crop = about.get("duration"), about.get("crop_method") or "left"
    if crop not in CROPS:
        raise Bad("wrong schema", f"crop_method is {crop!r}, expected one of {', '.join(CROPS)}")
    if duration is None:
        return None
    if isinstance(duration, bool) or not isinstance(duration, int | float) or not duration < float("inf"):
        raise Bad("wrong schema", f"duration is {duration!r}, expected seconds")
    if duration <= 0:
        raise Bad("empty clip", f"{about['video_path']}: a duration of {duration} seconds")

    def window(frames: int, fps: float) -> tuple[int, int]:
        length = min(int(duration * fps), frames)
        if length < 1:
            raise Bad("empty clip", f"{about['video_path']}: {duration} seconds hold no frame at {fps:g} a second")
        start = {"left": 0, "center": (frames - length) // 2, "right": frames - length}[crop]
        return start, start + length

    return window
