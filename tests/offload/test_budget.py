"""The budget planner: what its model says, against a grid of times; its choices, against all there are; recording."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, product
from random import Random

import pytest
import torch
from torch import Tensor, nn

from bernini.offload.budget import Choice, Limits, Plan, Saved, plan, predict, scaled
from bernini.offload.record import Recorder

ALL: tuple[Choice, ...] = ("keep", "offload", "recompute")


def stack(draw: Random, tensors: int) -> list[Saved]:
    """A forward and a backward of random tensors, used in reverse."""
    bits = [(draw.randint(1, 20), draw.randint(1, 10), draw.choice([None, draw.randint(1, 9)])) for _ in range(tensors)]
    end = sum(took for _, took, _ in bits)
    out, now = list[Saved](), 0
    for number, (nbytes, took, seconds) in enumerate(bits):
        now += took
        used = end + 2 * (end - now) + 1
        out.append(Saved(str(number), nbytes, now, used, used + took, seconds and float(seconds)))
    return out


def on_a_grid(saved: Sequence[Saved], choices: Sequence[Choice], limits: Limits) -> tuple[int, int]:
    """Most bytes on the device and the host, looking at every tenth of a second."""
    away: dict[int, tuple[float, float]] = {}
    free = 0.0
    for number, tensor in enumerate(saved):
        if choices[number] == "offload" and limits.out_rate:
            free = max(free, tensor.saved) + tensor.nbytes / limits.out_rate
            away[number] = free, 0.0
    free = 1e9
    for number in away:  # the first saved is the last used
        start = min(free, saved[number].used) - saved[number].nbytes / limits.back_rate
        if start > away[number][0]:
            free = start
            away[number] = away[number][0], start
        else:
            away[number] = 1e9, 1e9
    device = host = 0
    for tick in range(int(10 * max(tensor.end for tensor in saved)) + 20):
        now, here, there = tick / 10 + 0.05, 0, 0
        for number, tensor in enumerate(saved):
            alive = tensor.saved <= now < tensor.end
            if choices[number] == "recompute":
                run = [number]
                while run[0] and choices[run[0] - 1] == "recompute":
                    run.insert(0, run[0] - 1)
                while run[-1] + 1 < len(saved) and choices[run[-1] + 1] == "recompute":
                    run.append(run[-1] + 1)
                begin = min(saved[n].used for n in run) - sum(saved[n].seconds or 0 for n in run)
                alive = begin <= now < tensor.end
            elif number in away and away[number][0] <= now < away[number][1]:
                alive = False
            here += tensor.nbytes * alive
            there += tensor.nbytes * (choices[number] == "offload" and tensor.saved <= now < tensor.used)
        device, host = max(device, here), max(host, there)
    return device, host


@pytest.mark.parametrize("seed", range(30))
def test_the_model_is_what_a_clock_would_see(seed: int) -> None:
    draw = Random(seed)
    saved = stack(draw, 6)
    limits = Limits(0, 0, draw.choice([0.5, 1.0, 2.0, 10.0]), draw.choice([0.5, 1.0, 5.0]))
    choices = [draw.choice(ALL if tensor.seconds else ALL[:2]) for tensor in saved]
    found = predict(saved, choices, limits)
    device, host = on_a_grid(saved, choices, limits)
    assert found.host_bytes == host
    assert device <= found.device_bytes <= device + 20  # a copy may be shorter than the grid's step
    assert found.seconds == sum(t.seconds or 0 for t, c in zip(saved, choices, strict=True) if c == "recompute")


def best(saved: Sequence[Saved], limits: Limits) -> Plan | None:
    """Of all choices that fit, the one with the least time and then the fewest bytes moved."""
    options = [ALL if tensor.seconds is not None else ALL[:2] for tensor in saved]
    every = (predict(saved, choices, limits) for choices in product(*options))
    return min((p for p in every if p.fits(limits)), key=lambda p: (p.seconds, p.moved), default=None)


def test_its_choices_against_all_there_are() -> None:
    possible = missed = exact = 0
    ours = theirs = 0.0
    for seed in range(60):
        draw = Random(1000 + seed)
        saved = stack(draw, 5)
        whole = sum(tensor.nbytes for tensor in saved)
        rate = draw.choice([0.3, 1.0, 8.0])
        limits = Limits(int(whole * draw.uniform(0.3, 1.0)), draw.choice([0, whole // 3, whole]), rate, rate)
        wanted = best(saved, limits)
        try:
            found = plan(saved, limits)
        except ValueError:
            missed += wanted is not None
            possible += wanted is not None
            continue
        assert wanted is not None and found.fits(limits)
        assert found == predict(saved, found.choices, limits)
        possible += 1
        exact += found.seconds == wanted.seconds
        ours, theirs = ours + found.seconds, theirs + wanted.seconds
    assert possible >= 25 and missed <= 0.1 * possible and exact >= 0.8 * possible
    assert ours <= 1.2 * theirs


def test_nothing_is_done_when_it_fits() -> None:
    saved = stack(Random(0), 8)
    whole = sum(tensor.nbytes for tensor in saved)
    found = plan(saved, Limits(whole, whole, 100.0, 100.0))
    assert set(found.choices) == {"keep"} and (found.seconds, found.moved, found.host_bytes) == (0, 0, 0)
    assert plan([], Limits(0)).choices == ()


def layers(width: int = 100, depth: int = 20) -> list[Saved]:
    """Of each layer its input, which is quick to make again, and its attention's output, which is not."""
    saved = []
    for number in range(depth):
        start, back = number * 1.0, depth + 2.0 * (depth - 1 - number)
        saved.append(Saved(f"input {number}", width, start + 0.1, back + 1.0, back + 2.0, 0.1))
        saved.append(Saved(f"attention {number}", width, start + 1.0, back, back + 1.0, 0.9))
    return saved


