"""The arena: where blocks lie, that no two share a byte, what happens at its limits, and how little it wastes."""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch

from bench_perf import arena as bench
from bernini.offload import hostmem
from bernini.offload.arena import Arena, ArenaFull, Block
from bernini.offload.holes import Holes
from bernini.offload.hostmem import ALIGN, aligned

PAGE = 4096


def nothing(_address: int, _nbytes: int) -> None:
    """For arenas of which only the addresses matter."""


def best_fit(used: list[Block], end: int, size: int, behind: int) -> int | None:
    """By looking at every gap: the one behind the last block taken, else the start of the smallest that has room, the
    first of equals; the last gap last."""
    borders = sorted((block.offset, block.offset + aligned(max(block.nbytes, 1))) for block in used)
    starts, stops = [0, *(stop for _, stop in borders)], [*(start for start, _ in borders), end]
    gaps = [(b - a, a) for a, b in zip(starts, stops, strict=True) if b - a >= size]
    return min(gaps, key=lambda gap: (sum(gap) == end, gap[1] != behind, gap))[1] if gaps else None


@pytest.mark.parametrize("seed", range(8))
def test_blocks_go_where_the_best_fit_is_and_keep_their_bytes(seed: int) -> None:
    draw, used, written, behind = Random(seed), list[Block](), dict[int, int](), 0
    with Arena(256 * PAGE, slab_bytes=16 * PAGE) as arena:
        for turn in range(300):
            if used and draw.random() < 0.5:
                block = used.pop(draw.randrange(len(used)))
                assert (block.bytes == written.pop(block.offset)).all()
                block.free()
                continue
            nbytes = draw.randrange(12 * PAGE)
            end, size = arena.registered, aligned(max(nbytes, 1))
            expected = best_fit(used, end, size, behind)
            block = arena.take(nbytes)
            if expected is not None:
                assert (block.offset, arena.registered) == (expected, end)
            assert block.offset % ALIGN == 0 and block.bytes.shape == (nbytes,)
            assert block.bytes.data_ptr() % ALIGN == 0 or not nbytes
            behind = block.offset + size
            block.bytes.fill_(turn % 251)
            used.append(block)
            written[block.offset] = turn % 251
            stats = arena.stats()
            assert stats.live == sum(block.nbytes for block in used) <= stats.peak_live
            assert stats.extent <= stats.peak_bytes <= stats.registered <= 256 * PAGE
        for block in used:
            assert (block.bytes == written[block.offset]).all()
            block.free()
        stats = arena.stats()
        assert (stats.live, stats.extent, stats.largest_free) == (0, 0, stats.registered)  # one hole again


