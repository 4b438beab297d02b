"""How close the window balancer comes to the lower bound, what others reach, and that no schedule of it stands still.

Samples are those of :mod:`bench_perf.workload`; loads are counted for a 14B renderer and a 7B planner, forward and
backward (:meth:`Workload.of_models`: 400 TFLOP/s is assumed, whatever is computed, and cancels out of every ratio).
Tokens are those of the renderer and of the planner together; where a cap is told, it is 150 000 for a rank and
micro-batch. Loads are taken as they are: how well they predict a GPU's time is not measured here.

The bound is the larger of the mean load of a rank and of the largest piece of the largest group
(:func:`bernini.parallel.balance.lower_bound`). With groups allowed, every window of the mix is feasible: its longest
sample, cut for all ranks, is below the mean.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import islice
from statistics import median

from bernini.parallel.balance import Item, Placement, Sizes, Workload, lower_bound, place

from . import workload
from .balance_peers import Spans, at_once, bags, karmarkar_karp, seconds, token_budget
from .balance_schedules import FREE, schedule_rows
from .batching import BUDGET, FULL, full_lengths
from .harness import Row, compare, judged
from .lockstep import programs
from .lockstep import run as simulate

NEAR = 1.005
GROUPS = ((8, 16, FREE), (32, 16, FREE), (8, 16, BUDGET), (32, 16, BUDGET))
"""Ranks, items per rank, cap: 250 windows of each."""
OVERHEAD = 0.05

Window = list[Item]

COST = Workload.of_models(
    width=FULL.width, ffn=FULL.ffn, layers=FULL.layers, planner_width=FULL.planner_width, planner_ffn=FULL.planner_ffn,
    planner_keys=FULL.key_width, planner_layers=FULL.planner_layers,
)  # fmt: skip


def sizes(n: int, seed: int = 0) -> list[Sizes]:
    """Of samples of the mix."""
    made = []
    for record in workload.sample(n, seed):
        renderer, context, planner = full_lengths(record)
        made.append(Sizes(renderer, context, planner, record.visual_tokens if record.target else 0))
    return made


def items(n: int, seed: int = 0) -> Window:
    """Samples of the mix."""
    return [Item(one.renderer + one.planner, COST.seconds(one)) for one in sizes(n, seed)]


def windows(n: int, size: int) -> Iterator[Window]:
    every = _many(n * size)
    return (every[at : at + size] for at in range(0, n * size, size))


@cache
def _many(n: int) -> Window:
    return items(n)


def fewest(window: Sequence[Item], ranks: int, cap: int, **options: float) -> Placement:
    """With as few micro-batches as it fits in."""
    micros = max(1, -(-sum(item.tokens for item in window) // (ranks * cap)))
    while True:
        try:
            return place(window, ranks, cap_tokens=cap, micros=micros, **options)  # type: ignore[arg-type]
        except ValueError:
            micros += 1
            if micros > len(window):
                raise


# --- how close ------------------------------------------------------------------------------------------------------


class Found:
    """What came out for some windows."""

    def __init__(self, ranks: int, each: int, cap: int, n: int) -> None:
        self.shape = f"{ranks} ranks x {each} items" + ("" if cap == FREE else f", {cap // 1000}K tokens")
        self.over: list[float] = []
        self.spread: list[float] = []
        self.cut: list[float] = []
        self.micros: list[int] = []
        for window in windows(n, ranks * each):
            got = fewest(window, ranks, cap)
            bound = lower_bound(window, ranks, cap_tokens=cap, micros=len(got.micros))
            self.over.append(got.seconds / bound)
            self.spread.append(max(got.loads) / min(got.loads))
            self.cut.append(sum(piece.size > 1 for pieces in got.micros for piece in pieces) / len(window))
            self.micros.append(len(got.micros))

    @property
    def near(self) -> float:
        """Percent of the windows."""
        return 100 * sum(over <= NEAR for over in self.over) / len(self.over)

    def note(self) -> str:
        return (
            f"over the bound: median {100 * (median(self.over) - 1):.2f} %, worst {100 * (max(self.over) - 1):.2f} %; "
            f"max/min median {median(self.spread):.4f}, worst {max(self.spread):.4f}; "
            f"{100 * sum(self.cut) / len(self.cut):.1f} % of the items are cut; {min(self.micros)} to "
            f"{max(self.micros)} micro-batches"
        )


def near_rows() -> list[Row]:
    rows = []
    found = [Found(*group, 250) for group in GROUPS]
    every = sum(len(one.over) for one in found)
    rows.append(
        judged(
            "balance, windows within 0.5 % of the lower bound", sum(one.near for one in found) / len(found), unit="%",
            bar=99.0, higher_is_better=True, shape=f"{every} windows, 16 items a rank", note="the four below together",
        )
    )  # fmt: skip
    rows += [judged("balance, within 0.5 %", one.near, unit="%", shape=one.shape, note=one.note()) for one in found]
    for one in found:
        share = 100 * sum(value < 1.01 for value in one.spread) / len(one.spread)
        rows.append(
            judged(
                "balance, max/min over ranks", max(one.spread), unit="x", bar=1.01, shape=one.shape,
                note=f"the worst of {len(one.spread)} windows; below 1.01 in {share:.1f} %",
            )
        )  # fmt: skip
    for ranks, each in ((8, 8), (32, 8), (8, 4), (32, 4)):
        few = Found(ranks, each, FREE, 250 if ranks == 8 else 60)
        whole = _whole(ranks, each, 60)
        rows.append(
            judged(
                "balance, within 0.5 %", few.near, unit="%", bar=99.0, higher_is_better=True, shape=few.shape,
                note=f"{few.note()}; with nothing cut {whole}",
            )
        )  # fmt: skip
    return rows


def _whole(ranks: int, each: int, n: int) -> str:
    over, spread = [], []
    for window in windows(n, ranks * each):
        got = place(window, ranks, cap_tokens=FREE, largest=1)
        over.append(got.seconds / lower_bound(window, ranks, cap_tokens=FREE))
        spread.append(max(got.loads) / min(got.loads))
    return f"{100 * (median(over) - 1):.0f} % over the same bound and max/min {median(spread):.2f} (medians of {n})"


def time_rows() -> list[Row]:
    """Also where the cap leaves little room, and where four micro-batches have two samples a rank each."""
    window = list(islice(_many(4096), 4096))
    mean = sum(item.tokens for item in window) / 512
    rows = []
    for cap, micros, said in ((FREE, 1, ""), (int(1.1 * mean), 1, ", cap 1.1 x mean"), (FREE, 4, ", 4 micro-batches")):
        run = partial(place, window, 512, cap_tokens=cap, micros=micros)
        over = run().seconds / lower_bound(window, 512, cap_tokens=cap, micros=micros)
        rows.append(
            compare(
                "balance, time to place a window", run, unit="ms", bar=None if said else 20.0,
                shape=f"4096 samples x 512 ranks{said}", note=f"{100 * (over - 1):.2f} % over the bound",
            )
        )  # fmt: skip
    return rows


# --- against others -------------------------------------------------------------------------------------------------


def makespan_rows(ranks: int, each: int = 16, n: int = 40) -> list[Row]:
    """Seconds of a step simulator for the same samples under the same cap, where a group costs :data:`OVERHEAD` more.

    Without that, cutting everything for all ranks would be as good as anything, and nothing would be left to place.
    """
    some = list(windows(n, ranks * each))
    every = [item for window in some for item in window]
    ideal = sum(item.load for item in every) / ranks
    placed = [fewest(window, ranks, BUDGET, overhead=OVERHEAD) for window in some]
    ours = sum(
        max(simulate(programs(got, window, ranks, overhead=OVERHEAD))) for got, window in zip(placed, some, strict=True)
    )
    free = sum(fewest(window, ranks, BUDGET).seconds for window in some)
    topologies = [[size] * (ranks // size) for size in (1, 2, 4, 8)] + [[4, 2, 1, 1] * (ranks // 8)]
    bag = {}
    for sizes in topologies:
        spans = [bags(window, ranks, BUDGET, sizes, OVERHEAD) for window in some]
        bag["+".join(map(str, sizes[: 8 if sizes[0] == 1 else 4]))] = [one for one in spans if one is not None]
    held = {name: spans for name, spans in bag.items() if len(spans) == len(some)}
    best = min(held, key=lambda name: sum(map(seconds, held[name])))
    peers: dict[str, list[Spans]] = {
        "token budget (VeOmni dyn_bsz)": [token_budget(every, ranks, BUDGET)],
        "Karmarkar-Karp (verl)": [karmarkar_karp(window, ranks, BUDGET) for window in some],
        "Karmarkar-Karp with equal counts (verl)": [
            karmarkar_karp(window, ranks, BUDGET, equal=True) for window in some
        ],
        "greedy by length, every rank alone": held["1+1+1+1+1+1+1+1"],
        f"greedy by length, the best of {len(held)} bags, {best} (KnapFormer)": held[best],
    }  # fmt: skip
    rows = []
    for name, found in peers.items():
        theirs, once = sum(map(seconds, found)), sum(map(at_once, found))
        note = (
            f"peer: {name}, {_over(theirs, ideal)} over the mean load ({_over(once, ideal)} if ranks met only once a "
            f"window); ours {_over(ours, ideal)}, and {_over(free, ideal)} if groups cost nothing more"
        )
        rows.append(
            judged(
                "balance, makespan", ours, theirs, unit="s", note=note,
                shape=f"{n} windows, {ranks} ranks x {each} items, 150K tokens",
            )
        )  # fmt: skip
    return rows


def apart_row(ranks: int = 8, each: int = 16, n: int = 40) -> Row:
    """Loads count both models together. If all ranks meet between them, each model's part has to be even by itself."""
    lasted = mean = 0.0
    for number, window in enumerate(windows(n, ranks * each)):
        own = sizes((number + 1) * ranks * each)[number * ranks * each :]
        got = fewest(window, ranks, BUDGET)
        mean += sum(item.load for item in window) / ranks
        for part in ([one._replace(planner=0) for one in own], [Sizes(planner=one.planner) for one in own]):
            loads = [COST.seconds(one) for one in part]
            for pieces in got.micros:
                spans = [0.0] * ranks
                for item, first, size in pieces:
                    for rank in range(first, first + size):
                        spans[rank] += loads[item] / size
                lasted += max(spans)
    return judged(
        "balance, if all ranks meet between renderer and planner", lasted, unit="s", peer=mean,
        shape=f"{n} windows, {ranks} ranks x {each} items, 150K tokens",
        note=f"beside the mean load, which no placement can reach; {_over(lasted, mean)} over it",
    )  # fmt: skip


def _over(value: float, ideal: float) -> str:
    return f"{100 * (value / ideal - 1):.1f} %"


def run() -> list[Row]:
    if "MALLOC_MMAP_MAX_" not in os.environ:  # the run with the default malloc, on which no figure with a peer depends
        return []
    return [*time_rows(), *near_rows(), *makespan_rows(8), *makespan_rows(32, n=12), apart_row(), *schedule_rows()]
