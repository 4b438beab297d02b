"""From a prompt and source media to frames: the whole of Bernini-R in one call.

    media -> VAE latents -> packed segments -> guided sampling -> VAE -> frames

Every box is a module of :mod:`bernini.renderer`; this file only connects them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bernini.kernels import Segment, SegmentLayout, segment_phases

from .checkpoint import CheckpointError, component_folder, open_experts, resolve
from .media import Clip, from_model, to_model
from .presets import NEGATIVE_PROMPT, TASK_PREFIXES
from .renderer.latents import patch_grid, patchify, unpatchify
from .renderer.model import Renderer
from .renderer.sampler import ExpertPair, Experts, OneAtATime, Which, sample
from .renderer.schedule import make_solver
from .renderer.text import TextEncoder
from .renderer.vae import VideoAutoencoder
from .request import Request, settle
from .sources import read_sources, result_shape

COMPONENTS = ("vae", "text_encoder", "tokenizer")

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how much of it is done, how much there is)."""


class Bernini:
    """A renderer-only Bernini: two experts (or one), a text encoder and a video autoencoder.

    Example::

        model = Bernini.from_pretrained("checkpoint")
        clip = model("make it snow", videos=["in.mp4"], steps=20)
    """

    def __init__(self, experts: ExpertPair, text: TextEncoder, vae: VideoAutoencoder, device: str = "cpu") -> None:
        self.experts, self.text, self.vae, self.device = experts, text, vae, device

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        attention: str = "auto",
        low_memory: bool = False,
        components: str | Path | None = None,
    ) -> Bernini:
        """Loads a checkpoint in the released Bernini-R layouts.

        Args:
            model: a folder, or a Hugging Face repository ``owner/name``.
            dtype: of experts and text encoder; by default bfloat16 on an accelerator and float32 on a CPU. The VAE
                always runs in float32.
            attention: a backend of ``bernini.kernels.attention``'s table, or ``"auto"``.
            low_memory: keeps one expert in memory at a time and loads the other when its steps begin.
            components: folder or repository with ``vae``, ``text_encoder`` and ``tokenizer``, where ``model`` is a raw
                export that has none.

        Raises:
            CheckpointError: the folder, a file or a tensor is missing or wrong.
        """
        from diffusers import AutoencoderKLWan
        from transformers import AutoTokenizer, UMT5EncoderModel

        folder = resolve(str(model))
        parts = folder if components is None else resolve(str(components), parts=COMPONENTS)
        if dtype is None:
            dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        # Headers first, then the small parts: what is wrong is said before gigabytes are read.
        files = open_experts(folder, dtype=dtype, device=device)
        vae = _load(component_folder(parts, "vae"), AutoencoderKLWan.from_pretrained, torch_dtype=torch.float32)
        encoder = _load(component_folder(parts, "text_encoder"), UMT5EncoderModel.from_pretrained, dtype=dtype)
        tokenizer = _load(component_folder(parts, "tokenizer"), AutoTokenizer.from_pretrained)

        def load(which: Which) -> Renderer:
            expert = files.load(which)
            expert.backend = attention
            return expert

        experts: ExpertPair
        if low_memory:
            experts = OneAtATime(load, files.config, has_low=files.has_low, boundary=files.boundary)
        else:
            experts = Experts(load("high"), load("low") if files.has_low else None, files.boundary)
        return cls(
            experts, TextEncoder(tokenizer, encoder.to(device).eval()), VideoAutoencoder(vae.to(device).eval()), device
        )

    def __call__(self, prompt: str, *, progress: Progress | None = None, **options: Any) -> Clip:
        """``generate(Request(prompt, **options))``."""
        return self.generate(Request(prompt, **options), progress)

    def generate(self, request: Request, progress: Progress | None = None) -> Clip:
        """Runs one request.

        Raises:
            UserError: an option that cannot work; MediaError: a file that cannot be read.
        """
        chosen = settle(request)
        report = progress or (lambda stage, done, total: None)
        request = read_sources(request, chosen, report)
        sources = [to_model(source) for source in (*request.videos, *request.images)]  # type: ignore[arg-type]
        latents = []
        for number, pixels in enumerate(sources):
            report("encoding", number, len(sources))
            latents.append(self.vae.encode(pixels.to(self.device)))
        shape = self.vae.latent_shape(*result_shape(request, chosen))
        layout = self._layout([tuple(latent.shape) for latent in latents], shape)
        negative = NEGATIVE_PROMPT if request.negative_prompt is None else request.negative_prompt
        texts = {
            "positive": self.text(request.prompt, prefix=TASK_PREFIXES[chosen.task]),
            "negative": self.text(negative),
        }
        noise = torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(request.seed))[0]
        tokens = sample(
            self.experts,
            layout,
            videos=len(request.videos),
            source_tokens=[self._tokens(latent) for latent in latents],
            noise_tokens=self._tokens(noise.to(self.device)),
            texts=texts,
            plan=chosen.plan,
            guidance=chosen.guidance,
            solver=make_solver(request.solver, request.sigma_schedule, chosen.steps, request.flow_shift),
            progress=partial(report, "sampling"),
        )
        report("decoding", 0, 1)
        target = unpatchify(tokens, layout.segments[-1].grid, self._patch)
        result = Clip(from_model(self.vae.decode(target)), request.fps)
        report("decoding", 1, 1)
        return result

    @property
    def _patch(self) -> tuple[int, int, int]:
        return self.experts.config.patch_size

    def _tokens(self, latent: Tensor) -> Tensor:
        return patchify(latent, self._patch)

    def _layout(self, sources: Sequence[tuple[int, ...]], target: tuple[int, ...]) -> SegmentLayout:
        """One sample: the sources, numbered from 1, then the target, number 0."""
        phases = segment_phases(len(sources))
        return SegmentLayout(
            [
                *(Segment("source", patch_grid(s, self._patch), p) for s, p in zip(sources, phases, strict=True)),
                Segment("target", patch_grid(target, self._patch)),
            ]
        )


def _load(folder: Path, load: Callable[..., Any], **options: Any) -> Any:
    """A library's ``from_pretrained`` on a local folder, its many errors turned into one that names the folder."""
    try:
        return load(str(folder), local_files_only=True, **options)
    except Exception as error:
        raise CheckpointError(f"{folder}: cannot be loaded ({type(error).__name__}: {error})") from error
