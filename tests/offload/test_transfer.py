"""Streams, events and copies of the backends that need no GPU, and how a copy is cut for the one that does."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from bernini.offload.arena import Arena
from bernini.offload.checker import check
from bernini.offload.log import Log
from bernini.offload.transfer import Buffer, Transfers, make
from bernini.offload.transfer_cpu import CpuTransfers
from bernini.offload.transfer_sim import SimTransfers

MIB = 1 << 20


def device(transfers: Transfers, values: torch.Tensor) -> Buffer:
    raw = values.view(torch.uint8)
    return transfers.adopt(raw, (0, raw.numel()), (0,))


def there_and_back(transfers: CpuTransfers, arena: Arena, values: torch.Tensor) -> torch.Tensor:
    compute, out, back = transfers.current(), transfers.stream("out"), transfers.stream("back")
    source = device(transfers, values)
    host = transfers.host(arena.take(source.nbytes), source.nbytes)
    transfers.wait(out, transfers.record(compute))
    transfers.copy(out, host, source)
    copied = transfers.record(out)
    landing = transfers.new(compute, source.nbytes)
    transfers.wait(back, transfers.record(compute))
    transfers.wait(back, copied)
    transfers.copy(back, landing, host)
    landed = transfers.record(back)
    transfers.wait(compute, landed)
    transfers.give(landing, 0, (0, 0))
    transfers.wait(compute, copied)
    transfers.free(compute, source)
    transfers.synchronize(landed)
    result = landing.memory.view(values.dtype)
    transfers.free(None, host)
    return result


@pytest.mark.parametrize("seed", range(5))
def test_there_and_back(seed: int) -> None:
    """Whatever the delays are, a stream waits for the events that it was told to wait for."""
    transfers, arena = CpuTransfers(delay=0.01, seed=seed, log=Log(None)), Arena(MIB)
    for _ in range(3):
        values = torch.randn(10_000)
        assert torch.equal(there_and_back(transfers, arena, values), values)
    assert check(transfers.log) == [] and arena.stats().live == 0
    transfers.close()


def test_copies_really_are_late() -> None:
    """Without the wait the host is ahead: what is tested above can fail."""
    transfers, arena = CpuTransfers(bandwidth=1e6), Arena(MIB)
    source = device(transfers, torch.ones(25_000))
    host = transfers.host(arena.take(source.nbytes), source.nbytes)
    start = time.perf_counter()
    transfers.copy(transfers.stream("out"), host, source)
    copied = transfers.record(transfers.stream("out"))
    assert not transfers.done(copied)
    transfers.synchronize(copied)
    assert time.perf_counter() - start >= 0.1  # 100 kB at 1 MB/s
    assert transfers.done(copied)
    transfers.close()


def test_delays_are_those_of_the_seed() -> None:
    draws = []
    for seed in (1, 1, 2):
        transfers = CpuTransfers(delay=1.0, seed=seed)
        chance = transfers.stream("out").native._chance
        draws.append([chance.random() for _ in range(3)])
        transfers.close()
    assert draws[0] == draws[1] != draws[2]


def test_states() -> None:
    transfers = CpuTransfers()
    out, compute = transfers.stream("out"), transfers.current()
    one, other = device(transfers, torch.ones(8)), transfers.new(compute, 32)
    with pytest.raises(ValueError, match="is empty; this needs it filled"):
        transfers.copy(out, one, other)
    with pytest.raises(ValueError, match="a copy of 32 bytes into 16"):
        transfers.copy(out, transfers.new(compute, 16), one)
    transfers.free(compute, one)
    for call in (lambda: transfers.free(compute, one), lambda: transfers.copy(out, other, one)):
        with pytest.raises(ValueError, match="is freed"):
            call()
    transfers.close()


def test_a_failed_copy_is_told() -> None:
    """Where somebody waits for it, and by everything after it; nobody waits for ever."""
    transfers = CpuTransfers()
    out = transfers.stream("out")
    broken = Buffer(99, 32, "no memory", "filled")
    transfers.copy(out, transfers.new(transfers.current(), 32), broken)
    event = transfers.record(out)
    with pytest.raises(RuntimeError, match="a copy failed"):
        transfers.wait(transfers.current(), event)
    with pytest.raises(RuntimeError, match="a copy failed"):
        transfers.synchronize(transfers.record(out))
    transfers.close()


def test_compute_streams_are_names() -> None:
    transfers = CpuTransfers()
    first = transfers.current()
    with transfers.using("side"):
        side = transfers.current()
        assert side is not first and transfers.done(transfers.record(side))
        with transfers.using("side"):
            assert transfers.current() is side
    assert transfers.current() is first
    transfers.close()


def test_virtual_clock() -> None:
    """Two seconds of compute beside a copy of three: the third is waited for; copies of one stream queue up."""
    sim = SimTransfers(10.0, {"back": 20.0})
    compute, out, back = sim.current(), sim.stream("out"), sim.stream("back")
    source = sim.adopt(None, (0, 30), (0,))
    host = sim.host(None, 30)
    sim.copy(out, host, source)
    copied = sim.record(out)
    sim.work(compute, 2.0)
    assert (sim.now(compute), sim.now(out), sim.done(copied)) == (2.0, 3.0, False)
    sim.wait(back, copied)
    sim.copy(back, sim.new(compute, 30), host)
    landed = sim.record(back)
    assert sim.now(back) == 4.5
    sim.wait(compute, copied)
    assert sim.now(compute) == 3.0 and sim.stalled(compute) == 1.0 and sim.done(copied)
    sim.synchronize(landed)
    sim.work(compute, 1.0)
    assert sim.now(compute) == 5.5 and sim.seconds(1.0, sim.mark()) == 4.5


def test_same_schedule_on_the_virtual_clock() -> None:
    """The code above the backends is the same: the same calls run on either and leave the same log."""
    logs = []
    for transfers in (CpuTransfers(log=Log(None)), SimTransfers(1e9, log=Log(None))):
        compute, out = transfers.current(), transfers.stream("out")
        memory: Any = torch.zeros(16, dtype=torch.uint8) if isinstance(transfers, CpuTransfers) else None
        source, landing = transfers.adopt(memory, (0, 16), (0,)), transfers.new(compute, 16)
        transfers.wait(out, transfers.record(compute))
        transfers.copy(out, landing, source)
        transfers.wait(compute, transfers.record(out))
        transfers.free(compute, source)
        logs.append(list(transfers.log))
        transfers.close()
    assert logs[0] == logs[1] and check(logs[0]) == []


def test_pieces_of_a_copy() -> None:
    """A GPU's copy is cut where a block lies across two page-locked ranges, in either direction."""
    from bernini.offload.transfer_cuda import _pairs

    arena = Arena(8192 * 4, slab_bytes=8192, register=lambda address, size: None)
    first, block = arena.take(4096), arena.take(10_000)
    whole = torch.arange(10_000, dtype=torch.int32).to(torch.uint8)
    pairs = _pairs(block, whole)
    assert len(pairs) == len(block.pieces()) >= 2
    for to, of in pairs:
        to.copy_(of)
    assert torch.equal(block.bytes, whole)
    again = torch.zeros_like(whole)
    for to, of in _pairs(again, block):
        to.copy_(of)
    assert torch.equal(again, whole)
    first.free()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_backend_of_this_machine() -> None:
    transfers = make()
    assert isinstance(transfers, CpuTransfers) and isinstance(make("cpu"), CpuTransfers)
