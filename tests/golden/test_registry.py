"""The registry of golden sets and the comparisons: what must not pass, does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from . import compare, registry
from .subset import kept, shortened


def put(directory: Path, *stems: str) -> Path:
    for stem in stems:
        save_file({"x": torch.zeros(1)}, str(directory / f"{stem}.safetensors"), {"meta": "{}"})
    return directory


def test_finds_sets_by_their_files(tmp_path: Path) -> None:
    put(
        tmp_path, "preprocess", "planner_weights", "planner_forward_cases", "noise_training", "renderer_forward_weights"
    )
    (tmp_path / "README.md").touch()
    found = registry.find(tmp_path)
    assert set(found) == {"preprocess", "planner_forward", "noise_training"}
    assert found["noise_training"]["weights"].name == "renderer_forward_weights.safetensors"


@pytest.mark.parametrize(
    ("stems", "complaint"),
    [
        ((), r"holds no \.safetensors file"),
        (("preprocess", "surprise"), r"surprise\.safetensors belongs to no known set"),
        (("sampler_cases",), r"the set sampler lacks sampler_weights\.safetensors"),
        (("sampler_weights",), r"the set sampler lacks sampler_cases\.safetensors"),
        (("preprocess", "renderer_forward_weights"), r"lacks renderer_forward_cases\.safetensors"),
        (("noise_training",), r"the set noise_training lacks renderer_forward_weights\.safetensors"),
    ],
)
def test_incomplete_folders_are_errors(tmp_path: Path, stems: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(registry.GoldenError, match=complaint):
        registry.find(put(tmp_path, *stems))
    with pytest.raises(registry.GoldenError, match="no such folder"):
        registry.find(tmp_path / "nowhere")


def test_a_check_that_compares_nothing_fails(tmp_path: Path) -> None:
    put(tmp_path, "preprocess")
    with pytest.raises(AssertionError, match="found nothing to compare"):
        registry.run("preprocess", registry.find(tmp_path)["preprocess"])


def test_a_wrong_value_is_named(tmp_path: Path) -> None:
    rows = torch.tensor([[1920, 1080, 848, 1, 848, 496, 1]])
    save_file({"resize_rows": rows}, str(tmp_path / "preprocess.safetensors"), {"meta": json.dumps({})})
    with pytest.raises(AssertionError, match=r"resize_rows 1920x1080.*\[848, 480\], golden \[848, 496\]"):
        registry.run("preprocess", registry.find(tmp_path)["preprocess"])


def test_metadata_comes_in_one_object_or_by_key(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, str(tmp_path / "a.safetensors"), {"meta": '{"k": [1]}'})
    save_file({"x": torch.ones(2)}, str(tmp_path / "b.safetensors"), {"k": "[1]", "l": '{"m": 2}'})
    assert compare.load(tmp_path / "a.safetensors")[1] == {"k": [1]}
    assert compare.load(tmp_path / "b.safetensors")[1] == {"k": [1], "l": {"m": 2}}


def test_close_judges_every_given_limit() -> None:
    want = torch.tensor([100.0, 0.0])
    compare.close("x", want + 1e-3, want, atol=2e-3, rel_l2=1e-4)
    with pytest.raises(AssertionError, match=r"x \[2\]: max abs 0\.001"):
        compare.close("x", want + 1e-3, want, atol=1e-4)
    with pytest.raises(AssertionError, match=r"rel\. L2 1\.41e-05"):
        compare.close("x", want + 1e-3, want, atol=1.0, rel_l2=1e-5)
    with pytest.raises(AssertionError, match="shape"):
        compare.close("x", want[None], want, atol=1.0)
    with pytest.raises(AssertionError, match="not finite"):
        compare.close("x", want / 0, want, atol=1.0)
    with pytest.raises(ValueError, match="needs a limit"):
        compare.close("x", want, want)


def test_same_is_exact() -> None:
    compare.same("x", torch.ones(2), torch.ones(2))
    for other in (torch.ones(2, dtype=torch.float64), torch.ones(3), torch.ones(2) + 1e-7):
        with pytest.raises(AssertionError, match="x"):
            compare.same("x", torch.ones(2), other)
    with pytest.raises(AssertionError, match="x: 1, golden 2"):
        compare.same("x", 1, 2)


def test_ulps_are_counted_across_zero() -> None:
    want = torch.tensor([1.0, -1.0, 0.0, 3e-9], dtype=torch.bfloat16)
    next_up = torch.nextafter(want, torch.full_like(want, 9))
    compare.within_ulps("x", next_up, want, ulps=1, atol=0.0)
    with pytest.raises(AssertionError, match="differ by more than 0 ulp"):
        compare.within_ulps("x", next_up, want, ulps=0, atol=0.0)
    compare.within_ulps("x", want + 1e-6, want, ulps=1, atol=2e-6)
    with pytest.raises(AssertionError, match="expected bfloat16"):
        compare.within_ulps("x", want.float(), want, ulps=1, atol=0.0)


def test_the_last_matching_pattern_decides_what_a_subset_keeps() -> None:
    patterns = ("*", "-out.*", "out.a")
    assert [kept(name, patterns) for name in ("in.x", "out.b", "out.a")] == [True, False, True]


def test_zero_rows_are_left_out_and_come_back(tmp_path: Path) -> None:
    padded = torch.zeros(2, 6, 3)
    padded[0, 1], padded[1, 2, 0] = torch.randn(3), 1.0
    whole = {"padded": padded, "full": torch.randn(4, 3), "mask": torch.zeros(9, 9, dtype=torch.uint8)}
    short, notes = shortened(whole)
    assert {name: list(tensor.shape) for name, tensor in short.items()} == {
        "padded": [2, 3], "full": [4, 3], "mask": [9, 9]
    }  # fmt: skip
    save_file(short, str(tmp_path / "a.safetensors"), {"meta": '{"k": 1}', **notes})
    tensors, meta = compare.load(tmp_path / "a.safetensors")
    assert meta == {"k": 1} and all(torch.equal(tensors[name], whole[name]) for name in whole)
    assert shortened({"full": whole["full"]})[1] == {}
