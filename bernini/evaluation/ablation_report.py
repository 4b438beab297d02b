"""Outcomes of ablations as people read them: tables with both seeds, and what the paper claims beside what was seen."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..presets import ETA, MOMENTUM, THRESHOLDS
from ..renderer.guidance import FIXED
from .ablations import PAIRS, STRENGTHS, Outcome, last
from .suite import Result

Figures = dict[str, float]

UNITS: Mapping[str, str] = {
    "followed": "%", "identity": "%", "PSNR outside": "dB", "PSNR": "dB", "leak": "%", "other": "%",
    "overshoot": "of 255",
}  # fmt: skip
LESS_IS_BETTER = ("leak", "overshoot", "loss")
MEANING = (
    "Each cell: mean over the seeds (each seed). Followed: what the instruction is about is right. Identity: the right "
    "handwritten digit. PSNR outside: outside of the edited region against the source; PSNR: all pixels against the "
    "only right result. Leak: pixels that look like the background of a reference image and like nothing that is "
    "wanted; other: the same of a background that is neither, on average, so what is wrong without being a leak. "
    "Overshoot: how far channels lie outside of all colors of the world. Loss: the renderer's, last fifth of the "
    "steps, the same examples and noise in all arms. A claim is seen where all seeds agree with it, contradicted where "
    "all disagree; with two seeds neither is a proof."
)
TITLES: Mapping[str, str] = {
    "rope": "How segments are told apart (paper, figure 15)",
    "planner": "Planner and ViT interface (paper, figure 16)",
    "apg": "Adaptive projected guidance (inference only)",
}
ABOUT: Mapping[str, str] = {
    "rope": "A small renderer from random weights, the same for all arms of a seed. `sa3d`: the segment's phase in the "
    "rotary embedding. `plain`: the usual 3D RoPE. `embeddings`: the same and learned rows per segment and layer.",
    "planner": "The given renderer, fine-tuned. `full`: it reads the plan of the target. `states`: of the planner it "
    "reads text and sources only, the ViT interface is gone. `none`: no planner. How the paper trained its arms, it "
    "does not say; here the planner has learned to plan before, and in `states` it goes on learning.",
    "apg": "Two modes of guidance that differ in the projection alone; x2: all scales doubled. `t2v_apg` and `v2v_apg` "
    f"project the clean estimate of each frame (eta {ETA}, norms above {THRESHOLDS[0]:g} cut), `vae_txt_vit_wapg` the "
    f"velocity as a whole (eta {FIXED.eta}, norms not cut). Momentum is {MOMENTUM:g}.",
}


@dataclass(frozen=True)
class Line:
    """An outcome in numbers, as ``ablations.json`` keeps it.

    Args:
        measured: not so where the arm's time was up.
        samples: that were measured.
        steps, minutes, curve: of its training; the curve are the renderer's losses.
    """

    comparison: str
    arm: str
    seed: int
    measured: bool
    samples: int = 0
    figures: Figures = field(default_factory=dict)
    steps: int | None = None
    minutes: float | None = None
    curve: Sequence[float] = ()
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int]:
        return self.comparison, self.arm, self.seed


@dataclass(frozen=True)
class Claim:
    """``better`` is better than ``worse`` in a figure."""

    comparison: str
    better: str
    worse: str
    figure: str


CLAIMS = (
    *(Claim("rope", "sa3d", other, figure) for other in ("plain", "embeddings")
      for figure in ("leak", "PSNR outside", "identity rv2v", "followed rv2v", "followed r2v")),
    *(Claim("rope", "embeddings", "plain", figure) for figure in ("identity rv2v", "identity r2v")),
    *(Claim("planner", better, worse, figure) for better, worse in (("full", "states"), ("states", "none"))
      for figure in ("followed", "followed v2v", "followed rv2v")),
    *(Claim("apg", f"{pair.projected} x{strength}", f"{pair.without} x{strength}", "overshoot")
      for pair in PAIRS for strength in STRENGTHS),
)  # fmt: skip
"""What the paper says, in figures that a toy has."""


def line(outcome: Outcome, settings: Mapping[str, object]) -> Line:
    """
    Args:
        settings: what the outcome depends on, for whoever reads the file.
    """
    trained, samples = outcome.trained, 0 if outcome.results is None else len(outcome.results.rows)
    own = Line(
        outcome.comparison, outcome.arm, outcome.seed, outcome.results is not None, samples, figures(outcome),
        settings=dict(settings),
    )  # fmt: skip
    return own if trained is None else replace(
        own, steps=trained.steps, minutes=trained.minutes, curve=list(trained.curve)
    )  # fmt: skip


def figures(outcome: Outcome) -> Figures:
    """All of an arm's, by name; shares in percent. Those without samples are left out."""
    found: Figures = {}
    if outcome.trained is not None and outcome.trained.curve:
        found["loss"] = last(outcome.trained.curve)
    if outcome.results is None:
        return found
    rows = outcome.results.rows
    tasks = list(dict.fromkeys(row.task for row in rows))

    def add(name: str, values: Sequence[float | bool | None], factor: float = 1) -> None:
        given = [float(value) for value in values if value is not None]
        if given:
            found[name] = factor * float(np.mean(given))

    def each(name: str, value: Callable[[Result], float | bool | None], factor: float = 1) -> None:
        add(name, [value(row) for row in rows], factor)
        for task in tasks if len(tasks) > 1 else ():
            add(f"{name} {task}", [value(row) for row in rows if row.task == task], factor)

    each("followed", lambda row: row.followed, 100)
    each("identity", lambda row: row.identity, 100)
    add("identity ceiling", [row.ceiling for row in rows], 100)
    add("PSNR outside", [row.psnr for row in rows])
    add("PSNR", [row.psnr_truth for row in rows])
    for name, factor in (("leak", 100), ("other", 100), ("overshoot", 1)):
        add(name, [getattr(leak, name) for leak in outcome.leaks], factor)
    return found


