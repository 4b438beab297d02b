"""The checker names the seven bugs that other offloaders have had (facts, systems, section 2.1), each put back into the
real code and run; and it finds nothing in the real code."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bernini.offload import checker
from bernini.offload.activations import ActivationOffload
from bernini.offload.arena import Arena
from bernini.offload.checker import check
from bernini.offload.log import HOST, Log
from bernini.offload.saved import Interval
from bernini.offload.store import Store
from bernini.offload.transfer import Stream
from bernini.offload.transfer_cpu import CpuTransfers

WIDTH = 16


class Packed(nn.Module):
    """Saves views at offsets of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).sin()
        return y[:4] * y[4:] + (y * y).mean(0)


class Grows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Packed()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.inner(x), x[:4].tanh()])


class CachedStream(Store):
    """Asks for the current stream once."""

    cached: Stream | None = None

    def current(self) -> Stream:
        if self.cached is None:
            self.cached = super().current()
        return self.cached


class LateCopy(Store):
    """Records the event that the compute waits for before the copy, which so comes after the wait."""

    def land(self, known: Interval, back: Stream) -> None:
        assert known.landing is not None and known.host is not None
        known.landed = self.transfers.record(back)
        self.transfers.copy(back, known.landing, known.host)


class EarlyFree(Store):
    """Lets go of the tensor while it is copied."""

    def before_release(self, known: Interval) -> None:
        pass


class NoWait(Store):
    """Uses what comes back without waiting for it."""

    def before_use(self, known: Interval, at: Stream) -> None:
        pass


class BaseForView(Store):
    """Takes a view for what it is a view of."""

    def offset(self, known: Interval, tensor: Tensor) -> int:
        return 0


class SlotTooSoon(Store):
    """Copies into memory without waiting for those who may still use it as something else."""

    def before_landing(self, back: Stream, at: Stream) -> None:
        pass


class Forgetful(ActivationOffload):
    """Clears everything when the context ends."""

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.store.finish()
        for _, known in self.store._storages.values():
            for one in known:
                if one.host is not None:
                    self.transfers.free(None, one.host)
                    one.host = None


def run(store: type[Store] = Store, offload: type[ActivationOffload] = ActivationOffload) -> list[checker.Violation]:
    """A forward on two streams and a backward behind the context, with slow copies."""
    torch.manual_seed(0)
    blocks = [Grows(), Grows(), Grows()]
    transfers = CpuTransfers(delay=0.01, seed=1, log=Log(None))
    kind = type("Offload", (offload,), {"store_type": store})
    offloading = kind(
        blocks, policy="all", minimum=1, in_flight=1024, landing=2, transfers=transfers, arena=Arena(1 << 20)
    )
    with offloading:
        x = blocks[0](torch.randn(8, WIDTH, requires_grad=True))
        with transfers.using("side"):
            x = blocks[2](blocks[1](x))
        loss = x.sum()
    with contextlib.suppress(AssertionError):  # a bug may show in other ways, too
        loss.backward()
    del loss, x
    transfers.close()
    return check(transfers.log)


BUGS: dict[str, tuple[dict[str, Any], str]] = {
    "stream cached across a stream change": ({"store": CachedStream}, checker.OTHER_STREAM),
    "copy enqueued after the wait": ({"store": LateCopy}, checker.STALE_WAIT),
    "early free": ({"store": EarlyFree}, checker.FREED_EARLY),
    "missing wait on reload": ({"store": NoWait}, checker.READ_EARLY),
    "offset view taken for its base": ({"store": BaseForView}, checker.WRONG_BYTES),
    "exit clearing live state": ({"offload": Forgetful}, checker.WANTED),
    "landing slot reused too soon": ({"store": SlotTooSoon}, checker.NOT_THERE),
}


def test_the_real_code_breaks_no_rule() -> None:
    assert [str(wrong) for wrong in run()] == []


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_named(bug: str) -> None:
    broken, rule = BUGS[bug]
    found = {wrong.rule for wrong in run(**broken)}
    assert rule in found, found


def test_seven() -> None:
    assert len(BUGS) == 7 and len({rule for _, rule in BUGS.values()}) == 7


# --- logs written by hand ---------------------------------------------------------------------------------------------


def rules(log: Log) -> list[str]:
    return [wrong.rule for wrong in check(log)]


def test_order_is_by_edges_and_not_by_time() -> None:
    log = Log(None)
    log.add("adopt", "compute", 0)
    log.add("new", HOST, 1)
    log.add("copy", "out", 1, 0)
    assert rules(log) == [checker.READ_EARLY]
    log = Log(None)
    log.add("adopt", "compute", 0)
    event = log.add("record", "compute")
    log.add("new", HOST, 1)
    log.add("wait", "out", event=event)
    log.add("copy", "out", 1, 0)
    done = log.add("record", "out")
    assert rules(log) == []
    log.add("free", "compute", 0)
    assert rules(log) == [checker.FREED_EARLY]
    log.add("synchronize", HOST, event=done)
    log.add("free", HOST, 1)
    assert rules(log) == [checker.FREED_EARLY]
    log.add("copy", "out", 1, 0)
    assert rules(log)[1:] == [checker.GONE, checker.GONE]
    log.add("free", HOST, 1)
    assert rules(log)[-2:] == [checker.TWICE, checker.FREED_EARLY]


def test_an_edge_goes_through_a_third_stream() -> None:
    log = Log(None)
    log.add("adopt", "a", 0)
    first = log.add("record", "a")
    log.add("wait", "b", event=first)
    second = log.add("record", "b")
    log.add("wait", "c", event=second)
    log.add("give", "c", 0)
    log.add("give", "d", 0)
    assert [(wrong.rule, wrong.second.stream) for wrong in check(log)] == [(checker.READ_EARLY, "d")]


def test_what_was_written_while_it_is_read() -> None:
    log = Log(None)
    log.add("new", HOST, 0)
    log.add("adopt", "a", 1)
    log.add("copy", "a", 0, 1)
    log.add("copy", "b", 0, 1)
    assert set(rules(log)) == {checker.WRITE_EARLY, checker.READ_EARLY}


def test_a_short_log_is_no_reason_for_false_alarms() -> None:
    log = Log(3)
    for number in range(4):
        log.add("new", HOST, number)
    log.add("give", HOST, 0)
    log.add("free", HOST, 0)
    assert len(log) == 3 and rules(log) == []


def test_messages() -> None:
    log = Log(None)
    log.add("adopt", "compute", 7)
    log.add("new", HOST, 8)
    log.add("copy", "out", 8, 7)
    (wrong,) = check(log)
    assert str(wrong) == (
        "read before it is written: action 0 (adopt of buffer 7 on compute), then action 2 (copy into buffer 8 from "
        "buffer 7 on out)"
    )
