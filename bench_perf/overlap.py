"""Whether transfers really go beside computing: one layer of two processes over a link of three rates.

A layer is the projection of q, k and v, norm and rotation, the swap, attention and the projection of its result,
forward and backward, at the width of the 1.3B renderer. Each process has one core and one thread; the link between them
is slowed down (:mod:`bench_perf.link`), so that the bytes of a layer take a tenth of its computing, as long, and twice
as long. Computing alone is measured with a group that sends nothing, and the exchanges alone without computing.
Nothing can be faster than the longer of the two, and packed takes their sum: their ratio is the bound that is told.

A round's time is that of the slower process, and the best of many rounds counts: gloo's exchanges are bimodal (facts on
practice). The policy measures by itself, and its regret is what these rounds say about its choice; where they scatter
too much to say it, nothing is judged.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import link
from .harness import Row, Watch, cpu_seconds, judged

TOKENS, HEADS, DIM = 384, 12, 128
SHAPE = f"{TOKENS} tokens x {HEADS * DIM}, {HEADS} heads, 2 ranks, forward and backward"
RATES = {"cheap": 0.1, "comparable": 1.0, "dear": 2.0}
"""How long the transfers of a layer take, in times of its computing."""
ROUNDS, FEW = 36, 6
BAR, REGRET = 1.15, 1.0  # times faster; percent
WAYS = ("packed", "async", "chunk")


# --- a rank -----------------------------------------------------------------------------------------------------------


class Layer:
    """What a rank of two runs."""

    def __init__(self, group: Any) -> None:
        import torch

        from bernini.kernels import Segment, SegmentLayout
        from bernini.parallel.plan import SPPlan
        from bernini.renderer.config import RendererConfig
        from bernini.renderer.model import SelfAttention

        from .moves import Absent

        torch.manual_seed(group.rank)
        layout = SegmentLayout([Segment("target", (TOKENS // 64, 8, 8))])
        self.plan = SPPlan.make(layout, HEADS, HEADS, 2)
        self.local, self.group, self.absent = self.plan.local(group.rank), group, Absent(group.rank, 2)
        self.module = SelfAttention(RendererConfig(num_attention_heads=HEADS, attention_head_dim=DIM))
        self.x = torch.randn(self.local.tokens, HEADS * DIM).requires_grad_()
        self.dout = torch.randn(self.local.tokens, HEADS * DIM)
        self.spare = torch.randn(4 << 20)

    def run(self, way: str, group: Any = None) -> list[Any]:
        """The layer, forward and backward: its result and all gradients."""
        from bernini.parallel.policy import Policy

        return self.by(Policy(way), group or self.group)

    def by(self, policy: Any, group: Any) -> list[Any]:
        import torch

        from bernini.parallel.ulysses import Ulysses
        from bernini.renderer.model import How

        out = self.module(self.x, self.local, How("fp32", "auto", Ulysses(group, self.plan, policy)))
        return [out.detach(), *torch.autograd.grad(out, [self.x, *self.module.parameters()], self.dout)]

    def exchanges(self) -> None:
        """Those of the packed way, without anything between them."""
        import torch

        from bernini.parallel.swap import banded
        from bernini.parallel.ulysses import Ulysses

        swap = Ulysses(self.group, self.plan).swap
        x = banded(torch.ones(self.local.tokens, HEADS, DIM), 2).contiguous()
        for count in (3, 1):  # forward and backward
            there = swap.out(x, *[x] * (count - 1))
            swap.back(*[there[0]] * (4 - count))

    def product(self) -> None:
        """Computing, and nothing else."""
        for _ in range(3):
            self.spare[: 1 << 20].view(1024, 1024) @ self.spare[1 << 20 : 2 << 20].view(1024, 1024)

    def flight(self, beside: bool) -> None:
        """A message each way, with computing beside it or without."""
        from bernini.parallel.group import Message

        size, other = 1 << 20, 1 - self.group.rank
        pending = self.group.start([Message(other, self.spare[:size])], [Message(other, self.spare[-size:])])
        if beside:
            self.product()
        pending.wait()

    def timed(self, calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
        """Seconds of each in every round, by the slower rank; in turns, after a round that does not count."""
        own: list[dict[str, float]] = []
        for number in range(rounds + 1):
            times, names = {}, list(calls)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                self.group.tell(None)  # both begin together
                start = time.perf_counter()
                calls[name]()
                times[name] = time.perf_counter() - start
            own.append(times)
        rounds_told = list(zip(*self.group.tell(own[1:]), strict=True))
        return {name: [max(one[name] for one in ranks) for ranks in rounds_told] for name in calls}


def rank_main(rank: int, folder: str) -> None:
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank % len(os.sched_getaffinity(0))]})
    import torch
    import torch.distributed as dist

    from bernini.parallel.group import Processes
    from bernini.parallel.policy import Policy

    torch.set_num_threads(1)
    link.answer("here")
    layer: Layer | None = None
    for what, *given in link.commands():
        if what == "meet":
            dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
            layer = Layer(Processes())
            link.answer("met")
            continue
        assert layer is not None
        if what == "compute":
            # The group that sends nothing leaves what it received as it was.
            link.answer(layer.timed({"compute": partial(layer.run, "packed", layer.absent)}, given[0]))
        elif what == "same":
            wanted = layer.run("packed")
            link.answer([all(map(torch.equal, layer.run(way), wanted)) for way in WAYS])
        elif what == "layer":
            calls: dict[str, Callable[[], Any]] = {way: partial(layer.run, way) for way in WAYS}
            link.answer(layer.timed({**calls, "exchanges": layer.exchanges}, given[0]))
        elif what == "flight":
            link.answer(
                layer.timed(
                    {"product": layer.product, "message": partial(layer.flight, False),
                     "both": partial(layer.flight, True)}, given[0],
                )
            )  # fmt: skip
        elif what == "policy":
            policy, start = Policy("auto"), time.perf_counter()
            layer.by(policy, layer.group)
            took = time.perf_counter() - start
            (found,) = policy.found.values()
            link.answer({"chosen": found.choice, "took": took, "seconds": found.seconds})
    if layer is not None:
        dist.destroy_process_group()


def sent() -> int:
    """Bytes that a rank sends in a layer: a half of q, k, v and the result, and of their gradients."""
    return 8 * (TOKENS // 2) * (HEADS // 2) * DIM * 4


# --- who directs ------------------------------------------------------------------------------------------------------


def processes() -> tuple[float, float] | None:
    """As :func:`bench_perf.harness.cpu_seconds`, without the kernel's work for the link, which is no process."""
    found = cpu_seconds()
    if found is None:
        return None
    with open("/proc/stat", encoding="ascii") as file:
        interrupts = sum(map(int, file.readline().split()[6:8]))
    return found[0] - interrupts / os.sysconf("SC_CLK_TCK"), found[1]


