"""Guidance modes as plans: which branches are evaluated, and how their differences are added up.

A branch is the model seen with some of the sources and one of the two texts. A plan's result is its first branch plus
a chain of scaled differences, which :func:`bernini.kernels.guide` computes. Sources: paper eq. 12; facts of the
released model, section D.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bernini.kernels import SegmentLayout

Sources = Literal["none", "first video", "videos", "images", "all"]
Text = Literal["negative", "positive", "planned"]
"""``planned`` is the positive text followed by the planner's states."""


@dataclass(frozen=True)
class Projection:
    """Adaptive projection of every link (see :func:`bernini.kernels.guide`): its form, and where it is done.

    ``eta`` and ``threshold`` are numbers that the mode fixes; ``None`` leaves them to the request.
    """

    form: Literal["frame", "global"]
    space: Literal["x0", "velocity"]
    eta: float | None = None
    threshold: float | None = None


IN_X0 = Projection("frame", "x0")
"""Of the renderer's own modes."""
FIXED = Projection("global", "velocity", eta=0.2, threshold=0.0)
"""Of the full model's default mode, which takes no numbers from the request (facts, section D.2)."""


@dataclass(frozen=True)
class Branch:
    """One evaluation of the model."""

    sources: Sources
    text: Text

    def layout(self, full: SegmentLayout, videos: int) -> tuple[SegmentLayout, tuple[int, ...]]:
        """This branch's layout and the numbers of the segments it keeps.

        Args:
            full: one sample: source videos, then source images, then the target.
            videos: how many of the sources are videos.
        """
        sources = full.numbers("source")
        keep = {
            "none": (),
            "first video": sources[: min(videos, 1)],
            "videos": sources[:videos],
            "images": sources[videos:],
            "all": sources,
        }[self.sources]
        layout = full.branch(keep, ids="restart" if self.sources == "images" else "keep")
        return layout, (*keep, *full.numbers("target"))


@dataclass(frozen=True)
class Plan:
    """``branches[0] + sum of scale * A(branches[new] - branches[old])`` over ``links`` (new, old, name of the scale).

    ``apg`` makes A the adaptive projection; otherwise A changes nothing. ``skips`` names the scales whose branch is not
    evaluated where they are 0 or less: the next difference is then taken from the branch before it.
    """

    branches: tuple[Branch, ...]
    links: tuple[tuple[int, int, str], ...]
    apg: Projection | None = None
    skips: frozenset[str] = frozenset()

    @property
    def needs_planner(self) -> bool:
        return any(branch.text == "planned" for branch in self.branches)

    def evaluated(self, scales: Mapping[str, float]) -> Plan:
        """The plan without the branches that ``skips`` leaves out at these scales. Every plan is a chain."""
        gone = {new for new, _, name in self.links if name in self.skips and scales[name] <= 0}
        if not gone:
            return self
        kept = [number for number in range(len(self.branches)) if number not in gone]
        links = tuple((kept.index(new), kept.index(new) - 1, name) for new, _, name in self.links if new not in gone)
        return Plan(tuple(self.branches[number] for number in kept), links, self.apg, self.skips)

    def without_planner(self) -> Plan:
        """The part of the plan that a checkpoint without a planner can compute."""
        kept = [number for number, branch in enumerate(self.branches) if branch.text != "planned"]
        links = tuple(link for link in self.links if link[0] in kept and link[1] in kept)
        return Plan(tuple(self.branches[number] for number in kept), links, self.apg, self.skips)

    def scaled(self, scales: Mapping[str, float], factor: float = 1.0) -> list[tuple[int, int, float]]:
        """The links with numbers for scales, each times ``factor``."""
        return [(new, old, scales[name] * factor) for new, old, name in self.links]


_TARGET = Branch("none", "negative")
_TARGET_TEXT = Branch("none", "positive")
_VIDEO = Branch("first video", "negative")
_IMAGES = Branch("images", "negative")
_IMAGES_TEXT = Branch("images", "positive")
_ALL = Branch("all", "negative")
_ALL_TEXT = Branch("all", "positive")

_PLANNED = Branch("all", "planned")
_CHAIN = (_TARGET, _ALL, _ALL_TEXT, _PLANNED)
_CHAIN_LINKS = ((1, 0, "img"), (2, 1, "txt"), (3, 2, "tgt"))
_EQ12 = Plan(
    (_TARGET, Branch("videos", "negative"), _ALL, _ALL_TEXT, _PLANNED),
    ((1, 0, "vid"), (2, 1, "img"), (3, 2, "txt"), (4, 3, "tgt")),
    skips=frozenset({"vid", "img", "txt", "tgt"}),
)

PLANS: Mapping[str, Plan] = {
    # the seven released modes of Bernini-R
    "t2v": Plan((_TARGET, _TARGET_TEXT), ((1, 0, "txt"),)),
    "t2v_apg": Plan((_TARGET, _TARGET_TEXT), ((1, 0, "txt"),), apg=IN_X0),
    "v2v": Plan((_ALL, _ALL_TEXT), ((1, 0, "txt"),)),
    "v2v_apg": Plan((_ALL, _ALL_TEXT), ((1, 0, "txt"),), apg=IN_X0),
    "v2v_chain": Plan((_TARGET, _VIDEO, _ALL_TEXT), ((1, 0, "vid"), (2, 1, "txt"))),
    "r2v_apg": Plan((_TARGET, _IMAGES, _IMAGES_TEXT), ((1, 0, "img"), (2, 1, "txt")), apg=IN_X0),
    "rv2v": Plan((_TARGET, _VIDEO, _ALL, _ALL_TEXT), ((1, 0, "vid"), (2, 1, "img"), (3, 2, "txt"))),
    # those of the full model; the last has no projection in spite of its name, and is the paper's equation 12
    "vae_txt_vit": Plan(_CHAIN, _CHAIN_LINKS, skips=frozenset({"img", "txt"})),
    "vae_txt_vit_wapg": Plan(_CHAIN, _CHAIN_LINKS, apg=FIXED, skips=frozenset({"img", "txt"})),
    "v2v_apg_planned": Plan(
        (_TARGET, _PLANNED), ((1, 0, "txt"),), apg=Projection("frame", "x0", eta=1.0, threshold=50.0)
    ),
    "rv2v_wapg": _EQ12,
    "eq12": _EQ12,
}
"""By name. The full model calls ``v2v_apg_planned`` ``v2v_apg``, as Bernini-R does a mode that is another one."""

NEEDS_PLANNER = frozenset(name for name, plan in PLANS.items() if plan.needs_planner and name != "eq12")
"""Modes that make no sense without a planner. Equation 12 does: its last term drops out."""