def test_a_block_may_be_larger_than_a_slab_and_is_copied_piece_by_piece() -> None:
    ranges: list[tuple[int, int]] = []
    arena = Arena(64 * PAGE, slab_bytes=4 * PAGE, register=lambda *where: ranges.append(where))
    first, large = arena.take(3 * PAGE), arena.take(10 * PAGE + 1)
    last = arena.take(PAGE)
    assert [length // PAGE for _, length in ranges] == [4, 12]  # a growth is one range
    assert arena.stats().slabs == 2
    for block in (first, large, last):
        block.bytes.copy_(torch.arange(block.nbytes) % 251)
        pieces = block.pieces()
        torch.testing.assert_close(torch.cat(pieces), block.bytes, rtol=0, atol=0)
        for piece in pieces:
            start = piece.data_ptr()
            assert sum(a <= start and start + len(piece) <= a + length for a, length in ranges) == 1
    assert [len(block.pieces()) for block in (first, large, last)] == [1, 2, 1]


def test_a_tensor_is_a_view_of_the_block() -> None:
    arena = Arena(PAGE)
    block = arena.take(31)
    tensor = block.tensor((3, 5), torch.bfloat16)
    tensor.copy_(torch.arange(15).view(3, 5))
    assert tensor.is_contiguous() and torch.equal(block.bytes[:30].view(torch.bfloat16).view(3, 5), tensor)
    assert block.tensor((), torch.float32).shape == ()
    assert block.tensor((0, 7), torch.float32).shape == (0, 7)
    with pytest.raises(ValueError, match=r"\[4, 4\] of torch.bfloat16 are 32 bytes, and the block has 31"):
        block.tensor((4, 4), torch.bfloat16)


# --- limits ---------------------------------------------------------------------------------------------------------


def test_over_the_limit_nothing_is_lost() -> None:
    arena = Arena(10 * PAGE, slab_bytes=4 * PAGE)
    with pytest.raises(ArenaFull, match=f"{11 * PAGE} bytes are more than its whole limit of {10 * PAGE}"):
        arena.take(11 * PAGE)
    blocks = [arena.take(2 * PAGE) for _ in range(5)]
    for number, block in enumerate(blocks):
        block.bytes.fill_(number)
    blocks.pop(3).free()
    blocks.pop(1).free()
    with pytest.raises(ArenaFull, match=f"{6 * PAGE} of {10 * PAGE} are used, and no more than {2 * PAGE}"):
        arena.take(3 * PAGE)  # 4 pages are free, in two pieces
    assert [int(block.bytes[-1]) for block in blocks] == [0, 2, 4]
    stats = arena.stats()
    assert (stats.live, stats.registered, stats.refused, stats.takes) == (6 * PAGE, 10 * PAGE, 2, 5)
    assert arena.take(2 * PAGE).offset == 2 * PAGE


def test_the_end_of_the_last_slab_counts_when_it_grows() -> None:
    arena = Arena(8 * PAGE, slab_bytes=4 * PAGE, register=nothing)
    first = arena.take(3 * PAGE)
    assert arena.take(5 * PAGE).offset == first.nbytes and arena.registered == 8 * PAGE


@pytest.mark.parametrize(("limit", "slab"), [(0, 1), (PAGE - 1, 1), (PAGE, 0)])
def test_a_limit_without_a_page_is_an_error(limit: int, slab: int) -> None:
    with pytest.raises(ValueError, match="at least 4096 bytes"):
        Arena(limit, slab_bytes=slab)


def test_after_warm_up_it_does_not_grow() -> None:
    calls: list[tuple[int, int]] = []
    arena = Arena(64 * PAGE, slab_bytes=4 * PAGE, register=lambda *where: calls.append(where))
    arena.warm_up(22 * PAGE)
    assert arena.registered == 24 * PAGE and len(calls) == 1
    arena.warm_up(5 * PAGE)
    for _ in range(3):
        for block in [arena.take(5 * PAGE) for _ in range(4)]:
            block.free()
    assert len(calls) == 1
    with pytest.raises(ArenaFull, match="more than its whole limit"):
        arena.warm_up(65 * PAGE)


def test_a_system_that_refuses_leaves_what_there_was() -> None:
    undone: list[int] = []
    refuse = False

    def register(address: int, _nbytes: int) -> object:
        if refuse:
            raise MemoryError("no more locked pages")
        return lambda: undone.append(address)

    arena = Arena(64 * PAGE, slab_bytes=4 * PAGE, register=register)  # type: ignore[arg-type]
    first = arena.take(4 * PAGE)
    first.bytes.fill_(7)
    refuse = True
    for _ in range(2):
        with pytest.raises(ArenaFull, match=rf"has {4 * PAGE} bytes and cannot get {4 * PAGE} more: no more locked"):
            arena.take(PAGE)
    assert (first.bytes == 7).all() and arena.registered == 4 * PAGE and arena.stats().refused == 2
    refuse = False
    with pytest.raises(ArenaFull, match="cannot get"):
        arena.take(PAGE)  # it does not ask again for every tensor
    arena.warm_up(8 * PAGE)
    second = arena.take(4 * PAGE)
    second.bytes.fill_(8)
    assert (first.bytes == 7).all()
    address = first.bytes.data_ptr()
    first.free()
    second.free()
    arena.close()
    del first, second
    gc.collect()
    assert undone == [address + 4 * PAGE, address]


@contextmanager
def limited(kind: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def status(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(f"{name}:"))


def test_host_memory_exhausted() -> None:
    arena = Arena(1 << 40, slab_bytes=256 << 20, register=nothing)
    with limited(resource.RLIMIT_DATA, status("VmData") + (64 << 20)), pytest.raises(ArenaFull, match="has 0 bytes"):
        arena.take(1)
    arena.warm_up(256 << 20)
    arena.take(1).bytes.fill_(1)


def test_a_machine_with_little_memory_left_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostmem, "available", lambda: 5 * PAGE)
    arena = Arena(64 * PAGE, slab_bytes=4 * PAGE)
    first = arena.take(4 * PAGE)
    with pytest.raises(ArenaFull, match=f"this machine has {5 * PAGE} bytes of memory left"):
        arena.take(8 * PAGE)
    assert arena.stats().live == first.nbytes


def test_available_memory_is_that_of_this_machine() -> None:
    room = hostmem.available()
    assert room is not None and 0 < room < resource.getpagesize() * 2**40


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
def test_a_file_keeps_the_bytes_out_of_anonymous_memory(tmp_path: Path, named: bool) -> None:
    nbytes = 32 << 20
    before = status("RssAnon")
    with Arena(1 << 36, slab_bytes=1 << 20, file=tmp_path / "arena" if named else tmp_path) as arena:
        block = arena.take(nbytes)
        block.bytes.fill_(5)
        assert status("RssAnon") - before < nbytes / 4 and (block.bytes[:: 1 << 10] == 5).all()
        assert not list(tmp_path.iterdir())  # it has no name, so nobody need clean up
        block.free()


@pytest.mark.parametrize("where", ["missing/arena", "file/arena"])
def test_a_file_that_cannot_be_written(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"cannot write the file .*arena \(.*folder that can be written"):
        Arena(PAGE, file=tmp_path / where)


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        Arena(PAGE, file=tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_full_disk(tmp_path: Path) -> None:
    arena = Arena(64 << 20, slab_bytes=1 << 20, file=tmp_path)
    block = arena.take(1 << 20)
    block.bytes.fill_(3)
    with limited(resource.RLIMIT_FSIZE, 2 << 20), pytest.raises(ArenaFull, match="the arena's file cannot grow"):
        arena.take(4 << 20)
    arena.warm_up(5 << 20)
    arena.take(4 << 20).bytes.fill_(4)
    assert (block.bytes == 3).all()


# --- whose bytes ----------------------------------------------------------------------------------------------------


def test_what_was_freed_cannot_be_used() -> None:
    block = Arena(PAGE).take(9)
    block.free()
    with pytest.raises(ValueError, match="freed twice"):
        block.free()
    for use in (lambda: block.bytes, block.pieces, lambda: block.tensor((1,), torch.uint8)):
        with pytest.raises(ValueError, match="was freed"):
            use()


def test_a_forgotten_block_goes_back_when_its_tensors_are_gone() -> None:
    arena = Arena(4 * PAGE)
    tensor = arena.take(3 * PAGE).tensor((3 * PAGE,), torch.uint8)
    view = tensor[PAGE:].view(torch.float32)
    del tensor
    gc.collect()
    assert arena.stats().live == 3 * PAGE
    with pytest.raises(ArenaFull):
        arena.take(2 * PAGE)
    del view
    gc.collect()
    assert arena.take(4 * PAGE).offset == 0


def mapped(address: int) -> bool:
    with open("/proc/self/maps", encoding="utf-8") as file:
        spans = [line.split()[0].split("-") for line in file if line.split()[1].startswith("rw")]
    return any(int(start, 16) <= address < int(stop, 16) for start, stop in spans)


def test_closed_it_gives_no_blocks_and_keeps_those_there_are() -> None:
    arena = Arena(1 << 30, slab_bytes=1 << 20)
    block = arena.take(PAGE)
    kept = block.bytes.fill_(9)
    address = kept.data_ptr()
    arena.close()
    with pytest.raises(ValueError, match="closed"):
        arena.take(1)
    block.free()
    del block
    gc.collect()
    assert mapped(address) and (kept == 9).all()
    del kept
    gc.collect()
    assert not mapped(address)


def test_threads_take_and_free_at_once() -> None:
    arena = Arena(512 * PAGE, slab_bytes=8 * PAGE)

    def work(seed: int) -> int:
        draw, mine, wrong = Random(seed), list[Block](), 0
        for _ in range(150):
            if len(mine) > 5:
                block = mine.pop(draw.randrange(len(mine)))
                wrong += int((block.bytes != seed).sum())
                block.free()
            mine.append(arena.take(draw.randrange(1, 4 * PAGE)))
            mine[-1].bytes.fill_(seed)
        for block in mine:
            wrong += int((block.bytes != seed).sum())
            block.free()
        return wrong

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(1, 5))) == [0] * 4
    assert arena.stats().live == 0 and arena.stats().largest_free == arena.registered


