"""``generate --memory``: the same bits as with everything resident, within the limit, and what is said when it is not
enough."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from bernini import Bernini, cli, weights
from bernini.errors import UserError
from bernini.media import Clip, from_model, to_model
from bernini.memory import needs, residency
from bernini.memory.amounts import memory_size
from bernini.memory.choose import Choice, Mode, Part, choose
from bernini.memory.needs import Job
from bernini.memory.peak import Peak
from bernini.offload.weights import MappedFile
from bernini.renderer.vae import VideoAutoencoder
from bernini.renderer.vae_chunks import decode, encode
from bernini.request import Request
from bernini.toy_full import write_toy_full

EVERYTHING = 2**40
MANY = torch.Generator().manual_seed(0)
CLIP = Clip(torch.randint(0, 256, (9, 48, 64, 3), generator=MANY, dtype=torch.uint8), 16.0)
IMAGE = torch.randint(0, 256, (32, 48, 3), generator=MANY, dtype=torch.uint8)
REQUEST = Request(
    "make it snow", videos=[CLIP], images=[IMAGE], steps=2, planning_steps=2, decoder_steps=1, num_frames=9
)  # fmt: skip
LEANEST = {"planner": "streamed", "experts": "streamed", "text encoder": "streamed", "vae": "loaded for its stage"}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_full(tmp_path_factory.mktemp("model") / "full")


@pytest.fixture(scope="module")
def resident(full: Path) -> Bernini:
    return Bernini.from_pretrained(full)


@pytest.fixture(scope="module")
def expected(resident: Bernini) -> Tensor:
    return resident.generate(REQUEST).frames


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A toy is smaller than the 16 MB that loading takes beside it."""
    monkeypatch.setattr(weights, "BUFFER", 2**16)
    monkeypatch.setattr(residency, "LOADING", 2**16)


def forced(model: Bernini, job: Job, modes: dict[str, str]) -> Choice:
    """Makes the model keep its parts so, whatever would be best."""
    assert model.residency is not None
    beside = needs.needs(model.residency.model, job)
    parts = model.residency._parts(job)
    chosen = [part._replace(modes=tuple(m for m in part.modes if m.name == modes[part.name])) for part in parts]
    choice = choose(EVERYTHING, chosen, {stage: size + residency.LOADING for stage, size in beside.items()})
    model.residency._found[job] = choice
    return choice


def the_job(model: Bernini) -> Job:
    assert model.residency is not None and model.fit(REQUEST) is not None
    return next(iter(model.residency._found))


@pytest.fixture
def only_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mapped files are not counted: their pages are the system's."""
    view = MappedFile.tensor

    def tensor(*args: Any) -> Tensor:
        with _disable_current_modes():
            return view(*args)

    monkeypatch.setattr(MappedFile, "tensor", tensor)


@pytest.mark.parametrize(
    "modes",
    [LEANEST, dict.fromkeys(LEANEST, "loaded for its stage") | {"experts": "one at a time"}],
    ids=["streamed", "loaded"],
)
@pytest.mark.usefixtures("only_memory")
def test_the_same_bits_within_what_was_said(full: Path, expected: Tensor, modes: dict[str, str]) -> None:
    """What is alive in each stage, weights and all, against what was promised for it."""
    model = Bernini.from_pretrained(full, memory=EVERYTHING)
    assert model.residency is not None
    choice = forced(model, the_job(model), modes)
    found: dict[str, int] = {}
    leave = model.residency.leave
    with Peak() as peak:

        def left(stage: Any) -> None:
            if stage not in found:
                found[stage], peak.most = peak.most, peak.now
            leave(stage)
            peak.most = peak.now if len(found) < 5 else peak.most

        model.residency.leave = left  # type: ignore[method-assign]
        frames = model.generate(REQUEST).frames
    assert torch.equal(frames, expected)
    for stage, said in choice.stages.items():
        assert found[stage] <= said, f"{stage}: {found[stage]} bytes, and {said} were said"
    for stage in ("text", "encoding", "sampling"):
        assert found[stage] > 0.35 * choice.stages[stage], f"{stage}: {found[stage]} of {choice.stages[stage]}"  # type: ignore[index]
    parts = (*model.residency._experts.values(), model.residency._text, model.residency._vae, model.residency._planner)
    assert not any(part.loaded for part in parts if part is not None), "nothing may stay"


def test_with_enough_memory_all_stays(full: Path, expected: Tensor) -> None:
    model = Bernini.from_pretrained(full, memory=EVERYTHING)
    assert torch.equal(model.generate(REQUEST).frames, expected)
    choice = model.fit(REQUEST)
    assert choice is not None and {mode.name for mode in choice.modes.values()} == {"resident"}
    assert "memory 1024.0 GiB: planner resident, experts resident" in choice.describe()
    assert model.residency is not None and model.residency._text.loaded and model.residency._vae.loaded
    # The next request has less: what may not stay goes before anything is computed.
    job = the_job(model)
    forced(model, job, LEANEST)
    model.residency.prepare(job)
    assert not model.residency._text.loaded and not any(h.loaded for h in model.residency._experts.values())


