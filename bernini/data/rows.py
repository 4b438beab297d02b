"""One row of a table <-> what the models see of its pictures.

==================  ===========================  ====================================================================
column              type                         meaning
==================  ===========================  ====================================================================
``inputs``          string                       messages as JSON (:mod:`bernini.data.messages`); the only one needed
``images``          list of strings              image files, in the order of the messages
``videos``          list of structs              ``video_path``, ``duration``, ``crop_method``, in that order
``image_embeds``    list of bytes                ViT embeddings ``[tokens, V]`` of each image
``image_grid_thw``  list of three integers each  their grid (t, h, w) in patches, *before* merging
``image_vae_latents``  list of bytes             VAE posterior of each image
``video_embeds``, ``video_grid_thw``, ``video_vae_latents``   the same of the videos
``key``             string                       ours: the example's name; by default the file's and the row's number
``task``            string                       ours: the task; the release names the data set ``<task>$<name>``
``source_name``     string                       such a name, where a row carries its own
==================  ===========================  ====================================================================

Bytes: the release has ``torch.save`` of the embeddings, and of the posterior's parameters ``[1, 2C, T, H, W]`` (means,
then log variances). We write safetensors: ``embeds``; ``mean`` and ``logvar`` ``[C, T, H, W]``. Both are read.

Source: ``tools/preprocess_data.py`` and ``docs/bernini_r_train.md`` of the release; ``key`` and ``task`` are ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .blobs import finite, halved, pack, unpack
from .example import Example, Features
from .messages import Slot, Talk, write_messages
from .skips import Bad

FEATURE_COLUMNS = tuple(
    f"{kind}_{part}" for kind in ("image", "video") for part in ("embeds", "grid_thw", "vae_latents")
)
COLUMNS = ("key", "task", "source_name", "inputs", "images", "videos", *FEATURE_COLUMNS)
"""Those that are read; others may be there."""

LOGVAR_RANGE = (-30.0, 20.0)
"""To which the autoencoder's own class clamps the logarithm of a variance; the release stores it unclamped."""

PATCH = (1, 2, 2)
"""Latents that make a token of the renderer, in time, height and width; a latent of another size has no tokens."""

Load = Callable[[Literal["image", "video"], Any], Features]
"""A picture's pixels from the cell of ``images`` or ``videos``."""


def read_example(
    key: str, task: str, talk: Talk, row: Mapping[str, Any], load: Load | None, patch: tuple[int, int, int] = PATCH
) -> Example:
    """
    Args:
        row: the other columns; those of features may be missing or ``None``.
        load: reads pixels where there are no features at all of a picture; ``None`` if none are wanted.
        patch: of the renderer.

    Raises:
        Bad: a picture or a feature that is missing or wrong.
    """

    def features(slot: Slot) -> Features:
        return _features(slot, talk, row, load, patch)

    target = None if talk.target is None else features(talk.target)
    return Example(key, task, talk.prompt, tuple(features(slot) for slot in talk.sources), target, talk.answer)


def _features(
    slot: Slot, talk: Talk, row: Mapping[str, Any], load: Load | None, patch: tuple[int, int, int]
) -> Features:
    kind, expected = slot.kind, talk.images if slot.kind == "image" else talk.videos
    name = f"{kind} {slot.number}"
    embeds, grids, latents = (
        _cell(row, f"{kind}_{part}", expected, slot.number) for part in ("embeds", "grid_thw", "vae_latents")
    )
    vit, grid = (None, None) if embeds is None else _vit(name, embeds, grids)
    mean, logvar = (None, None) if latents is None else _posterior(name, latents, kind, patch)
    if vit is None and mean is None and load is not None:
        source = _cell(row, f"{kind}s", expected, slot.number)
        if source is None:
            raise Bad("wrong schema", f"{name} has neither a file nor features")
        return load(kind, source)
    return Features(kind, None, vit, grid, mean, logvar)


def _cell(row: Mapping[str, Any], column: str, expected: int, number: int) -> Any:
    """An element of a list; ``None`` if the column is missing or empty."""
    cells = row.get(column)
    if not cells:
        return None
    if not isinstance(cells, list) or len(cells) != expected:
        count = len(cells) if isinstance(cells, list) else type(cells).__name__
        raise Bad("wrong schema", f"the messages name {expected} and {column} holds {count}")
    return cells[number]


