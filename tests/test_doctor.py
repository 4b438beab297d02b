"""``bernini doctor``: what it finds on a sound machine, and on broken ones."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from bernini import cli
from bernini.doctor import Finding, examine, render
from bernini.kernels import dispatch, which
from bernini.kernels.native import loader


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_a_sound_machine() -> None:
    """In a process of its own: which OpenMP runtimes there are depends on what else was loaded."""
    command = [sys.executable, "-m", "bernini", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert done.stdout.strip().splitlines()[-1] == "nothing is broken"
    for expected in (
        torch.__version__,
        "cpu float32, cpu bfloat16",
        "libx264",
        "writes .gif",
        "sdpa",
        "threads in torch",
    ):
        assert expected in done.stdout


def test_it_names_what_runs() -> None:
    findings = by_name([finding for finding in examine() if finding.topic == "kernels"])
    places: list[tuple[str, Any]] = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    assert len(findings) == len(dispatch._TABLE) + 1
    for op in dispatch._TABLE:
        for device, dtype in places:
            assert which(op, device, dtype) in findings[op].text
        if all(which(op, *place) == "reference" for place in places):
            assert "native " in findings[op].text and "triton " in findings[op].text, "why nothing better runs"


def test_a_library_that_is_not_built_is_no_fault_and_one_that_does_not_load_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loader, "LIBRARY", tmp_path / "none.so")
    monkeypatch.setattr(loader, "missing", lambda: "is not built; run `make native`")
    found = by_name(examine())["library"]
    assert found.text == "is not built; run `make native`" and not found.broken
    (tmp_path / "none.so").touch()
    monkeypatch.setattr(loader, "missing", lambda: "cannot be loaded: no such symbol")
    found = by_name(examine())["library"]
    assert found.text == "cannot be loaded: no such symbol" and found.broken


def test_two_openmp_runtimes_are_a_fault(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(loader, "openmp_runtimes", lambda: ["/a/libgomp.so.1", "/b/libiomp5.so"])
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "BROKEN: 2 in one process, whose threads fight for the cores: /a/libgomp.so.1, /b/libiomp5.so" in out
    assert out.strip().splitlines()[-1] == "broken: OpenMP"


def test_a_forced_kernel_that_cannot_serve_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERNINI_KERNELS", "triton")
    found = by_name(examine())
    assert found["BERNINI_KERNELS"].text == "forces triton for every op"
    assert found["modulate"].broken and "BERNINI_KERNELS=triton" in found["modulate"].text


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name in ("triton", "diffusers"):
            raise ImportError(f"No module named {name!r}")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    found = by_name(examine())
    assert found["diffusers"].broken and "No module named 'diffusers'" in found["diffusers"].text
    assert not found["triton"].broken and "not installed" in found["triton"].text


def test_a_missing_encoder_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    real = av.codec.Codec

    def codec(name: str, mode: str) -> Any:
        if name == "libx264":
            raise ValueError("no such codec")
        return real(name, mode)

    monkeypatch.setattr(av.codec, "Codec", codec)
    found = by_name(examine())
    assert found["libx264"].broken and ".mp4, .mov and .mkv cannot be written" in found["libx264"].text
    assert not found["gif"].broken


def test_one_broken_part_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[str]:
        raise OSError("the maps are gone")

    monkeypatch.setattr(loader, "openmp_runtimes", fail)
    findings = examine()
    assert by_name(findings)["native library"].text == "cannot be examined (OSError: the maps are gone)"
    assert {"versions", "machine", "kernels", "attention", "media"} <= {finding.topic for finding in findings}
    assert "broken: native library" in render(findings)


def test_cores_are_those_of_the_process() -> None:
    text = by_name(examine())["processor"].text
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert f"{count} cores for this process, {torch.get_num_threads()} threads in torch" in text
