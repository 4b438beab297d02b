"""Block lists from intervals: the tiles of the brute-force mask, of the Triton kernels' plan, and what FlexAttention
computes from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bernini.kernels import Segment, SegmentLayout, interval_attention
from bernini.kernels.attention import visits
from bernini.kernels.attention.block_lists import BlockLists, block_lists, flex_mask, mask_mod
from bernini.kernels.attention.reference import interval_mask


def planner(*, samples: int = 2) -> tuple[int, tuple[Tensor, ...]]:
    segments = []
    for n in range(samples):
        segments += [Segment("text", (9, 1, 1), 0.0, n), Segment("source", (1, 5, 7), 1.0, n)]
        segments += [Segment("text", (1, 1, 1), 0.0, n), Segment("target", (2, 5, 6), 0.0, n)]
        segments += [Segment("text", (3, 1, 1), 0.0, n)]
    layout = SegmentLayout(segments)
    starts, ends, second = layout.intervals
    return layout.tokens, tuple(torch.from_numpy(x) for x in (starts, ends, *(second or ())))


def arbitrary(seed: int) -> tuple[int, tuple[Tensor, ...]]:
    rng = np.random.default_rng(seed)
    rows, keys, run = int(rng.integers(1, 150)), int(rng.integers(1, 150)), int(rng.integers(1, 40))
    borders = np.repeat(np.sort(rng.integers(0, keys + 1, (rows, 4)), axis=1)[::run], run, axis=0)[:rows].copy()
    borders[:, 2] = np.minimum(borders[:, 2] + 1, borders[:, 3])  # intervals that touch would be written as one
    borders[rng.random(rows) < 0.05] = 0
    columns = [torch.from_numpy(borders[:, n].astype(np.int32)) for n in range(4)]
    return keys, tuple(columns if seed % 2 else columns[:2])


CASES = [planner(), planner(samples=1), *map(arbitrary, range(8))]
BLOCKS = [(16, 16), (32, 16), (128, 128), (7, 5)]


def pair(columns: tuple[Tensor, ...]) -> Any:
    return columns[2:] or None


def brute(keys: int, columns: tuple[Tensor, ...]) -> Tensor:
    return interval_mask(columns[0], columns[1], *(columns[2:] or (None, None)), keys)


def tiles(mask: Tensor, m: int, n: int) -> tuple[Tensor, Tensor]:
    """Which tiles hold a visible pair, and which are seen whole by the rows that there are; a tile that ends behind the
    last key is not."""
    rows, keys = -(-mask.shape[0] // m), -(-mask.shape[1] // n)
    some, whole = torch.zeros(rows, keys, dtype=torch.bool), torch.zeros(rows, keys, dtype=torch.bool)
    for i in range(rows):
        for j in range(keys):
            tile = mask[i * m : (i + 1) * m, j * n : (j + 1) * n]
            some[i, j], whole[i, j] = bool(tile.any()), bool(tile.all()) and tile.shape[1] == n
    return some, whole


def spread(counts: Tensor, indices: Tensor) -> Tensor:
    """The tiles in a list."""
    assert counts.dtype == indices.dtype == torch.int32 and counts.shape == indices.shape[:3]
    out = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for i, count in enumerate(counts[0, 0].tolist()):
        listed = indices[0, 0, i, :count]
        assert torch.equal(listed, listed.unique()) and not indices[0, 0, i, count:].any()
        out[i, listed.long()] = True
    return out


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_lists_are_the_masks_tiles(case: int, block: tuple[int, int]) -> None:
    keys, columns = CASES[case]
    lists = block_lists(*columns[:2], keys=keys, second=pair(columns), block=block)
    some, whole = tiles(brute(keys, columns), *block)
    assert torch.equal(spread(lists.full_block_cnt, lists.full_block_idx), whole)
    assert torch.equal(spread(lists.mask_block_cnt, lists.mask_block_idx), some & ~whole)
    assert lists.block_size == block
    arrays = [x.numpy() for x in columns]
    state = visits.states(arrays[0], arrays[1], tuple(arrays[2:]) or None, keys, *block)  # type: ignore[arg-type]
    assert np.array_equal(state == visits.FULL, whole.numpy())
    assert np.array_equal(state != visits.GAP, some.numpy()), "what the Triton kernels visit"


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_flex_mask_is_the_mask(case: int, block: tuple[int, int]) -> None:
    keys, columns = CASES[case]
    want = brute(keys, columns)
    mask = flex_mask(*columns[:2], keys=keys, second=pair(columns), block=block)
    some, _ = tiles(want, *block)
    assert mask.seq_lengths == (len(columns[0]), keys) and block == mask.BLOCK_SIZE
    assert torch.equal(mask.to_dense()[0, 0].bool(), some)
    row, key = torch.meshgrid(torch.arange(len(columns[0])), torch.arange(keys), indexing="ij")
    zero = torch.zeros_like(row)
    assert torch.equal(mask.mask_mod(zero, zero, row, key), want)
    # The lists of row tiles, which the backward goes through, are the transposed ones.
    assert mask.q_num_blocks is not None and mask.full_q_num_blocks is not None
    assert torch.equal((mask.q_num_blocks + mask.full_q_num_blocks)[0, 0], some.sum(0, dtype=torch.int32))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", range(len(CASES)))
def test_flex_attention_computes_the_same(case: int) -> None:
    """In its dense form, which asks mask_mod for every pair; kernels for GPUs go by the lists, and cannot run here."""
    from torch.nn.attention.flex_attention import flex_attention

    keys, columns = CASES[case]
    generator = torch.Generator().manual_seed(case)
    q = torch.randn(len(columns[0]), 4, 16, generator=generator)
    k, v = (torch.randn(keys, 2, 16, generator=generator) for _ in range(2))
    mask = flex_mask(*columns[:2], keys=keys, second=pair(columns), block=(16, 16))
    q_HTD, k_GSD, v_GSD = (x.transpose(0, 1)[None] for x in (q, k, v))
    found = flex_attention(q_HTD, k_GSD, v_GSD, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    torch.testing.assert_close(
        found, interval_attention(q, k, v, *columns[:2], second=pair(columns)), atol=2e-6, rtol=0
    )


def test_the_lists_have_flash_attentions_names() -> None:
    """``BlockSparseTensorsTorch`` of flash-attn-4 (flash_attn/cute/block_sparsity.py) begins with these fields, int32
    ``[batch, heads, row tiles]`` and ``[.., key tiles]`` with 1 for what is alike; its block_size stands elsewhere."""
    assert BlockLists._fields == (
        "mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx", "block_size",
    )  # fmt: skip
    keys, columns = CASES[0]
    lists = block_lists(*columns[:2], keys=keys, second=pair(columns), block=(128, 64))
    assert lists.mask_block_cnt.shape == lists.full_block_cnt.shape == (1, 1, 2)
    assert lists.mask_block_idx.shape == lists.full_block_idx.shape == (1, 1, 2, 4)
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in lists[:4])  # type: ignore[union-attr]


def test_intervals_that_touch_inside_a_tile_are_left_to_the_mask() -> None:
    low, middle, high = (torch.full((4,), x, dtype=torch.int32) for x in (0, 6, 8))
    lists = block_lists(low, middle, keys=8, second=(middle, high), block=(4, 4))
    assert lists.full_block_idx[0, 0, 0, : int(lists.full_block_cnt)].tolist() == [0]
    assert lists.mask_block_idx[0, 0, 0, : int(lists.mask_block_cnt)].tolist() == [1]


def test_bad_input() -> None:
    starts = ends = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"the intervals \[3\] must be on the CPU, not meta"):
        block_lists(starts.to("meta"), ends, keys=4)
    with pytest.raises(ValueError, match=r"block=\(0, 16\) must be positive"):
        flex_mask(starts, ends, keys=4, block=(0, 16))
    seen = mask_mod(starts, ends)(*[torch.zeros(1, dtype=torch.int64)] * 4)
    assert not seen.any()
