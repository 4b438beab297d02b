"""From a prompt and source media to frames: the whole of Bernini in one call.

    media, prompt -> planner -> plan and contexts                                        (full checkpoints)
    media -> VAE latents -> packed segments -> guided sampling under the contexts -> VAE -> frames

Every box is a module of :mod:`bernini.planner` or :mod:`bernini.renderer`; this file only connects them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bernini.kernels import Segment, SegmentLayout, segment_phases

from .checkpoint import component_folder, open_experts, read_layout, resolve
from .errors import UserError
from .geometry import RELEASED, Geometry
from .media import Clip
from .parallel.share import ALONE, Share
from .parts import load_part, open_stage, read_geometry
from .presets import TASK_PREFIXES
from .renderer.latents import patch_grid, patchify, unpatchify
from .renderer.model import Renderer
from .renderer.sampler import ExpertPair, Experts, OneAtATime, Which, sample
from .renderer.schedule import make_solver
from .renderer.text import TextEncoder
from .renderer.vae import VideoAutoencoder
from .renderer.vae_chunks import decode, encode
from .request import Request, Settings, settle
from .shipped import shipped
from .sources import read_sources, result_shape

if TYPE_CHECKING:
    from bernini.parallel.branches import Placement

    from .memory.choose import Choice
    from .memory.needs import Stage
    from .memory.residency import Residency
    from .planner.stage import Planned, PlannerStage

COMPONENTS = ("vae", "text_encoder", "tokenizer")

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how much of it is done, how much there is)."""


