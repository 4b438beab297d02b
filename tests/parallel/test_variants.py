"""The ways through attention give the same bits, let transfers go beside computing, and the fastest is found.

Ranks are threads, and once real processes over gloo: ``python -m tests.parallel.test_variants FOLDER`` is those.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from bernini.cli_options import Parser, add_generate
from bernini.errors import UserError
from bernini.kernels import Segment, SegmentLayout
from bernini.parallel import calls, overlap, trace
from bernini.parallel.group import Alone, Group, Message, Pending
from bernini.parallel.overlap import chunks_of
from bernini.parallel.plan import Heads, SPPlan
from bernini.parallel.policy import CHOICES, GAIN, Measured, Policy, Variant
from bernini.parallel.share import Share
from bernini.parallel.simulated import simulate
from bernini.parallel.swap import Coming, Swap
from bernini.parallel.ulysses import Ulysses
from bernini.renderer.config import RendererConfig
from bernini.renderer.model import QKV, QKNorm, Renderer
from bernini.training.flow import RendererSample, pack_renderer, renderer_losses
from bernini.training.recipe import Recipe, load
from tests.parallel import forked
from tests.parallel.test_ulysses import Case, cases, larger

OTHERS: tuple[Variant, ...] = ("async", "chunk")
COUNTS = {2: 24, 3: 24, 4: 24, 5: 8, 6: 8, 7: 4, 8: 8}
"""How many of the core's cases for each number of ranks."""

# --- a layer ----------------------------------------------------------------------------------------------------------


@dataclass
class Layer:
    """A rank's part of a case: projections of its own, and the gradients that come back through them."""

    case: Case
    group: Group
    policy: Policy | str = "packed"
    frozen: str = ""
    """Names of the projections that need no gradients."""
    around: Callable[..., Tensor] = field(default=lambda run, x: run(x))

    def __post_init__(self) -> None:
        case, width = self.case, self.case.heads * self.case.dim
        source = torch.Generator().manual_seed(case.seed)
        made = (torch.randn(width, width, generator=source, dtype=torch.float64) / width**0.5 for _ in "qkv")
        self.weights = [w.to(case.dtype).requires_grad_(n not in self.frozen) for n, w in zip("qkv", made, strict=True)]
        self.norms = [w.clone().requires_grad_() for w in case.weights]
        x, _, _, self.dout = case.parts(self.group.size, self.group.rank)
        self.x = x.flatten(1).clone().requires_grad_()
        plan = SPPlan.make(case.layout, case.heads, case.heads, self.group.size)
        policy = Policy(self.policy) if isinstance(self.policy, str) else self.policy
        self.attend, self.local = Ulysses(self.group, plan, policy), plan.local(self.group.rank)

    def project(self, number: int, x: Tensor) -> Tensor:
        return (x @ self.weights[number]).unflatten(1, (self.case.heads, -1))

    def forward(self, x: Tensor) -> Tensor:
        to = QKV(*(partial(self.project, number) for number in range(3)))
        return self.attend(x, to, self.local, QKNorm(*self.norms, 1e-6), "fp32", "auto")

    def run(self) -> list[Tensor]:
        """The result, and the gradients of x, of the projections and of the norms."""
        out = self.around(self.forward, self.x)
        leaves = [x for x in (self.x, *self.weights, *self.norms) if x.requires_grad]
        return [out.detach(), *torch.autograd.grad(out, leaves, self.dout)]


def found(case: Case, ranks: int, policy: Policy | str, **options: Any) -> list[list[Tensor]]:
    return simulate(ranks, lambda group: Layer(case, group, policy, **options).run())


def same(ones: Sequence[Sequence[Tensor]], others: Sequence[Sequence[Tensor]]) -> bool:
    return all(all(map(torch.equal, one, other)) for one, other in zip(ones, others, strict=True))


@lru_cache
def some(ranks: int) -> list[Case]:
    return [case for case in cases(ranks) if not case.planner][: COUNTS[ranks]]


def typed() -> list[Case]:
    return [case for dtype in (torch.float32, torch.bfloat16) for case in larger(dtype) if not case.planner]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Ranks are threads already."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", COUNTS)
