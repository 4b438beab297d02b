"""The held-out samples of every task, one after another: what was generated for them, measured.

``generate`` is anything that makes frames for a sample, so a model, an ablation of one and an oracle are evaluated
alike. Results are written as they come, and a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data import world
from ..data.scene import FPS, FRAMES, SIZE, Frames
from ..data.world import EDITS, Sample, sample
from ..errors import UserError
from .checks import FOLLOWED, identity, judge

if TYPE_CHECKING:
    from ..pipeline import Bernini
    from ..renderer.vae import VideoAutoencoder
    from ..request import Request

TASKS = tuple(task for task in world.TASKS if task != "understanding")
SPLITS = ("test", "unseen")
KINDS: Mapping[str, tuple[str, ...]] = {
    "i2i": tuple(edit for edit in EDITS if edit != "motion"), "v2v": EDITS, "r2v": ("object", "digit"),
    "rv2v": ("object", "digit"),
}  # fmt: skip
"""What is counted apart within a task: edits, and whether a reference shows a handwritten digit. A withheld combination
is never a digit, so the split unseen has none."""

Generate = Callable[[Sample], Frames]
"""Makes uint8 ``[F, 32, 32, 3]`` for a sample, with as many frames as its target."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, order=True)
class Cell:
    """Samples that are counted together. ``kind`` is of :data:`KINDS`, empty for a task without any."""

    task: str
    kind: str
    split: str

    @property
    def name(self) -> str:
        return f"{self.task} {self.kind}".rstrip()


@dataclass(frozen=True)
class Result:
    """One sample, measured.

    Args:
        seed: the sample's number in its split.
        shape: of the thing that it is about.
        checks, psnr, psnr_truth, identity: see :class:`bernini.evaluation.checks.Verdict`.
        ceiling: identity of the truth after the autoencoder; ``None`` where there was none.
    """

    task: str
    kind: str
    split: str
    seed: int
    shape: str
    checks: dict[str, bool]
    psnr: float | None = None
    psnr_truth: float | None = None
    identity: bool | None = None
    ceiling: bool | None = None

    @property
    def cell(self) -> Cell:
        return Cell(self.task, self.kind, self.split)

    @property
    def followed(self) -> bool:
        """Whether the instruction was: :data:`bernini.evaluation.checks.FOLLOWED`."""
        return all(self.checks[name] for name in FOLLOWED.get(self.kind, FOLLOWED.get(self.task, ())))


@dataclass(frozen=True)
class Shown:
    """A sample with what was made of it, for the picture."""

    name: str
    sample: Sample
    frames: Frames


@dataclass(frozen=True)
class Results:
    rows: tuple[Result, ...]
    shown: tuple[Shown, ...] = ()

    def of(self, task: str, kind: str | None = None, split: str | None = None) -> list[Result]:
        """Those of a task, perhaps of one kind and split."""
        return [
            row for row in self.rows if row.task == task and kind in (None, row.kind) and split in (None, row.split)
        ]


def cells(tasks: Sequence[str] = TASKS, splits: Sequence[str] = SPLITS) -> list[Cell]:
    """All kinds of the tasks; ``"v2v:recolor"`` names one alone.

    Raises:
        UserError: an unknown task, kind or split.
    """
    chosen = []
    for name in tasks:
        task, colon, kind = name.partition(":")
        if task not in TASKS:
            raise UserError(f"unknown task {task!r}; there are {', '.join(TASKS)}")
        kinds = KINDS.get(task, ("",))
        if colon and kind not in kinds:
            raise UserError(f"{task} has no {kind!r}" + (f"; there are {', '.join(kinds)}" if all(kinds) else ""))
        chosen += [(task, each) for each in ([kind] if colon else kinds)]
    for split in splits:
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    found = [Cell(task, kind, split) for task, kind in chosen for split in splits]
    return list(dict.fromkeys(cell for cell in found if (cell.kind, cell.split) != ("digit", "unseen")))


def samples(cell: Cell, count: int) -> Iterator[Sample]:
    """The first ``count`` of a cell."""
    seed, made = 0, 0
    while made < count:
        edit = cell.kind if cell.task in ("i2i", "v2v") else None
        drawn = sample(cell.task, seed, cell.split, edit=edit)
        seed += 1
        assert drawn.scene is not None
        if edit is not None or not cell.kind or (cell.kind == "digit") == (drawn.scene.main.shape == "digit"):
            made += 1
            yield drawn


