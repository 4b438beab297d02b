"""Video and image files: reading at the sizes and frames the models want, and writing.

Pictures are uint8 RGB with the channels last, as files and people have them: an image is ``[H, W, 3]``, a video
``[F, H, W, 3]``. Models want float ``[3, F, H, W]`` in [-1, 1]: :func:`to_model` and :func:`from_model` convert.

A video is streamed: only the frames that are used are resized and kept, so memory does not grow with its length. A
file that cannot be used raises :class:`MediaError` with a sentence for the person who named it. Outputs appear whole
or not at all: they are written beside the target and renamed at the end.
"""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
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
_CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".gif": "gif"}
_PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


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


# --- writing --------------------------------------------------------------------------------------------------------


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
