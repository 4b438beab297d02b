"""A Wan VAE by ranks that have consecutive frames, against diffusers' own: values, bits, gradients, what is sent when.

Ranks are threads, and once real processes over gloo: ``vae_worker.py``.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench_perf.moves import Absent, Counted
from bench_perf.vae_cost import Start, Wait, Work, timetable
from bernini.media import Clip, from_model, to_model
from bernini.memory.peak import peak_bytes
from bernini.parallel import vae_exchange
from bernini.parallel.group import Group
from bernini.parallel.simulated import simulate
from bernini.parallel.vae import TemporalVAE, can
from bernini.parallel.vae_frames import balanced, down, even, halo, kept, moved, owner, up, windows
from bernini.renderer import vae_chunks
from bernini.renderer.vae import VideoAutoencoder
from tests.proof.processes.vae_cases import Case, apart, random_cases, steady_convolutions

ROOT = Path(__file__).resolve().parents[3]

# --- frames: integers -------------------------------------------------------------------------------------------------


def test_cuts_are_balanced_and_move_little() -> None:
    draw = random.Random(0)
    for _ in range(500):
        ranks, first, count = draw.randint(1, 9), draw.randint(0, 20), draw.randint(0, 40)
        wished = sorted([first, first + count, *(draw.randint(first, first + count) for _ in range(ranks - 1))])
        cut = balanced(wished)
        sizes = [stop - start for start, stop in pairwise(cut)]
        assert (cut[0], cut[-1]) == (first, first + count) and min(sizes) >= 0 and max(sizes) == -(-count // ranks)
        assert balanced(cut) == cut, "what is balanced stays"
    assert even(0, 21, 8) == (0, 3, 6, 8, 11, 14, 16, 19, 21) and even(2, 3, 2) == (2, 3, 3)
    assert all(down(up(border)) == border for border in range(50))


@pytest.mark.parametrize("most", [1, 3])
def test_everyone_gets_the_frames_before_his_own_once(most: int) -> None:
    """Over all windows of random videos, and what is sent is what is expected."""
    draw = random.Random(most)
    for _ in range(100):
        ranks, latents, width, first = draw.randint(1, 8), draw.randint(1, 33), draw.randint(1, 2), draw.randint(0, 1)
        spans = windows(latents, ranks, most, draw.random() < 0.5)
        assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])] and spans[-1][1] == latents
        tails: Any = ()
        for start, stop in spans:
            cut = tuple(max(border, first) for border in even(start, stop, ranks))
            plans = [halo(cut, tails, rank, width, first) for rank in range(ranks)]
            for rank, plan in enumerate(plans):
                read = [f for piece in plan.receives for f in range(piece.start, piece.stop)] + list(range(*plan.own))
                wanted = range(max(cut[rank] - width, first), cut[rank]) if cut[rank] < cut[rank + 1] else range(0)
                assert sorted(read) == list(wanted)
                for piece in plan.receives:
                    assert piece._replace(rank=rank) in plans[piece.rank].sends
                    assert all(owner(cut, tails, frame) == piece.rank for frame in range(piece.start, piece.stop))
            assert sum(len(plan.sends) for plan in plans) == sum(len(plan.receives) for plan in plans)
            tails = kept(cut, tails, width)


def test_cutting_anew_moves_every_frame_to_its_place() -> None:
    draw = random.Random(3)
    for _ in range(200):
        ranks, count = draw.randint(1, 8), draw.randint(0, 30)
        old, new = (
            (0, *sorted(draw.randint(0, count) for _ in range(ranks - 1)), count) for _ in range(2)
        )  # fmt: skip
        for rank in range(ranks):
            plan = moved(old, new, rank)
            got = [f for piece in plan.receives for f in range(piece.start, piece.stop)] + list(range(*plan.own))
            assert sorted(got) == list(range(new[rank], new[rank + 1]))
            assert all(piece._replace(rank=rank) in moved(old, new, piece.rank).sends for piece in plan.receives)


# --- values -----------------------------------------------------------------------------------------------------------

CASES = [*random_cases(7, seed=2, most=2), Case(7, 1, 8), Case(7, 33, 3), Case(11, 2, 5, most=1), Case(8376, 21, 8)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.seed}-{case.latents}x{case.ranks}")
def test_the_bits_of_diffusers(case: Case) -> None:
    """With convolutions that do not depend on the number of frames; with torch's own, to 1e-6."""
    with torch.no_grad():
        expected = case.encoded(case.pixels), case.decoded(case.latent)
        assert apart([*case.both()], [*expected]) <= 1e-6
        fast = Case(case.seed, case.latents, 1, case.most).both(exact=False)
        assert apart([*fast], [*expected]) <= 1e-4
        for one, other in zip(case.both(exact=False), fast, strict=True):
            assert torch.equal(one, other), "the faster form has the same bits on any number of ranks"


