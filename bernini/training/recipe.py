"""Recipes: what a run of training does, as a small TOML file with overrides ``key=value`` from the command line.

Every key has a type and most have a default; an unknown key is an error that names the known ones. Paths are relative
to the working directory, as those of every other command.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, cast

from ..errors import UserError

FOLDER = Path(__file__).parent / "recipes"
"""Recipes that ship with the package; ``bernini train toy/vae`` finds them by name."""

StageName = Literal["vae", "understanding", "planner", "renderer", "joint"]


@dataclass(frozen=True)
class Part:
    """Data of one kind in the mixture.

    Args:
        source: a folder of feature files, a manifest of raw records, or ``"world"``: samples of the synthetic world,
            drawn as they are needed.
        weight: share of the samples, in proportion to the other parts that are active.
        tasks: only these; with numbers, their shares inside of the part.
        start, end: the part of the run during which it is used, 0 to 1.
        decay: whether its weight falls in a straight line from ``start`` to nothing at ``end`` (paper section 4.1,
            pair data).
        count, first: of ``"world"``: how many samples of each task there are, and the seed of the first.
        trust_unmarked: whether features that do not say which model made them, as the release's do not, are taken.
    """

    source: str
    weight: float = 1.0
    tasks: Mapping[str, float] = field(default_factory=dict)
    start: float = 0.0
    end: float = 1.0
    decay: bool = False
    count: int = 1_000_000
    first: int = 0
    trust_unmarked: bool = False


@dataclass(frozen=True)
class Batch:
    """Of one optimizer step.

    Args:
        samples: at most so many in a micro-batch.
        renderer_tokens, planner_tokens: budgets of a micro-batch, in tokens of the packed sequence of each model.
        accumulate: micro-batches of a step; more where a balanced step does not fit in so many.
        window: steps whose examples are dealt out anew, so that each has as much work. A step's losses then weigh as
            many examples as it has, and the window's gradients add up to those of the plain mean.
        balance: give examples to processes, and to micro-batches, by the work that they are, instead of in turn.
        split: at most so many processes share an example that is more than one's part of the work: a power of two.
        fit: steps after which the estimate of that work is fitted again to measured times; 0 never. The same examples
            come in the same steps, but sums are rounded as the times fell out.
    """

    samples: int = 1_000_000
    renderer_tokens: int = 150_000
    planner_tokens: int = 150_000
    accumulate: int = 1
    window: int = 1
    balance: bool = False
    split: int = 1
    fit: int = 0


@dataclass(frozen=True)
class Optimizer:
    """AdamW as the release has it (facts, section F), or Muon for matrices with AdamW for all the rest.

    Args:
        lr: after warm-up.
        warmup: steps.
        schedule: what follows: constant, or down to ``lr * final`` along a line or a cosine.
        clip: largest norm of all gradients together.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final: float = 0.0
    clip: float = 1.0


@dataclass(frozen=True)
class Dropout:
    """How often a condition is left out, each for itself (facts, section F); ``plan``: the planned target."""

    text: float = 0.1
    image: float = 0.1
    video: float = 0.1
    plan: float = 0.1


@dataclass(frozen=True)
class Losses:
    """Weights of equation 3; and of the autoencoder: absolute and squared errors, and the pull on its posteriors."""

    text: float = 0.2
    visual: float = 1.0
    dit: float = 1.0
    pixels: float = 1.0
    squares: float = 0.0
    kl: float = 1e-6


@dataclass(frozen=True)
class Noise:
    """Of the renderer's timesteps.

    Args:
        low, high: the noise levels of the expert that is trained, 0 to 1.
        table: whose shifts, see :mod:`bernini.training.noise`.
    """

    low: float = 0.0
    high: float = 1.0
    table: Literal["paper", "release"] = "paper"


