"""Our fused ops inside a stock diffusers Wan model: ``patch_diffusers(pipe)``, and back with ``unpatch_diffusers``.

Replaced are, on each instance and never on a class, the forward of every ``WanTransformerBlock`` and the processor of
its two attentions (see :mod:`bernini.renderer.fused_wan`). Everything else stays diffusers' own and stays where it is:
parameters, state dict, adapters on linear layers, attention backend, gradient checkpointing, and hooks on the model,
on blocks, attentions and linear layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import MethodType
from typing import Any, TypeVar

import diffusers
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformer3DModel, WanTransformerBlock
from torch import nn

from bernini.kernels.dispatch import check_rounding

from .fused_wan import FusedAttnProcessor, FusedBlock

Target = TypeVar("Target")

KNOWN = "0.35 to 0.42"
"""diffusers versions whose Wan block and processor do what the fused ones do."""

ROLES = ("transformer", "transformer_2")
PARTS = {"norm1", "attn1", "norm2", "attn2", "norm3", "ffn"}
SIGNATURES = {
    WanTransformerBlock.forward: ("hidden_states", "encoder_hidden_states", "temb", "rotary_emb"),
    WanAttnProcessor.__call__: (
        "attn",
        "hidden_states",
        "encoder_hidden_states",
        "attention_mask",
        "rotary_emb",
    ),
}


def patch_diffusers(pipe_or_model: Target, *, rounding: str = "fp32") -> Target:
    """Puts the fused ops into a diffusers Wan model, or into every Wan transformer of a pipeline, in place.

    Patch before compiling; adapters, hooks and offloading may come before or after. Layer-wise offloading does not go
    with it (``enable_sequential_cpu_offload``, ``leaf_level`` group offloading): the fused ops read the weights of
    norms without calling them. A patched model must be unpatched before it is patched with another rounding.

    Args:
        pipe_or_model: a ``WanTransformer3DModel``, or anything that holds one as ``transformer`` or ``transformer_2``.
        rounding: ``"fp32"`` computes in float32 and rounds once; ``"eager"`` rounds where diffusers' own chain does.

    Returns:
        Its first argument.

    Raises:
        ValueError: not a Wan model, patched or compiled already, or changed in a way that the fused code would
            ignore. Nothing has been changed then.
    """
    check_rounding("patch_diffusers", rounding)
    models = _models("patch_diffusers", pipe_or_model)
    for role, model in models:
        _check_model(role, model)
    for block in (block for _, model in models for block in model.blocks):
        fused = FusedBlock(block, rounding)
        for holder, name in list(_stock_slots(block)):
            setattr(holder, name, fused.forward)
        for attn in (block.attn1, block.attn2):
            attn.processor = FusedAttnProcessor(attn.processor, rounding)
    return pipe_or_model


def unpatch_diffusers(pipe_or_model: Target) -> Target:
    """Undoes :func:`patch_diffusers`. The attention backend stays what it is now; nothing of ours is left behind.

    Returns:
        Its argument.

    Raises:
        ValueError: nothing is patched, or something unknown was wrapped around a block's forward after patching.
            Nothing has been changed then.
    """
    models = [(role, model) for role, model in _models("unpatch_diffusers", pipe_or_model) if _is_patched(model)]
    if not models:
        raise ValueError(f"unpatch_diffusers: this {type(pipe_or_model).__name__} is not patched")
    for role, model in models:
        for number, block in enumerate(model.blocks):
            if not list(_fused_slots(block)):
                raise ValueError(
                    f"unpatch_diffusers: {role}.blocks.{number} now runs {_describe(block.forward)}, put there after "
                    "patching; take that away first"
                )
    for block in (block for _, model in models for block in model.blocks):
        for holder, name in list(_fused_slots(block)):
            if holder is block and name == "forward":
                del block.forward  # the class's own shows again
            else:
                setattr(holder, name, _stock_forward(block))
        for attn in (block.attn1, block.attn2):
            if isinstance(attn.processor, FusedAttnProcessor):
                attn.processor = attn.processor.stock
    return pipe_or_model


# --- what may be patched ----------------------------------------------------------------------------------------------


def _models(caller: str, pipe_or_model: Any) -> list[tuple[str, WanTransformer3DModel]]:
    """(role, model) of every Wan transformer, each model once."""
    if isinstance(pipe_or_model, nn.Module):
        held = {"model": pipe_or_model}
    else:
        held = {role: model for role in ROLES if (model := getattr(pipe_or_model, role, None)) is not None}
    if not held:
        raise ValueError(
            f"{caller}: expected a diffusers WanTransformer3DModel or a pipeline with one, got a "
            f"{type(pipe_or_model).__name__}"
        )
    for role, model in held.items():
        if not isinstance(model, WanTransformer3DModel):
            advice = "; patch first, then compile" if hasattr(model, "_orig_mod") else ""
            raise ValueError(
                f"{caller}: the {role} must be a diffusers WanTransformer3DModel, got a {type(model).__name__}{advice}"
            )
    return list({id(model): (role, model) for role, model in held.items()}.values())


def _check_model(role: str, model: WanTransformer3DModel) -> None:
    """Refuses a model in which the fused code would leave out something that its own code does."""
    if _is_patched(model):
        raise ValueError(f"patch_diffusers: the {role} is patched already; unpatch_diffusers it first")
    if any(getattr(module, "_compiled_call_impl", None) for module in (model, *model.blocks)):
        raise ValueError(f"patch_diffusers: the {role} is compiled already; patch first, then compile")
    for function, known in SIGNATURES.items():
        takes = tuple(inspect.signature(function).parameters)[1:]
        if takes != known:
            raise ValueError(
                f"patch_diffusers: {function.__qualname__} of diffusers {diffusers.__version__} takes "
                f"{', '.join(takes)}; in the versions it knows, {KNOWN}, it takes {', '.join(known)}"
            )
    for number, block in enumerate(model.blocks):
        problem = next(_problems(block), None)
        if problem is not None:
            raise ValueError(f"patch_diffusers: {role}.blocks.{number}{problem}")


def _problems(block: WanTransformerBlock) -> Iterator[str]:
    parts = {name for name, _ in block.named_children()}
    if parts != PARTS:
        yield f" has the parts {', '.join(sorted(parts))}, not those of diffusers {KNOWN}: {', '.join(sorted(PARTS))}"
    if not list(_stock_slots(block)):
        yield f" does not run WanTransformerBlock's own forward but {_describe(block.forward)}"
    norms: dict[str, tuple[Any, tuple[type, ...]]] = {
        "norm1": (block.norm1, (FP32LayerNorm,)),
        "norm2": (block.norm2, (FP32LayerNorm, nn.Identity)),
        "norm3": (block.norm3, (FP32LayerNorm,)),
    }
    for place, attn in (("attn1", block.attn1), ("attn2", block.attn2)):
        if type(attn.processor) is not WanAttnProcessor:
            yield f".{place} has the processor {type(attn.processor).__name__}; only WanAttnProcessor can be replaced"
        names = [name for name in ("norm_q", "norm_k", "norm_added_k") if hasattr(attn, name)]
        norms |= {f"{place}.{name}": (getattr(attn, name), (nn.RMSNorm,)) for name in names}
    for place, (norm, types) in norms.items():
        if type(norm) not in types or (isinstance(norm, nn.RMSNorm) and norm.weight is None):
            yield f".{place} must be a {types[0].__name__} as diffusers makes it, got {norm}"
        if _is_hooked(norm):
            yield (
                f".{place} has a hook that would never run, since the fused ops read the weight of a norm and do not "
                "call it; if it belongs to layer-wise offloading, offload blocks or whole models instead"
            )


def _is_hooked(norm: nn.Module) -> bool:
    """Whether calling the norm does more than its forward; accelerate's hooks matter if they fetch weights."""
    own = (norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks, norm._backward_pre_hooks)
    diffusers_hooks = getattr(getattr(norm, "_diffusers_hook", None), "hooks", None)
    return any(own) or bool(diffusers_hooks) or getattr(getattr(norm, "_hf_hook", None), "offload", False)


