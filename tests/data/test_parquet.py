"""Tables of the release and of ours: what is read, and what becomes of rows that are wrong."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save

from bernini.data.example import Example, Skip
from bernini.data.parquet import ParquetData
from bernini.errors import UserError

V2V = [{"type": "video"}, {"type": "text", "text": "make it snow"}, {"type": "video_gen"}]
T2I = [{"type": "text", "text": "a red ring"}, {"type": "image_gen"}]

EMBEDS, LATENT = torch.randn(8, 6), torch.randn(1, 8, 3, 4, 6)
Bytes = Callable[[Any], bytes]


def row(torch_bytes: Bytes, **changes: Any) -> dict[str, Any]:
    """A row with features as the release has it: two videos of 2 x 4 x 4 patches."""
    return {
        "inputs": V2V,
        "video_embeds": [torch_bytes(EMBEDS), torch_bytes(EMBEDS + 1)],
        "video_grid_thw": [[2, 4, 4], [2, 4, 4]],
        "video_vae_latents": [torch_bytes(LATENT), torch_bytes((LATENT + 1).bfloat16())],
        **changes,
    }


def read(data: ParquetData, index: int = 0) -> Example:
    example = data[index]
    assert isinstance(example, Example), example
    return example


def test_the_releases_rows(table: Callable[..., Path], torch_bytes: Bytes) -> None:
    data = ParquetData(table([row(torch_bytes)]), name="mv2v$films")
    example = read(data)
    assert (example.key, example.task, example.prompt) == ("a.parquet#0", "mv2v", "make it snow")
    source, target = example.visuals
    assert source.kind == target.kind == "video" and source.vit_grid == (2, 2, 2), "patches merge two by two"
    assert source.vit is not None and target.vit is not None and source.vae_mean is not None
    assert torch.equal(source.vit, EMBEDS) and torch.equal(target.vit, EMBEDS + 1)
    assert torch.equal(source.vae_mean, LATENT[0, :4])
    assert source.vae_logvar is not None and torch.equal(source.vae_logvar, LATENT[0, 4:])
    assert target.vae_mean is not None and target.vae_mean.dtype == torch.float32
    assert torch.equal(target.vae_mean, (LATENT + 1).bfloat16()[0, :4].float())
    assert data.parts == {"vae", "vit"} and not data.has_pixels and data.about == [None]


def test_log_variances_are_clamped_as_the_autoencoder_does(table: Callable[..., Path], torch_bytes: Bytes) -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    wild = torch.randn(1, 8, 1, 2, 2) * 50
    data = ParquetData(table([row(torch_bytes, video_vae_latents=[torch_bytes(wild)] * 2)]))
    assert torch.equal(read(data).sources[0].vae_logvar, DiagonalGaussianDistribution(wild).logvar[0])  # type: ignore[arg-type]


def test_rows_in_order_over_files_and_groups(table: Callable[..., Path]) -> None:
    for name, first in (("b.parquet", 5), ("a.parquet", 0)):
        rows = [{"key": f"k{first + n}", "task": "t2i", "inputs": T2I} for n in range(5)]
        path = table(rows, name, row_group_size=2)
    data = ParquetData(path.parent, cache_bytes=1)  # one group at a time
    assert len(data) == 10 and len(data.files) == 2
    assert [read(data, n).key for n in (*range(10), 3, 9, -1, 0)] == [f"k{n}" for n in (*range(10), 3, 9, 9, 0)]
    assert list(data.of_task("t2i")) == list(range(10)) and list(data.of_task("v2v")) == []
    with pytest.raises(IndexError):
        data[10]
    other = pickle.loads(pickle.dumps(data))
    assert read(other, 7).key == "k7", "goes to workers"
    assert other.identity == data.identity != ParquetData(path).identity


def test_where_the_task_comes_from(table: Callable[..., Path]) -> None:
    names = ((None, None), ("r2i$faces", None), ("r2i$faces", "t2i"))
    path = table([{"inputs": T2I, "source_name": released, "task": ours} for released, ours in names])
    assert [read(ParquetData(path), n).task for n in range(3)] == ["t2i", "i2i", "t2i"]
    assert [read(ParquetData(path, name="i2i$x"), n).task for n in range(3)] == ["i2i"] * 3


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"inputs": "nonsense"}, "wrong schema", "not JSON"),
        ({"inputs": None}, "wrong schema", "list of messages"),
        ({"inputs": [*V2V, {"type": "video"}]}, "wrong schema", "name 3 and video_embeds holds 2"),
        ({"source_name": "x2y$z"}, "unknown task", "x2y"),
        ({"video_grid_thw": [[2, 4, 4], [2, 4, 3]]}, "misshaped features", "video 1: 8 ViT embeddings for 2x4x3"),
        ({"video_grid_thw": [[2, 4, 4], [8, 4]]}, "misshaped features", "grid"),
        ({"video_grid_thw": None}, "misshaped features", "grid"),
        ({"embeds": torch.full((8, 6), torch.nan)}, "not finite", "video 1, ViT embeddings: 48"),
        ({"embeds": torch.zeros(8, 6, 1)}, "misshaped features", "[8, 6, 1]"),
        ({"embeds": torch.zeros(8, 6, dtype=torch.int64)}, "misshaped features", "int64"),
        ({"embeds": torch.zeros(0, 6)}, "misshaped features", "0 ViT embeddings"),
        ({"embeds": {"not": "a tensor"}}, "unreadable features", "dict"),
        ({"latent": LATENT.where(LATENT < 1, torch.inf)}, "not finite", "VAE"),
        ({"latent": LATENT[0]}, "misshaped features", "[1, 2C, T, H, W]"),
        ({"latent": LATENT[:, :7]}, "misshaped features", "[1, 7, 3, 4, 6]"),
        ({"latent": LATENT[..., :5]}, "misshaped features", "tokens of (1, 2, 2)"),
        ({"blob": b""}, "unreadable features", "none"),
        ({"blob": b"PK\x03\x04 cut off"}, "unreadable features", "no tensor"),
        ({"blob": save({"embeds": EMBEDS})[:-5]}, "unreadable features", "damaged safetensors"),
        ({"blob": save({"other": EMBEDS})}, "unreadable features", "no tensor 'embeds' among other"),
    ],
)  # fmt: skip
def test_a_bad_row_is_skipped_with_its_reason(
    table: Callable[..., Path], torch_bytes: Bytes, changes: dict[str, Any], reason: str, words: str
) -> None:
    embeds, latent, blob = changes.pop("embeds", None), changes.pop("latent", None), changes.pop("blob", None)
    if embeds is not None:
        blob = torch_bytes(embeds)
    if blob is not None:
        changes["video_embeds"] = [torch_bytes(EMBEDS), blob]
    if latent is not None:
        changes["video_vae_latents"] = [torch_bytes(LATENT), torch_bytes(latent)]
    data = ParquetData(table([row(torch_bytes, **changes), row(torch_bytes)]))
    skip = data[0]
    assert isinstance(skip, Skip) and skip.key == "a.parquet#0"
    assert skip.reason == reason and words in skip.detail
    assert read(data, 1).task == "v2v", "the next is not touched by it"


class Evil:
    """Runs code where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_features_cannot_run_code(table: Callable[..., Path], torch_bytes: Bytes, tmp_path: Path) -> None:
    marker = tmp_path / "was here"
    for number, blob in enumerate((torch_bytes(Evil(marker)), pickle.dumps(Evil(marker), 2))):
        data = ParquetData(table([row(torch_bytes, video_embeds=[torch_bytes(EMBEDS), blob])], f"{number}.parquet"))
        skip = data[0]
        assert isinstance(skip, Skip) and skip.reason == "unreadable features" and not marker.exists()
    pickle.loads(pickle.dumps(Evil(tmp_path / "would")))
    assert (tmp_path / "would").exists(), "it would have"


