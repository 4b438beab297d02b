"""A trained model as a checkpoint: the folder it started from, with what was trained in place of what was there.

Configs, tokenizers and all that was not trained are copied as they are; layout, names and stored dtypes stay those of
the folder it started from. Files are copied, and then each trained tensor is written over the old one: no more than one
tensor is in memory, on the process that writes, wherever its rows are.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import Stored, component_folder, open_experts, resolve
from ..errors import UserError
from ..parallel.group import Alone, Group
from ..parallel.patience import patiently
from ..toy import new_folder
from ..weights import read_weights
from . import recipe as recipes
from .recipe import Recipe

Fetch = Callable[[str], Tensor | None]
"""The whole of a trained tensor, ``part/name``, on the first process. All processes ask for the same ones in turn."""
SHARED = {"encoder.embed_tokens.weight": "shared.weight"}
"""UMT5's names of one tensor; a file may have either or both."""


@dataclass(frozen=True)
class Writer:
    """Writes checkpoints of a run.

    Args:
        names: ``part/name`` of everything that was trained.
    """

    recipe: Recipe
    names: Iterable[str]
    fetch: Fetch
    world: Group

    def __call__(self, folder: Path, finish: Callable[[Path], None] = lambda folder: None) -> None:
        """Writes the checkpoint; the folder appears complete or not at all. One that is there already is replaced.

        Args:
            finish: called by the first process with the unfinished folder, to add what the weights do not say.

        Raises:
            UserError: it cannot be written; the folder that was there stays.
        """
        first, start = self.world.rank == 0, resolve(self.recipe.model)
        trained = set(self.names)
        stored = {name: place for name, place in stored_tensors(self.recipe, start).items() if _known(name) in trained}
        with ExitStack() as stack:

            def copy() -> Path | None:
                if not first:
                    return None
                fresh = _beside(folder, "new")
                try:
                    shutil.rmtree(fresh, ignore_errors=True)
                    work = stack.enter_context(new_folder(fresh))
                    for file in sorted(file for file in start.rglob("*") if not file.is_dir()):
                        target = work / file.relative_to(start)
                        target.parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(file, target)
                except OSError as error:
                    raise UserError(f"{folder}: cannot be written ({error})") from None
                return work

            work, failed = patiently(self.world, copy), ""
            for name, place in stored.items():
                tensor = self.fetch(_known(name))
                if work is not None and not failed:
                    try:
                        write_tensor(work / place.file.relative_to(start), place, tensor)
                    except OSError as error:
                        failed = f"{folder}: cannot be written ({error})"

            def rest() -> None:
                if failed:
                    raise UserError(failed)
                if work is not None:
                    finish(work)

            patiently(self.world, rest)
        if first:
            _take_place(folder)
        self.world.tell(None)


def stored_tensors(recipe: Recipe, start: Path) -> dict[str, Stored]:
    """Where everything that a stage trains lies in the checkpoint that it started from, by ``part/name``.

    Raises:
        CheckpointError: a file is missing or broken.
    """
    from ..planner.loading import open_planner
    from .models import NEEDS

    needs, found = NEEDS[recipe.stage], dict[str, dict[str, Stored]]()
    if "vae" in needs:
        found["vae"] = read_weights(component_folder(start, "vae"))
    if "renderer" in needs:
        found["renderer"] = open_experts(start).experts["low" if recipe.expert == "low" else "high"].tensors
    if "planner" in needs:
        found["planner"] = open_planner(start).tensors
    if "text" in needs and recipe.train_text_encoder:
        found["text_encoder"] = read_weights(component_folder(start, "text_encoder"))
    return {f"{part}/{name}": place for part, tensors in found.items() for name, place in tensors.items()}


def export_run(run: Path, folder: Path) -> int:
    """Writes the model of a run's last checkpoint, tensor by tensor; nothing is trained, and no other part of the
    checkpoint is read. Returns its step.

    Raises:
        UserError: there is no checkpoint, it cannot be read, or the model cannot be written.
    """
    from . import checkpoints
    from .stages import make_stage
    from .stages.vae import VaeStage

    last = checkpoints.latest(run)
    if last is None:
        raise UserError(f"{run}: has no checkpoint; the folder of a run is what its recipe calls output")
    with checkpoints.reading(last) as (pieces, facts):
        recipe = recipes.read(facts["recipe"], str(last / checkpoints.FACTS))
        kind = "ema" if recipe.ema else "weights"
        names = [name.removeprefix("weights/") for name in pieces if name.startswith("weights/")]
        write = Writer(recipe, names, lambda name: pieces.read(f"{kind}/{name}"), Alone())
        stage = make_stage(recipe) if recipe.stage == "vae" else None
        write(folder, stage.measure if isinstance(stage, VaeStage) else lambda folder: None)
    return int(facts["step"])


def _known(name: str) -> str:
    """As the run calls it."""
    part, _, own = name.partition("/")
    return f"{part}/{SHARED.get(own, own)}" if part == "text_encoder" else name


def write_tensor(file: Path, place: Stored, tensor: Tensor | None) -> None:
    """Over the one that is there, in its dtype."""
    if place.size == 0:
        return
    assert tensor is not None and place.torch_dtype is not None and tuple(tensor.shape) == place.shape
    values = tensor.detach().to("cpu", place.torch_dtype).contiguous()
    with file.open("r+b") as out:
        out.seek(place.start)
        values.view(-1).view(torch.uint8).numpy().tofile(out)


def _take_place(folder: Path) -> None:
    old = _beside(folder, "old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    _beside(folder, "new").rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")
