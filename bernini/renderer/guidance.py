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
Apg = Literal["frame"]


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

    ``apg="frame"`` makes A the adaptive projection in x0 space, per latent frame; otherwise A changes nothing.
    """

    branches: tuple[Branch, ...]
    links: tuple[tuple[int, int, str], ...]
    apg: Apg | None = None

    def without_planner(self) -> Plan:
        """The part of the plan that a checkpoint without a planner can compute."""
        kept = [number for number, branch in enumerate(self.branches) if branch.text != "planned"]
        links = tuple(link for link in self.links if link[0] in kept and link[1] in kept)
        return Plan(tuple(self.branches[number] for number in kept), links, self.apg)

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

PLANS: Mapping[str, Plan] = {  # the seven released modes of Bernini-R, and the paper's equation 12
    "t2v": Plan((_TARGET, _TARGET_TEXT), ((1, 0, "txt"),)),
    "t2v_apg": Plan((_TARGET, _TARGET_TEXT), ((1, 0, "txt"),), apg="frame"),
    "v2v": Plan((_ALL, _ALL_TEXT), ((1, 0, "txt"),)),
    "v2v_apg": Plan((_ALL, _ALL_TEXT), ((1, 0, "txt"),), apg="frame"),
    "v2v_chain": Plan((_TARGET, _VIDEO, _ALL_TEXT), ((1, 0, "vid"), (2, 1, "txt"))),
    "r2v_apg": Plan((_TARGET, _IMAGES, _IMAGES_TEXT), ((1, 0, "img"), (2, 1, "txt")), apg="frame"),
    "eq12": Plan(
        (_TARGET, Branch("videos", "negative"), _ALL, _ALL_TEXT, Branch("all", "planned")),
        ((1, 0, "vid"), (2, 1, "img"), (3, 2, "txt"), (4, 3, "tgt")),
    ),
    "rv2v": Plan((_TARGET, _VIDEO, _ALL, _ALL_TEXT), ((1, 0, "vid"), (2, 1, "img"), (3, 2, "txt"))),
}