def evaluate(
    generate: Generate,
    *,
    tasks: Sequence[str] = TASKS,
    splits: Sequence[str] = SPLITS,
    count: int = 40,
    reconstruct: Callable[[Frames], Frames] | None = None,
    folder: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Results:
    """Generates and measures ``count`` samples of every cell; cells take turns, so that a part of a run says something.

    Args:
        reconstruct: the autoencoder there and back, for the ceiling of identity.
        folder: where ``results.jsonl`` and the frames of each cell's first sample go. What is there is not made again.
        settings: whatever decides about results; results in the folder must have been made with the same.

    Raises:
        UserError: an unknown task or split, or a folder with results of other settings.
    """
    asked = cells(tasks, splits)
    log = None if folder is None else _Log(folder, dict(settings or {}))
    rows: list[Result] = []
    shown: dict[Cell, Shown] = {}
    turns = [iter(samples(cell, count)) for cell in asked]
    total = count * len(asked)
    for turn in range(count):
        for cell, drawn in zip(asked, (next(each) for each in turns), strict=True):
            if progress is not None:
                progress("samples", len(rows), total)
            done = None if log is None else log.done.get((cell, drawn.seed))
            first = turn == 0 and cell.split == "test"
            frames = log.read_frames(cell) if first and done is not None and log is not None else None
            if done is None or (first and frames is None):
                frames = np.asarray(generate(drawn))
                done = _measured(cell, drawn, frames, reconstruct)
                if log is not None:
                    if first:
                        log.write_frames(cell, frames)
                    log.write(done)
            rows.append(done)
            if first and frames is not None:
                shown[cell] = Shown(cell.name, drawn, frames)
    if progress is not None:
        progress("samples", total, total)
    return Results(tuple(rows), tuple(shown.values()))


def _measured(
    cell: Cell, drawn: Sample, frames: Frames, reconstruct: Callable[[Frames], Frames] | None
) -> Result:  # fmt: skip
    verdict, ceiling = judge(drawn, frames), None
    assert drawn.scene is not None and drawn.target is not None
    if verdict.identity is not None and reconstruct is not None:
        best = identity(drawn, reconstruct(drawn.target))
        ceiling = best is not None and best.number == drawn.scene.main.digit
    about = drawn.sources[0].main if drawn.edit == "remove" else drawn.scene.main
    return Result(
        cell.task, cell.kind, cell.split, drawn.seed, about.shape, verdict.checks, verdict.psnr, verdict.psnr_truth,
        verdict.identity, ceiling,
    )  # fmt: skip


# --- a model ----------------------------------------------------------------------------------------------------------


def request_of(drawn: Sample, *, steps: int | None = None, seed: int = 0) -> Request:
    """The request that a sample is; i2v goes as r2v, since no released task animates an image.

    Args:
        steps: of sampling; by default the preset's.
        seed: of the noise; the sample's number is added to it.
    """
    import torch

    from ..media import Clip
    from ..request import Request

    return Request(
        drawn.prompt,
        videos=[Clip(torch.from_numpy(video), FPS) for video in drawn.videos],
        images=[torch.from_numpy(image) for image in drawn.images],
        task="r2v" if drawn.task == "i2v" else drawn.task,
        steps=steps,
        seed=seed + drawn.seed,
        size=(SIZE, SIZE),
        num_frames=FRAMES,
        fps=FPS,
    )


def generator(model: Bernini, *, steps: int | None = None, seed: int = 0) -> Generate:
    """A model as :func:`evaluate` takes it; see :func:`request_of`."""

    def generate(drawn: Sample) -> Frames:
        return model.generate(request_of(drawn, steps=steps, seed=seed)).frames.numpy()

    return generate


def reconstruction(vae: VideoAutoencoder) -> Callable[[Frames], Frames]:
    """The autoencoder there and back."""
    import torch

    from ..media import from_model, to_model

    return lambda frames: from_model(vae.decode(vae.encode(to_model(torch.from_numpy(frames))))).numpy()


# --- files ------------------------------------------------------------------------------------------------------------


class _Log:
    """``results.jsonl``, settings first and then a line for each result, and ``frames/*.npy``."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.file, self.frames = folder / "results.jsonl", folder / "frames"
        self.done: dict[tuple[Cell, int], Result] = {}
        try:
            self.frames.mkdir(parents=True, exist_ok=True)
            lines = self.file.read_text("utf-8").splitlines(keepends=True) if self.file.is_file() else []
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{folder}: cannot be used as an output folder ({error})") from None
        whole = [line for line in lines if line.endswith("\n")]  # the last one may have been cut off
        header = json.dumps({"settings": settings}, sort_keys=True) + "\n"
        if whole and whole[0] != header:
            raise UserError(f"{self.file}: holds results of other settings; give another --output, or remove it")
        try:
            for line in whole[1:]:
                row = Result(**json.loads(line))
                self.done[row.cell, row.seed] = row
        except (ValueError, TypeError):
            raise UserError(f"{self.file}: a line is no result; give another --output, or remove it") from None
        if not whole or len(whole) < len(lines):
            self.file.write_text("".join(whole or [header]), "utf-8")

    def write(self, row: Result) -> None:
        self.done[row.cell, row.seed] = row
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")

    def write_frames(self, cell: Cell, frames: Frames) -> None:
        path = self._path(cell)
        beside = path.with_suffix(f".{os.getpid()}.part")
        with beside.open("wb") as file:
            np.save(file, frames, allow_pickle=False)
        beside.replace(path)

    def read_frames(self, cell: Cell) -> Frames | None:
        try:
            return np.load(self._path(cell), allow_pickle=False)
        except (OSError, ValueError):
            return None

    def _path(self, cell: Cell) -> Path:
        return self.frames / f"{cell.name.replace(' ', '-')}-{cell.split}.npy"
