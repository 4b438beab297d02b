"""Weights that stream through a window: the same bits, in any order of calls, and what is said to misuse."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bernini.offload import courier
from bernini.offload.arena import Arena, ArenaFull
from bernini.offload.weights import MappedFile, Weight, WeightStream, in_arena, window_bytes
from bernini.weights import DTYPES, read_header

WIDTH = 24


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.rand(1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        # A parameter of the block's own is read first, before any module inside of it is called.
        return x + self.scale * self.down(torch.tanh(self.up(self.norm(x))))


def stack(count: int = 5) -> list[nn.Module]:
    """Blocks of different sizes."""
    torch.manual_seed(0)
    return [Block(16 + 8 * (number % 3)) for number in range(count)]


def weights_of(blocks: Sequence[nn.Module], dtype: torch.dtype = torch.float32) -> list[dict[str, Weight]]:
    return [{name: Weight(p.detach().clone(), dtype) for name, p in block.named_parameters()} for block in blocks]


def through(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    with torch.no_grad():
        for block in blocks:
            x = block(x)
    return x


X = torch.rand(3, WIDTH, generator=torch.Generator().manual_seed(1))


def test_the_same_bits_and_two_blocks_of_memory() -> None:
    resident, streamed = stack(), stack()
    expected = [through(resident, X * n) for n in range(3)]
    stream = WeightStream(streamed, weights_of(streamed), device="cpu")
    assert all(torch.equal(through(streamed, X * n), expected[n]) for n in range(3))
    largest = max(sum(-(-p.numel() * 4 // 256) * 256 for p in block.parameters()) for block in resident)
    assert stream.bytes == window_bytes(weights_of(resident)) == 2 * largest
    assert stream.counts.unforeseen == 1, "the first block; the others were sent for"
    assert stream.counts.loads == 16, "three rounds of five, and the one that is on its way"
    stream.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_casts_are_those_of_resident_weights(dtype: torch.dtype) -> None:
    resident, streamed = stack(), stack()
    for block in resident:
        block.to(dtype)
    with torch.device("meta"):
        streamed = stack()  # nothing but the sources has memory
    WeightStream(streamed, weights_of(stack(), dtype), device="cpu")
    assert torch.equal(through(streamed, X.to(dtype)), through(resident, X.to(dtype)))


def test_any_order_and_modules_called_by_themselves() -> None:
    resident, streamed = stack(), stack()
    stream = WeightStream(streamed, weights_of(streamed), device="cpu")
    order = torch.randint(0, 5, (200,), generator=torch.Generator().manual_seed(2)).tolist()
    for step, number in enumerate(order):
        name = ("up", "norm", None)[step % 3]
        ours, theirs = streamed[number], resident[number]
        with torch.no_grad():
            if name is not None:
                ours, theirs = ours.get_submodule(name), theirs.get_submodule(name)
            assert torch.equal(ours(X), theirs(X)), (step, number, name)
    stream.close()


def test_an_order_is_learned() -> None:
    blocks = stack()
    stream = WeightStream(blocks, weights_of(blocks), device="cpu")
    order = [blocks[number] for number in (3, 0, 4, 2, 1)]
    through(order, X)
    before = stream.counts.unforeseen
    through(order, X), through(order, X)
    # From the second round on only what follows the last block was never seen before.
    assert before == 5 and stream.counts.unforeseen - before == 1
    stream.close()


def test_the_next_block_comes_while_one_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block's call only ends when the copy of the next has; and a copy that is late is waited for."""
    copy, done = courier.copy, threading.Semaphore(0)

    def slow(pairs: courier.Pairs) -> None:
        time.sleep(0.005)
        copy(pairs)
        done.release()

    monkeypatch.setattr(courier, "copy", slow)
    resident, streamed = stack(), stack()
    stream = WeightStream(streamed, weights_of(streamed), device="cpu")
    with torch.no_grad():
        assert torch.equal(streamed[0](X), resident[0](X))
    assert done.acquire(timeout=60), "of the first block"
    came = [done.acquire(timeout=60)]  # the second, which nobody has called
    for module in streamed[1:]:
        module.register_forward_hook(lambda *_: came.append(done.acquire(timeout=60)))
    assert torch.equal(through(streamed[1:], X), through(resident[1:], X))
    assert came == [True] * 5 and stream.counts.unforeseen == 1
    stream.close()


def test_between_turns_there_is_nothing_to_read_by_mistake() -> None:
    blocks = stack()
    stream = WeightStream(blocks, weights_of(blocks), device="cpu")
    through(blocks, X)
    scale = blocks[0].scale
    assert scale.shape == (1, WIDTH) and scale.isnan().all() and scale.untyped_storage().nbytes() == 4
    stream.close()
    assert all(p.isnan().all() for block in blocks for p in block.parameters())
    through(blocks, X)  # hooks are gone: nothing is raised


def test_an_exception_in_a_block_loses_nothing() -> None:
    resident, streamed = stack(), stack()
    stream = WeightStream(streamed, weights_of(streamed), device="cpu")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    hook = streamed[2].down.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        through(streamed, X)
    hook.remove()
    assert torch.equal(through(streamed, X), through(resident, X))
    stream.close()


