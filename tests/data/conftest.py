"""Small models, samples and tables for the tests of data."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from bernini.data.features import FeatureEncoder
from bernini.data.worlds import WorldData
from bernini.planner.vision import VisionRules
from bernini.renderer.vae import VideoAutoencoder

RULES = VisionRules(patch=4, min_pixels=64, max_pixels=1024)


def saved(tensor: Any) -> bytes:
    """As the release stores features."""
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def torch_bytes() -> Callable[[Any], bytes]:
    return saved


@pytest.fixture(scope="session")
def vae() -> VideoAutoencoder:
    """9 x 32 x 32 pixels -> 3 x 8 x 8 latents."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    model = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, attn_scales=[], temperal_downsample=[True, True],
        scale_factor_spatial=4, scale_factor_temporal=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return VideoAutoencoder(model.eval())


@pytest.fixture(scope="session")
def see() -> Callable[[Tensor, Sequence[tuple[int, int, int]]], Tensor]:
    """Each token is the mean of its four patches, projected."""
    weight = torch.randn(2 * 3 * 4 * 4, 6, generator=torch.Generator().manual_seed(1))

    def see(patches: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        assert len(patches) == sum(t * h * w for t, h, w in grids)
        return patches.unflatten(0, (-1, 4)).mean(1) @ weight

    return see


@pytest.fixture
def encoder(vae: VideoAutoencoder, see: Any) -> FeatureEncoder:
    return FeatureEncoder(vae, see, RULES, frames_for_vit=lambda frames, fps: [0, 3, 5, 8], stride=8, batch=4)


@pytest.fixture
def world() -> WorldData:
    pytest.importorskip("sklearn", reason="needs scikit-learn, whose digits are drawn")
    return WorldData({"t2i": 3, "v2v": 3, "r2v": 2, "understanding": 4})


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as a parquet file; ``inputs`` that are lists become JSON."""

    def write(rows: Sequence[dict[str, Any]], name: str = "a.parquet", **options: Any) -> Path:
        for row in rows:
            if isinstance(row.get("inputs"), list):
                row["inputs"] = json.dumps(row["inputs"])
        pq.write_table(pa.Table.from_pylist(list(rows)), tmp_path / name, **options)
        return tmp_path / name

    return write
