"""What is fixed by a checkpoint and not by the method: strides, rates, lengths, and the request it is made for.

Where it comes from (every key but those of the autoencoder and of the transformers may be missing, and then has its
released value):

======================  ==============================================================================================
field                   file and key
======================  ==============================================================================================
``pixel_stride``        ``vae/config.json`` (``dim_mult``, ``patch_size``) times the transformer's ``patch_size``
``frame_stride``        ``vae/config.json`` (``temperal_downsample``)
``text_tokens``         ``config.json``: ``t5_max_sequence_length``, or ``max_sequence_length``
``vit_rate_divisor``    ``config.json``: ``vit_fps_divisor``
``vit_frame_stride``    ``mllm/config.json``: ``vision_config.temporal_patch_size``
the others              ``config.json``: ``defaults``, an object with the fields' names as its keys
======================  ==============================================================================================

Released values: facts of the released model, sections A.1, C.1, C.4, D.3 and E.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import cases
from .layouts import BUNDLE_CONFIGS, component_folder, config_folder, read_layout
from .media_rules import FRAME_STRIDE, STRIDE, VIT_FRAME_STRIDE, VIT_RATE_DIVISOR, frame_count, frame_indices, vit_rate
from .presets import FLOW_SHIFT, FPS, MAX_SIZE, NEGATIVE_PROMPT, NUM_FRAMES, PRESETS, VIT_IMG_CFG, VIT_TXT_CFG
from .weights import CheckpointError, read_json

if TYPE_CHECKING:
    from torch import Tensor

TEXT_TOKENS = 512
MLLM_CONFIG = "mllm/config.json"


@dataclass(frozen=True)
class Geometry:
    """The defaults are the released checkpoints'.

    Args:
        pixel_stride: pixels of a token's side; heights and widths are multiples of it.
        frame_stride: video frames per latent frame; videos have a multiple of it, and one frame.
        vit_rate_divisor: the planner's vision tower sees ``fps // vit_rate_divisor`` frames per second.
        vit_frame_stride: so many of these frames make one of its patches.
        text_tokens: texts are cut, and the renderer's contexts are padded to at least so many tokens.
        fps, num_frames, max_size: what a request has that does not say.
        size: the same, (height, width); ``None`` leaves it to the preset. It goes before the preset's.
        preset: the same; ``None`` is ``v2`` with a planner and ``bernini-r`` without.
        negative_prompt, flow_shift, vit_txt_cfg, vit_img_cfg: the same.
    """

    pixel_stride: int = STRIDE
    frame_stride: int = FRAME_STRIDE
    vit_rate_divisor: int = VIT_RATE_DIVISOR
    vit_frame_stride: int = VIT_FRAME_STRIDE
    text_tokens: int = TEXT_TOKENS
    fps: float = FPS
    num_frames: int = NUM_FRAMES
    size: tuple[int, int] | None = None
    max_size: int = MAX_SIZE
    preset: str | None = None
    negative_prompt: str = NEGATIVE_PROMPT
    flow_shift: float = FLOW_SHIFT
    vit_txt_cfg: float = VIT_TXT_CFG
    vit_img_cfg: float = VIT_IMG_CFG

    @classmethod
    def of(
        cls,
        root: Mapping[str, Any],
        vae: Mapping[str, Any],
        renderer: Mapping[str, Any],
        mllm: Mapping[str, Any] | None = None,
        *,
        folder: str | Path = "",
        vae_file: Path | None = None,
    ) -> Geometry:
        """From the contents of a checkpoint's configs; an empty one stands for released values.

        Args:
            root, vae, renderer, mllm: ``config.json`` of the checkpoint, of its autoencoder, of a transformer, and of
                the planner's language model.
            folder: of the checkpoint, for messages.
            vae_file: the autoencoder's config, for messages; ``vae/config.json`` in that folder by default.

        Raises:
            CheckpointError: a value that cannot be; the message names the file and the key.
        """
        folder = Path(folder)
        space, time = _checked(vae_file or folder / "vae" / "config.json", lambda: vae_strides(vae))
        values = _checked(folder / "config.json", lambda: _root(root))
        values["vit_frame_stride"] = _checked(folder / MLLM_CONFIG, lambda: _vit_frame_stride(mllm or {}))
        patch = renderer.get("patch_size") or (1, 2, 2)
        found = cls(pixel_stride=space * math.lcm(*patch[1:]), frame_stride=time, **values)
        if found.size is not None and any(side % found.pixel_stride for side in found.size):
            raise CheckpointError(
                f"{folder / 'config.json'}: defaults: size: both sides must be multiples of {found.pixel_stride}, "
                f"got {list(found.size)}"
            )
        return found

    @classmethod
    def read(cls, folder: str | Path, components: str | Path | None = None) -> Geometry:
        """From the configs in a checkpoint's folder; one that is missing or broken counts as released.

        What else is wrong with a checkpoint is said when it is opened.

        Args:
            components: folder of the autoencoder, if elsewhere.

        Raises:
            CheckpointError: a value that cannot be; the message names the file and the key.
        """
        folder, parts = Path(folder), Path(components or folder)
        try:
            layout = read_layout(folder)
            place = layout.experts["high"]
            bundle = layout.kind == "bundle"
            expert = folder / BUNDLE_CONFIGS[place.which] if bundle else place.folder / "config.json"
        except CheckpointError:
            return cls()
        try:
            vae = component_folder(parts, "vae") / "config.json"
        except CheckpointError:
            vae = parts / "vae" / "config.json"
        renderer = _lenient(expert)
        patch = renderer.get("patch_size")
        if not (isinstance(patch, list) and len(patch) == 3 and all(type(side) is int and side > 0 for side in patch)):
            renderer = {}
        mllm = _lenient(folder / MLLM_CONFIG) if bundle else {}
        root = _lenient(folder / "config.json")
        return cls.of(root, _lenient(vae), renderer, mllm, folder=folder, vae_file=vae)

    def frame_count(self, frames: int) -> int:
        """The frame count that is really used when ``frames`` are asked for."""
        return frame_count(frames, self.frame_stride)

    def frame_indices(
        self, total: int, video_fps: float, fps: float, num_frames: int, rule: str = "renderer"
    ) -> list[int]:
        """:func:`bernini.media_rules.frame_indices` with this checkpoint's strides."""
        return frame_indices(
            total, video_fps, fps, num_frames, rule, stride=self.frame_stride,
            vit_divisor=self.vit_rate_divisor, vit_stride=self.vit_frame_stride,
        )  # fmt: skip

    def vit_rate(self, fps: float) -> float:
        """Frames per second that the planner's vision tower sees of a video at ``fps``."""
        return vit_rate(fps, self.vit_rate_divisor)

    def seen(self, frames_FHW3: Tensor, fps: float) -> Tensor:
        """Those of a video's frames that the planner's vision tower sees; past the end, the last one."""
        total = len(frames_FHW3)
        picked = self.frame_indices(total, fps, fps, total, "full_vit")
        return frames_FHW3[[min(index, total - 1) for index in picked]]

    def default_preset(self, planner: bool) -> str:
        """Name of the preset of a request that does not say."""
        return self.preset or ("v2" if planner else "bernini-r")

    def describe(self) -> str:
        """One line for people."""
        size = "" if self.size is None else f" of {self.size[0]}x{self.size[1]}"
        return (
            f"sizes are multiples of {self.pixel_stride}, frames {self.frame_stride}n + 1, texts up to "
            f"{self.text_tokens} tokens; default: {self.num_frames} frames{size} at {self.fps:g} fps"
            + (f", preset {self.preset}" if self.preset else "")
        )


