"""Video and image files: reading at the sizes and frames the models want (writing: :mod:`bernini.media_write`).

Pictures are uint8 RGB with the channels last, as files and people have them: an image is ``[H, W, 3]``, a video
``[F, H, W, 3]``. Models want float ``[3, F, H, W]`` in [-1, 1]: :func:`to_model` and :func:`from_model` convert.

A video is streamed: only the frames that are used are resized and kept, so memory does not grow with its length. A
file that cannot be used raises :class:`MediaError` with a sentence for the person who named it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import UserError
from .geometry import RELEASED, Geometry
from .media_rules import Timeline
from .media_rules import frame_count as frame_count
from .media_rules import frame_indices as frame_indices
from .media_rules import make_divisible as make_divisible
from .media_rules import resize_size as resize_size

PathLike = str | os.PathLike[str]


class MediaError(UserError):
    """A media file cannot be read or written; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Clip:
    """``frames`` uint8 ``[F, H, W, 3]`` RGB, shown at ``fps`` frames per second."""

    frames: Tensor
    fps: float


# --- pixels ---------------------------------------------------------------------------------------------------------


def resize(frames_FHW3: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes uint8 ``[F, H, W, 3]`` to ``size`` (width, height): bicubic with antialias, computed in float32.

    Bicubic weights overshoot at edges, so the result is clamped to [0, 255] and rounded half to even. Frames that
    already have the size are returned untouched.
    """
    width, height = size
    if tuple(frames_FHW3.shape[1:3]) == (height, width):
        return frames_FHW3
    wide = frames_FHW3.permute(0, 3, 1, 2).float()
    wide = F.interpolate(wide, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    return wide.clamp_(0, 255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_model(clip: Clip | Tensor) -> Tensor:
    """uint8 ``[F, H, W, 3]`` (or an image ``[H, W, 3]``, as one frame) to float32 ``[3, F, H, W]`` in [-1, 1]."""
    frames = clip.frames if isinstance(clip, Clip) else clip
    frames = frames.unsqueeze(0) if frames.dim() == 3 else frames
    check_frames("to_model", frames)
    return (frames.permute(3, 0, 1, 2).float() / 127.5 - 1.0).contiguous()


def from_model(x_3FHW: Tensor) -> Tensor:
    """Float ``[3, F, H, W]`` in [-1, 1] to uint8 ``[F, H, W, 3]``; values outside are clamped.

    Raises:
        ValueError: another shape. UserError: values that are not finite.
    """
    if x_3FHW.dim() != 4 or x_3FHW.shape[0] != 3 or not x_3FHW.is_floating_point():
        raise ValueError(f"from_model: expected float [3, F, H, W], got {x_3FHW.dtype} {list(x_3FHW.shape)}")
    if not bool(torch.isfinite(x_3FHW).all()):
        raise UserError(
            "from_model: the video holds values that are not finite; smaller guidance scales or another dtype may help"
        )
    levels = ((x_3FHW.detach().float() + 1.0) * 127.5).clamp_(0, 255).round_()
    return levels.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu()


def check_frames(name: str, frames: Tensor) -> None:
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"{name}: frames must be uint8 [F, H, W, 3], got {frames.dtype} {list(frames.shape)}")


# --- reading --------------------------------------------------------------------------------------------------------


def read_video(
    path: PathLike,
    *,
    fps: float = 16,
    num_frames: int = 81,
    max_size: int = 848,
    min_size: int = 1,
    size: tuple[int, int] | None = None,
    rule: str = "renderer",
    window: Callable[[int, float], tuple[int, int]] | None = None,
    geometry: Geometry = RELEASED,
) -> Clip:
    """Reads a video at a frame rate, a number of frames and a size.

    Args:
        fps: wanted frame rate; see :func:`frame_indices` for which frames that takes.
        num_frames: upper limit, brought to a :func:`frame_count` first (80 asks for 81).
        max_size, min_size: limits in pixels for the long and the short edge, see :func:`resize_size`.
        size: exact (width, height) instead; the aspect ratio is then the caller's concern.
        rule: ``"renderer"``, ``"full"`` or ``"full_vit"``, see :func:`frame_indices`.
        window: from the number of frames in the file and their rate, the first frame that counts and the one behind the
            last; by default all do.
        geometry: strides and rates of the checkpoint that it is read for.

    Returns:
        A :class:`Clip` at ``fps`` (``geometry.vit_rate(fps)`` for ``"full_vit"``). Where frames are shown for uneven
        times (variable frame rate) they are chosen by their timestamps on an even timeline at the mean rate.

    Raises:
        MediaError: the file is missing, a directory, empty, no video, without pictures or cut off before the first one.
    """
    path = _existing(path)
    timeline, first = _scan(path), 0
    if window is not None:
        first, end = window(timeline.total, timeline.fps)
        timeline = Timeline(timeline.fps, [time - timeline.times[first] for time in timeline.times[first:end]])
    while True:  # again, with a shorter timeline, only when fewer frames can be decoded than the container promised
        indices = geometry.frame_indices(timeline.total, timeline.fps, fps, geometry.frame_count(num_frames), rule)
        wanted = [first + timeline.frame_at(index) for index in indices]
        kept, decoded = _decode(path, set(wanted), size, max_size, min_size, geometry.pixel_stride)
        if decoded > max(wanted):
            rate = geometry.vit_rate(fps) if rule == "full_vit" else fps
            return Clip(torch.stack([kept[index] for index in wanted]), rate)
        if decoded <= first:
            raise MediaError(f"{path}: not one frame can be decoded; the file seems cut off or damaged")
        total = first + timeline.total
        warnings.warn(f"{path}: only {decoded} of {total} frames can be decoded", RuntimeWarning, stacklevel=2)
        timeline = Timeline(timeline.fps, timeline.times[: decoded - first])


def _scan(path: Path) -> Timeline:
    """Reads the packets without decoding: containers may not know, or misstate, how many frames they hold."""
    stamps: list[float | None] = []
    with _open_video(path) as (container, stream):
        with suppress(av.FFmpegError):  # damaged from here on: what extend() has taken before still counts
            packets = (packet for packet in container.demux(stream) if packet.size > 0 and not packet.is_discard)
            stamps.extend(None if packet.pts is None else float(packet.pts * packet.time_base) for packet in packets)
        declared = float(stream.average_rate or stream.guessed_rate or 0)
    if not stamps:
        raise MediaError(f"{path}: the video holds no frame; the file seems cut off or damaged")
    known = sorted(stamp for stamp in stamps if stamp is not None)
    span = known[-1] - known[0] if known else 0.0
    if len(known) < len(stamps) or span <= 0:  # one frame, or a format without timestamps
        rate = declared or 25.0
        return Timeline(rate, [number / rate for number in range(len(stamps))])
    measured = (len(stamps) - 1) / span
    # The header's exact fraction is better than a measurement, unless it describes another video.
    rate = declared if declared and abs(declared - measured) <= 0.01 * measured else measured
    return Timeline(rate, [stamp - known[0] for stamp in known])


@contextmanager
def _open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream; the libraries' errors come out as :class:`MediaError`."""
    try:
        with av.open(str(path)) as container:
            if container.format.name.endswith("_pipe") or container.format.name == "image2":
                raise MediaError(f"{path}: is a still image, not a video")
            cover = av.stream.Disposition.attached_pic  # the picture of a song
            streams = [stream for stream in container.streams.video if not stream.disposition & cover]
            if not streams:
                holds = "sound but no pictures" if container.streams.audio else "nothing that can be read"
                raise MediaError(f"{path}: holds {holds}; expected a video")
            streams[0].thread_type = "AUTO"
            yield container, streams[0]
    except av.FFmpegError as error:
        raise MediaError(f"{path}: cannot be read as a video ({error.strerror}); damaged, or not a video") from error


def _decode(
    path: Path, wanted: set[int], size: tuple[int, int] | None, max_size: int, min_size: int, stride: int
) -> tuple[dict[int, Tensor], int]:
    """Decodes up to the last wanted frame. Returns the wanted ones, upright and resized, and how many were seen."""
    kept: dict[int, Tensor] = {}
    last, number = max(wanted), -1
    with _open_video(path) as (container, stream), suppress(av.FFmpegError):
        # A damaged file ends here with an error: the caller sees that frames are missing and says so.
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                # Phones store frames as the sensor gave them, with the turn that makes them upright.
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                upright = torch.from_numpy(np.ascontiguousarray(pixels))[None]
                size = size or resize_size(upright.shape[2], upright.shape[1], max_size, min_size, stride)
                kept[number] = resize(upright, size)[0]
            if number >= last:
                break
    return kept, number + 1


def read_image(
    path: PathLike,
    *,
    max_size: int = 848,
    min_size: int = 1,
    size: tuple[int, int] | None = None,
    geometry: Geometry = RELEASED,
) -> Tensor:
    """Reads an image as RGB uint8 ``[H, W, 3]``, sized as :func:`read_video` does.

    Grey becomes RGB, 16 bits become 8, transparency is laid over white, and the camera's orientation (EXIF) is
    applied. Of an animated file the first picture is taken.

    Raises:
        MediaError: the file is missing, a directory, empty, cut off or no image.
    """
    path = _existing(path)
    try:
        with Image.open(path) as opened:
            image = _rgb(path, ImageOps.exif_transpose(opened))
    except UnidentifiedImageError as error:
        raise MediaError(f"{path}: is not an image that can be read (a video?)") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: cannot be read as an image ({error}); damaged, or not an image") from error
    pixels = torch.from_numpy(np.array(image))[None]
    size = size or resize_size(image.width, image.height, max_size, min_size, geometry.pixel_stride)
    return resize(pixels, size)[0]


def _rgb(path: Path, image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise MediaError(f"{path}: floating-point images have no defined brightness range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # grey with 16 bits, which Pillow's own conversion would clip at 255
        grey = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.rint(np.clip(grey, 0, 65535) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _existing(path: PathLike) -> Path:
    path = Path(path)
    try:
        empty = path.stat().st_size == 0
    except FileNotFoundError:
        raise MediaError(f"{path}: no such file") from None
    except OSError as error:
        raise MediaError(f"{path}: cannot be opened ({error.strerror})") from error
    if path.is_dir():
        raise MediaError(f"{path}: is a directory, expected a file")
    if empty:
        raise MediaError(f"{path}: is empty")
    return path
