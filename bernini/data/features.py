"""What the models see of pixels: ViT embeddings of the planner's vision tower, and the VAE's posterior.

Features are worth nothing with another model than the one that made them, so a model's fingerprint goes with them.
Shapes: F frames, V width of a ViT embedding, C latent channels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bernini.errors import UserError
from bernini.media import to_model
from bernini.media_rules import frame_indices

from .blobs import finite
from .example import Example, Features, Skip
from .skips import Bad

if TYPE_CHECKING:
    from bernini.planner.vision import VisionRules
    from bernini.renderer.vae import VideoAutoencoder

PARTS = ("vae", "vit")

FramesForVit = Callable[[int, float], Sequence[int]]
"""(frames of a video, their rate) -> those that the vision tower sees."""

See = Callable[[Tensor, Sequence[tuple[int, int, int]]], Tensor]
"""Patches of pictures in a row and their grids -> embeddings in a row: :meth:`bernini.planner.model.Planner.see`."""


def released_frames(frames: int, fps: float) -> list[int]:
    """An even number of frames at ``fps // 8`` a second, as the released planner sees videos."""
    return frame_indices(frames, fps, fps, frames, "full_vit")


@dataclass(frozen=True)
class FeatureEncoder:
    """Turns pixels into features; what there is no model for is left out.

    Args:
        see: the vision tower, with the ``rules`` of its processor.
        frames_for_vit: which frames of a video it sees.
        stride: pixels that divide both sides of all pictures; 1 asks for no more than the models do.
        device: where pixels are put.
        batch: pictures of one shape that are encoded together.
    """

    vae: VideoAutoencoder | None = None
    see: See | None = None
    rules: VisionRules | None = None
    frames_for_vit: FramesForVit = released_frames
    stride: int = 1
    device: str | torch.device = "cpu"
    batch: int = 16

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(part for part, model in (("vae", self.vae), ("vit", self.see)) if model is not None)

    @torch.no_grad()
    def __call__(
        self, examples: Sequence[Example | Skip], fps: float, *, keep_pixels: bool = False
    ) -> list[Example | Skip]:
        """The same examples in the same order, with features for every picture that has pixels.

        A posterior is float32, an embedding of the model's dtype, both on the CPU. Features that are there already
        stay. An example one of whose pictures no model can take becomes a skip.

        Args:
            fps: of the videos.
        """
        bad: dict[int, Bad] = {}
        pictures: list[tuple[int, Features]] = []
        for number, example in enumerate(examples):
            if isinstance(example, Skip):
                continue
            try:
                for visual in example.visuals:
                    self._check(visual)
                pictures += [(number, visual) for visual in example.visuals]
            except Bad as error:
                bad[number] = error
        pictures = [(number, visual) for number, visual in pictures if number not in bad]
        made = [visual for _, visual in pictures]
        for encode, model in ((self._posteriors, self.vae), (self._embeddings, self.see)):
            if model is not None:
                made = encode(made, fps)
        for (number, _), visual in zip(pictures, made, strict=True):
            try:
                _check_finite(visual)
            except Bad as error:
                bad.setdefault(number, error)
        pieces = iter(made)
        done: list[Example | Skip] = []
        kept = {number for number, _ in pictures}
        for number, example in enumerate(examples):
            if isinstance(example, Skip):
                done.append(example)
                continue
            mine = [next(pieces) for _ in example.visuals] if number in kept else list(example.visuals)
            if number in bad:
                done.append(bad[number].skip(example.key))
                continue
            mine = mine if keep_pixels else [replace(visual, pixels=None) for visual in mine]
            target = mine.pop() if example.target is not None else None
            done.append(replace(example, sources=tuple(mine), target=target))
        return done

    def _check(self, visual: Features) -> None:
        """That pixels can be encoded. Raises Bad where not."""
        pixels = visual.pixels
        missing = [part for part, value in (("vae", visual.vae_mean), ("vit", visual.vit)) if value is None]
        if not set(missing) & set(self.parts):
            return
        if pixels is None:
            raise Bad("wrong schema", f"a {visual.kind} without pixels, of which features are wanted")
        if pixels.is_floating_point():
            finite(f"pixels of a {visual.kind}", pixels)
        if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[-1] != 3:
            raise Bad(
                "bad pixels", f"a {visual.kind} of {pixels.dtype} {list(pixels.shape)}, expected uint8 [F, H, W, 3]"
            )
        if not len(pixels):
            raise Bad("empty clip", f"a {visual.kind} of no frames")
        if visual.kind == "image" and len(pixels) != 1:
            raise Bad("bad pixels", f"an image of {len(pixels)} frames")
        height, width = pixels.shape[1:3]
        stride, step = self.stride, 1
        if self.vae is not None:
            stride, step = math.lcm(stride, self.vae.spatial_stride), self.vae.temporal_stride
        if not height or not width or height % stride or width % stride or (len(pixels) - 1) % step:
            raise Bad(
                "bad pixels",
                f"{len(pixels)} frames of {width}x{height} pixels; the model takes sides that {stride} divides, and "
                f"one frame more than a multiple of {step}",
            )
        if self.rules is not None:
            try:
                self.rules.size(height, width)
            except UserError as error:
                raise Bad("bad pixels", str(error)) from None

    def _posteriors(self, visuals: Sequence[Features], fps: float) -> list[Features]:
        assert self.vae is not None
        model, made = self.vae.model, list(visuals)
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, visual in enumerate(visuals):
            if visual.vae_mean is None and visual.pixels is not None:
                groups.setdefault(tuple(visual.pixels.shape), []).append(number)
        for numbers in groups.values():
            for start in range(0, len(numbers), self.batch):
                chunk = numbers[start : start + self.batch]
                pixels = torch.stack([to_model(visuals[number].pixels) for number in chunk])  # type: ignore[arg-type]
                posterior = model.encode(pixels.to(self.device, model.dtype)).latent_dist
                means, logvars = posterior.mean.float().cpu(), posterior.logvar.float().cpu()
                for number, mean, logvar in zip(chunk, means, logvars, strict=True):
                    made[number] = replace(made[number], vae_mean=mean.clone(), vae_logvar=logvar.clone())
        return made

    def _embeddings(self, visuals: Sequence[Features], fps: float) -> list[Features]:
        assert self.see is not None and self.rules is not None
        made, merge = list(visuals), self.rules.merge
        wanted = [n for n, visual in enumerate(visuals) if visual.vit is None and visual.pixels is not None]
        for start in range(0, len(wanted), self.batch):
            chunk = wanted[start : start + self.batch]
            patches, grids = zip(*(self.rules.patches(self._seen(visuals[n], fps)) for n in chunk), strict=True)
            embeds = self.see(torch.cat(patches).to(self.device), grids).cpu()
            sizes = [t * (h // merge) * (w // merge) for t, h, w in grids]
            for number, (t, h, w), piece in zip(chunk, grids, embeds.split(sizes), strict=True):
                made[number] = replace(made[number], vit=piece.clone(), vit_grid=(t, h // merge, w // merge))
        return made

    def _seen(self, visual: Features, fps: float) -> Tensor:
        assert visual.pixels is not None
        if visual.kind == "image":
            return visual.pixels
        picked = torch.tensor(self.frames_for_vit(len(visual.pixels), fps))
        return visual.pixels[picked.clamp_max(len(visual.pixels) - 1)]


def _check_finite(visual: Features) -> None:
    for name, values in (("VAE mean", visual.vae_mean), ("VAE log variance", visual.vae_logvar), ("ViT", visual.vit)):
        if values is not None:
            finite(f"{visual.kind}, {name}", values)


# --- whose they are ---------------------------------------------------------------------------------------------------


def vae_fingerprint(vae: VideoAutoencoder) -> str:
    """Of the half of the autoencoder that makes latents; the decoder may change."""
    state = vae.model.state_dict()
    return _digest({name: value for name, value in state.items() if name.startswith(("encoder.", "quant_conv."))})


def vit_fingerprint(visual: nn.Module, rules: VisionRules) -> str:
    """Of a vision tower and the rules by which it is shown pictures."""
    return _digest(dict(visual.named_parameters()), repr(rules))


def _digest(tensors: Mapping[str, Tensor], more: str = "") -> str:
    """Of names and values as bfloat16: the same whatever type the weights are held in."""
    digest = hashlib.sha256(more.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {list(tensors[name].shape)}".encode())
        values = tensors[name].detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_features(
    data: Any, *, vae_fingerprint: str | None = None, vit_fingerprint: str | None = None, trust_unmarked: bool = False
) -> None:
    """That a data set's features are those of the models that will read them. Nothing is read but the files' headers.

    Args:
        data: a data set; one without features, such as of raw files, has nothing to check.
        vae_fingerprint, vit_fingerprint: of the models; ``None`` for one that is not used.
        trust_unmarked: whether features that do not say whose they are, such as the release's, are taken.

    Raises:
        UserError: features of another model, unmarked ones, or neither features nor files to make them from.
    """
    parts: frozenset[str] = getattr(data, "parts", frozenset())
    for part, wanted in (("vae", vae_fingerprint), ("vit", vit_fingerprint)):
        if wanted is None:
            continue
        if part not in parts:
            if not getattr(data, "has_pixels", True):
                raise UserError(
                    f"{_name(data)}: holds no {part.upper()} features, and no pictures to make them from; prepare it "
                    f"with --parts {part} or both"
                )
            continue
        for file, about in zip(data.files, data.about, strict=True):
            found = (about or {}).get(part)
            if found is None and not trust_unmarked:
                raise UserError(
                    f"{file}: does not say which model its {part.upper()} features are of; the one in use has the "
                    f"fingerprint {wanted}. Prepare the data with it, or say that they are to be trusted"
                )
            if found is not None and found != wanted:
                raise UserError(
                    f"{file}: its {part.upper()} features are of another model, with the fingerprint {found}; the one "
                    f"in use has {wanted}. Prepare the data again with 'bernini data prepare'"
                )


def _name(data: Any) -> str:
    files = getattr(data, "files", None)
    return str(files[0].parent) if files else type(data).__name__
