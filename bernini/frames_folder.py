"""A video as a folder of numbered pictures, whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from .media import MediaError, PathLike, check_frames
from .media_write import write_image


def write_frames(folder: PathLike, frames_FHW3: Tensor) -> None:
    """Writes uint8 ``[F, H, W, 3]`` as ``00000.png``, ``00001.png``, ... into a new or empty folder.

    Raises:
        ValueError: frames of another shape or dtype.
        MediaError: the folder holds something already, or cannot be made.
    """
    check_frames("write_frames", frames_FHW3)
    with _new_folder(Path(folder)) as part:
        for number, frame in enumerate(frames_FHW3):
            write_image(part / f"{number:05d}.png", frame)
        os.rename(part, folder)  # takes the place of an empty folder, and fails on one that has been filled meanwhile


def check_frames_folder(folder: PathLike) -> None:
    """Raises now what :func:`write_frames` would raise after hours of work."""
    with _new_folder(Path(folder)):
        pass


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder``, removed at the end if it was not renamed."""
    if os.path.lexists(folder):
        if not folder.is_dir():
            raise MediaError(f"{folder}: exists and is no folder")
        if any(folder.iterdir()):
            raise MediaError(f"{folder}: exists and is not empty; frames go into a new or empty folder")
    part = folder.absolute().with_name(f".{folder.absolute().name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.mkdir()
        yield part
    except OSError as error:
        reason = error.strerror or str(error)
        if not part.parent.is_dir():
            reason = f"the directory {folder.parent} does not exist"
        raise MediaError(f"{folder}: cannot be written ({reason})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