def test_a_copy_that_fails_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    copy, calls = courier.copy, list[int]()

    def broken(pairs: courier.Pairs) -> None:
        calls.append(len(calls))
        if len(calls) == 3:
            copy(pairs[:1])
            raise OSError("the disk is gone")
        copy(pairs)

    monkeypatch.setattr(courier, "copy", broken)
    resident, streamed = stack(), stack()
    stream = WeightStream(streamed, weights_of(streamed), device="cpu")
    with pytest.raises(OSError, match="gone"):
        through(streamed, X)
    assert torch.equal(through(streamed, X), through(resident, X))
    stream.close()


@pytest.mark.parametrize("count", [1, 2])
def test_few_blocks_are_copied_once(count: int) -> None:
    resident, streamed = stack(count), stack(count)
    stream = WeightStream(streamed, weights_of(streamed), device="cpu")
    for _ in range(3):
        assert torch.equal(through(streamed, X), through(resident, X))
    assert stream.counts.loads == count
    stream.close()


# --- sources ----------------------------------------------------------------------------------------------------------


def test_from_a_mapped_file_at_any_offset(tmp_path: Path) -> None:
    blocks = stack()
    tensors = {f"{n}.{name}": p.detach() for n, block in enumerate(blocks) for name, p in block.named_parameters()}
    save_file({"odd": torch.zeros(3, dtype=torch.uint8), **tensors}, tmp_path / "w.safetensors")
    stored, file = read_header(tmp_path / "w.safetensors"), MappedFile(tmp_path / "w.safetensors")
    weights = [
        {
            name: Weight(file.tensor(at.start, at.shape, DTYPES[at.dtype]), torch.float32)
            for name, at in ((name, stored[f"{n}.{name}"]) for name, _ in block.named_parameters())
        }
        for n, block in enumerate(blocks)
    ]
    del file  # the tensors keep it
    expected = through(blocks, X)
    stream = WeightStream(blocks, weights, device="cpu")
    assert torch.equal(through(blocks, X), expected)
    stream.close()
    with pytest.raises(ValueError, match="of a file of"):
        MappedFile(tmp_path / "w.safetensors").tensor(0, (10**6,), torch.float32)


def test_from_the_arena() -> None:
    resident, streamed = stack(), stack()
    for block in resident:
        block.to(torch.bfloat16)
    with Arena(2**20, slab_bytes=2**16) as arena:
        held = in_arena(weights_of(streamed, torch.bfloat16), arena)
        assert arena.stats().live > 0
        stream = WeightStream(streamed, held, device="cpu")
        assert torch.equal(through(streamed, X.bfloat16()), through(resident, X.bfloat16()))
        stream.close()
        del held, stream
    with Arena(4096) as small, pytest.raises(ArenaFull):
        in_arena(weights_of(stack()), small)


def test_a_source_in_pieces_is_put_together() -> None:
    blocks = stack(3)
    whole = weights_of(blocks)
    cut = [
        {n: Weight(torch.full_like(w.source, math.nan), w.dtype, _halves(w.source)) for n, w in own.items()}
        for own in whole
    ]
    expected = through(blocks, X)
    stream = WeightStream(blocks, cut, device="cpu")
    assert torch.equal(through(blocks, X), expected)
    stream.close()


def _halves(source: Tensor) -> tuple[Tensor, ...]:
    raw = source.contiguous().view(-1).view(torch.uint8)
    return raw[: len(raw) // 3], raw[len(raw) // 3 :]


# --- misuse -----------------------------------------------------------------------------------------------------------


def test_training_is_refused() -> None:
    blocks = stack()
    stream = WeightStream(blocks, weights_of(blocks), device="cpu")
    with pytest.raises(RuntimeError, match="no_grad"):
        blocks[0](X)
    stream.close()


def test_weights_that_are_not_the_blocks_own() -> None:
    blocks = stack()
    weights = weights_of(blocks)
    before = [p.clone() for block in blocks for p in block.parameters()]

    def refused(words: str, bad: Sequence[nn.Module], given: list[dict[str, Weight]]) -> None:
        with pytest.raises(ValueError, match=words):
            WeightStream(bad, given, device="cpu")

    refused("5 blocks and the weights of 4", blocks, weights[:4])
    refused("0 blocks", [], [])
    refused("'scale'", blocks, [*weights[:4], {n: w for n, w in weights[4].items() if n != "scale"}])
    refused("block 0 .*'down.weight'", blocks, weights[1:] + weights[:1])
    refused("two of the blocks", [*blocks[:4], blocks[0]], [*weights[:4], weights[0]])
    refused("cannot be streamed", blocks, weights_of(blocks, torch.int32))
    blocks[1].register_buffer("table", torch.empty(2, device="meta"))
    refused("'table'", blocks, weights)
    assert all(torch.equal(p, q) for p, q in zip(before, (p for b in blocks for p in b.parameters()), strict=True))