def _vit(name: str, blob: Any, patches: Any) -> tuple[Tensor, tuple[int, int, int]]:
    embeds = _one(unpack(blob), "embeds", name)
    if embeds.dim() != 2 or not embeds.is_floating_point():
        raise Bad("misshaped features", f"{name}: ViT embeddings are {embeds.dtype} {list(embeds.shape)}")
    if not isinstance(patches, list) or len(patches) != 3 or not all(isinstance(n, int) and n > 0 for n in patches):
        raise Bad("misshaped features", f"{name}: the grid of its ViT embeddings is {patches!r}")
    t, h, w = patches
    merge = math.isqrt(t * h * w // max(1, len(embeds)))
    if not merge or h % merge or w % merge or t * (h // merge) * (w // merge) != len(embeds):
        raise Bad("misshaped features", f"{name}: {len(embeds)} ViT embeddings for {t}x{h}x{w} patches")
    return finite(f"{name}, ViT embeddings", embeds), (t, h // merge, w // merge)


def _posterior(name: str, blob: Any, kind: str, patch: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    stored = unpack(blob)
    if "" in stored:
        both = stored[""]
        if both.dim() != 5 or len(both) != 1 or both.shape[1] % 2:
            raise Bad("misshaped features", f"{name}: VAE parameters are {list(both.shape)}, expected [1, 2C, T, H, W]")
        mean, logvar = both[0].chunk(2)
    else:
        mean, logvar = _one(stored, "mean", name), _one(stored, "logvar", name)
    if mean.dim() != 4 or mean.shape != logvar.shape or 0 in mean.shape or (kind == "image" and mean.shape[1] != 1):
        raise Bad("misshaped features", f"{name}: VAE mean {list(mean.shape)}, log variance {list(logvar.shape)}")
    if any(side % step for side, step in zip(mean.shape[1:], patch, strict=True)):
        raise Bad(
            "misshaped features", f"{name}: a latent {list(mean.shape)}, of which tokens of {patch} cannot be made"
        )
    mean, logvar = finite(f"{name}, VAE mean", mean.float()), finite(f"{name}, VAE log variance", logvar.float())
    return mean, logvar.clamp(*LOGVAR_RANGE)


def _one(stored: Mapping[str, Tensor], wanted: str, name: str) -> Tensor:
    found = stored.get(wanted, stored.get(""))
    if found is None:
        raise Bad("unreadable features", f"{name}: no tensor {wanted!r} among {', '.join(stored)}")
    return found


def write_row(example: Example, parts: Sequence[str], merge: int) -> dict[str, Any]:
    """A row of our own files: key, task, inputs and the features of ``parts`` (``"vae"``, ``"vit"``).

    Values are stored as float16; where one would overflow, the tensor as float32 (VAE) or bfloat16 (ViT).

    Args:
        merge: patches a side in a ViT token.
    """
    row: dict[str, Any] = {
        "key": example.key,
        "task": example.task,
        "inputs": json.dumps(write_messages(example), ensure_ascii=False),
        **{column: [] for column in FEATURE_COLUMNS if column.rsplit("_", 1)[-1] == "latents" and "vae" in parts},
        **{column: [] for column in FEATURE_COLUMNS if column.rsplit("_", 1)[-1] != "latents" and "vit" in parts},
    }
    for visual in example.visuals:
        if "vae" in parts:
            assert visual.vae_mean is not None and visual.vae_logvar is not None
            values = {"mean": visual.vae_mean, "logvar": visual.vae_logvar}
            packed = pack({name: halved(value, torch.float32) for name, value in values.items()})
            row[f"{visual.kind}_vae_latents"].append(packed)
        if "vit" in parts:
            assert visual.vit is not None and visual.vit_grid is not None
            t, h, w = visual.vit_grid
            row[f"{visual.kind}_embeds"].append(pack({"embeds": halved(visual.vit, torch.bfloat16)}))
            row[f"{visual.kind}_grid_thw"].append([t, h * merge, w * merge])
    return row
