"""One of two processes that share a VAE over gloo: ``python -m tests.proof.processes.vae_worker FOLDER RANK``."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from bernini.parallel.group import Processes
from tests.proof.processes.vae_cases import Case


def rank_main(folder: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    group, case = Processes(), Case(7, 4, 2, most=1, dtype=torch.float64)
    with torch.no_grad():
        for ours, theirs in (
            (case.encode(case.vae(group), case.pixels), case.encoded(case.pixels)),
            (list(case.vae(group).decode(case.latent)), case.decoded(case.latent)),
        ):
            for part in ours:
                own = theirs[:, :, part.cut[rank] : part.cut[rank + 1]]
                torch.testing.assert_close(part.own, own, rtol=1e-11, atol=1e-11)
    x = case.latent.clone().requires_grad_()
    (part,) = case.vae(group).decode(x)
    part.own.sum().backward()
    assert x.grad is not None
    total = sum(group.gather(x.grad, [1, 1]).split(1))
    expected = case.latent.clone().requires_grad_()
    case.decoded(expected).sum().backward()
    torch.testing.assert_close(total, expected.grad, rtol=1e-10, atol=1e-10)
    dist.destroy_process_group()


if __name__ == "__main__":
    rank_main(sys.argv[1], int(sys.argv[2]))
