"""The registered ops on their Triton implementation: opcheck, full-graph compilation, and a whole renderer block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bernini.kernels import (
    Segment,
    SegmentLayout,
    gather_rows,
    launch,
    modulate,
    qk_rope,
    rms_norm,
    rope_tables,
    scatter_rows,
    which,
)

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="needs TRITON_INTERPRET=1")

FORCED = "triton"


@pytest.fixture(autouse=True)
def _forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERNINI_KERNELS", FORCED)


def randn(*shape: int, grad: bool = True, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).requires_grad_(grad)


def _rope() -> tuple[list[Tensor], Tensor]:
    tables = list(rope_tables(8, (3, 3, 3), (0.0, 1.5)))
    return tables, torch.tensor([[0, 0, 0, 0], [1, 0, 2, 1], [2, 2, 1, 1]])


def _rms_norm() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return torch.ops.bernini.rms_norm.default, (randn(3, 24), randn(24), 1e-6, "fp32")


def _qk_rope() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    q, k = randn(3, 4, 8), randn(3, 2, 8)
    return torch.ops.bernini.qk_rope.default, (q, k, *_rope(), randn(32), randn(16), "across_heads", 1e-6, "fp32")


def _modulate() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    tables = [randn(2, 24, seed=seed) for seed in range(3)]
    index = torch.tensor([0, 1, 1])
    return torch.ops.bernini.modulate.default, (randn(3, 24), randn(3, 24), *tables, index, None, None, 1e-6, "fp32")


def _modulate_norm() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return torch.ops.bernini.modulate_norm.default, (
        randn(3, 24), None, None, None, randn(24), randn(24, seed=1), 1e-6, "fp32",
    )  # fmt: skip


def _gather() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return torch.ops.bernini.gather_rows.default, (randn(5, 24), torch.tensor([4, 0, 0]))


def _scatter() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    sources = [randn(2, 24, grad=False), randn(1, 24, grad=False)]
    indices = [torch.tensor([4, 0]), torch.tensor([2])]
    return torch.ops.bernini.scatter_rows.default, (torch.zeros(5, 24), sources, indices)


OPS = {"rms_norm": _rms_norm, "qk_rope": _qk_rope, "modulate": _modulate, "modulate_norm": _modulate_norm,
       "gather_rows": _gather, "scatter_rows": _scatter}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    assert which(name) == FORCED
    op, args = OPS[name]()
    torch.library.opcheck(op, args)


CALLS: dict[str, Callable[..., Any]] = {
    "rms_norm": lambda x: rms_norm(x, x[0]),
    "qk_rope": lambda x: qk_rope(x.view(3, 3, 8), x.view(3, 3, 8), *_rope(), q_weight=x[0], k_weight=x[1]),
    "modulate": lambda x: modulate(x, x + 1, gate=x[:1], scale=x[1:2], shift=x[:1]),
    "gather_rows": lambda x: gather_rows(x, torch.tensor([2, 0])),
    "scatter_rows": lambda x: scatter_rows(torch.zeros(4, 24), [x], [torch.tensor([3, 0, 1])]),
}


@pytest.mark.parametrize("name", CALLS)
def test_full_graph_compilation_with_gradients(name: str) -> None:
    def loss(x: Tensor) -> Tensor:
        results = CALLS[name](x)
        parts = results if isinstance(results, tuple) else (results,)
        return sum((part.square().mean() for part in parts), torch.zeros(()))

    plain, compiled = randn(3, 24), randn(3, 24)
    expected = loss(plain)
    expected.backward()
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled)
    found.backward()
    assert torch.equal(found, expected)
    torch.testing.assert_close(compiled.grad, plain.grad, rtol=1e-6, atol=1e-7)


def _block() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    from bernini.renderer.config import RendererConfig
    from bernini.renderer.model import Block, How, Stream

    torch.manual_seed(0)
    config = RendererConfig(num_attention_heads=2, attention_head_dim=16, ffn_dim=48, num_layers=1)
    block = Block(config)
    layout = SegmentLayout(
        [Segment("source", (1, 2, 2), 1.0), Segment("target", (1, 2, 2)), Segment("target", (1, 1, 2), sample=1)]
    )
    text = torch.randn(2, 3, config.width)
    keys, values = (t.reshape(6, 2, 16) for t in (text, text + 1))
    time = torch.randn(2, 6, config.width)

    def run(x: Tensor) -> Tensor:
        stream = block(Stream(x), time, keys, values, layout, (0, 3, 6), How("fp32", "auto"))
        return stream.residual + stream.branch * stream.gate[layout.on(x.device).timestep_rows]

    return run, torch.randn(layout.tokens, config.width)


def test_a_renderer_block_on_triton_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    run, x = _block()
    on_triton, on_reference = x.clone().requires_grad_(), x.clone().requires_grad_()
    # Attention has no Triton implementation to force.
    found = run(on_triton)
    found.square().mean().backward()
    monkeypatch.setenv("BERNINI_KERNELS", "reference")
    expected = run(on_reference)
    expected.square().mean().backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(on_triton.grad, on_reference.grad, rtol=1e-4, atol=1e-5)


def test_a_renderer_block_compiles_as_one_graph() -> None:
    run, x = _block()
    with torch.no_grad():
        expected = run(x)
        found = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(found, expected)