def test_all_ways_give_the_bits_of_packed(ranks: int) -> None:
    for case in [*some(ranks), *(typed() if ranks < 5 else [])]:
        wanted = found(case, ranks, "packed")
        assert not any(x.isnan().any() for part in wanted for x in part)
        for way in OTHERS:
            assert same(found(case, ranks, way), wanted), (way, case)


def test_the_cases_have_what_is_hard() -> None:
    every = [(ranks, case, Heads.shared(case.heads, case.heads, ranks)) for ranks in COUNTS for case in some(ranks)]
    assert sum(chunks_of(heads) > 1 for *_, heads in every) > 25
    assert sum(heads.gather > 1 and heads.ulysses > 1 for *_, heads in every) > 10
    assert sum(case.layout.num_samples > 1 for _, case, _ in every) > 40
    assert sum(case.layout.tokens % ranks > 0 for ranks, case, _ in every) > 40
    assert sum(case.layout.tokens < ranks for ranks, case, _ in every) > 0


def test_chunks_have_whole_groups_of_key_heads() -> None:
    kinds = {(40, 40, 8): 5, (40, 40, 4): 5, (12, 12, 2): 3, (12, 12, 4): 3, (28, 4, 2): 2, (28, 4, 8): 1, (8, 8, 8): 1}
    assert {kind: chunks_of(Heads.shared(*kind)) for kind in kinds} == kinds


BROKEN: dict[str, Callable[[pytest.MonkeyPatch], None]] = {}


