"""Writing video and image files: as the suffix says, whole or not at all.

A file is written beside its target and renamed at the end. Pictures are uint8 RGB with the channels last, as in
:mod:`bernini.media`; what cannot be written raises its :class:`MediaError`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .media import Clip, MediaError, PathLike, check_frames

_CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".gif": "gif"}
_PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@contextmanager
def _whole_or_nothing(path: Path, kinds: dict[str, str]) -> Iterator[tuple[Path, str]]:
    """A temporary file beside ``path`` and the format its suffix asks for; renamed at the end, removed on any exit."""
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise MediaError(f"{path}: unknown suffix {path.suffix!r}; expected one of {', '.join(kinds)}")
    if path.is_dir():
        raise MediaError(f"{path}: is a directory, expected a file name")
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield part, kind
        os.replace(part, path)
    except (OSError, av.FFmpegError) as error:
        reason = error.strerror or str(error)
        if not path.parent.is_dir():
            reason = f"the directory {path.parent} does not exist"
        raise MediaError(f"{path}: cannot be written ({reason})") from error
    finally:
        if os.path.lexists(part):
            os.unlink(part)


def is_picture(path: PathLike) -> bool:
    """Whether the suffix is one of still images."""
    return Path(path).suffix.lower() in _PICTURES


def check_output(path: PathLike, frames: int = 1) -> None:
    """Raises now what :func:`write_media` would raise after hours of work.

    Raises:
        MediaError: a bad suffix, that of a picture for more than one of ``frames``, or a place not to be written.
    """
    if is_picture(path) and frames > 1:
        kinds = ", ".join(_CONTAINERS)
        raise MediaError(f"{path}: {frames} frames do not fit into a picture; the suffixes of videos are {kinds}")
    with suppress(_Probed), _whole_or_nothing(Path(path), _CONTAINERS | _PICTURES):
        raise _Probed


class _Probed(Exception):
    """Leaves a probe before anything is renamed."""


def write_media(path: PathLike, clip: Clip) -> None:
    """Writes a clip as its suffix says: :func:`write_video`, or :func:`write_image` for a single frame.

    Raises:
        MediaError: the file cannot be written, or a picture is asked of more than one frame.
    """
    if not is_picture(path):
        write_video(path, clip.frames, clip.fps)
    elif len(clip.frames) == 1:
        write_image(path, clip.frames[0])
    else:
        check_output(path, len(clip.frames))


def write_video(path: PathLike, frames_FHW3: Tensor | NDArray[np.uint8], fps: float, crf: float = 8) -> None:
    """Writes uint8 ``[F, H, W, 3]`` RGB.

    ``.mp4``, ``.mov`` and ``.mkv`` become H.264 (yuv420p), which plays everywhere; ``.gif`` an endless animation with
    one palette made from all frames. A GIF counts in hundredths of a second: its frames differ by one in length where
    the rate asks for it, and more than 50 in a second are shown slower.

    The same frames give the same bytes on one machine with the same libraries. Elsewhere they may not: x264 decides
    by the kind and the number of processors.

    Args:
        fps: frames per second.
        crf: constant rate factor of H.264, 0 (largest) to 51; 8 cannot be told from the original by eye.

    Raises:
        ValueError: frames of another shape or dtype, or a rate that is not positive.
        MediaError: the file cannot be written, or the size is odd for H.264: yuv420p stores colour for 2 x 2 pixels.
    """
    path = Path(path)
    frames = torch.as_tensor(frames_FHW3)
    check_frames("write_video", frames)
    if fps <= 0:
        raise ValueError(f"write_video: fps must be positive, got {fps}")
    height, width = frames.shape[1:3]
    gif = path.suffix.lower() == ".gif"
    if not gif and (width % 2 or height % 2):
        raise MediaError(f"{path}: H.264 in yuv420p needs an even width and height, got {width}x{height}")
    rate = Fraction(min(fps, 50) if gif else fps).limit_denominator(100_000)
    with _whole_or_nothing(path, _CONTAINERS) as (part, container_format):
        options = {"movflags": "faststart"} if container_format in ("mp4", "mov") else {}
        if container_format == "matroska":
            options["fflags"] = "+bitexact"  # without it the file gets a random identity
        with av.open(str(part), "w", format=container_format, options=options) as container:
            stream: Any = container.add_stream("gif" if gif else "libx264", rate=rate)
            stream.width, stream.height, stream.pix_fmt = width, height, "pal8" if gif else "yuv420p"
            pictures = _pictures(frames)
            if gif:
                pictures = _with_palette(pictures, width, height, rate)
            else:
                stream.options = {"crf": str(crf), **_repeatable()}
                # swscale converts with the BT.601 matrix; untagged, players guess BT.709 for large pictures.
                stream.codec_context.colorspace = av.video.reformatter.Colorspace.SMPTE170M
            for picture in pictures:
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))


@cache
def _repeatable() -> dict[str, str]:
    """Options that keep x264 from its AVX-512 code, which writes another file every time.

    Its ``mbtree_propagate_list`` takes eight macroblocks a turn and does not mask the last ones: where the width is no
    multiple of 128, what freed memory held decides how the bits are spread. Its AVX2 code is right and as fast. A
    processor with AVX-512 has all of AVX2; others must not be told to use it.
    """
    try:
        wide = "avx512f" in Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        wide = False
    return {"x264-params": "asm=AVX2"} if wide else {}


def _pictures(frames: Tensor) -> Iterator[Any]:
    for pixels in frames:
        yield av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels.cpu().numpy()), format="rgb24")


def _with_palette(pictures: Iterator[Any], width: int, height: int, rate: Fraction) -> Iterator[Any]:
    """The same pictures in the 256 colours that suit all of them best, as ffmpeg chooses them."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=1 / rate)
    split, choose = graph.add("split"), graph.add("palettegen", "stats_mode=full")
    # Error diffusion within moving rectangles only: what stands still does not flicker.
    use, sink = graph.add("paletteuse", "dither=sierra2_4a:diff_mode=rectangle"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(choose, 1, 0)
    choose.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for number, picture in enumerate(pictures):
        picture.pts, picture.time_base = number, 1 / rate
        source.push(picture)
    source.push(None)
    with suppress(av.EOFError, av.BlockingIOError):
        while True:
            yield sink.pull()


def write_image(path: PathLike, image_HW3: Tensor | NDArray[np.uint8]) -> None:
    """Writes uint8 ``[H, W, 3]`` RGB as ``.png``, ``.jpg`` or ``.webp``.

    Raises:
        ValueError: an image of another shape or dtype.
        MediaError: the file cannot be written.
    """
    image = torch.as_tensor(image_HW3)
    check_frames("write_image", image[None])
    save_picture(Path(path), Image.fromarray(image.cpu().numpy()))


def save_picture(path: Path, picture: Image.Image) -> None:
    with _whole_or_nothing(path, _PICTURES) as (part, kind):
        quality = {} if kind == "PNG" else {"quality": 95}
        picture.save(part, format=kind, **quality)