def direct(folder: str) -> None:
    """Runs in a network of its own; writes down what was found."""
    found: dict[str, Any] = {}
    with (
        Watch(processes) as watch,
        link.Pair(__spec__.name, Path(folder)) as pair,
    ):  # whose time is known when it has ended
        pair.answers()
        pair.connect()
        pair.ask("meet")
        compute = min(pair.ask("compute", FEW)[0]["compute"])
        found["compute"] = compute
        found["same"] = all(map(all, pair.ask("same")))
        for name, times in RATES.items():
            rate = sent() / (times * compute)
            pair.limit(rate)
            found[name] = {"rate": rate, "flight": pair.ask("flight", FEW)[0], "layer": pair.ask("layer", ROUNDS)[0]}
            found[name]["policy"] = pair.ask("policy")[0]
    found["unfit"] = watch.unfit
    Path(folder, "found.json").write_text(json.dumps(found), encoding="utf-8")


def rows(found: Mapping[str, Any]) -> list[Row]:
    """From what :func:`direct` wrote."""
    compute, out = found["compute"], []
    unfit = found["unfit"] if found["same"] else "the ways do not give the same bits"
    case: dict[str, Any] = {"shape": SHAPE, "dtype": "float32", "unfit": unfit}
    for name in RATES:
        one, rounds = found[name], found[name]["layer"]
        layer = {way: min(times) for way, times in rounds.items()}
        transfer = layer["exchanges"]
        bound = (compute + transfer) / max(compute, transfer)
        about = (
            f"link {one['rate'] * 8e-6:.0f} Mbit/s; computing alone {compute * 1e3:.0f} ms, exchanges alone "
            f"{transfer * 1e3:.0f} ms, so no way gains more than {bound:.2f}x; minima of {ROUNDS} rounds"
        )
        out += [
            judged(
                f"{name} link: {way} against packed", layer[way] * 1e3, layer["packed"] * 1e3, unit="ms",
                bar=BAR if (name, way) == ("comparable", "async") else None, note=about, **case,
            )
            for way in WAYS[1:]
        ]  # fmt: skip
        policy = one["policy"]
        lost, scatter = regret(rounds, policy["chosen"])
        doubt = (
            f"{lost:.1f} % with an error of {scatter:.1f} says nothing" if lost - 2 * scatter < REGRET < lost else None
        )
        measured = ", ".join(f"{way} {seconds * 1e3:.0f}" for way, seconds in policy["seconds"].items())
        out.append(
            judged(
                f"{name} link: regret of the policy", lost, unit="%", bar=REGRET,
                note=f"+- {scatter:.1f} %; chose {policy['chosen']} after {policy['took']:.1f} s ({measured} ms)",
                **{**case, "unfit": unfit or doubt},
            )
        )  # fmt: skip
        flight = {side: min(times) for side, times in one["flight"].items()}
        out.append(
            judged(
                f"{name} link: a message beside a product", flight["both"] * 1e3,
                (flight["product"] + flight["message"]) * 1e3, unit="ms",
                note=f"peer: one after the other, {flight['product'] * 1e3:.0f} + {flight['message'] * 1e3:.0f} ms",
                **{**case, "shape": "4 MB each way"},
            )
        )  # fmt: skip
    return out


def regret(rounds: Mapping[str, Sequence[float]], chosen: str) -> tuple[float, float]:
    """(what the choice loses to the best, its standard error), in percent, by medians over rounds of the quotients.

    What slows the machine down for a while slows all of a round, so quotients scatter half as much as minima do.
    """
    from bernini.parallel.policy import middle

    return max(
        middle([100 * (one / other - 1) for one, other in zip(rounds[chosen], rounds[way], strict=True)])
        for way in WAYS
    )


def run() -> list[Row]:
    why = link.missing()
    if why is not None:
        return [
            judged("async against packed", 0.0, unit="ms", shape=SHAPE, dtype="float32", bar=BAR, unfit=why),
            judged("regret of the policy", 0.0, unit="%", shape=SHAPE, dtype="float32", bar=REGRET, unfit=why),
        ]
    with tempfile.TemporaryDirectory() as folder:
        if link.inside([sys.executable, "-m", __spec__.name, "direct", folder]):
            raise RuntimeError("overlap: a process failed; what it said is above")
        return rows(json.loads(Path(folder, "found.json").read_text(encoding="utf-8")))


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        rank_main(int(sys.argv[2]), sys.argv[3])
    else:
        direct(sys.argv[2])
