"""A plan on disk, to be rendered again: the target's ViT embeddings and what they belong to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bernini.errors import UserError

from .model import Planner
from .prompt import Visual

FORMAT = "bernini plan 1"


@dataclass(frozen=True, eq=False)
class Plan:
    """Target ViT embeddings ``[N, V]``, the visual they are of, and which planner made them."""

    embeds: Tensor
    visual: Visual
    model: str

    def check(self, target: Visual, planner: Planner) -> None:
        """Raises UserError where the plan is not one for this model and this result, or holds what is no number."""
        _check_finite("the plan", self.embeds)
        if self.model != fingerprint(planner):
            raise UserError("the plan was made by another model; plan again, or render with that model")
        if self.visual != target:
            here, there = ("x".join(map(str, visual.grid)) for visual in (target, self.visual))
            raise UserError(
                f"the plan is of {self.visual.kind} tokens {there} (time x height x width), and this result has "
                f"{target.kind} tokens {here}; ask for the size and the number of frames that it was made for"
            )
        if tuple(self.embeds.shape) != (target.tokens, planner.mask_embedding.numel()):
            raise UserError(
                f"the plan has embeddings {list(self.embeds.shape)}, and {target.tokens} tokens of this model take "
                f"{[target.tokens, planner.mask_embedding.numel()]}"
            )


def _check_finite(what: str, embeds: Tensor) -> None:
    if not bool(torch.isfinite(embeds).all()):
        raise UserError(f"{what}: {int((~torch.isfinite(embeds)).sum())} of its values are not finite numbers")


def fingerprint(planner: Planner) -> str:
    """Tells planners apart, by the mask token and a layer of the connector as they are stored.

    The loader has taken it from the file, so that it does not depend on the dtype that the weights are used in.
    """
    return planner.identity or identity((planner.mask_tokens, *planner.connector.pred_vit[4].parameters()))


def identity(parts: Iterable[Tensor]) -> str:
    """Of the mask tokens and the connector's last weight and bias, in this order."""
    mask, *others = (part.detach().to("cpu", torch.bfloat16) for part in parts)
    values = b"".join(part.contiguous().view(torch.int16).numpy().tobytes() for part in (mask[0, 0], *others))
    return hashlib.sha256(values).hexdigest()[:16]


def save_plan(path: str | Path, plan: Plan) -> None:
    """Writes the file, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(path)
    about = {"format": FORMAT, "kind": plan.visual.kind, "grid": list(plan.visual.grid), "model": plan.model}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file({"embeds": plan.embeds.float().cpu().contiguous()}, part, metadata={"bernini": json.dumps(about)})
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: the plan cannot be written ({error})") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def load_plan(path: str | Path) -> Plan:
    """Reads a plan.

    Raises:
        UserError: no such file, not a plan, or values that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {})["bernini"])
            embeds = file.get_tensor("embeds")
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']!r}")
        visual = Visual(about["kind"], tuple(about["grid"]))
        if visual.kind not in ("image", "video") or len(visual.grid) != 3:
            raise ValueError(f"{visual.kind!r} of {visual.grid}")
        if embeds.dim() != 2 or len(embeds) != visual.tokens:
            raise ValueError(f"{list(embeds.shape)} embeddings for the grid {visual.grid}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a plan of Bernini ({type(error).__name__}: {error})") from None
    _check_finite(str(path), embeds)
    return Plan(embeds, visual, str(about["model"]))