def test_too_little_is_said_with_the_least_that_does(full: Path) -> None:
    with pytest.raises(UserError, match=r"at least (\d+)MiB, while \w+") as error:
        Bernini.from_pretrained(full, memory=2**20).fit(REQUEST)
    least = memory_size(str(error.value).split("at least ")[1].split(",")[0])
    assert Bernini.from_pretrained(full, memory=least).fit(REQUEST) is not None
    with pytest.raises(UserError, match="at least"):
        Bernini.from_pretrained(full, memory=least - 2**20).fit(REQUEST)
    with pytest.raises(UserError, match="exclude each other"):
        Bernini.from_pretrained(full, memory=least, low_memory=True)


def test_larger_requests_take_more(full: Path) -> None:
    model = Bernini.from_pretrained(full, memory=EVERYTHING)
    assert model.residency is not None
    job = the_job(model)
    small = needs.needs(model.residency.model, job)
    large = needs.needs(model.residency.model, replace(job, target=(33, 96, 128), sources=((33, 96, 128),)))
    assert large["sampling"] > 1.5 * small["sampling"] and large["decoding"] > 2 * small["decoding"]
    assert large["encoding"] > 2 * small["encoding"] and large["text"] < 1.2 * small["text"]
    longer = needs.needs(model.residency.model, replace(job, target=(65, 96, 128), sources=((33, 96, 128),)))
    assert longer["decoding"] < 1.4 * large["decoding"], "in pieces: only the bytes of the result grow"


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_of_the_ways_that_fit_the_one_that_moves_least() -> None:
    parts = [
        Part("a", ("text",), (Mode("resident", 50, 50, 0), Mode("loaded", 0, 50, 50), Mode("streamed", 0, 5, 400))),
        Part("b", ("sampling",), (Mode("resident", 80, 80, 0), Mode("loaded", 0, 80, 80), Mode("streamed", 0, 9, 900))),
    ]
    beside = {"text": 10, "sampling": 20}

    def names(limit: int) -> list[str]:
        return [mode.name for mode in choose(limit, parts, beside).modes.values()]  # type: ignore[arg-type]

    assert names(150) == ["resident", "resident"] and names(149) == ["loaded", "resident"]
    assert names(100) == ["loaded", "loaded"] and names(99) == ["resident", "streamed"]
    assert names(79) == ["resident", "streamed"] and names(78) == ["loaded", "streamed"]
    assert names(29) == ["streamed", "streamed"]
    with pytest.raises(UserError, match="while sampling"):
        names(28)
    for limit, other in itertools.pairwise(range(29, 160)):
        moved = [sum(m.moved for m in choose(x, parts, beside).modes.values()) for x in (limit, other)]  # type: ignore[arg-type]
        assert moved[0] >= moved[1], "more memory never costs more"


@pytest.mark.parametrize(
    ("text", "size"), [("12GiB", 12 * 2**30), ("1.5g", 3 * 2**29), ("800 MiB", 800 * 2**20), ("2GB", 2 * 10**9)]
)
def test_amounts(text: str, size: int) -> None:
    assert memory_size(text) == size


@pytest.mark.parametrize("text", ["12", "", "GiB", "many", "0GiB", "1e3G", "12GiB/s", "-1G", "1.2.3G"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(ValueError, match=r"amount|nothing"):
        memory_size(text)


# --- the VAE in pieces ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_pieces_have_the_bits_of_the_whole(resident: Bernini, frames: int) -> None:
    vae = resident.vae
    pixels = torch.randint(0, 256, (frames, 32, 48, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    latent = vae.encode(to_model(Clip(pixels, 16.0)))
    assert torch.equal(encode(vae, Clip(pixels, 16.0), "cpu"), latent)
    assert torch.equal(decode(vae, latent), from_model(vae.decode(latent)))
    if frames == 1:
        assert torch.equal(encode(vae, pixels[0], "cpu"), latent), "an image"


def test_tiles_are_only_used_when_asked_for(full: Path) -> None:
    from diffusers import AutoencoderKLWan

    vae = VideoAutoencoder(AutoencoderKLWan.from_pretrained(full / "vae").eval())
    vae.model.enable_tiling(32, 32, 24, 24)
    latent = torch.randn(16, 2, 6, 8, generator=torch.Generator().manual_seed(4))
    tiled = decode(vae, latent)
    assert torch.equal(tiled, from_model(vae.decode(latent)))
    vae.model.use_tiling = False
    assert tiled.shape == decode(vae, latent).shape and not torch.equal(tiled, decode(vae, latent))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_what_it_chose(
    full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    quick = ["--prompt", "a house", "--num-frames", "1", "--size", "16x16", "--steps", "1", "--planning-steps", "1",
             "--decoder-steps", "1", "--device", "cpu", "--model", str(full)]  # fmt: skip

    def generate(name: str, *options: str) -> int:
        return cli.main(["generate", *quick, "--output", str(tmp_path / name), *options])

    assert generate("little.png", "--memory", "1MiB") == 2
    said = capsys.readouterr().err
    assert "a memory of 1 MiB is too small" in said and "at least" in said
    least = said.split("at least ")[1].split(",")[0]
    assert generate("lean.png", "--memory", least) == 0
    assert f"memory {memory_size(least) // 2**20} MiB: planner " in capsys.readouterr().err
    assert generate("whole.png") == 0
    assert (tmp_path / "lean.png").read_bytes() == (tmp_path / "whole.png").read_bytes()
    for options in (["--memory", "12"], ["--memory", "12GiB", "--low-memory"]):
        with pytest.raises(SystemExit) as stop:
            generate("no.png", *options)
        assert stop.value.code == 2
    assert "not an amount of memory" in capsys.readouterr().err