@dataclass(frozen=True)
class Offload:
    """Of what blocks keep for backward, to host memory and back (see ``bernini.offload.activations``). Same bits.

    Args:
        policy: ``hidden``: the inputs of blocks; ``hidden+attention``: attention's outputs too, which are then not
            computed again. Both want ``recompute``. ``all``: everything, without it.
        host_gib: GiB of host memory for a process; 0 for its part of half of the machine's. What does not fit stays.
    """

    policy: Literal["none", "hidden", "hidden+attention", "all"] = "none"
    host_gib: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """A run.

    Args:
        stage: what is trained: the autoencoder; the language model and vision tower by next tokens; stage I, II or III.
        model: checkpoint to start from.
        output: folder of the run; an unfinished run in it goes on.
        steps: optimizer steps in all.
        expert: which one stage II and III train: of noise above the checkpoint's boundary, below, or its only one.
        train_text_encoder: whether T5 is trained with the renderer (paper section 4.1).
        train_planner: of stage III: whether the planner is trained too; otherwise the renderer learns to read it as it
            is, from examples with a target alone, for three quarters of a step's time (the toy's).
        precision: of the computation; weights are kept and updated in float32.
        recompute: keep only the blocks' inputs and compute the rest again in backward.
        sequence: processes that share each packed sequence; of several processes, a number that divides theirs.
        swap: how those send each other heads (:mod:`bernini.parallel.policy`); auto measures. The result is the same.
        ema: decay of the averaged weights, which are what is exported; 0 for none.
        least_psnr: of stage II and III: how good the autoencoder must be, in dB, by what its own training noted.
        copies: noisy copies of a masked ViT embedding in the decoder's loss.
        mask_ratio: (alpha, beta) of the mask ratio's Beta distribution, for all tasks; empty for those of the paper's
            table 3, which is stage I's. What is masked is planned, and in stage III the renderer reads what is not.
        save_every, keep, log_every, samples_every: in steps, and how many checkpoints stay.
    """

    stage: StageName
    model: str
    output: str
    steps: int
    seed: int = 0
    expert: Literal["high", "low", "only"] = "only"
    train_text_encoder: bool = False
    train_planner: bool = True
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    recompute: bool = False
    sequence: int = 1
    swap: Literal["auto", "packed", "async", "chunk"] = "auto"
    ema: float = 0.9999
    least_psnr: float = 0.0
    copies: int = 16
    mask_ratio: tuple[float, ...] = ()
    save_every: int = 1000
    keep: int = 2
    log_every: int = 10
    samples_every: int = 0
    data: tuple[Part, ...] = ()
    batch: Batch = Batch()
    optimizer: Optimizer = Optimizer()
    dropout: Dropout = Dropout()
    loss: Losses = Losses()
    noise: Noise = Noise()
    offload: Offload = Offload()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        name: a file, or the name of one that ships with the package.
        overrides: ``"steps=10"``, ``"optimizer.lr=1e-4"``, ``"data.0.weight=2"``; values as TOML writes them, text
            without its quotes too.

    Raises:
        UserError: no such recipe, no TOML, or a key or value that cannot be.
    """
    path = find(name)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not TOML ({error})") from None
    for override in overrides:
        _override(values, override)
    return read(values, str(path))


def read(values: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from what TOML or :meth:`Recipe.to_dict` says.

    Raises:
        UserError: a key or value that cannot be; ``where`` is named.
    """
    recipe = cast("Recipe", _built(Recipe, values, where, ""))
    _check(recipe, where)
    return recipe


def find(name: str | Path) -> Path:
    """The file of a recipe."""
    for candidate in (Path(name), FOLDER / f"{name}.toml"):
        if candidate.is_file():
            return candidate
    raise UserError(f"no recipe {name}: neither a file nor one of {', '.join(shipped())}")


def shipped() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.toml"))


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: expected key=value, for example optimizer.lr=1e-4")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    at: Any = values
    *parents, last = key.split(".")
    for number, name in enumerate(parents):
        if isinstance(at, list):
            if not name.isdigit() or int(name) >= len(at):
                raise UserError(f"override {override!r}: {'.'.join(parents[:number])} has no entry {name!r}")
            at = at[int(name)]
        else:
            at = at.setdefault(name, {})
        if not isinstance(at, dict | list):
            raise UserError(f"override {override!r}: {'.'.join(parents[: number + 1])} is no table")
    if isinstance(at, list):
        raise UserError(f"override {override!r}: name a key of an entry, as in data.0.weight=2")
    at[last] = value