def test_page_locking_by_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA's runtime: every growth is locked by itself, and all are let go of at the end."""
    locked: list[tuple[int, int]] = []
    answer = 0

    def lock(address: int, nbytes: int, _flags: int) -> int:
        if not answer:
            locked.append((address, nbytes))
        return answer

    def unlock(address: int) -> int:
        locked[:] = [entry for entry in locked if entry[0] != address]
        return 0

    runtime = SimpleNamespace(cudaHostRegister=lock, cudaHostUnregister=unlock)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    arena = Arena(64 * PAGE, slab_bytes=4 * PAGE)
    blocks = [arena.take(4 * PAGE), arena.take(6 * PAGE)]
    start = blocks[0].bytes.data_ptr()
    assert locked == [(start, 4 * PAGE), (start + 4 * PAGE, 8 * PAGE)]
    answer = 2
    with pytest.raises(ArenaFull, match="cudaHostRegister refused \\(error 2\\)"):
        arena.take(4 * PAGE)
    assert len(locked) == 2
    arena.close()
    del blocks
    gc.collect()
    assert not locked


# --- what it wastes -------------------------------------------------------------------------------------------------


class NeverJoins(Holes):
    """Frees leave holes as they are: what the figures are to find."""

    def give(self, start: int, size: int) -> None:
        self._put(start, size)


