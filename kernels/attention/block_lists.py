"""The same intervals in the forms that FlexAttention and FlashAttention-4 take: lists of key tiles for each row tile.

Made on the host from the borders alone, in one byte per pair of tiles; the dense mask is never made.
Shapes: T query rows, S keys; row tiles of M query rows, key tiles of N keys.
Names and layouts: ``torch.nn.attention.flex_attention.BlockMask`` of PyTorch 2.6 and later, and
``flash_attn.cute.block_sparsity.BlockSparseTensorsTorch`` of flash-attn-4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .visits import FULL, PARTIAL, states

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class BlockLists(NamedTuple):
    """Tiles under the mask and tiles that every row sees whole, for all batches and heads alike; int32.

    ``BlockSparseTensorsTorch(**lists._asdict())`` of flash-attn-4 takes them by these names. The first ``cnt`` entries
    of a row tile's ``idx`` count, in rising order; the others are zero. A tile that rows see whole only through both of
    their intervals, which touch inside it, is under the mask.
    """

    mask_block_cnt: Tensor
    """``[1, 1, T / M]``"""
    mask_block_idx: Tensor
    """``[1, 1, T / M, S / N]``"""
    full_block_cnt: Tensor
    full_block_idx: Tensor
    block_size: tuple[int, int]
    """(M, N)"""


def block_lists(
    starts_T: Tensor,
    ends_T: Tensor,
    *,
    keys: int,
    second: tuple[Tensor, Tensor] | None = None,
    block: tuple[int, int] = (128, 128),
    device: torch.device | str | None = None,
) -> BlockLists:
    """The lists, for attention without cu_seqlens over one batch of T rows and S keys.

    FlashAttention-4 wants (128, 128) on Hopper and, for two row tiles at a time, (256, 128) on Blackwell.

    Args:
        starts_T, ends_T, second: as :func:`bernini.kernels.interval_attention` takes them, on the CPU.
        keys: S.
        block: (M, N).
        device: of the lists, by default the CPU.

    Raises:
        ValueError: a size is not positive, or the intervals are on a device (reading them would wait for it).
    """
    if starts_T.device.type != "cpu":
        raise ValueError(f"block_lists: the intervals {list(starts_T.shape)} must be on the CPU, not {starts_T.device}")
    if min(block) < 1 or keys < 0:
        raise ValueError(f"block_lists: block={block} must be positive, and keys={keys} not negative")
    pair = None if second is None else (second[0].numpy(), second[1].numpy())
    state = states(starts_T.numpy(), ends_T.numpy(), pair, keys, *block)
    return BlockLists(*_lists(state == PARTIAL, device), *_lists(state == FULL, device), block)


def _lists(wanted: NDArray[np.bool_], device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    counts = wanted.sum(1, dtype=np.int32)
    # A stable sort puts the wanted columns in front and keeps them in order.
    order = np.argsort(~wanted, axis=1, kind="stable").astype(np.int32)
    order[np.arange(wanted.shape[1]) >= counts[:, None]] = 0
    return torch.from_numpy(counts)[None, None].to(device), torch.from_numpy(order)[None, None].to(device)


def mask_mod(starts_T: Tensor, ends_T: Tensor, second: tuple[Tensor, Tensor] | None = None) -> MaskMod:
    """The mask of single pairs that FlexAttention asks for, from intervals on the device it runs on."""

    def visible(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        seen = (key >= starts_T[row]) & (key < ends_T[row])
        if second is not None:
            seen = seen | ((key >= second[0][row]) & (key < second[1][row]))
        return seen

    return visible


def flex_mask(
    starts_T: Tensor,
    ends_T: Tensor,
    *,
    keys: int,
    second: tuple[Tensor, Tensor] | None = None,
    block: tuple[int, int] = (128, 128),
    device: torch.device | str | None = None,
) -> BlockMask:
    """The intervals as a ``BlockMask``, for all batches and heads alike.

    Rows without keys: FlexAttention gives them zeros, as :func:`bernini.kernels.interval_attention` does.

    Args, Raises: as for :func:`block_lists`.
    """
    from torch.nn.attention.flex_attention import BlockMask

    lists = block_lists(starts_T, ends_T, keys=keys, second=second, block=block, device=device)
    moved = None if second is None else (second[0].to(device), second[1].to(device))
    return BlockMask.from_kv_blocks(
        lists.mask_block_cnt, lists.mask_block_idx, lists.full_block_cnt, lists.full_block_idx, BLOCK_SIZE=block,
        mask_mod=mask_mod(starts_T.to(device), ends_T.to(device), moved), seq_lengths=(len(starts_T), keys),
    )  # fmt: skip
