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

from .checkpoint import CheckpointError, component_folder, open_experts, read_json, read_layout, resolve
from .geometry import MLLM_CONFIG, RELEASED, Geometry
from .media import Clip, from_model, to_model
from .parallel.share import ALONE, Share
from .presets import TASK_PREFIXES
from .renderer.latents import patch_grid, patchify, unpatchify
from .renderer.model import Renderer
from .renderer.sampler import ExpertPair, Experts, OneAtATime, Which, sample
from .renderer.schedule import make_solver
from .renderer.text import TextEncoder
from .renderer.vae import VideoAutoencoder
from .request import Request, Settings, settle
from .sources import read_sources, result_shape

if TYPE_CHECKING:
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
    ) -> None:
        self.experts, self.text, self.vae, self.device, self._planner = experts, text, vae, device, planner
        self.geometry, self.share = geometry, share

    @property
    def has_planner(self) -> bool:
        return self._planner is not None

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
        share: Share = ALONE,
    ) -> Bernini:
        """Loads a checkpoint in one of the released layouts: Bernini-R, its raw export, or a full Bernini.

        Args:
            model: a folder, or a Hugging Face repository ``owner/name``.
            dtype: of experts and text encoder; by default bfloat16 on an accelerator and float32 on a CPU. The VAE
                always runs in float32.
            attention: a backend of ``bernini.kernels.attention``'s table, or ``"auto"``.
            low_memory: keeps one expert in memory at a time and loads the other when its steps begin; the planner is
                loaded for each request and gone before the first expert comes.
            components: folder or repository with ``vae``, ``text_encoder`` and ``tokenizer``, where ``model`` is a raw
                export that has none.
            share: processes that serve every request together: each calls this and then asks for the same.

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

        geometry = _geometry(folder, component_folder(parts, "vae") / "config.json", vae.config, files.config.to_dict())
        bundle = read_layout(folder).kind == "bundle"
        planner = _planner(folder, dtype, device, attention, geometry, share) if bundle else None
        experts: ExpertPair
        if planner is not None and not low_memory:
            stage = planner()
            planner = lambda: stage  # noqa: E731
        if low_memory:
            experts = OneAtATime(load, files.config, has_low=files.has_low, boundary=files.boundary)
        else:
            experts = Experts(load("high"), load("low") if files.has_low else None, files.boundary)
        text = TextEncoder(tokenizer, encoder.to(device).eval(), geometry.text_tokens)
        return cls(experts, text, VideoAutoencoder(vae.to(device).eval()), device, planner, geometry, share)

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
        shape = self.vae.latent_shape(*result_shape(request, chosen))
        texts = self._contexts(request, chosen, shape, report, on_plan)
        sources = [to_model(source) for source in (*request.videos, *request.images)]  # type: ignore[arg-type]
        latents = []
        for number, pixels in enumerate(sources):
            report("encoding", number, len(sources))
            latents.append(self.vae.encode(pixels.to(self.device)))
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
        )
        report("decoding", 0, 1)
        target = unpatchify(tokens, layout.segments[-1].grid, self._patch)
        result = Clip(from_model(self.vae.decode(target)), chosen.fps)
        report("decoding", 1, 1)
        return result

    def _contexts(
        self, request: Request, chosen: Settings, latent_shape: tuple[int, ...], report: Progress,
        on_plan: Callable[[Planned], None] | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The renderer's contexts by name: the text's states, and behind them, with a planner, its own."""
        planned = self._plan(request, chosen, latent_shape, report)
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


def _geometry(folder: Path, vae_file: Path, vae: Any, renderer: dict[str, Any]) -> Geometry:
    """From the parts' configs as they were loaded, and the checkpoint's own, which a raw export need not have."""
    root, mllm = (read_json(path) if path.is_file() else {} for path in (folder / "config.json", folder / MLLM_CONFIG))
    return Geometry.of(root, dict(vae), renderer, mllm, folder=folder, vae_file=vae_file)


def _planner(
    folder: Path, dtype: torch.dtype, device: str, attention: str, geometry: Geometry, share: Share
) -> Callable[[], PlannerStage]:
    """Checks a bundle's planner now; the function that comes back loads it."""
    from transformers import AutoTokenizer

    from .planner.loading import MLLM_FOLDER, open_planner
    from .planner.model import qwen_configs
    from .planner.stage import PlannerStage
    from .planner.vision import VisionRules

    source = open_planner(folder)
    tokenizer = _load(folder / MLLM_FOLDER, AutoTokenizer.from_pretrained)
    file = folder / MLLM_FOLDER / "preprocessor_config.json"
    try:
        rules = VisionRules.of(qwen_configs(source.config.mllm)[1], read_json(file) if file.is_file() else {})
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None

    def load() -> PlannerStage:
        planner = source.load(dtype=dtype, device=device)
        return PlannerStage(planner, tokenizer, rules, backend=attention, geometry=geometry, share=share)

    return load


def _load(folder: Path, load: Callable[..., Any], **options: Any) -> Any:
    """A library's ``from_pretrained`` on a local folder, its many errors turned into one that names the folder."""
    try:
        return load(str(folder), local_files_only=True, **options)
    except Exception as error:
        raise CheckpointError(f"{folder}: cannot be loaded ({type(error).__name__}: {error})") from error