def _built(kind: Any, value: Any, path: str, key: str) -> Any:
    """``value`` from TOML as the type that a field has."""
    where = f"{path}: {key}" if key else path
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: must be a table, is {value!r}")
        hints, known = typing.get_type_hints(kind), {f.name: f for f in fields(kind)}
        unknown = [name for name in value if name not in known]
        if unknown:
            raise UserError(f"{where}: unknown key {unknown[0]!r}; there are {', '.join(known)}")
        missing = [
            name for name, f in known.items()
            if name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]  # fmt: skip
        if missing:
            raise UserError(f"{where}: has no {missing[0]!r}")
        dotted = f"{key}." if key else ""
        return cast("Any", kind)(
            **{name: _built(hints[name], item, path, f"{dotted}{name}") for name, item in value.items()}
        )
    if origin is Literal:
        if value not in args:
            raise UserError(f"{where}: {value!r} is none of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}: must be a list, is {value!r}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise UserError(f"{where}: must have {len(kinds)} entries, has {len(value)}")
        return tuple(_built(k, v, path, f"{key}.{n}") for n, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin in (dict, Mapping, typing.get_origin(Mapping[str, float])):
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            value = dict.fromkeys(value, 1.0)
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: must be a table or a list of names, is {value!r}")
        return {str(name): _built(args[1], item, path, f"{key}.{name}") for name, item in value.items()}
    if origin is types.UnionType:
        raise TypeError(f"a recipe's field has the type {kind}, which no TOML value is checked for")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{where}: must be {kind.__name__}, is {value!r}")
    return value


def _check(recipe: Recipe, path: str) -> None:
    """What types do not say."""

    def refuse(key: str, value: object, must: str) -> typing.NoReturn:
        raise UserError(f"{path}: {key} must be {must}, is {value}")

    for key in ("steps", "save_every", "keep", "log_every", "copies", "sequence"):
        if getattr(recipe, key) < 1:
            refuse(key, getattr(recipe, key), "positive")
    for key in ("samples", "renderer_tokens", "planner_tokens", "accumulate", "window", "split"):
        if getattr(recipe.batch, key) < 1:
            refuse(f"batch.{key}", getattr(recipe.batch, key), "positive")
    if recipe.batch.fit < 0:
        refuse("batch.fit", recipe.batch.fit, "at least 0")
    if recipe.batch.split & (recipe.batch.split - 1):
        refuse("batch.split", recipe.batch.split, "a power of two")
    for key, asked in (
        ("window", recipe.batch.window > 1), ("split", recipe.batch.split > 1), ("fit", recipe.batch.fit > 0)
    ):  # fmt: skip
        if asked and not recipe.batch.balance:
            refuse("batch.balance", "false", f"true where batch.{key} is used")
    hidden = recipe.offload.policy.startswith("hidden")
    if recipe.offload.policy != "none" and recipe.recompute != hidden:
        refuse(
            "recompute",
            str(recipe.recompute).lower(),
            f"{str(hidden).lower()} with offload.policy {recipe.offload.policy!r}",
        )
    if recipe.offload.policy != "none" and recipe.stage in ("vae", "understanding"):
        refuse("offload.policy", repr(recipe.offload.policy), f"'none' in the stage {recipe.stage!r}")
    if recipe.offload.host_gib < 0:
        refuse("offload.host_gib", recipe.offload.host_gib, "at least 0")
    if not recipe.train_planner and recipe.stage != "joint":
        refuse("train_planner", "false", f"true in the stage {recipe.stage!r}")
    if not 0 <= recipe.ema < 1:
        refuse("ema", recipe.ema, "at least 0 and below 1")
    if recipe.seed < 0:
        refuse("seed", recipe.seed, "at least 0")
    for key in ("lr", "clip", "eps"):
        if not 0 < getattr(recipe.optimizer, key) < float("inf"):
            refuse(f"optimizer.{key}", getattr(recipe.optimizer, key), "positive")
    if len(recipe.mask_ratio) not in (0, 2) or not all(0 < number < float("inf") for number in recipe.mask_ratio):
        refuse("mask_ratio", list(recipe.mask_ratio), "two positive numbers, or empty")
    if not 0 <= recipe.noise.low < recipe.noise.high <= 1:
        refuse("noise", f"from {recipe.noise.low} to {recipe.noise.high}", "a range inside of 0 to 1")
    for key in ("text", "image", "video", "plan"):
        if not 0 <= getattr(recipe.dropout, key) <= 1:
            refuse(f"dropout.{key}", getattr(recipe.dropout, key), "a probability")
    if not recipe.data:
        raise UserError(f"{path}: has no data; give it at least one [[data]] with a source")
    for number, part in enumerate(recipe.data):
        if part.weight <= 0 or part.count < 1 or any(share < 0 for share in part.tasks.values()):
            refuse(f"data.{number}", part, "of positive weight and count, with no negative shares")
        if not 0 <= part.start < part.end <= 1:
            refuse(f"data.{number}", f"from {part.start} to {part.end}", "used in a part of the run, 0 to 1")
    if not any(part.start == 0 for part in recipe.data):
        refuse("data", "empty at the beginning of the run", "there from the start (start = 0)")