@pytest.mark.parametrize("case", [Case(5, 5, 3, most=1), Case(8376, 13, 7), Case(4617, 9, 2)], ids=str)
def test_bit_by_bit_where_convolutions_are_steady(case: Case) -> None:
    with torch.no_grad(), steady_convolutions():
        expected = case.encoded(case.pixels), case.decoded(case.latent)
        for one, other in zip(case.both(), expected, strict=True):
            assert torch.equal(one, other)


# --- gradients --------------------------------------------------------------------------------------------------------

GRADIENTS = [
    Case(1, 5, 3, dtype=torch.float64), Case(2, 9, 4, dtype=torch.float64), Case(3, 2, 8, dtype=torch.float64),
    Case(4, 3, 2, dtype=torch.float64), Case(4, 1, 2, dtype=torch.float64),
]  # fmt: skip


@pytest.mark.parametrize("case", GRADIENTS, ids=lambda case: f"{case.seed}-{case.latents}x{case.ranks}")
@pytest.mark.parametrize("job", ["encode", "decode"])
def test_gradients_of_inputs_and_weights(job: str, case: Case) -> None:
    assert apart(case.gradients(job, ranks=True), case.gradients(job, ranks=False)) <= 1e-11


@pytest.mark.parametrize("job", ["encode", "decode"])
def test_gradients_in_single_precision(job: str) -> None:
    """As near to float64 as diffusers' own are."""
    case = Case(2, 5, 3)
    right = [grad.float() for grad in Case(2, 5, 3, dtype=torch.float64).gradients(job, ranks=False)]
    theirs, ours = (case.gradients(job, ranks) for ranks in (False, True))
    noise = apart(theirs, right)
    assert apart(ours, theirs) <= max(1e-6, 3 * noise) and noise < 2e-5


