"""A patched diffusers model against the same model unpatched: outputs, gradients, everything users hang onto it."""

from __future__ import annotations

import copy
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformerBlock
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bernini import patch_diffusers, unpatch_diffusers
from bernini.renderer import fused_wan
from bernini.renderer.config import RendererConfig
from bernini.renderer.model import KEEP_IN_FP32, Renderer

SIZES = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "ffn_dim": 96}
SIZES |= {"text_dim": 48, "freq_dim": 32, "rope_max_seq_len": 16}
CASES: dict[str, dict[str, Any]] = {
    "one sample": {"batch": 1},
    "batch": {},
    "timestep per token": {"per_token": True},
    "one sample, timestep per token": {"batch": 1, "per_token": True},
    "no cross-attention norm": {"config": {"cross_attn_norm": False}},
    "image to video": {"config": {"image_dim": 24, "added_kv_proj_dim": 64}, "image": True},
    "fused projections": {"fuse": True},
    "image to video, fused projections": {
        "config": {"image_dim": 24, "added_kv_proj_dim": 64},
        "image": True,
        "fuse": True,
    },
}


def build(dtype: torch.dtype = torch.float32, config: dict[str, Any] | None = None, fuse: bool = False) -> Any:
    """A stock model, all its weights sizeable (fresh norms would hide mistakes), in the dtypes that diffusers loads."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(**{**SIZES, **(config or {})}).eval()
    for name, parameter in model.named_parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
        if not any(part in name.split(".") for part in KEEP_IN_FP32):
            parameter.data = parameter.data.to(dtype)
    if fuse:
        model.fuse_qkv_projections()
    return model


def inputs(
    dtype: torch.dtype = torch.float32, batch: int = 2, per_token: bool = False, image: bool = False, seed: int = 1
) -> dict[str, Any]:
    """45 tokens a sample; with images the text is 512 tokens, as diffusers takes for granted."""
    torch.manual_seed(seed)
    given: dict[str, Any] = {
        "hidden_states": torch.randn(batch, 16, 3, 6, 10).to(dtype),
        "timestep": torch.randint(0, 1000, (batch, 45) if per_token else (batch,)),
        "encoder_hidden_states": torch.randn(batch, 512 if image else 20, 48).to(dtype),
    }
    return given | ({"encoder_hidden_states_image": torch.randn(batch, 7, 24).to(dtype)} if image else {})


def setup(case: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    options = dict(CASES[case])
    model = build(dtype, options.pop("config", None), options.pop("fuse", False))
    return model, inputs(dtype, **options)


def run(model: Any, given: dict[str, Any]) -> Tensor:
    return model(**given, return_dict=False)[0]


def distance(x: Tensor, want: Tensor) -> float:
    return ((x.double() - want.double()).norm() / want.double().norm()).item()


def wide(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if x.is_floating_point() else x for name, x in given.items()}


# --- the same numbers -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_same_output_in_float32(case: str) -> None:
    model, given = setup(case, torch.float32)
    want = run(model, given)
    assert distance(run(patch_diffusers(model), given), want) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_eager_rounding_is_that_of_the_stock_model(case: str, dtype: torch.dtype) -> None:
    """Bit for bit where torch sums rows in one order on both sides; one rounding left out is 5e-3 in bfloat16."""
    model, given = setup(case, dtype)
    want = run(model, given)
    got = run(patch_diffusers(model, rounding="eager"), given)
    assert got.dtype == dtype
    assert distance(got, want) <= (1e-6 if dtype == torch.float32 else 1e-3)


@torch.no_grad()
def test_bfloat16_is_as_close_to_float64_as_the_stock_model() -> None:
    stock = build(torch.bfloat16)
    ours = patch_diffusers(copy.deepcopy(stock))
    exact = patch_diffusers(copy.deepcopy(stock).double())
    errors = torch.zeros(2, dtype=torch.float64)
    for seed in range(6):  # one forward alone is a matter of luck
        given = inputs(torch.bfloat16, batch=1, seed=seed)
        want = run(exact, wide(given))
        errors += torch.tensor([distance(run(model, given), want) for model in (ours, stock)])
    assert errors[0] <= 1.05 * errors[1]


@torch.no_grad()
def test_float64_agrees_with_the_renderer() -> None:
    """What the bfloat16 test measures against: stock diffusers itself norms in float32, whatever the model."""
    from bernini.kernels import Segment, SegmentLayout
    from bernini.renderer.latents import patchify, unpatchify

    config = RendererConfig(**SIZES)
    model = build().double()
    renderer = Renderer(config).double()
    renderer.load_state_dict(model.state_dict())
    given = wide(inputs(batch=1))
    layout = SegmentLayout([Segment("target", (3, 3, 5))])
    context = renderer.text_context(given["encoder_hidden_states"][0])
    tokens = patchify(given["hidden_states"][0], config.patch_size)
    want = unpatchify(renderer(tokens, layout, given["timestep"], context), (3, 3, 5), config.patch_size)
    assert distance(run(patch_diffusers(model), given)[0], want) <= 1e-6  # diffusers norms the output in float32


@torch.no_grad()
def test_another_rope_is_honoured() -> None:
    """One that somebody rescaled: the rotation comes from what the model hands its blocks."""
    model, given = build(), inputs()
    before = run(model, given)
    half_steps = torch.arange(16) // 2
    model.rope.freqs_cos, model.rope.freqs_sin = model.rope.freqs_cos[half_steps], model.rope.freqs_sin[half_steps]
    want = run(model, given)
    assert distance(want, before) > 1e-3
    assert distance(run(patch_diffusers(model), given), want) <= 1e-5


class Calls(TorchDispatchMode):
    """Counts the ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_what_a_forward_calls() -> None:
    model, given = patch_diffusers(build()), inputs()
    with Calls() as calls:
        run(model, given)
    ours = {name.removeprefix("bernini::"): n for name, n in calls.names.items() if name.startswith("bernini::")}
    assert ours == {"modulate": 4, "modulate_norm": 2, "qk_rope": 2, "rms_norm": 4}  # two blocks
    assert calls.names["aten::native_layer_norm"] == 1  # the output norm, which is outside the blocks
    assert len(fused_wan._MADE) == 0  # the rotations went with the forward that they belong to


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_the_stock_model(checkpointing: bool) -> None:
    model, given = build().train(), inputs()
    given["hidden_states"].requires_grad_()
    leaves = {**dict(model.named_parameters()), "input": given["hidden_states"]}

    def gradients() -> dict[str, Tensor]:
        loss = run(model, given).square().mean()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    want = gradients()
    patch_diffusers(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    got = gradients()
    assert all(want[name].abs().sum() > 0 for name in leaves if not name.endswith("to_k.bias"))
    wrong = {name: error for name in leaves if (error := (got[name] - want[name]).abs().max()) > 1e-6}
    assert not wrong


class Adapter(nn.Module):
    """A Linear with a low-rank update, as LoRA wraps it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("patched_first", [False, True])
def test_adapters_work_and_train(patched_first: bool) -> None:
    model, given = build().requires_grad_(False), inputs()
    plain = run(model, given)
    if patched_first:
        patch_diffusers(model)
    torch.manual_seed(2)
    adapters = []
    for block in model.blocks:
        for attn, name in ((block.attn1, "to_q"), (block.attn1, "to_k"), (block.attn2, "to_v")):
            adapters.append(Adapter(getattr(attn, name)))
            setattr(attn, name, adapters[-1])
    if not patched_first:
        patch_diffusers(model)
    weights = [adapter.up.weight for adapter in adapters]
    got = run(model, given)
    got_grads = torch.autograd.grad(got.square().mean(), weights)
    unpatch_diffusers(model)
    want = run(model, given)
    want_grads = torch.autograd.grad(want.square().mean(), weights)
    assert distance(want, plain) > 1e-3
    assert distance(got, want) <= 1e-5
    assert all(distance(x, y) <= 1e-4 for x, y in zip(got_grads, want_grads, strict=True))


def test_compiles_without_a_break() -> None:
    model, given = patch_diffusers(build(config={"num_layers": 1})), inputs()
    with torch.no_grad():
        want = run(model, given)
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(**given).sample
    assert distance(got, want) <= 1e-6


# --- putting it in and taking it out ----------------------------------------------------------------------------------


def insides(model: Any) -> dict[str, dict[str, Any]]:
    return {name: {k: v for k, v in vars(module).items() if k != "_modules"} for name, module in model.named_modules()}


@torch.no_grad()
@pytest.mark.parametrize("rounding", ["fp32", "eager"])
def test_unpatching_leaves_nothing_behind(rounding: str) -> None:
    model, other, given = build(), build(), inputs()
    want, before, keys = run(model, given), insides(model), list(model.state_dict())
    class_forward = WanTransformerBlock.forward
    assert patch_diffusers(model, rounding=rounding) is model
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == list(before)
    assert WanTransformerBlock.forward is class_forward
    assert torch.equal(run(other, given), want)  # another instance of the class is not touched
    assert unpatch_diffusers(model) is model
    after = insides(model)
    for name, attributes in before.items():
        assert attributes.keys() == after[name].keys(), name
        assert all(attributes[k] is after[name][k] or attributes[k] == after[name][k] for k in attributes), name
    assert torch.equal(run(model, given), want)


@torch.no_grad()
def test_a_copy_stands_alone() -> None:
    model, given = build(), inputs()
    stock = run(model, given)
    fused = run(patch_diffusers(model), given)
    twin = copy.deepcopy(model)
    unpatch_diffusers(model)
    assert torch.equal(run(model, given), stock)
    assert torch.equal(run(twin, given), fused)
    assert torch.equal(run(unpatch_diffusers(twin), given), stock)


@torch.no_grad()
def test_the_attention_backend_stays_the_users() -> None:
    model, given = build(), inputs()
    model.set_attention_backend("_native_math")
    want = run(model, given)
    patch_diffusers(model)
    backends = [attn.processor._attention_backend for block in model.blocks for attn in (block.attn1, block.attn2)]
    assert backends == ["_native_math"] * 4
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        dispatch = fused_wan.dispatch_attention_fn
        patch.setattr(
            fused_wan, "dispatch_attention_fn", lambda *a, **k: seen.append(k["backend"]) or dispatch(*a, **k)
        )
        assert distance(run(model, given), want) <= 1e-5
        model.set_attention_backend("native")
        run(model, given)
    assert seen == ["_native_math"] * 4 + ["native"] * 4
    unpatch_diffusers(model)
    assert all(type(block.attn1.processor) is WanAttnProcessor for block in model.blocks)
    assert {block.attn2.processor._attention_backend for block in model.blocks} == {"native"}


class Doubling(ModelHook):
    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return 2 * output


class AccelerateDoubling(AccelerateHook):
    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return 2 * output


def hang(kind: str, block: Any) -> None:
    if kind == "torch":
        block.handle = block.register_forward_hook(lambda module, args, output: 2 * output)
    elif kind == "diffusers":
        HookRegistry.check_if_exists_or_initialize(block).register_hook(Doubling(), "doubling")
    else:
        add_hook_to_module(block, AccelerateDoubling())


def take_down(kind: str, block: Any) -> None:
    if kind == "torch":
        block.handle.remove()
    elif kind == "diffusers":
        block._diffusers_hook.remove_hook("doubling")
    else:
        remove_hook_from_module(block)


@torch.no_grad()
@pytest.mark.parametrize("order", ["hook, patch", "patch, hook"])
@pytest.mark.parametrize("kind", ["torch", "diffusers", "accelerate"])
def test_hooks_on_blocks_before_and_after(kind: str, order: str) -> None:
    """Hooks see whole hidden states; either of the two may come first, and either may go first."""
    model, given = build(), inputs()
    plain = run(model, given)
    hang(kind, model.blocks[0])
    want = run(model, given)
    assert distance(want, plain) > 1e-2
    take_down(kind, model.blocks[0])
    for unpatch_first in (False, True):
        for step in order.split(", "):
            patch_diffusers(model) if step == "patch" else hang(kind, model.blocks[0])
        with Calls() as calls:
            assert distance(run(model, given), want) <= 1e-5
        assert calls.names["bernini::modulate"] == 4
        if unpatch_first:
            unpatch_diffusers(model)
            assert torch.equal(run(model, given), want)
            take_down(kind, model.blocks[0])
        else:
            take_down(kind, model.blocks[0])
            assert distance(run(model, given), plain) <= 1e-5
            unpatch_diffusers(model)
        assert torch.equal(run(model, given), plain)


def test_pipelines() -> None:
    high, low = build(), build()
    pipe = SimpleNamespace(transformer=high, transformer_2=low, vae=None)
    patch_diffusers(pipe, rounding="eager")
    assert all(isinstance(m.blocks[1].attn2.processor, fused_wan.FusedAttnProcessor) for m in (high, low))
    unpatch_diffusers(pipe)
    assert patch_diffusers(SimpleNamespace(transformer=high, transformer_2=None)).transformer is high
    unpatch_diffusers(SimpleNamespace(transformer=high, transformer_2=high))
    patch_diffusers(SimpleNamespace(transformer=None, transformer_2=low))
    with pytest.raises(ValueError, match="the transformer_2 is patched already; unpatch_diffusers it first"):
        patch_diffusers(pipe)
    assert type(high.blocks[0].attn1.processor) is WanAttnProcessor  # nothing was done by halves
    unpatch_diffusers(pipe)


# --- refusals ---------------------------------------------------------------------------------------------------------


def vace() -> Any:
    return WanVACETransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, num_layers=1, ffn_dim=8, freq_dim=8, text_dim=8, vace_layers=[0]
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), "the model must be a diffusers WanTransformer3DModel, got a Linear$"),
        (lambda: object(), "expected a diffusers WanTransformer3DModel or a pipeline with one, got a object"),
        (vace, "got a WanVACETransformer3DModel"),
        (lambda: SimpleNamespace(transformer=vace()), "the transformer must be .* got a WanVACETransformer3DModel"),
        (lambda: torch.compile(build()), "got a OptimizedModule; patch first, then compile"),
    ],
)
def test_other_models_are_refused(make: Any, message: str) -> None:
    for function in (patch_diffusers, unpatch_diffusers):
        with pytest.raises(ValueError, match=message):
            function(make())


class OwnProcessor(WanAttnProcessor):
    pass


def spoil(model: Any, how: str) -> None:
    block = model.blocks[1]
    if how == "compiled":
        block.compile()
    elif how == "processor":
        block.attn2.processor = OwnProcessor()
    elif how == "forward":
        block.forward = lambda *args: args[0]
    elif how == "norm":
        block.norm2 = nn.LayerNorm(64)
    elif how == "hooked norm":
        block.attn1.norm_q.register_forward_hook(lambda *args: None)
    else:
        block.norm4 = nn.Identity()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("compiled", "the model is compiled already; patch first, then compile"),
        ("processor", r"model.blocks.1.attn2 has the processor OwnProcessor; only WanAttnProcessor can be replaced"),
        ("forward", r"model.blocks.1 does not run WanTransformerBlock's own forward but spoil"),
        ("norm", r"model.blocks.1.norm2 must be a FP32LayerNorm as diffusers makes it, got LayerNorm"),
        ("hooked norm", r"model.blocks.1.attn1.norm_q has a hook that would never run"),
        ("part", r"model.blocks.1 has the parts .*norm4, not those of diffusers 0.35 to 0.42"),
    ],
)
def test_what_the_fused_code_would_ignore_is_refused(how: str, message: str) -> None:
    model = build()
    spoil(model, how)
    with pytest.raises(ValueError, match=message):
        patch_diffusers(model)
    assert type(model.blocks[0].attn1.processor) is WanAttnProcessor


def test_another_diffusers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from bernini.renderer import patch

    monkeypatch.setattr(patch, "SIGNATURES", {WanTransformerBlock.forward: ("hidden_states", "temb")})
    with pytest.raises(ValueError, match=r"WanTransformerBlock.forward of diffusers .* knows, 0.35 to 0.42, it takes"):
        patch_diffusers(build())


def test_patching_twice_and_unpatching_twice() -> None:
    model = build()
    with pytest.raises(ValueError, match="this WanTransformer3DModel is not patched"):
        unpatch_diffusers(model)
    patch_diffusers(model)
    with pytest.raises(ValueError, match="the model is patched already; unpatch_diffusers it first"):
        patch_diffusers(model, rounding="eager")
    own = model.blocks[0].forward
    model.blocks[0].forward = lambda *args: own(*args)
    with pytest.raises(ValueError, match=r"model.blocks.0 now runs .*lambda.*, put there after patching"):
        unpatch_diffusers(model)
    model.blocks[0].forward = own
    unpatch_diffusers(model)


def test_wrong_rounding() -> None:
    with pytest.raises(ValueError, match="rounding='half'; expected one of 'fp32', 'eager'"):
        patch_diffusers(build(), rounding="half")
