"""Generated code of every kernel, from real launches on fake tensors: 440 000 tokens, no GPU, no driver."""

from __future__ import annotations

import copy
import functools
import os

import pytest
import torch

from bench_perf.proof import case, checks, stub, table

EVERYTHING = os.environ.get("BERNINI_PROOF") == "all"
RECORDED = table.read()
KEYS = [key for key in table.keys(case.cases()) if table.due(key, RECORDED, EVERYTHING)]


@functools.cache
def proved(name: str, target: str, dtype: torch.dtype) -> tuple[checks.Cell, dict[str, str]]:
    """A case as it is: once, however many broken variants are compared with it."""
    return checks.prove(next(one for one in case.cases() if one.name == name), target, dtype)


def test_a_figure_may_waver_and_not_more() -> None:
    key = KEYS[0]
    cell, _ = proved(key[0].name, *key[1:])
    for share, found in ((0.01, 0), (0.1, 1)):
        recorded = copy.deepcopy(RECORDED)
        kernel = recorded["cells"][table.name(key)]["kernels"][0]
        kernel["registers"] += max(1, round(share * kernel["registers"]))
        assert len(table.differences(key, cell, recorded)) == found
    kernel["registers"] = RECORDED["cells"][table.name(key)]["kernels"][0]["registers"]
    kernel["spills"] += 1
    assert len(table.differences(key, cell, recorded)) == 1


@pytest.mark.parametrize("key", KEYS, ids=table.name)
def test_cell_holds_and_is_the_recorded_one(key: table.Key) -> None:
    cell, faults = proved(key[0].name, *key[1:])
    assert not faults
    changes = table.differences(key, cell, RECORDED)
    assert not changes, "run `python -m bench_perf.proof --update` and review what it changes in codegen.json"


def test_the_table_is_complete_and_has_nothing_else() -> None:
    assert set(RECORDED["cells"]) == {table.name(key) for key in table.keys(case.cases())}


def test_no_recorded_cell_breaks_a_rule() -> None:
    """Cells that are not proved today were proved when they were recorded."""
    for name, cell in RECORDED["cells"].items():
        assert cell["bytes_over_minimum"] <= checks.MOST_TRAFFIC, name
        for kernel in cell["kernels"]:
            assert kernel["spills"] == 0 and kernel["fp64"] == 0, name


def test_the_readme_shows_the_recorded_table() -> None:
    assert table.README.read_text("utf-8") == table.readme_with(table.markdown(RECORDED["cells"]))


BROKEN = [variant for variant in case.broken() if variant.caught_by != "semantics"]


@pytest.mark.parametrize("variant", BROKEN, ids=lambda variant: f"{variant.module} {variant.name}")
def test_a_broken_variant_is_caught(variant: case.Broken) -> None:
    assert variant.caught_by in checks.CHECKS
    about = next(one for one in case.cases() if one.name == variant.case)
    _, right = proved(about.name, "sm_90", torch.bfloat16)
    _, faults = checks.prove(about, "sm_90", torch.bfloat16, variant.load())
    assert variant.caught_by not in right
    assert variant.caught_by in faults


def test_every_kernel_has_the_four_mistakes() -> None:
    """Wrong stride and missing mask show in the numbers, an int32 offset in the lint, a spilling tile in the code."""
    for family in case.FAMILIES:
        caught = {variant.caught_by for variant in case.broken() if variant.module.startswith(f"{family}.")}
        assert {"semantics", "lint", "spills"} <= caught, family


def test_launches_need_no_memory_and_leave_no_trace() -> None:
    import triton

    before = triton.runtime.driver._active
    with stub.launches("sm_80") as log:
        x = torch.empty(case.TOKENS, case.WIDTH, dtype=torch.bfloat16, device="cuda")
        case.cases()[0].load().rms_norm(x, None, 1e-6, "fp32")
    assert log[0].grid == (case.TOKENS, 1, 1) and log[0].bytes_of("x_ptr") > 2**31
    assert triton.runtime.driver._active is before
