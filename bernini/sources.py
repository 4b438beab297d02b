"""Reading a request's media, and the size of what it will make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from .media import Clip, read_image, read_video
from .presets import TASKS
from .request import Request, Settings

DEFAULT_SIZE = (480, 848)
"""Of checkpoints and presets that state none."""


def read_sources(
    request: Request, settings: Settings, progress: Callable[[str, int, int], None] | None = None
) -> Request:
    """The request with its files read; media that are read already stay as they are.

    The first source of an editing task takes the wanted size; all others keep their own, up to ``max_size``.

    Raises:
        MediaError: a file that cannot be read.
    """
    exact = None if request.size is None else (request.size[1], request.size[0])  # media say width first
    edited_image = TASKS[settings.task].still and not request.videos
    report = progress or (lambda stage, done, total: None)
    videos, images = list(request.videos), list(request.images)
    total = len(videos) + len(images)
    for number, video in enumerate(videos):
        report("reading", number, total)
        if not isinstance(video, Clip):
            size = exact if number == 0 else None
            videos[number] = read_video(
                video, fps=settings.fps, num_frames=settings.frames, max_size=settings.max_size, size=size,
                geometry=settings.geometry,
            )  # fmt: skip
    for number, image in enumerate(images):
        report("reading", len(videos) + number, total)
        if not isinstance(image, Tensor):
            size = exact if edited_image and number == 0 else None
            images[number] = read_image(image, max_size=settings.max_size, size=size, geometry=settings.geometry)
    return replace(request, videos=videos, images=images)


def result_shape(request: Request, settings: Settings) -> tuple[int, int, int]:
    """Frames, height and width of the result: as the source that is edited, or as asked for.

    ``request`` comes from :func:`read_sources`.
    """
    if request.videos:
        clip = request.videos[0]
        assert isinstance(clip, Clip), "sources are read first"
        frames, height, width, _ = clip.frames.shape
        return frames, height, width
    if TASKS[settings.task].still and request.images:
        picture = request.images[0]
        assert isinstance(picture, Tensor), "sources are read first"
        return 1, picture.shape[0], picture.shape[1]
    return (settings.frames, *(request.size or settings.geometry.size or settings.preset.size or DEFAULT_SIZE))
