"""The paper's ablations on the synthetic world (section 6.6; guidance: section 4.2), as far as a toy can repeat them.

    rope      sa3d, plain, embeddings: a small renderer each, from the same random weights (figure 15)
    planner   full, states, none: the toy's renderer fine-tuned with its planner's plan, with its states of text and
              sources alone, and without a planner (figure 16)
    apg       guidance with and without adaptive projection, twice as strong too: nothing is trained

Arms of a comparison and a seed see the same examples, noise and drops, take the same number of steps, which the recipe
fixes, and answer the same held-out samples from the same noise. An arm that runs out of time is not measured, since
fewer steps would be another comparison. Everything goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.torch import load_file

from ..checkpoint import WEIGHTS, save_renderer
from ..data.scene import Frames
from ..data.world import Sample
from ..errors import UserError
from ..pipeline import Bernini
from ..renderer.config import RendererConfig
from ..renderer.guidance import PLANS
from ..renderer.sampler import Experts
from ..request import Request, settle
from ..training import recipe as recipes
from ..training.data import open_mixture
from ..training.models import TrainedRenderer, open_models
from ..training.recipe import Recipe
from ..training.stage import Stage
from ..training.stages import make_stage
from ..training.stages.renderer import RendererStage
from ..training.trainer import LOG, MODEL, Trainer
from .arms import BLOCKS, RENDERER, make_renderer
from .leaks import Leak, Watch
from .suite import Generate, Results, evaluate, reconstruction, request_of
from .suite import Progress as Report

if TYPE_CHECKING:
    from ..data.mixture import Mixture
    from ..training.export import Writer
    from ..training.models import Models

RECIPE = "toy/ablation"
FINE_TUNED = ("steps=250", "batch.samples=16", "optimizer.lr=1e-3")
"""What the planner's comparison changes in the recipe: it begins with a renderer that is trained already."""
PLANNER_ARMS: Mapping[str, tuple[str, ...]] = {
    "full": ("stage=joint",), "states": ("stage=joint", "dropout.plan=1"), "none": (),
}  # fmt: skip
"""By arm: its further changes. In ``states`` the planner learns the same, but the renderer reads no target."""

TASKS: Mapping[str, tuple[str, ...]] = {
    "rope": ("rv2v", "r2v", "v2v:recolor", "v2v:background", "v2v:shape"),
    "planner": ("v2v:recolor", "v2v:background", "v2v:shape", "v2v:motion", "rv2v", "r2v:object", "t2v"),
}


@dataclass(frozen=True)
class Pair:
    """Guidance modes that differ in the projection alone, and what they are measured on."""

    without: str
    projected: str
    tasks: tuple[str, ...]


PAIRS = (
    Pair("t2v", "t2v_apg", ("t2v",)),
    Pair("v2v", "v2v_apg", ("v2v:recolor", "v2v:background")),
    Pair("vae_txt_vit", "vae_txt_vit_wapg", ("t2v", "v2v:recolor", "v2v:background", "r2v:object", "rv2v:object")),
)
STRENGTHS = (1, 2)
"""Factors on all scales; the stronger the guidance, the more there is for the projection to take away."""


@dataclass(frozen=True)
class Options:
    """
    Args:
        model: the toy: its autoencoder and text encoder, for ``planner`` and ``apg`` its planner and renderer as well.
        model_id: tells its weights from others.
        data: features made with its autoencoder, for ``planner`` with its vision tower too.
        only: comparisons to make.
        minutes: of training, for each arm in all.
        count: samples of each row.
        steps: of sampling; by default the preset's.
        overrides: of the recipe, ``key=value``.
        renderer: of the arms of ``rope``; what depends on the model follows it.
    """

    model: Path
    model_id: str
    data: Path
    output: Path
    only: tuple[str, ...] = ("rope", "planner", "apg")
    minutes: float = 15.0
    seeds: int = 2
    count: int = 40
    steps: int | None = None
    overrides: tuple[str, ...] = ()
    renderer: RendererConfig = RENDERER


@dataclass(frozen=True)
class Trained:
    """Of an arm: ``curve`` are the renderer's losses, step by step."""

    steps: int
    minutes: float
    curve: Sequence[float]


@dataclass(frozen=True)
class Outcome:
    """One arm with one seed. ``results`` is ``None`` where its time was up; ``trained`` where it needed no training."""

    comparison: str
    arm: str
    seed: int
    results: Results | None = None
    leaks: Sequence[Leak] = ()
    trained: Trained | None = None


