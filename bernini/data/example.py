"""What training reads: one task with its solution, as text and as what the models see of its pictures.

Shapes: F frames, V width of a ViT embedding, C latent channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Features:
    """An image or a video. What a stage does not need may be ``None``.

    Args:
        kind: an image has one frame.
        pixels: uint8 ``[F, H, W, 3]``.
        vit: ViT embeddings, ``[t * h * w, V]`` of ``vit_grid`` = (t, h, w) merged patches.
        vae_mean, vae_logvar: float32 ``[C, T, H, W]``, the posterior of the autoencoder, not normalised.
    """

    kind: Literal["image", "video"]
    pixels: Tensor | None = None
    vit: Tensor | None = None
    vit_grid: tuple[int, int, int] | None = None
    vae_mean: Tensor | None = None
    vae_logvar: Tensor | None = None


@dataclass(frozen=True)
class Example:
    """One task.

    Args:
        key: tells it from every other example of its data set; its random draws follow from it.
        task: a name of :data:`bernini.presets.TASKS`, ``"i2v"``, or ``"understanding"``.
        prompt: what is asked for.
        sources: videos, then images.
        target: ``None`` in understanding.
        answer: in understanding, what is to be said.
    """

    key: str
    task: str
    prompt: str
    sources: tuple[Features, ...] = ()
    target: Features | None = None
    answer: str | None = None

    @property
    def visuals(self) -> Iterable[Features]:
        """Sources, then the target."""
        return (*self.sources, *(() if self.target is None else (self.target,)))


@dataclass(frozen=True)
class Skip:
    """Stands in for an example that cannot be used.

    Args:
        reason: one of a few words that are counted, such as ``"unreadable video"``.
        detail: which one it is and what was wrong with it.
    """

    key: str
    reason: str
    detail: str