@pytest.mark.parametrize("case", bench.CASES, ids=lambda case: case.name)
def test_little_is_wasted_whatever_the_lengths(case: bench.Case) -> None:
    rows = bench.measure(case, 40)
    judged = {row.name.split(": ")[1]: row for row in rows if row.bar is not None}
    assert len(judged) == 3
    assert judged["registrations after warm-up"].holds
    assert judged["blocks that fragmentation refused"].holds
    peers = [row.ratio for row in rows if row.ratio is not None]
    assert len(peers) == 3 and min(peers[:2]) > 1.3
    sizes = bench.steps(case, 40)
    ours = bench.Ours(1 << 42)
    found = bench.replay(ours, case, sizes)
    assert found.live == ours.arena.stats().peak_live and ours.arena.stats().live == 0
    assert ours.arena.stats().peak_bytes <= 1.05 * found.live
    limit = int(1.05 * found.live)
    broken = bench.Ours(limit)
    broken.arena._holes = NeverJoins()
    assert bench.replay(broken, case, sizes).refused > 0


def test_the_trace_takes_and_frees_every_tensor_once() -> None:
    sizes = [[5, 6, 7], [8], [9, 10]]
    for graphs in (1, 2):
        taken: dict[int, int] = {}
        freed: list[int] = []
        together = most = 0
        for actions in bench.trace(sizes, graphs):
            for number, nbytes in actions:
                if nbytes is None:
                    assert number in taken
                    freed.append(number)
                else:
                    taken[number] = nbytes
                together += 1 if nbytes is not None else -1
                most = max(most, together)
        assert list(taken.values()) == [5, 6, 7, 8, 9, 10] and sorted(freed) == list(range(6))
        assert most == {1: 3, 2: 4}[graphs]