RELEASED = Geometry()


def peek(model: str | Path, components: str | Path | None = None) -> tuple[bool, Geometry]:
    """Whether a checkpoint has a planner, and its geometry: from its small configs alone, which are fetched if needed.

    Raises:
        CheckpointError: see :meth:`Geometry.read`.
    """
    folder = config_folder(model)
    if folder is None:
        return False, RELEASED
    planner = _lenient(folder / "config.json").get("model_type") == "bernini"
    return planner, Geometry.read(folder, config_folder(components) if components else None)


def vae_strides(vae: Mapping[str, Any]) -> tuple[int, int]:
    """(pixels per latent, frames per latent) of an ``AutoencoderKLWan``, by the levels of its config.

    Raises:
        ValueError: levels that no autoencoder has, or ``scale_factor_spatial`` or ``scale_factor_temporal`` that state
            something else; diffusers writes 8 and 4 where nobody said otherwise.
    """
    levels, halved = vae.get("dim_mult", (1, 2, 4, 4)), vae.get("temperal_downsample", (False, True, True))
    if not isinstance(levels, list | tuple) or not levels:
        raise ValueError(f"dim_mult must be a list of numbers, is {levels!r}")
    if not isinstance(halved, list | tuple) or len(halved) < len(levels) - 1:
        raise ValueError(f"temperal_downsample must have {len(levels) - 1} entries, is {halved!r}")
    patch = _key("patch_size", cases.count, vae.get("patch_size") or 1)
    space, time = patch * 2 ** (len(levels) - 1), 2 ** sum(map(bool, halved[: len(levels) - 1]))
    for key, found in (("scale_factor_spatial", space), ("scale_factor_temporal", time)):
        if vae.get(key) not in (None, found):
            raise ValueError(f"{key} is {vae[key]!r}, but its {len(levels)} levels make {found}; correct it")
    return space, time