def verdict(claim: Claim, lines: Sequence[Line]) -> tuple[str, list[float]] | None:
    """Whether a claim was seen, and the difference in each seed; ``None`` where not both arms were measured."""
    of = {each.key: each.figures for each in lines if each.measured}
    gaps = []
    for seed in sorted({seed for _, _, seed in of}):
        one, other = (of.get((claim.comparison, arm, seed), {}) for arm in (claim.better, claim.worse))
        if claim.figure in one and claim.figure in other:
            gaps.append(one[claim.figure] - other[claim.figure])
    if not gaps:
        return None
    sign = -1 if claim.figure.split()[0] in LESS_IS_BETTER else 1
    if all(sign * gap > 0 for gap in gaps):
        return "seen", gaps
    return ("contradicted" if all(sign * gap < 0 for gap in gaps) else "undecided"), gaps


def markdown(lines: Sequence[Line], title: str) -> str:
    """All comparisons that were made."""
    parts = [f"# {title}", "", MEANING, ""]
    for comparison in (name for name in TITLES if any(each.comparison == name for each in lines)):
        mine = [each for each in lines if each.comparison == comparison]
        parts += [f"## {TITLES[comparison]}", "", ABOUT[comparison], ""]
        parts += [*_table([each for each in mine if each.measured]), *_unfinished(mine), *_claims(comparison, mine)]
    return "\n".join(parts)


def _table(lines: Sequence[Line]) -> list[str]:
    arms = list(dict.fromkeys(each.arm for each in lines))
    if not arms:
        return []
    head = ["", *arms]
    made = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]

    def row(name: str, value: Callable[[Line], float | None]) -> None:
        cells = [[value(each) for each in lines if each.arm == arm] for arm in arms]
        given = [[number for number in cell if number is not None] for cell in cells]
        if any(given):
            made.append(f"| {name} | {' | '.join(_cell(cell) for cell in given)} |")

    for name in dict.fromkeys(name for each in lines for name in each.figures):
        unit = UNITS.get(name) or UNITS.get(name.split()[0], "")
        row(f"{name}{f', {unit}' if unit else ''}", lambda each, name=name: each.figures.get(name))  # type: ignore[misc]
    row("steps", lambda each: each.steps)
    row("minutes of training", lambda each: each.minutes)
    row("samples", lambda each: each.samples)
    return [*made, ""]


def _cell(values: Sequence[float]) -> str:
    """The mean, and behind it the seeds' own numbers."""
    if not values:
        return ""
    digits = 0 if all(isinstance(value, int) for value in values) else 4 if max(map(abs, values)) < 1 else 1
    mean, *each = (f"{value:.{digits}f}" for value in (float(np.mean(values)), *values))
    return mean if len(set(each)) == 1 else f"{mean} ({', '.join(each)})"


def _unfinished(lines: Sequence[Line]) -> list[str]:
    found = [f"- {each.arm}, seed {each.seed}: stopped after {each.steps or 0} steps" for each in lines if
             not each.measured]  # fmt: skip
    return ["Not measured, since their time was up:", "", *found, ""] if found else []


def _claims(comparison: str, lines: Sequence[Line]) -> list[str]:
    rows = []
    for claim in CLAIMS:
        found = verdict(claim, lines) if claim.comparison == comparison else None
        if found is not None:
            shown = ", ".join(f"{gap:+.3g}" for gap in found[1])
            rows.append(f"| {claim.better} better than {claim.worse} | {claim.figure} | {shown} | {found[0]} |")
    head = ["| the paper's claim | figure | difference, each seed | here |", "| --- | --- | --- | --- |"]
    return [*head, *rows, ""] if rows else []


def write(folder: Path, lines: Sequence[Line], title: str) -> list[Line]:
    """Writes ``ablations.md`` and ``ablations.json``.

    Returns:
        these lines, and before them those that the folder has of other arms.

    Raises:
        UserError: the folder has an ``ablations.json`` that is none.
    """
    table, numbers = folder / "ablations.md", folder / "ablations.json"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        known = [Line(**each) for each in json.loads(numbers.read_text("utf-8"))["lines"]] if numbers.is_file() else []
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{numbers}: holds no results of ablations; give another --output, or remove it") from None
    mine = {each.key for each in lines}
    every = [*(each for each in known if each.key not in mine), *lines]
    verdicts = [(claim, verdict(claim, every)) for claim in CLAIMS]
    claims = [{**asdict(claim), "differences": found[1], "here": found[0]} for claim, found in verdicts if found]
    made = {"claims": claims, "lines": [asdict(each) for each in every]}
    for file, text in ((numbers, json.dumps(made, indent=1) + "\n"), (table, markdown(every, title))):
        work = file.with_suffix(".part")
        work.write_text(text, "utf-8")
        work.replace(file)
    return every