def test_a_fast_link_costs_no_time_and_moves_no_more_than_it_must() -> None:
    saved = layers()
    found = plan(saved, Limits(1000, 10_000, 400.0, 400.0))
    assert found.seconds == 0 and "recompute" not in found.choices
    assert 3000 <= found.moved <= 3600 and found.device_bytes <= 1000  # of 4000, 1000 may stay


def test_what_the_link_cannot_carry_is_made_again_the_cheapest_first() -> None:
    saved = layers()
    slow = plan(saved, Limits(1000, 10_000, 100.0, 100.0))
    assert slow.choices.count("recompute") and slow.choices.count("offload")
    assert {saved[n].name.split()[0] for n, choice in enumerate(slow.choices) if choice == "recompute"} == {"input"}
    unlinked = plan(saved, Limits(1300, 10_000))  # every fourth stays, and three are made again at a time
    assert "offload" not in unlinked.choices and unlinked.seconds > slow.seconds
    crowded = plan(saved, Limits(1000, 500, 400.0, 400.0))
    assert crowded.host_bytes <= 500 and crowded.seconds > 0
    assert "offload" in crowded.table(saved) and "recompute" in crowded.table(saved)


def test_what_fits_nowhere_is_said_with_what_would() -> None:
    saved = [Saved("a", 100, 0.0, 10.0), Saved("b", 100, 1.0, 9.0)]
    with pytest.raises(ValueError, match="150 bytes on the device and 0 on the host; the device needs 200"):
        plan(saved, Limits(150))
    with pytest.raises(ValueError, match="shorten the sequence"):
        plan(saved, Limits(99, 1000, 1000.0, 1000.0))  # smaller than one tensor
    assert plan(saved, Limits(150, 1000, 1000.0, 1000.0)).device_bytes <= 150


def test_other_lengths_are_planned_with_less_time_than_they_take() -> None:
    saved = layers()
    for ratio in (0.5, 2.0):
        other = scaled(saved, ratio)
        assert [tensor.nbytes for tensor in other] == [round(tensor.nbytes * ratio) for tensor in saved]
        for before, after in zip(saved, other, strict=True):
            took, takes = before.end - before.saved, after.end - after.saved
            assert takes <= took * ratio + 1e-9 and takes <= took * ratio**2 + 1e-9
            assert after.seconds is not None and before.seconds is not None and after.seconds >= before.seconds * ratio
    assert plan(scaled(saved, 0.25), Limits(1000)).seconds == 0


# --- recording ------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Saves its input, the product (once, though two operations and a view of it are saved) and the sine's argument."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.weight
        return (h * h + h[1:].sum()).sin().sum()


def test_a_step_is_recorded_and_not_changed() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(4, 8)
    (expected,) = torch.autograd.grad(model(x), model.weight)
    ticks = count()
    with Recorder(clock=lambda: float(next(ticks))) as recorder:
        loss = model(x)
    assert recorder.saved == []
    (grad,) = torch.autograd.grad(loss, model.weight)
    torch.testing.assert_close(grad, expected, rtol=0, atol=0)
    saved = recorder.saved
    assert [tensor.nbytes for tensor in saved] == [4 * 8 * 4] * 3
    assert saved[0].seconds is None  # the input cannot be made again
    assert all(tensor.seconds is not None for tensor in saved[1:])
    assert [tensor.saved for tensor in saved] == sorted(tensor.saved for tensor in saved)
    assert [tensor.used for tensor in saved] == sorted((tensor.used for tensor in saved), reverse=True)
    assert all(tensor.saved < tensor.used <= tensor.end for tensor in saved)
    assert saved[1].end > saved[1].used  # both factors are wanted
    assert plan(saved, Limits(400)).choices == ("keep", "keep", "keep")


def test_a_recorded_step_outlives_its_tensors_and_addresses() -> None:
    """Layers whose tensors go before the next ones come: the same address is another tensor."""
    weight = torch.randn(64, 64, requires_grad=True)
    with Recorder() as recorder:
        for _ in range(3):
            (torch.randn(64, 64) @ weight).sum().backward()
    assert len(recorder.saved) == 3
