"""The benchmark of overlap: its rows, and what it says where there can be no slow link."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import pytest

from bench_perf import link, overlap
from bench_perf.moves import Absent, Counted


def found(**changes: Any) -> dict[str, Any]:
    layer = {"packed": [0.3, 0.2], "async": [0.16, 0.2], "chunk": [0.15, 0.15], "exchanges": [0.1, 0.2]}
    policy = {"chosen": "chunk", "took": 1.0, "seconds": {"packed": 0.2, "async": 0.16, "chunk": 0.15}}
    flight = {"product": [0.06, 0.05], "message": [0.06], "both": [0.07]}
    one = {"rate": 1e7, "layer": layer, "policy": policy, "flight": flight}
    return {"compute": 0.1, "same": True, "unfit": None, **dict.fromkeys(overlap.RATES, one), **changes}


def test_rows_have_the_bound_and_the_bars() -> None:
    rows = overlap.rows(found())
    judged = {row.name: row for row in rows if row.bar is not None}
    assert list(judged) == [
        "cheap link: regret of the policy",
        "comparable link: async against packed",
        "comparable link: regret of the policy",
        "dear link: regret of the policy",
    ]
    best = judged["comparable link: async against packed"]
    assert best.ratio == pytest.approx(1.25) and best.holds and "2.00x" in best.note and "80 Mbit/s" in best.note
    assert judged["dear link: regret of the policy"].ours == pytest.approx(0) and "chose chunk" in rows[2].note
    beside = next(row for row in rows if row.name == "comparable link: a message beside a product")
    assert beside.ratio == pytest.approx(11 / 7)


def test_a_choice_that_loses_is_told() -> None:
    layer = {"packed": [0.2] * 3, "async": [0.19] * 3, "chunk": [0.25] * 3, "exchanges": [0.1] * 3}
    rows = overlap.rows(found(comparable={**found()["comparable"], "layer": layer}))
    holds = {row.name: row.holds for row in rows if row.bar is not None}
    assert holds["comparable link: regret of the policy"] is False
    assert holds["comparable link: async against packed"] is False
    assert holds["cheap link: regret of the policy"] is True


def test_a_loss_within_the_scatter_is_not_judged() -> None:
    layer = {"packed": [0.2] * 9, "async": [0.16, 0.12] * 4 + [0.14], "chunk": [0.143] * 9, "exchanges": [0.1] * 9}
    lost, scatter = overlap.regret(layer, "chunk")
    assert lost == pytest.approx(100 * (0.143 / 0.14 - 1)) and scatter > 5
    row = overlap.rows(found(dear={**found()["dear"], "layer": layer}))[-2]
    assert row.name == "dear link: regret of the policy" and row.holds is None
    assert "not judged: 2.1 % with an error of" in row.note


def test_other_bits_or_a_busy_machine_are_not_judged() -> None:
    for rows in (overlap.rows(found(same=False)), overlap.rows(found(unfit="others were busy"))):
        assert all(row.holds is None for row in rows)
        assert all("not judged: " in row.note for row in rows)


@pytest.mark.parametrize("why", ["unshare: unshare failed: Operation not permitted", ""])
def test_without_namespaces_the_rows_hold_null_and_say_why(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = subprocess.CompletedProcess([], 1, "", why)
    monkeypatch.setattr(shutil, "which", lambda tool: f"/bin/{tool}")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: refused)
    rows = overlap.run()
    assert {row.bar for row in rows} == {overlap.BAR, overlap.REGRET}
    assert all(
        row.holds is None and "no network namespaces here: " + (why or "exit code 1") in row.note for row in rows
    )


def test_without_the_tools_the_rows_say_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "tc" else f"/bin/{tool}")
    assert link.missing() == "there is no tc here"
    assert all(row.holds is None and "there is no tc" in row.note for row in overlap.run())


def test_what_a_rank_sends_is_what_is_counted() -> None:
    layer = overlap.Layer(Counted(Absent(0, 2)))
    for way in overlap.WAYS:
        layer.group.exchanges.clear()
        layer.run(way)
        assert sum(one.sent for one in layer.group.exchanges) == overlap.sent(), way
    layer.group.exchanges.clear()
    layer.exchanges()
    assert sum(one.sent for one in layer.group.exchanges) == overlap.sent()