# --- the keys of config.json ------------------------------------------------------------------------------------------


def _size(value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"must be [height, width], is {value!r}")
    return cases.count(value[0]), cases.count(value[1])


def _preset(value: Any) -> str:
    if not isinstance(value, str) or value not in PRESETS:
        raise ValueError(f"unknown preset {value!r}; there are {', '.join(PRESETS)}")
    return value


_DEFAULTS: Mapping[str, Callable[[Any], Any]] = {
    "fps": cases.rate,
    "num_frames": cases.count,
    "size": _size,
    "max_size": cases.count,
    "preset": _preset,
    "negative_prompt": cases.text,
    "flow_shift": cases.positive,
    "vit_txt_cfg": cases.number,
    "vit_img_cfg": cases.number,
}
"""Keys of ``defaults`` and the checks of their values."""


def _root(root: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that the checkpoint's ``config.json`` states."""
    found: dict[str, Any] = {}
    for key, name in (
        ("max_sequence_length", "text_tokens"),
        ("t5_max_sequence_length", "text_tokens"),
        ("vit_fps_divisor", "vit_rate_divisor"),
    ):
        if root.get(key) is not None:
            found[name] = _key(key, cases.count, root[key])
    defaults = root.get("defaults")
    if defaults is not None and not isinstance(defaults, dict):
        raise ValueError(f"defaults must be an object, is {defaults!r}")
    for key, value in (defaults or {}).items():
        if key not in _DEFAULTS:
            raise ValueError(f"defaults: unknown key {key!r}; there are {', '.join(_DEFAULTS)}")
        if value is not None:
            found[key] = _key(f"defaults: {key}", _DEFAULTS[key], value)
    return found


def _vit_frame_stride(mllm: Mapping[str, Any]) -> int:
    vision = mllm.get("vision_config")
    value = vision.get("temporal_patch_size") if isinstance(vision, dict) else None
    return _key("vision_config: temporal_patch_size", cases.count, VIT_FRAME_STRIDE if value is None else value)


def _key(key: str, check: Callable[[Any], Any], value: Any) -> Any:
    try:
        return check(value)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _checked(file: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _lenient(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except CheckpointError:
        return {}
