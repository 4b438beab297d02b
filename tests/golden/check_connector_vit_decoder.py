"""Golden set ``connector_vit_decoder``: the connector's heads, the decoder's network, and its sampler with guidance."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from bernini.planner.heads import Connector, DecoderConfig, VitDecoder, decoder_levels, sinusoid

from . import compare

ATOL, ATOL_CONNECTOR = 1e-4, 2e-5
WEIGHTS = {  # of the full, text-only and unconditional conditions
    "nocfg": (1.0, 0.0, 0.0),
    "cfg1.2_1.0": (1.2, 1.0 - 1.2, 0.0),
    "cfg1.4_1.2": (1.4, 1.2 - 1.4, 1 - 1.2),
    "cfg1.3_noimg": (1.3, 0.0, 1 - 1.3),
}


@torch.no_grad()
def check(files: dict[str, Path]) -> int:
    cases, meta = compare.load(files["cases"])
    config = meta["config"]
    connector = Connector(config["hidden"], config["out_dim_for_gen"], config["out_dim_for_vit"])
    decoder = VitDecoder(
        DecoderConfig(
            config["hidden"], config["decoder_width"], config["decoder_depth"], config["shift"], config["freq_embed"]
        )
    )
    for name, module in (("connector", connector), ("vit_decoder", decoder)):
        prefix = f"weights.{name}."
        module.load_state_dict({k.removeprefix(prefix): v for k, v in cases.items() if k.startswith(prefix)})
    done = 0
    for name, want in cases.items():
        got = _compute(name, cases, connector, decoder)
        if got is None:
            assert not name.startswith(("out", "sched")), f"nothing computes {name}"
            continue
        if name.startswith("sched"):
            compare.same(name, got.to(torch.bfloat16), want)
        elif name.startswith("out_bf16"):
            compare.close(name, got.float().reshape(want.shape), want.float(), rel_l2=0.02)
        else:
            compare.close(name, got.reshape(want.shape), want, atol=ATOL if "out.p" not in name else ATOL_CONNECTOR)
        done += 1
    return done


def _compute(
    name: str, cases: dict[str, torch.Tensor], connector: Connector, decoder: VitDecoder
) -> torch.Tensor | None:
    dtype = torch.bfloat16 if name.startswith("out_bf16") else torch.float32
    connector, decoder = connector.to(dtype), decoder.to(dtype)
    key = name.partition(".")[2]
    hidden, x, z = (cases[f"in.{part}"].to(dtype) for part in ("hidden", "x", "z"))
    conditions = [z, cases["in.z_textonly"].to(dtype), cases["in.z_uncond"].to(dtype)]
    if name.startswith("sched."):
        found = re.fullmatch(r"n(\d+)\.(sigmas|timesteps)_bf16", key)
        assert found is not None
        sigmas, times = decoder_levels(int(found[1]), decoder.config.shift, parity=True)
        return torch.tensor(sigmas[:-1] if found[2] == "sigmas" else times)
    if not name.startswith("out"):
        return None
    if key == "proj_gen":
        return connector.for_gen(hidden)
    if key == "pred_vit":
        return connector.for_vit(hidden)
    if key == "net.t_per_token":
        return decoder.net(x, cases["in.t_per_token"], z)
    if key == "net.sinusoid.t800":
        return sinusoid(torch.tensor([800.0]), decoder.config.frequencies)
    if key == "net.time_embed.t800":
        return decoder.net.time_embed(torch.tensor([800.0]))
    if key == "net_cfg3.t800":
        weights = WEIGHTS["cfg1.2_1.0"]
        return sum((w * decoder.net(x, torch.tensor([800.0]), c) for w, c in zip(weights, conditions, strict=True)),
                   torch.zeros_like(x))  # fmt: skip
    if found := re.fullmatch(r"net\.t([\d.]+)", key):
        return decoder.net(x, torch.tensor([float(found[1])]), z)
    if found := re.fullmatch(r"sample\.n(\d+)\.(.*)", key):
        pairs = [(w, c) for w, c in zip(WEIGHTS[found[2]], conditions, strict=True) if w]
        return decoder.sample(cases["in.noise"], pairs, int(found[1]), parity=True)
    return None