class Ablations:
    """
    Args:
        note: called with a sentence where something is worth telling.
        progress: called with (what is being done, how much of it, how much there is).
    """

    def __init__(
        self, options: Options, *, note: Callable[[str], None] = lambda text: None,
        progress: Report = lambda stage, done, total: None,
    ) -> None:  # fmt: skip
        self.options, self._note, self._progress = options, note, progress

    def run(self) -> Iterator[Outcome]:
        """Every arm that was asked for, as it is done: all arms with the first seed, then with the next.

        Raises:
            UserError: a model, data, recipe or output folder that cannot be used.
        """
        makers = {"rope": self.rope, "planner": self.planner, "apg": self.apg}
        for name in self.options.only:
            yield from makers[name]()

    @cached_property
    def base(self) -> Bernini:
        """The model as it is."""
        return Bernini.from_pretrained(self.options.model)

    # --- how segments are told apart ---

    def rope(self) -> Iterator[Outcome]:
        start = self._recipe()
        mixture, models = open_mixture(start), open_models(start)
        assert models.renderer is not None
        theirs = models.renderer.model.config
        config = replace(
            self.options.renderer, text_dim=theirs.text_dim, patch_size=theirs.patch_size,
            in_channels=theirs.in_channels, out_channels=theirs.out_channels,
        )  # fmt: skip
        for seed in range(self.options.seeds):
            for arm in BLOCKS:
                folder = self._folder("rope", arm, seed)
                recipe = replace(start, seed=seed, output=str(folder))
                stage = RopeStage(recipe, models, mixture, arm, config)
                trained = self._train(recipe, stage, f"{arm} {seed}")
                if trained is None:
                    yield Outcome("rope", arm, seed, trained=_so_far(folder))
                    continue
                stage.renderer.load_state_dict(load_file(folder / MODEL / WEIGHTS))  # the averaged weights
                expert = stage.renderer.requires_grad_(False).eval()
                model = Bernini(Experts(expert), self.base.text, self.base.vae, geometry=self.base.geometry)
                generate = generator(model, steps=self.options.steps, seed=seed)
                yield self._measured("rope", arm, seed, generate, TASKS["rope"], trained)

    # --- what the renderer reads of the planner ---

    def planner(self) -> Iterator[Outcome]:
        self._needs_planner("planner")
        for seed in range(self.options.seeds):
            for arm, changes in PLANNER_ARMS.items():
                folder = self._folder("planner", arm, seed)
                recipe = replace(self._recipe(*FINE_TUNED, *changes), seed=seed, output=str(folder))
                trained = self._train(recipe, make_stage(recipe), f"{arm} {seed}")
                if trained is None:
                    yield Outcome("planner", arm, seed, trained=_so_far(folder))
                    continue
                model, asked = Bernini.from_pretrained(folder / MODEL), {}
                if arm == "none":
                    model = without_planner(model)
                elif arm == "states":
                    asked = {"scales": {"tgt": 0.0}, "planning_steps": 1, "decoder_steps": 1}  # nobody reads the plan
                generate = generator(model, steps=self.options.steps, seed=seed, **asked)
                yield self._measured("planner", arm, seed, generate, TASKS["planner"], trained)

    # --- how guidance is added up ---

    def apg(self) -> Iterator[Outcome]:
        for seed in range(self.options.seeds):
            for pair, strength in ((pair, strength) for pair in PAIRS for strength in STRENGTHS):
                if PLANS[pair.projected].needs_planner and not self.base.has_planner:
                    continue
                for mode in (pair.without, pair.projected):
                    generate = guided(self.base, mode, strength, steps=self.options.steps, seed=seed)
                    yield self._measured("apg", f"{mode} x{strength}", seed, generate, pair.tasks, None)

    # --- common to all ---

    def _recipe(self, *changes: str) -> Recipe:
        options = self.options
        given = (f"model={options.model}", f"data.0.source={options.data}")
        recipe = recipes.load(RECIPE, [*changes, *options.overrides, *given])
        if recipe.train_text_encoder:
            raise UserError("train_text_encoder: ablations share the model's text encoder, so it is not trained")
        return recipe

    def _folder(self, comparison: str, arm: str, seed: int) -> Path:
        return self.options.output / comparison / f"{arm.replace(' ', '-')}-{seed}"

    def _needs_planner(self, comparison: str) -> None:
        if not self.base.has_planner:
            raise UserError(f"{self.options.model}: has no planner, which the comparison {comparison!r} is about")

    def _train(self, recipe: Recipe, stage: Stage, name: str) -> Trained | None:
        """``None`` where the time was up before the last step."""
        trainer = Trainer(
            recipe, stage, note=lambda text: self._note(f"{name}: {text}"),
            report=lambda done: self._progress(name, done.step, done.steps),
        )  # fmt: skip
        spent = _so_far(Path(recipe.output))
        left = 60 * (self.options.minutes - spent.minutes)
        if (spent.steps < recipe.steps and left <= 0) or not trainer.train(until=time.monotonic() + left):
            spent = _so_far(Path(recipe.output))
            self._note(
                f"{name}: {self.options.minutes:g} minutes were up after step {spent.steps} of {recipe.steps}, so it "
                "is not measured; go on with larger --minutes, or begin again with fewer steps in another --output"
            )
            return None
        return _so_far(Path(recipe.output))

    def _measured(
        self, comparison: str, arm: str, seed: int, generate: Generate, tasks: Sequence[str], trained: Trained | None
    ) -> Outcome:
        options, folder = self.options, self._folder(comparison, arm, seed) / "eval"
        settings = {"model": options.model_id, "steps": options.steps, "seed": seed}
        watch = Watch(generate, folder / "leaks.jsonl")
        results = evaluate(
            watch, tasks=tasks, splits=("test",), count=options.count, reconstruct=reconstruction(self.base.vae),
            folder=folder, settings=settings,
            progress=lambda _, done, total: self._progress(f"{arm} {seed}: samples", done, total),
        )  # fmt: skip
        return Outcome(comparison, arm, seed, results, watch.of(results.rows), trained)