def test_a_halo_without_its_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a public implementation, whose backward drops it (facts on systems, section 5.1)."""

    def dropped(self: vae_exchange.Flight, grad: Tensor) -> Tensor:
        vae_exchange_add(self, grad)
        return grad

    vae_exchange_add = vae_exchange.Flight.add_back
    monkeypatch.setattr(vae_exchange.Flight, "add_back", dropped)
    case = GRADIENTS[0]
    assert apart(case.gradients("decode", ranks=True), case.gradients("decode", ranks=False)) > 1e-3


# --- what is sent, and when -------------------------------------------------------------------------------------------


def on_meta(case: Case) -> Any:
    return case.model.to("meta")


def test_frames_without_a_halo_are_convolved_while_it_comes() -> None:
    case = Case(8376, 21, 4)
    model = on_meta(case)
    events = timetable(model, "decode", case.latent.to("meta"), 4, 6)[1]
    flights = [number for number, event in enumerate(events) if isinstance(event, Start) and event.receives]
    overlapped = 0
    for number in flights:
        landing = events.index(Wait(events[number].flight))  # type: ignore[union-attr]
        between = events[number:landing]
        overlapped += any(isinstance(event, Work) and event.key[0] == "causal" for event in between)
    convolutions = {event.key for event in events if isinstance(event, Work) and event.key[0] == "causal"}
    assert overlapped == len(convolutions) > 10


def test_each_convolution_has_one_message_of_two_frames() -> None:
    """Where everyone has two frames or more, and nothing is cut anew."""
    case = Case(7, 8, 4)
    vae, sent = case.model, []
    steps = sum(vae.config.temperal_downsample)

    def work(group: Group) -> None:
        counted = Counted(group)
        with torch.no_grad():
            list(TemporalVAE(vae, counted, exact=False, most=9).decode(case.latent))
        sent.append([exchange for exchange in counted.exchanges if exchange.messages])

    simulate(4, work)
    convolutions = sum(isinstance(m, torch.nn.Conv3d) and m.kernel_size[0] > 1 for m in vae.decoder.modules())
    messages = sum(exchange.messages for exchanges in sent for exchange in exchanges)
    assert 3 * convolutions <= messages <= 3 * (convolutions + 2 * steps)


@pytest.mark.parametrize("ranks", [1, 3])
def test_memory_does_not_grow_with_the_video(ranks: int) -> None:
    model = on_meta(Case(8376, 1, 1))

    def pixels(start: int, stop: int) -> Tensor:
        return torch.empty((1, 3, stop - start, 8, 8), device="meta")

    def bytes_of(latents: int) -> int:
        latent = torch.empty((1, model.config.z_dim, latents, 4, 4), device="meta")
        vae = TemporalVAE(model, Absent(0, ranks), most=2)

        def run() -> None:
            for _ in vae.decode(latent):
                pass
            for _ in vae.encode(pixels, 1 + 4 * (latents - 1)):
                pass

        return peak_bytes(run)

    assert bytes_of(61) <= 1.05 * bytes_of(19)


def test_frames_come_out_as_they_are_made() -> None:
    case = Case(7, 9, 1)
    with torch.no_grad():
        parts = iter(case.vae().decode(case.latent))
        first = next(parts)
        assert first.own.shape[2] == 1 and first.cut == (0, 1)
        assert torch.equal(first.own, case.decoded(case.latent[:, :, :1])), "before anything of the others is known"


# --- as the pipeline uses it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 5])
def test_processes_that_share_a_request_get_the_bytes_of_one(ranks: int) -> None:
    case = Case(7, 6, ranks)
    frames, (height, width) = case.frames, case.pixels.shape[3:]
    draw = torch.Generator().manual_seed(5)
    clip = Clip(torch.randint(0, 256, (frames, height, width, 3), generator=draw, dtype=torch.uint8), 16.0)
    alone = VideoAutoencoder(case.model)
    latent, pixels = vae_chunks.encode(alone, clip, "cpu"), vae_chunks.decode(alone, case.latent[0])
    assert torch.equal(latent, alone.encode(to_model(clip)))
    assert torch.equal(pixels, from_model(alone.decode(case.latent[0])))

    def work(group: Group) -> tuple[Tensor, Tensor, Tensor]:
        vae = VideoAutoencoder(case.model, group, most=2)
        picture = vae_chunks.encode(vae, clip.frames[0], "cpu")
        return vae_chunks.encode(vae, clip, "cpu"), vae_chunks.decode(vae, case.latent[0]), picture

    picture = vae_chunks.encode(alone, clip.frames[0], "cpu")
    for found in simulate(ranks, work):
        assert all(torch.equal(a, b) for a, b in zip(found, (latent, pixels, picture), strict=True))


def test_other_forms_are_left_to_diffusers() -> None:
    from diffusers import AutoencoderKL, AutoencoderKLWan

    case = Case(7, 2, 1)
    assert can(case.model)
    case.model.enable_tiling()
    assert not can(case.model) and not VideoAutoencoder(case.model).in_pieces
    with pytest.raises(ValueError, match=r"Wan 2\.1"):
        case.vae()
    later = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], is_residual=True,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4, in_channels=12, out_channels=12, patch_size=2,
    )  # fmt: skip
    assert not can(later)
    assert not can(AutoencoderKL())


def test_what_cannot_be_encoded_is_told() -> None:
    case = Case(1, 3, 1)
    with pytest.raises(ValueError, match="most: 0 latent frames of a rank"):
        TemporalVAE(case.model, most=0)
    with pytest.raises(ValueError, match="0 frames; there has to be one"):
        next(case.vae().encode(lambda start, stop: case.pixels[:, :, start:stop], 0))
    with torch.no_grad(), pytest.raises(ValueError, match=r"pixels\(0, 1\) gave 3 frames and not 1"):
        next(case.vae().encode(lambda start, stop: case.pixels[:, :, :3], case.frames))


# --- real processes ---------------------------------------------------------------------------------------------------


def test_two_processes(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.proof.processes.vae_worker", str(tmp_path)]
    ranks = [
        subprocess.Popen([*command, str(rank)], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(said)