def test_missing_files_of_pictures(table: Callable[..., Path], tmp_path: Path) -> None:
    rows = [
        {"inputs": T2I, "images": ["none.png"]},
        {"inputs": T2I, "images": ["https://example.org/a.png"]},
        {"inputs": T2I, "images": []},
        {"inputs": T2I, "images": ["a.png", "b.png"]},
    ]
    data = ParquetData(table(rows))
    assert data.has_pixels
    found = [data[n] for n in range(4)]
    assert all(isinstance(skip, Skip) for skip in found)
    assert [skip.reason for skip in found] == ["unreadable image"] * 2 + ["wrong schema"] * 2  # type: ignore[union-attr]
    assert "only files" in found[1].detail and "neither a file nor features" in found[2].detail  # type: ignore[union-attr]


def test_what_is_no_table_is_refused_up_front(tmp_path: Path, table: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="no such file"):
        ParquetData(tmp_path / "none.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no parquet file"):
        ParquetData(tmp_path / "empty")
    (tmp_path / "text.parquet").write_text("this is no parquet file")
    with pytest.raises(UserError, match=r"text\.parquet: cannot be read as parquet"):
        ParquetData(tmp_path / "text.parquet")
    with pytest.raises(UserError, match="has no column 'inputs'.*it has prompt, file"):
        ParquetData(table([{"prompt": "x", "file": "y"}], "b.parquet"))
    with pytest.raises(UserError, match="the column 'inputs' is of the type int64, expected text"):
        ParquetData(table([{"inputs": 3}], "c.parquet"))
    with pytest.raises(UserError, match="the column 'images' is of the type string, expected a list"):
        ParquetData(table([{"inputs": T2I, "images": "a.png"}], "d.parquet"))


def test_damage_within_a_file_takes_its_rows_alone(table: Callable[..., Path], torch_bytes: Bytes) -> None:
    rows = [row(torch_bytes, key=f"k{n}") for n in range(4)]
    path = table(rows, row_group_size=2, write_page_checksum=True, compression="none")
    bad = bytearray(path.read_bytes())
    place = bad.index(EMBEDS[0].numpy().tobytes())  # a number of the first row; no structure of the file
    bad[place] ^= 1
    path.write_bytes(bytes(bad))
    data = ParquetData(path)
    found = [data[n] for n in range(4)]
    assert [isinstance(example, Skip) for example in found] == [True, True, False, False]
    assert {skip.reason for skip in found[:2]} == {"unreadable row"}  # type: ignore[union-attr]
    assert len(data.of_task("v2v")) == 4, "tasks are in other columns"


def test_columns_of_nothing(tmp_path: Path) -> None:
    schema = pa.schema([("inputs", pa.string()), ("images", pa.null()), ("image_embeds", pa.list_(pa.binary()))])
    pq.write_table(pa.Table.from_pylist([], schema), tmp_path / "none.parquet")
    assert len(ParquetData(tmp_path)) == 0
