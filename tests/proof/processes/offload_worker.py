"""Ranks of the test of offload with FSDP2: ``python offload_worker.py RESULTS``. Forks two that meet by gloo; each
writes what it found to ``RESULTS/RANK.json``."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZE = 2
WIDTH = 32


def build() -> Any:
    """Blocks of linear layers and attention, spread over the ranks, and a head in the root."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
    from torch.distributed.fsdp import fully_shard

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                part.unflatten(-1, (2, -1)).transpose(0, 1)[None] for part in self.qkv(self.norm(x)).chunk(3, -1)
            )
            out = F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)
            return x + F.gelu(self.out(out))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(4))
            self.head = nn.Linear(WIDTH, WIDTH)
            self.around: Callable[..., Tensor] = lambda block, x: block(x)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = self.around(block, x)
            return self.head(x).square().mean()

    torch.manual_seed(0)
    model = Model()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def work(rank: int, store: str, results: Path) -> None:
    import torch
    import torch.distributed as dist
    from torch.utils.checkpoint import checkpoint

    from bernini.offload.activations import ActivationOffload
    from bernini.offload.arena import Arena
    from bernini.offload.checker import check
    from bernini.offload.log import Log
    from bernini.offload.transfer_cpu import CpuTransfers

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE)
    model = build()
    torch.manual_seed(1 + rank)  # ranks have other examples
    batches = [torch.randn(length, WIDTH) for length in (16, 40, 7)]
    found: dict[str, Any] = {}

    def gradients(run: Callable[[Any], None], x: Any) -> list[Any]:
        model.zero_grad(set_to_none=True)
        run(x)
        return [p.grad.to_local().clone() for p in model.parameters()]

    plain = [gradients(lambda x: model(x).backward(), x) for x in batches]
    cases = [
        ("hidden", False, False), ("hidden", True, False), ("hidden", False, True), ("hidden+attention", True, False),
        ("all", False, False), ("all", False, True),
    ]  # fmt: skip
    for policy, recompute, own in cases:
        transfers, arena = CpuTransfers(delay=2e-3, seed=rank, log=Log(None)), Arena(1 << 24)
        offload = ActivationOffload(
            model.blocks, policy=policy, recompute=recompute, arena=arena, transfers=transfers, minimum=64,
            in_flight=8192, landing=2,
        )  # fmt: skip
        model.around = (lambda block, x: checkpoint(block, x, use_reentrant=False)) if own else (lambda b, x: b(x))
        alike = []
        for inside in (False, True):

            def run(x: Any, offload: Any = offload, inside: bool = inside) -> None:
                with offload:
                    loss = model(x)
                    if inside:
                        loss.backward()
                if not inside:
                    loss.backward()

            for x, wanted in zip(batches, plain, strict=True):
                got = gradients(run, x)
                alike.append(all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)))
        offload.finish()
        whole = {p.numel() * 4 for p in model.parameters() if p.dim() == 2}
        found[f"{policy}, recompute={recompute}, own={own}"] = {
            "alike": alike,
            "broken": [str(wrong) for wrong in check(transfers.log)],
            "left": [offload.live, arena.stats().live],
            "offloaded": offload.counts.offloaded,
            "weights": sum(action.kind == "adopt" and action.span[1] in whole for action in transfers.log),
        }
        transfers.close()
    (results / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def main(results: Path) -> int:
    import torch.distributed.fsdp  # noqa: F401  # once, before the ranks are forked

    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(SIZE):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    work(rank, f"{folder}/store", results)
                    code = 0
                except BaseException:
                    import traceback

                    traceback.print_exc()
                finally:
                    os._exit(code)
            ranks.append(pid)
        return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
