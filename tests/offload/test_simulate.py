"""Offload schedules on the virtual clock: against times worked out by hand, and the promise of the benchmark."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench_perf import offload_sim as bench
from bernini.offload.checker import check
from bernini.offload.log import Log
from bernini.offload.simulate import AT_USE, DEADLINE, LOOKAHEAD, Layer, Link, Schedule, simulate

LINK = Link(10.0, latency=0.0)
LAYERS = [Layer(1.0, 2.0, 5)] * 4  # a copy takes half a second


def test_times_worked_out_by_hand() -> None:
    assert simulate(LAYERS, LINK, AT_USE).stall == pytest.approx(3 * 0.5)  # the last of four stays
    assert simulate(LAYERS, LINK, LOOKAHEAD).stall == simulate(LAYERS, LINK, DEADLINE).stall == 0
    assert simulate(LAYERS, LINK, DEADLINE).seconds == pytest.approx(4 + 8)
    slow = [replace(layer, nbytes=30) for layer in LAYERS]  # three seconds a copy
    # Out: from second 1 to 4, 7, 10; the third forward waits for the first copy, the fourth for the second.
    # Back: from 10 on, when the third is out, while the last layer computes from 8 to 10.
    found = simulate(slow, LINK, LOOKAHEAD)
    assert found.seconds == pytest.approx(13 + 2 + 1 + 2 + 1 + 2) and found.stall == pytest.approx(found.seconds - 12)
    assert found.device_bytes <= 4 * 30


def test_copies_come_back_in_the_order_of_use_and_within_their_slots() -> None:
    uneven = [Layer(1.0, 2.0, 5), Layer(1.0, 2.0, 45), Layer(1.0, 1.0, 5), Layer(1.0, 1.0, 5), Layer(5.0, 1.0, 5)]
    results = {slots: simulate(uneven, LINK, replace(DEADLINE, slots=slots)) for slots in (2, 3, 4)}
    # Layer 1 takes 4.5 seconds each way: forward it holds up layer 3 from 3 to 6.5; backward it is wanted 3 seconds
    # after layer 4 began, and its copy begins 1 second after that (behind those of 3 and 2) or, with two slots, 2.
    assert [results[slots].stall for slots in (2, 3, 4)] == pytest.approx([7.0, 6.0, 6.0])
    assert results[2].stall == simulate(uneven, LINK, LOOKAHEAD).stall  # two slots are one layer ahead
    assert results[2].device_bytes <= results[4].device_bytes <= 65


def test_no_schedule_has_a_race() -> None:
    for schedule in (AT_USE, LOOKAHEAD, DEADLINE, replace(DEADLINE, slots=5, kept=2)):
        for nbytes in (1, 5, 30):
            log = Log(None)
            simulate([replace(layer, nbytes=nbytes) for layer in LAYERS * 2], LINK, schedule, log=log)
            copies = [action for action in log if action.kind == "copy"]
            assert len(copies) == 2 * (8 - schedule.kept)
            assert check(log) == []


def test_everything_kept_is_a_step_without_copies() -> None:
    kept = simulate(LAYERS, LINK, replace(DEADLINE, kept=4))
    assert (kept.stall, kept.seconds, kept.device_bytes) == (0, 12, 20)
    with_offload = simulate(LAYERS, LINK, DEADLINE)
    assert with_offload.device_bytes < 20


def test_the_promise_and_who_does_not_keep_it() -> None:
    every = list(bench.cells())
    good = [cell for cell in every if cell.qualifies]
    assert len(good) >= 0.6 * len(every)
    assert all(cell.run(DEADLINE).share < 0.01 for cell in good)
    good = [cell for cell in good if cell.policy == "all"]
    assert all(cell.run(DEADLINE, seed=1).share < 0.01 for cell in good)
    assert max(cell.run(AT_USE).share for cell in good) > 0.1
    hasty = Schedule("no copy may be unfinished", "deadline", flight=1)
    assert max(cell.run(hasty).share for cell in good) > 0.01
    assert bench.edge().holds


def test_the_figures_of_a_layer_are_those_of_the_facts() -> None:
    """440K tokens, 8 ranks (facts, systems, section 0.6): attention is 94 % of the forward, 21 GiB of hidden states."""
    cells = {policy: bench.Cell(policy, 440_000, 50e9).layer for policy in bench.POLICIES}
    hidden, attention = cells["hidden"], cells["hidden+attention"]
    assert 40 * hidden.nbytes / 2**30 == pytest.approx(21, abs=0.1)
    assert hidden.nbytes / 50e9 == pytest.approx(0.011, abs=5e-4)
    steps = [layer.forward + layer.backward for layer in (hidden, attention)]
    assert steps[0] / hidden.forward == pytest.approx(4.47, abs=0.02)
    assert steps[0] / steps[1] == pytest.approx(1.27, abs=0.01)


def test_a_row_for_every_cell() -> None:
    rows = bench.run()
    assert [row.holds for row in rows if row.bar is not None].count(True) == sum(row.bar is not None for row in rows)
    listed = [row for row in rows if row.shape.endswith("GB/s")]
    assert len({(row.name, row.shape) for row in listed}) == len(listed) == len(list(bench.cells()))
