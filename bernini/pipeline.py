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

from .checkpoint import CheckpointError, load_experts
from .errors import UserError
from .media import Clip, from_model, read_video, to_model
from .media_rules import frame_count
from .presets import FPS, MAX_SIZE, NEGATIVE_PROMPT, NUM_FRAMES, PRESETS, SEED, TASK_PREFIXES
from .renderer.guidance import PLANS
from .renderer.latents import patch_grid, patchify, unpatchify
from .renderer.sampler import Experts, Guidance, sample
from .renderer.schedule import euler_schedule
from .renderer.text import TextEncoder
from .renderer.vae import VideoAutoencoder

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how much of it is done, how much there is)."""


class Bernini:
    """A renderer-only Bernini: two experts (or one), a text encoder and a video autoencoder.

    Example::

        model = Bernini.from_pretrained("checkpoint")
        clip = model("make it snow", videos=["in.mp4"], steps=20)
    """

    def __init__(self, experts: Experts, text: TextEncoder, vae: VideoAutoencoder) -> None:
        self.experts, self.text, self.vae = experts, text, vae

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None) -> Bernini:
        """Loads a checkpoint folder in the released Bernini-R layout.

        Args:
            dtype: of experts and text encoder; by default bfloat16 on an accelerator and float32 on a CPU. The VAE
                always runs in float32.

        Raises:
            CheckpointError: the folder, a file or a tensor is missing or wrong.
        """
        from diffusers import AutoencoderKLWan
        from transformers import AutoTokenizer, UMT5EncoderModel

        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        if dtype is None:
            dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        experts = load_experts(folder, dtype=dtype, device=device)
        vae = _load(folder / "vae", AutoencoderKLWan.from_pretrained, torch_dtype=torch.float32)
        encoder = _load(folder / "text_encoder", UMT5EncoderModel.from_pretrained, dtype=dtype)
        tokenizer = _load(folder / "tokenizer", AutoTokenizer.from_pretrained)
        return cls(experts, TextEncoder(tokenizer, encoder.to(device).eval()), VideoAutoencoder(vae.to(device).eval()))

    def __call__(
        self,
        prompt: str,
        *,
        videos: Sequence[str | Path | Clip],
        negative_prompt: str | None = None,
        steps: int | None = None,
        seed: int = SEED,
        size: tuple[int, int] | None = None,
        num_frames: int = NUM_FRAMES,
        fps: float = FPS,
        progress: Progress | None = None,
    ) -> Clip:
        """Edits the first of ``videos`` by ``prompt``.

        Args:
            videos: files, or clips that are already read (and sized).
            negative_prompt: what to avoid; ``None`` takes the released default.
            steps: sampling steps; ``None`` takes the preset's.
            size: (height, width) in pixels that files are brought to; ``None`` follows each file's own size.
            num_frames: at most this many frames, rounded down to 4n + 1.
            fps: frame rate at which files are read and the result is shown.
            progress: see :data:`Progress`; the stages are reading, encoding, sampling and decoding.

        Raises:
            UserError: an option that cannot work; MediaError: a file that cannot be read.
        """
        preset = PRESETS["v2v"]
        if not videos:
            raise UserError("video-to-video needs a source video")
        report = progress or (lambda stage, done, total: None)
        sources = []
        for number, video in enumerate(videos):
            report("reading", number, len(videos))
            sources.append(to_model(self._clip(video, size, num_frames, fps)))
        latents = []
        for number, pixels in enumerate(sources):
            report("encoding", number, len(sources))
            latents.append(self.vae.encode(pixels))
        target_shape = tuple(latents[0].shape)
        layout = self._layout([tuple(latent.shape) for latent in latents], target_shape)
        texts = {
            "positive": self.text(prompt, prefix=TASK_PREFIXES["v2v"]),
            "negative": self.text(NEGATIVE_PROMPT if negative_prompt is None else negative_prompt),
        }
        # Drawn on the CPU, so that a seed means the same noise on every device.
        noise = torch.randn((1, *target_shape), generator=torch.Generator("cpu").manual_seed(seed))[0]
        tokens = sample(
            self.experts,
            layout,
            videos=len(videos),
            source_tokens=[self._tokens(latent) for latent in latents],
            noise_tokens=self._tokens(noise.to(latents[0].device)),
            texts=texts,
            plan=PLANS[preset.mode],
            guidance=Guidance(preset.scales, preset.switch_factor, preset.eta, preset.thresholds, preset.momentum),
            schedule=euler_schedule(preset.steps if steps is None else steps, preset.flow_shift),
            progress=partial(report, "sampling"),
        )
        report("decoding", 0, 1)
        target = unpatchify(tokens, layout.segments[-1].grid, self._patch)
        result = Clip(from_model(self.vae.decode(target)), fps)
        report("decoding", 1, 1)
        return result

    @property
    def _patch(self) -> tuple[int, int, int]:
        return self.experts.high.config.patch_size

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

    @staticmethod
    def _clip(video: str | Path | Clip, size: tuple[int, int] | None, num_frames: int, fps: float) -> Clip:
        if isinstance(video, Clip):
            return video
        exact = None if size is None else (size[1], size[0])
        return read_video(video, fps=fps, num_frames=frame_count(num_frames), max_size=MAX_SIZE, size=exact)


def _load(folder: Path, load: Callable[..., Any], **options: Any) -> Any:
    """A library's ``from_pretrained`` on a local folder, its many errors turned into one that names the folder."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; the checkpoint is incomplete")
    try:
        return load(str(folder), local_files_only=True, **options)
    except Exception as error:
        raise CheckpointError(f"{folder}: cannot be loaded ({type(error).__name__}: {error})") from error