# --- where a block keeps its forward ----------------------------------------------------------------------------------


def _slots(block: WanTransformerBlock) -> Iterator[tuple[Any, str]]:
    """Every (holder, attribute) that may hold a block's innermost forward.

    That is the block, unless hooks of accelerate or diffusers have put their own function there and kept what was.
    """
    yield block, "forward"
    yield block, "_old_forward"
    for reference in getattr(getattr(block, "_diffusers_hook", None), "_fn_refs", ()):
        yield reference, "forward"
        yield reference, "original_forward"


def _stock_forward(block: WanTransformerBlock) -> MethodType:
    return MethodType(WanTransformerBlock.forward, block)


def _stock_slots(block: WanTransformerBlock) -> Iterator[tuple[Any, str]]:
    stock = _stock_forward(block)
    return (slot for slot in _slots(block) if getattr(*slot, None) == stock)


def _fused_slots(block: WanTransformerBlock) -> Iterator[tuple[Any, str]]:
    return (slot for slot in _slots(block) if isinstance(getattr(getattr(*slot, None), "__self__", None), FusedBlock))


def _is_patched(model: WanTransformer3DModel) -> bool:
    return any(
        isinstance(attn.processor, FusedAttnProcessor) or any(_fused_slots(block))
        for block in model.blocks
        for attn in (block.attn1, block.attn2)
    )


def _describe(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__