class Bernini:
    """Two experts (or one), a text encoder and a video autoencoder, and in a full Bernini the planner.

    Example::

        model = Bernini.from_pretrained("checkpoint")
        clip = model("make it snow", videos=["in.mp4"], steps=20)
    """

    def __init__(
        self,
        experts: ExpertPair,
        text: TextEncoder,
        vae: VideoAutoencoder,
        device: str = "cpu",
        planner: Callable[[], PlannerStage] | None = None,
        geometry: Geometry = RELEASED,
        share: Share = ALONE,
        residency: Residency | None = None,
    ) -> None:
        self.experts, self.text, self.vae, self.device, self._planner = experts, text, vae, device, planner
        self.geometry, self.share, self.residency = geometry, share, residency
        self.placement: Placement | None = None
        """Which processes had which branches of guidance in the last request."""

    @property
    def has_planner(self) -> bool:
        return self._planner is not None

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        attention: str = "auto",
        low_memory: bool = False,
        memory: int | None = None,
        vae_tiling: bool = False,
        components: str | Path | None = None,
        share: Share = ALONE,
    ) -> Bernini:
        """Loads a checkpoint in one of the released layouts: Bernini-R, its raw export, or a full Bernini.

        Args:
            model: a folder, or a Hugging Face repository ``owner/name``; by default the toy of the package.
            dtype: of experts and text encoder; by default bfloat16 on an accelerator and float32 on a CPU. The VAE
                always runs in float32.
            attention: a backend of ``bernini.kernels.attention``'s table, or ``"auto"``.
            low_memory: keeps one expert in memory at a time and loads the other when its steps begin; the planner is
                loaded for each request and gone before the first expert comes.
            memory: bytes on the device that weights and what is computed may take. For each request it is chosen which
                parts stay, which are loaded for their stage and which have their blocks streamed
                (:mod:`bernini.memory`); the results are the same bits. The interpreter and its libraries come on top.
            vae_tiling: the VAE works on tiles that are blended: less memory for large frames, another result.
            components: folder or repository with ``vae``, ``text_encoder`` and ``tokenizer``, where ``model`` is a raw
                export that has none.
            share: processes that serve every request together: each calls this and then asks for the same.

        Raises:
            CheckpointError: the folder, a file or a tensor is missing or wrong.
            UserError: ``memory`` and ``low_memory``, which exclude each other.
        """
        from diffusers import AutoencoderKLWan
        from transformers import AutoTokenizer, UMT5EncoderModel

        folder = resolve(str(shipped() if model is None else model))
        parts = folder if components is None else resolve(str(components), parts=COMPONENTS)
        if dtype is None:
            dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        # Headers first, then the small parts: what is wrong is said before gigabytes are read.
        files = open_experts(folder, dtype=dtype, device=device)
        vae_folder, text_folder = component_folder(parts, "vae"), component_folder(parts, "text_encoder")

        def load_vae() -> Any:
            vae = load_part(vae_folder, AutoencoderKLWan.from_pretrained, torch_dtype=torch.float32)
            if vae_tiling:
                vae.enable_tiling()
            return vae.to(device).eval()

        def load_text() -> Any:
            return load_part(text_folder, UMT5EncoderModel.from_pretrained, dtype=dtype).to(device).eval()

        def load(which: Which) -> Renderer:
            expert = files.load(which)
            expert.backend = attention
            return expert

        bundle = read_layout(folder).kind == "bundle"
        if memory is not None:
            if low_memory:
                raise UserError("memory and low_memory exclude each other; memory chooses for itself")
            from .memory.opening import open_within

            return open_within(
                cls, memory, folder, files, vae_folder, text_folder, component_folder(parts, "tokenizer"),
                load_vae, load_text, device=device, dtype=dtype, attention=attention, share=share, tiling=vae_tiling,
            )  # fmt: skip
        vae, encoder = load_vae(), load_text()
        tokenizer = load_part(component_folder(parts, "tokenizer"), AutoTokenizer.from_pretrained)
        geometry = read_geometry(folder, vae_folder / "config.json", vae.config, files.config.to_dict())
        planner = None
        if bundle:
            source, _, make = open_stage(folder, attention, geometry, share)
            planner = lambda: make(source.load(dtype=dtype, device=device))  # noqa: E731
        experts: ExpertPair
        if planner is not None and not low_memory:
            stage = planner()
            planner = lambda: stage  # noqa: E731
        if low_memory:
            experts = OneAtATime(load, files.config, has_low=files.has_low, boundary=files.boundary)
        else:
            experts = Experts(load("high"), load("low") if files.has_low else None, files.boundary)
        text = TextEncoder(tokenizer, encoder, geometry.text_tokens)
        return cls(experts, text, VideoAutoencoder(vae, share.group), device, planner, geometry, share)

    def fit(self, request: Request) -> Choice | None:
        """What is kept where for a request, under the memory limit that the model was loaded with; else ``None``.

        Raises:
            UserError: an option that cannot work, or a limit that is too small; it names the least that would do.
            MediaError: a file that cannot be read.
        """
        if self.residency is None:
            return None
        from .memory.needs import Job

        chosen = settle(request, planner=self.has_planner, geometry=self.geometry)
        return self.residency.choice(Job.of(read_sources(request, chosen), chosen))

    def __call__(self, prompt: str, *, progress: Progress | None = None, **options: Any) -> Clip:
        """``generate(Request(prompt, **options))``."""
        return self.generate(Request(prompt, **options), progress)

    def generate(
        self, request: Request, progress: Progress | None = None, on_plan: Callable[[Planned], None] | None = None
    ) -> Clip:
        """Runs one request.

        Args:
            on_plan: called with what the planner made, before anything is rendered.

        Raises:
            UserError: an option that cannot work; MediaError: a file that cannot be read.
        """
        chosen = settle(request, planner=self.has_planner, geometry=self.geometry)
        report = progress or (lambda stage, done, total: None)
        request = read_sources(request, chosen, report)
        if self.residency is None:
            return self._generate(request, chosen, report, on_plan)
        from .memory.needs import Job

        self.residency.prepare(Job.of(request, chosen))
        try:
            return self._generate(request, chosen, report, on_plan)
        finally:
            self.residency.leave_all()

    def _generate(
        self, request: Request, chosen: Settings, report: Progress, on_plan: Callable[[Planned], None] | None
    ) -> Clip:
        """``request`` has its sources read."""
        shape = self.vae.latent_shape(*result_shape(request, chosen))
        texts = self._contexts(request, chosen, shape, report, on_plan)
        self._leave("text")
        sources: list[Clip | Tensor] = [*request.videos, *request.images]  # type: ignore[list-item]
        latents = []
        for number, source in enumerate(sources):
            report("encoding", number, len(sources))
            latents.append(encode(self.vae, source, self.device))
        self._leave("encoding")
        layout = self._layout([tuple(latent.shape) for latent in latents], shape, request)
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
            solver=make_solver(request.solver, request.sigma_schedule, chosen.steps, chosen.flow_shift),
            progress=partial(report, "sampling"),
            share=self.share,
            placed=partial(setattr, self, "placement"),
        )
        self._leave("sampling")
        report("decoding", 0, 1)
        target = unpatchify(tokens, layout.segments[-1].grid, self._patch)
        result = Clip(decode(self.vae, target), chosen.fps)
        report("decoding", 1, 1)
        return result

    def _leave(self, stage: Stage) -> None:
        if self.residency is not None:
            self.residency.leave(stage)

    def _contexts(
        self, request: Request, chosen: Settings, latent_shape: tuple[int, ...], report: Progress,
        on_plan: Callable[[Planned], None] | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The renderer's contexts by name: the text's states, and behind them, with a planner, its own."""
        planned = self._plan(request, chosen, latent_shape, report)
        self._leave("planning")
        if planned is not None and on_plan is not None:
            on_plan(planned)
        texts = {
            "positive": self.text.states(request.prompt, prefix=TASK_PREFIXES[chosen.task]),
            "negative": self.text.states(chosen.negative_prompt),
        }
        if planned is None:
            return {name: self.text.context(states) for name, states in texts.items()}
        made = planned.contexts
        return {
            name: self.text.context(texts[text], states.to(texts[text].dtype))
            for name, text, states in (
                ("positive", "positive", made.positive),
                ("negative", "negative", made.negative),
                ("planned", "positive", made.planned),
            )
        }

    def _plan(
        self, request: Request, chosen: Settings, latent_shape: tuple[int, ...], report: Progress
    ) -> Planned | None:
        """The planner's part; ``None`` without one."""
        if self._planner is None or chosen.planning is None:
            return None
        from .planner.decode import ReleasedSeeded, Seeded
        from .planner.plan_file import load_plan

        plan = load_plan(request.plan) if isinstance(request.plan, str | Path) else request.plan
        patches, values = math.prod(patch_grid(latent_shape, self._patch)), (latent_shape[0], *self._patch)
        stage = self._planner()
        return stage(
            request.prompt,
            (*request.videos, *request.images),  # type: ignore[arg-type]
            stage.target(*result_shape(request, chosen), chosen.fps),
            task=chosen.task,
            negative_prompt=chosen.negative_prompt,
            settings=chosen.planning,
            draws=ReleasedSeeded(request.seed, patches, values) if request.plan_parity else Seeded(request.seed),
            plan=plan,
            progress=report,
        )

    @property
    def _patch(self) -> tuple[int, int, int]:
        return self.experts.config.patch_size

    def _tokens(self, latent: Tensor) -> Tensor:
        return patchify(latent, self._patch)

    def _layout(
        self, sources: Sequence[tuple[int, ...]], target: tuple[int, ...], request: Request
    ) -> SegmentLayout:  # fmt: skip
        """One sample: videos and images, numbered from 1 in the request's order, then the target, number 0."""
        phases = segment_phases(len(sources))
        if request.source_order == "images-first":
            images = len(request.images)
            phases = (*phases[images:], *phases[:images])
        return SegmentLayout(
            [
                *(Segment("source", patch_grid(s, self._patch), p) for s, p in zip(sources, phases, strict=True)),
                Segment("target", patch_grid(target, self._patch)),
            ]
        )