def broken(change: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
    BROKEN[change.__name__] = change
    return change


@broken
def who_attends_does_not_wait(patch: pytest.MonkeyPatch) -> None:
    def forward(ctx: Any, chunk: int, trips: Sequence[overlap.Trip], *tickets: Tensor) -> tuple[Tensor, ...]:
        ctx.chunk, ctx.trips = chunk, trips
        coming = [trip.there.pop(chunk) for trip in trips]
        early = [one.finish()[0].clone() for one in coming]
        for one in coming:
            one.wait()
        return tuple(early)

    patch.setattr(overlap._Arrive, "forward", staticmethod(forward))


@broken
def gradients_of_k_are_those_of_v(patch: pytest.MonkeyPatch) -> None:
    right = overlap._Arrive.backward
    patch.setattr(overlap._Arrive, "backward", staticmethod(lambda ctx, q, k, v: right(ctx, q, v, k)))


@broken
def chunks_come_home_in_another_order(patch: pytest.MonkeyPatch) -> None:
    def come_home(self: overlap.Trip, way: dict[int, Coming]) -> Tensor:
        parts = [way.pop(chunk).wait()[0] for chunk in range(self.chunks)]
        return torch.cat(parts[::-1], 1)

    patch.setattr(overlap.Trip, "come_home", come_home)


@broken
def x_sums_its_gradients_in_another_order(patch: pytest.MonkeyPatch) -> None:
    right = overlap.overlapped

    def overlapped(swap: Swap, chunks: int, x: Tensor, to: QKV, *rest: Any) -> Tensor:
        q, k, v = (project(x) for project in to)
        return right(swap, chunks, x, QKV(lambda _: q, lambda _: k, lambda _: v), *rest)

    patch.setattr("bernini.parallel.ulysses.overlapped", overlapped)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = larger(torch.float32)[0]
    wanted = found(case, 2, "packed")
    BROKEN[name](monkeypatch)
    assert not same(found(case, 2, "chunk"), wanted)


@pytest.mark.parametrize("frozen", ["v", "q", "qk"])
def test_what_needs_no_gradient_is_not_sent_back(frozen: str) -> None:
    case = larger(torch.float32)[0]
    wanted = found(case, 3, "packed", frozen=frozen)
    assert len(wanted[0]) == 7 - len(frozen)
    for way in OTHERS:
        assert same(found(case, 3, way, frozen=frozen), wanted)


def test_blocks_that_are_computed_again_have_the_same_bits() -> None:
    def again(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return checkpoint(run, x, use_reentrant=False)

    case = larger(torch.float32)[1]
    wanted = found(case, 2, "packed")
    for way in (*OTHERS, Policy("auto", rounds=(1, 1))):
        assert same(found(case, 2, way, around=again), wanted)


@pytest.mark.parametrize("way", [*OTHERS, "auto"])
def test_a_models_losses_and_gradients(way: str) -> None:
    """Through the whole renderer, by what its share says."""
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "ffn_dim": 16, "text_dim": 12, "freq_dim": 16, "in_channels": 4, "out_channels": 4}
    model = Renderer(RendererConfig(num_attention_heads=4, attention_head_dim=8, **sizes))
    draws = torch.Generator().manual_seed(1)
    shapes = [(4, 2, 4, 4), (4, 2, 4, 6), (5, 12), (4, 2, 4, 6)]
    source, target, context, noise = (torch.randn(shape, generator=draws) for shape in shapes)
    samples = [RendererSample((source,), target, context, 0.4, 400.0, noise)]

    def work(group: Group, policy: Policy) -> list[Tensor]:
        seen = Seen(group)
        share = Share(seen, least=0, policy=policy)
        losses = renderer_losses(model, pack_renderer(samples, (1, 2, 2), share), share)
        grads = torch.autograd.grad(losses.sum(), list(model.parameters()))
        assert ("exchange" in seen.log) == (policy.choice in ("packed", "auto"))
        assert any(word.startswith("start") for word in seen.log) == (policy.choice != "packed")
        return [losses.detach(), *grads]

    wanted = simulate(2, lambda group: work(group, Policy("packed")))
    assert same(simulate(2, lambda group: work(group, Policy(way, rounds=(1, 1)))), wanted)


def test_people_choose_a_way() -> None:
    parser = Parser()
    add_generate(parser)
    assert parser.parse_args([]).swap == "auto"
    assert parser.parse_args(["--swap", "chunk"]).swap == "chunk"
    assert load("toy/renderer").swap == "auto"
    assert load("toy/renderer", ["swap=async"]).swap == "async"
    with pytest.raises(UserError, match="swap.*'fast' is none of 'auto', 'packed', 'async', 'chunk'"):
        load("toy/renderer", ["swap=fast"])
    assert get_args(get_type_hints(Recipe)["swap"]) == CHOICES


# --- what is on its way when ------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """A group that writes down what begins and what is waited for, by the number of the exchange."""

    group: Group
    log: list[str] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        self.rank, self.size = self.group.rank, self.group.size
        self.gather, self.tell, self.parts = self.group.gather, self.group.tell, self.group.parts

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        self.log.append("exchange")
        self.group.exchange(sends, receives)

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        self.count += 1
        self.log.append(f"start {self.count}")
        return _SeenPending(self.group.start(sends, receives), self.log, f"wait {self.count}")


@dataclass
class _SeenPending:
    pending: Pending
    log: list[str]
    what: str

    def wait(self) -> None:
        self.log.append(self.what)
        self.pending.wait()


class Logged(Layer):
    """Says when it projects, and when the gradient of a projection is known; when it attends, forward and backward."""

    def project(self, number: int, x: Tensor) -> Tensor:
        log = self.group.log  # type: ignore[attr-defined]
        log.append("qkv"[number])
        weight = self.weights[number] * 1  # its hook runs when the product's backward has
        weight.register_hook(lambda grad: log.append("d" + "qkv"[number]))
        return (x @ weight).unflatten(1, (self.case.heads, -1))


def logged(way: str, heads: int) -> list[str]:
    one = Segment("target", (2, 3, 5))
    case = Case(False, SegmentLayout([one]), heads, heads, 8, seed=1)

    def work(group: Group) -> list[str]:
        seen = Seen(group)
        layer = Logged(case, seen, way)
        layer.run()
        return seen.log

    first, second = simulate(2, work)
    assert first == second
    return first


def test_packed_exchanges_and_everybody_waits() -> None:
    assert logged("packed", 4) == "v k q exchange exchange exchange exchange dq dk dv".replace(" ", "|").split("|")


def test_v_leaves_while_k_is_projected_and_gradients_return_in_reverse() -> None:
    forward = ["v", "start 1", "k", "start 2", "q", "start 3", "wait 3", "wait 2", "wait 1", "start 4", "wait 4"]
    backward = ["start 5", "wait 5", "start 6", "start 7", "start 8", "wait 6", "dq", "wait 7", "dk", "wait 8", "dv"]
    assert logged("async", 4) == [*forward, *backward]


def test_a_chunk_attends_while_the_others_are_on_their_way() -> None:
    log = logged("chunk", 4)  # two ranks, two heads each, two chunks: v 1 2, k 3 4, q 5 6, results 7 8
    at = log.index
    assert at("start 6") < at("wait 5") < at("start 7") < at("wait 6") < at("start 8") < at("wait 7")
    assert log[: at("wait 5")] == ["v", "start 1", "start 2", "k", "start 3", "start 4", "q", "start 5", "start 6"]
    # Backward: gradients of results, the last chunk's 9 and 10; of its q, k, v 11 to 13; of the first chunk's 14 to 16.
    back = log[at("start 9") :]
    assert back[:6] == ["start 9", "start 10", "wait 9", "start 11", "start 12", "start 13"]
    assert back[6:10] == ["wait 10", "start 14", "start 15", "start 16"]
    assert [word for word in back[10:] if word[0] == "d"] == ["dq", "dk", "dv"]
    assert back.index("dq") < back.index("wait 12") and back.index("dk") < back.index("wait 13")


# --- the policy -------------------------------------------------------------------------------------------------------


class Clock:
    """Goes on by the seconds that a way takes on a rank."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.now, self.runs = seconds, 0.0, list[str]()

    def __call__(self) -> float:
        return self.now


def policy_of(seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch, looks: int = 1) -> tuple[Policy, Clock]:
    """One that sees these times; its layers still run."""
    clock = Clock(seconds)
    policy = Policy("auto", rounds=(1, looks), clock=clock)
    right = policy._timed

    def timed(group: Group, run: Any, x: Tensor) -> float:
        taken = right(group, run, x)
        assert taken == 0
        clock.runs.append(run.args[0])
        return seconds[run.args[0]]

    monkeypatch.setattr(policy, "_timed", timed)
    return policy, clock


def test_the_slowest_rank_decides_and_all_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank would choose something else alone."""
    times = [{"packed": 1.0, "async": 0.5, "chunk": 0.6}, {"packed": 1.0, "async": 2.0, "chunk": 0.9}]
    case = larger(torch.float32)[0]
    wanted = found(case, 2, "packed")

    def work(group: Group) -> tuple[list[Tensor], list[str], list[dict[Variant, float]]]:
        policy, clock = policy_of(times[group.rank], monkeypatch)
        Layer(case, group, policy).run()
        parts = Layer(case, group, policy).run()  # known by now
        return parts, clock.runs, [one.seconds for one in policy.found.values()]

    for (parts, runs, seconds), own in zip(simulate(2, work), wanted, strict=True):
        assert same([parts], [own])
        assert seconds == [{"packed": 1.0, "async": 2.0, "chunk": 0.9}]
        assert runs == ["packed", "async", "chunk"] * 2  # once for nothing


@pytest.mark.parametrize(
    ("times", "looks"),
    [([0.1, 0.1, 0.05], 2), ([0.1, 0.05, 0.05, 0.05], 4), ([30.0, 9.0, 8.0], 1), ([1.1**n / 10 for n in range(9)], 8)],
)
def test_rounds_go_on_until_nothing_changes(times: list[float], looks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of async, while packed takes 0.1 s; unless the budget is spent, or the most looks are made."""
    policy, runs = Policy("auto", rounds=(2, 8)), list[str]()

    def timed(group: Group, run: Any, x: Tensor) -> float:
        runs.append(run.args[0])
        number = len(runs) // 2 - 1  # in turns, after one for nothing
        return 0.1 if run.args[0] == "packed" else times[max(number - 1, 0) // 2]

    monkeypatch.setattr(policy, "_timed", timed)
    measured = policy._measured(Alone(), ("packed", "async"), torch.zeros(1), lambda variant, x: x)
    assert len(runs) == 2 + 4 * looks
    assert measured.seconds == pytest.approx({"packed": 0.1, "async": median(times[:looks])})


def test_packed_stays_unless_another_gains() -> None:
    def chosen(*rounds: dict[Variant, float]) -> Variant:
        return Measured(Alone(), rounds).choice

    assert chosen({"packed": 1.0, "async": 1.0 - GAIN / 2, "chunk": 1.1}) == "packed"
    assert chosen({"packed": 1.0, "async": 0.98, "chunk": 0.965}) == "chunk"
    assert chosen({"packed": 1.0, "async": 0.98, "chunk": 0.985}) == "async"
    assert chosen({"packed": 1.0, "async": 1.5}) == "packed"
    slow: list[dict[Variant, float]] = [{"packed": 1.0 * n, "async": 0.95 * n} for n in (1, 3, 1, 2)]
    assert chosen(*slow) == "async"  # what slows all of a round says nothing
    assert chosen(*slow, {"packed": 1.0, "async": 2.5}) == "async"  # nor does one that is slow by itself
    doubtful: list[dict[Variant, float]] = [{"packed": 1.0, "async": 0.95 + n} for n in (-0.2, 0.2, 0, 0.1, -0.1)]
    assert chosen(*doubtful) == "packed"


def test_measured_once_for_what_is_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(4, 4, 4), (4, 4, 4), (4, 3, 6), (8, 8, 8)]

    def work(group: Group) -> list[int]:
        policy, clock = policy_of({"packed": 1.0, "async": 0.5, "chunk": 0.6}, monkeypatch)
        counts = []
        for grid in sizes:
            case = Case(False, SegmentLayout([Segment("target", grid)]), 4, 4, 8)
            Layer(case, group, policy).run()
            counts.append(len(clock.runs))
        with torch.no_grad():
            layer = Layer(case, group, policy)
            layer.forward(layer.x)
        return [*counts, len(clock.runs)]

    assert simulate(2, work)[0] == [6, 6, 6, 12, 18]


def test_measuring_leaves_nothing_behind() -> None:
    """No gradients, nothing for who offloads what is saved, and no bits."""
    case = larger(torch.float32)[0]
    packs: list[list[int]] = []

    def work(group: Group) -> list[Tensor | None]:
        kept: list[int] = []
        packs.append(kept)

        def keep(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
                return run(x)

        policy = Policy("auto", rounds=(1, 1))
        layer = Layer(case, group, policy, around=keep)
        layer.run()
        first, kept[:] = list(kept), []
        layer.run()
        assert first == kept
        return [layer.x.grad, *[weight.grad for weight in layer.weights]]

    assert simulate(2, work) == [[None] * 4] * 2


def test_what_has_no_values_is_not_measured() -> None:
    class Nobody(Alone):
        size = 2

    def by(variant: Variant, x: Tensor) -> Tensor:
        raise AssertionError

    heads = Heads.shared(4, 4, 2)
    plan = SPPlan.make(SegmentLayout([Segment("target", (2, 2, 2))]), 4, 4, 2)
    swap = Swap(Nobody(), heads, plan.cut, plan.cut)
    with FakeTensorMode():
        assert Policy("auto").choose(swap, (0, 8), 2, torch.empty(4, 8), by) == "packed"
    assert Policy("auto").choose(swap, (0, 8), 2, torch.empty(4, 8, device="meta"), by) == "packed"
    with pytest.raises(ValueError, match="'fast' is none of auto, packed, async, chunk"):
        Policy("fast")


# --- messages on their way --------------------------------------------------------------------------------------------


def in_flight(group: Group) -> list[list[float]]:
    """Many at once, waited for in another order than begun, with exchanges between them."""
    other, pending, places = 1 - group.rank, [], []
    for number in range(20):
        sent = torch.full((1000 * (number % 3 + 1),), float(100 * group.rank + number))
        place = torch.empty_like(sent)
        pending.append(group.start([Message(other, sent)], [Message(other, place)]))
        places.append(place)
        if number % 7 == 3:
            group.exchange([Message(other, torch.ones(3))], [Message(other, place := torch.empty(3))])
            assert place.tolist() == [1.0] * 3
    for one in (*pending[::-1], *pending[:3]):  # more than once does no harm
        one.wait()
    return [[float(place.min()), float(place.max())] for place in places]


def wanted_in_flight(rank: int) -> list[list[float]]:
    return [[100.0 * (1 - rank) + number] * 2 for number in range(20)]


def test_messages_between_two_ranks_are_told_apart() -> None:
    assert simulate(2, in_flight) == [wanted_in_flight(0), wanted_in_flight(1)]
    assert trace.simulate(2, in_flight) == [wanted_in_flight(0), wanted_in_flight(1)]


def test_simulated_ranks_are_strict() -> None:
    def one(group: Group, change: bool = False, wait: bool = True, take: bool = True) -> float:
        sent, place, other = torch.zeros(3), torch.zeros(3), 1 - group.rank
        pending = group.start([Message(other, sent)], [Message(other, place)] if take else [])
        assert not take or place.isnan().all()
        if change:
            sent += 1
        if wait:
            pending.wait()
        return float(place.sum())

    assert simulate(2, one) == [0.0, 0.0]
    for bad, said in (
        (partial(one, change=True), r"rank \d changed what was on its way to rank \d"),
        (partial(one, wait=False), r"rank \d did not wait for what was on its way"),
        (partial(one, take=False), r"rank \d sent a message that rank \d did not take"),
        (lambda group: one(group) if group.rank else None, "rank 1 waits for a message of rank 0, which has ended"),
    ):
        with pytest.raises(RuntimeError, match=said):
            simulate(2, bad)


def test_who_waits_for_what_has_left_waits_in_no_circle() -> None:
    """0 waits for what 1 began to send, and 1 for 0 in another group, with more begun behind it: 0 will come."""
    note = calls.Note(1, "float32", (3,), 3)
    here, there = trace.Trace((0, 1), 0), trace.Trace((0, 1), 1)
    begun = here.begin("start", [], [note], False)
    here.end()
    here.begin("start", [], [note], False)
    here.end()
    here.resume(begun)
    other = trace.Trace((1, 0), 0)
    other.begin("tell", [], [], True)
    late = trace.Trace((1, 0), 1)
    views = {0: [here.view(1), late.view()], 1: [other.view(), there.view()]}
    assert [view.members for view in calls.circle(views, 0)] == [(0, 1), (1, 0)]  # 1 has sent nothing yet
    there.begin("start", [note._replace(rank=0)], [], False)
    there.end()
    views[1] = [other.view(), there.view()]
    assert calls.circle(views, 0) == []
    assert "call 1, start" in here.view(1).where
    here.end()
    for _ in range(trace.KEPT):
        here.begin("start", [], [note], False)
    here.resume(begun)
    assert "call 1, start" in here.view().where  # however long ago it was begun


def test_ranks_that_begin_different_messages_are_told() -> None:
    def work(group: Group) -> None:
        size = 3 + group.rank
        group.start([Message(1 - group.rank, torch.ones(size))], [Message(1 - group.rank, torch.ones(size))]).wait()

    with pytest.raises(calls.Mismatch, match=r"group.start by test_variants.*sends it float32\[3\]"):
        trace.simulate(2, work)


# --- processes --------------------------------------------------------------------------------------------------------


def by_process(group: Group) -> list[list[Tensor]]:
    assert in_flight(group) == wanted_in_flight(group.rank)  # and then another one on the same connections
    case = larger(torch.float32)[0]
    policy = Policy("auto", rounds=(2, 1))
    runs = [Layer(case, group, way).run() for way in ("packed", *OTHERS, policy)]
    (measured,) = policy.found.values()
    told = group.tell(measured.seconds)
    assert all(seconds == told[0] for seconds in told) and set(told[0]) == {"packed", *OTHERS}
    return runs


def test_processes_have_the_bits_of_threads(tmp_path: Path) -> None:
    by_process = forked.found("tests.parallel.test_variants", tmp_path, 2)
    wanted = found(larger(torch.float32)[0], 2, "packed")
    for runs, own in zip(by_process, wanted, strict=True):
        for run in runs:
            assert same([run], [own])


if __name__ == "__main__":
    forked.run(Path(sys.argv[1]), 2, by_process)
