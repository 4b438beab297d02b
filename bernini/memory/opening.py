"""A checkpoint under a memory limit: everything is looked at, and nothing is loaded before a request is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bernini.parallel.share import Share

from ..checkpoint import ExpertFiles, read_json, read_layout
from ..parts import load_part, open_stage, read_geometry
from ..renderer.model import Renderer
from ..renderer.sampler import Which
from ..renderer.text import TextEncoder
from ..renderer.vae import VideoAutoencoder
from . import streaming
from .needs import Model
from .residency import Held, HeldExperts, Lazy, Loaded, Residency

if TYPE_CHECKING:
    from ..pipeline import Bernini
    from ..planner.stage import PlannerStage


def open_within(
    make: type[Bernini], limit: int, folder: Path, files: ExpertFiles, vae_folder: Path, text_folder: Path,
    tokenizer_folder: Path, load_vae: Callable[[], Any], load_text: Callable[[], Any], *, device: str,
    dtype: torch.dtype, attention: str, share: Share, tiling: bool,
) -> Bernini:  # fmt: skip
    """A pipeline whose parts come when they are wanted.

    Args:
        limit: bytes on the device.
        load_vae, load_text: load these parts whole, on the device.
        tiling: whether the VAE works in tiles.

    Raises:
        CheckpointError: the folder, a file or a tensor is missing or wrong.
    """
    from transformers import AutoTokenizer

    tokenizer = load_part(tokenizer_folder, AutoTokenizer.from_pretrained)
    empty_vae = _empty_vae(vae_folder, tiling)
    geometry = read_geometry(folder, vae_folder / "config.json", empty_vae.config, files.config.to_dict())
    empty_text = streaming.empty_text(text_folder)
    sizes = {
        str(which): streaming.sizes(streaming.empty_expert(source), streaming.expert_dtype(dtype))
        for which, source in files.experts.items()
    }
    sizes["text"] = streaming.sizes(empty_text, streaming.text_dtype(empty_text, dtype))
    sizes["vae"] = streaming.sizes(empty_vae, lambda name: torch.float32)
    planner: Held[PlannerStage] | None = None
    about: tuple[Any, Any, Any] | None = None
    if read_layout(folder).kind == "bundle":
        from ..planner.loading import empty_planner

        source, rules, make_stage = open_stage(folder, attention, geometry, share)
        empty = empty_planner(source.config, understanding=False)
        sizes["planner"] = streaming.sizes(empty, lambda name: dtype)
        about = empty.text_config, empty.vision_config, rules

        def flowing() -> Loaded[PlannerStage]:
            found, flow = streaming.stream_planner(source, dtype, device)
            return make_stage(found), flow

        planner = Held(lambda: make_stage(source.load(dtype=dtype, device=device)), flowing)

    def ready(expert: Renderer) -> Renderer:
        expert.backend = attention
        return expert

    def streamed(which: Which) -> Loaded[Renderer]:
        expert, flow = streaming.stream_expert(files.experts[which], dtype, device)
        return ready(expert), flow

    def expert(which: Which) -> Held[Renderer]:
        return Held(lambda: ready(files.load(which)), lambda: streamed(which))

    experts = {which: expert(which) for which in files.experts}
    text: Held[Any] = Held(load_text, lambda: streaming.stream_text(text_folder, dtype, device))
    vae: Held[Any] = Held(load_vae)
    on_host = torch.device(device).type == "cpu"
    model = Model(
        files.config, VideoAutoencoder(empty_vae, exact=not on_host), empty_text.config, geometry.text_tokens, about,
        geometry, dtype, on_host,
    )  # fmt: skip
    residency = Residency(
        limit, model, experts=experts, text=text, vae=vae, planner=planner, sizes=sizes, tiled=tiling
    )  # fmt: skip
    return make(
        HeldExperts(files, experts), TextEncoder(tokenizer, Lazy(text), geometry.text_tokens),
        VideoAutoencoder(Lazy(vae, config=empty_vae.config), share.group, most=1), device,
        None if planner is None else planner.get, geometry, share, residency,
    )  # fmt: skip


def _empty_vae(folder: Path, tiling: bool) -> Any:
    from diffusers import AutoencoderKLWan

    def empty(path: str, **_: Any) -> Any:
        with torch.device("meta"):
            return AutoencoderKLWan.from_config(read_json(Path(path) / "config.json"))

    vae = load_part(folder, empty)
    if tiling:
        vae.enable_tiling()
    return vae.eval()
