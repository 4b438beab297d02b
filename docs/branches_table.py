"""Writes the tables of ``docs/branches.md``: ``python docs/branches_table.py``. A test compares them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bernini.kernels import Segment, SegmentLayout
from bernini.parallel.branches import MACHINES, Costs, Machine, Model, Work, in_turn, place
from bernini.parallel.share import LEAST
from bernini.renderer.config import RendererConfig
from bernini.renderer.guidance import PLANS

PAGE = Path(__file__).with_name("branches.md")
MARK = "<!-- table -->\n"

RELEASED = RendererConfig()
MODEL = Model(RELEASED.num_layers, RELEASED.width, RELEASED.ffn_dim, RELEASED.num_attention_heads, 2)
RANKS = (2, 3, 4, 5, 8)
GRIDS = {"512x512, image": (1, 32, 32), "480x848, 33 frames": (9, 30, 53), "480x848, 81 frames": (21, 30, 53)}
LINKS: dict[str, Machine] = {
    "200 GB/s": MACHINES["cuda"],
    "20 GB/s": MACHINES["cuda"]._replace(link=2e10),
}
TEXT, PLANNED = 512, 1024
"""Tokens of a text; of the positive one with the planner's states behind it."""


def works(mode: str, grid: tuple[int, int, int]) -> tuple[Work, ...]:
    """The distinct branches of a mode: a video like the target where it has one, and two pictures where it has them."""
    seen = {branch.sources for branch in PLANS[mode].branches}
    only_video = mode.startswith("v2v")
    videos = int(only_video or bool(seen & {"first video", "videos", "all"}))
    pictures = 0 if only_video else 2 * bool(seen & {"images", "all"})
    grids = [*[grid] * videos, *[(1, *grid[1:])] * pictures]
    sources = [Segment("source", shape, float(phase)) for phase, shape in enumerate(grids, 1)]
    full = SegmentLayout([*sources, Segment("target", grid)])
    size = full.segments[-1].tokens * RELEASED.patch_values * MODEL.itemsize
    found = dict.fromkeys((branch.layout(full, videos)[0], branch.text) for branch in PLANS[mode].branches)
    return tuple(Work(layout.tokens, PLANNED if text == "planned" else TEXT, size) for layout, text in found)


def cell(branches: tuple[Work, ...], ranks: int, machine: Machine) -> tuple[float, float]:
    """How many times longer a step takes with all ranks together, and with branches in turn."""
    costs = Costs(branches, ranks, MODEL, machine, LEAST)
    ours = place(costs)
    return ours.together / ours.seconds, costs.step(in_turn(len(branches), ranks)) / ours.seconds


def lines() -> Iterator[str]:
    for link, machine in LINKS.items():
        for name, grid in GRIDS.items():
            yield f"\n{name}, link {link}\n\n"
            yield f"| modes | branches (tokens) | {' | '.join(f'P = {ranks}' for ranks in RANKS)} |\n"
            yield f"|---|---|{'---|' * len(RANKS)}\n"
            modes: dict[tuple[Work, ...], list[str]] = {}
            for mode in PLANS:
                modes.setdefault(works(mode, grid), []).append(mode)
            for branches, names in modes.items():
                cells = (cell(branches, ranks, machine) for ranks in RANKS)
                said = " | ".join(f"{together:.2f}, {turn:.2f}" for together, turn in cells)
                yield f"| {', '.join(names)} | {', '.join(str(work.tokens) for work in branches)} | {said} |\n"


def main() -> None:
    head = PAGE.read_text("utf-8").partition(MARK)[0]
    PAGE.write_text(head + MARK + "".join(lines()), "utf-8")


if __name__ == "__main__":
    main()