class RopeStage(RendererStage):
    """Stage II with an arm in place of the checkpoint's renderer; what it writes is the arm alone."""

    def __init__(self, recipe: Recipe, models: Models, mixture: Mixture, arm: str, config: RendererConfig) -> None:
        assert models.renderer is not None
        own = TrainedRenderer(make_renderer(arm, config, recipe.seed), models.renderer.boundary)
        super().__init__(recipe, replace(models, renderer=own), mixture)

    def samples(self, folder: Path, step: int, model: Path) -> None:
        """None: arms are looked at in the suite's frames."""

    def export(self, folder: Path, writer: Writer) -> None:
        save_renderer(self.renderer, folder)


def generator(model: Bernini, *, steps: int | None, seed: int, **asked: Any) -> Generate:
    """As :func:`bernini.evaluation.suite.generator`, with further fields of the request."""

    def generate(drawn: Sample) -> Frames:
        return model.generate(replace(request_of(drawn, steps=steps, seed=seed), **asked)).frames.numpy()

    return generate


def guided(model: Bernini, mode: str, strength: float, *, steps: int | None, seed: int) -> Generate:
    """A guidance mode at the preset's scales times ``strength``."""

    def generate(drawn: Sample) -> Frames:
        request = request_of(drawn, steps=steps, seed=seed)
        return model.generate(replace(request, mode=mode, scales=scales(model, request, strength))).frames.numpy()

    return generate


def scales(model: Bernini, request: Request, strength: float) -> dict[str, float]:
    """The preset's, with one change: modes with one scale for all sources take a video's where that is the larger."""
    given = settle(request, planner=model.has_planner, geometry=model.geometry).guidance.scales
    sources = max(given["img"], given["vid"]) if request.videos else given["img"]
    return {name: strength * value for name, value in {**given, "img": sources}.items()}


def without_planner(model: Bernini) -> Bernini:
    """The rest of a model: contexts are of the text encoder alone."""
    return Bernini(model.experts, model.text, model.vae, model.device, geometry=model.geometry)


def _so_far(run: Path) -> Trained:
    """What a run's log says."""
    file, curve, seconds, step = run / LOG, list[float](), 0.0, 0
    for text in file.read_text("utf-8").splitlines() if file.is_file() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # a line that a killed process did not finish
            continue
        step, seconds = line["step"], seconds + line["seconds"]
        curve.append(line["dit"])
    return Trained(step, seconds / 60, curve)


def last(curve: Sequence[float], share: float = 0.2) -> float:
    """Mean of the curve's last part: all arms have seen the same examples and noise in it."""
    return float(np.mean(curve[-max(1, round(share * len(curve))) :]))
