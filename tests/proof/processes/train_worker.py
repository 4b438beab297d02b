"""Ranks that train, for the tests of :mod:`bernini.parallel.fsdp`.

Called as ``python train_worker.py ROUNDS.json``: a list of rounds, each ``{"size": ranks, "sequence": ranks that share
sequences, "jobs": [...]}``. The ranks of a round are forked from a process that has imported everything and computed
nothing, so that they start at once. With ``"kill": [steps, seconds]`` they are all killed that long after the first
job's log has so many steps.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def recipe_of(job: dict[str, Any]) -> Any:
    import small

    recipe = small.recipe(
        job["stage"], Path(job["model"]), Path(job["output"]), Path(job["features"]), **job.get("changes", {})
    )
    for key in ("batch", "optimizer"):
        recipe = replace(recipe, **{key: replace(getattr(recipe, key), **job.get(key, {}))})
    return recipe


def trainer_of(job: dict[str, Any], mesh: Any) -> Any:
    from bernini.parallel.share import Share
    from bernini.training.stages import make_stage
    from bernini.training.trainer import Trainer

    recipe = recipe_of(job)
    stage: Any = make_stage(recipe, mesh=mesh)
    if recipe.precision == "fp64" and not recipe.train_text_encoder and hasattr(stage, "text"):
        stage.text.encoder.model.double()  # in float32 its states are rounded by what is packed together
    stage._share = Share(mesh.sequence, least=1)  # these sequences are too short to be cut
    stage.batches.least = 1
    return Trainer(recipe, stage, mesh=mesh)


def train(job: dict[str, Any], mesh: Any) -> None:
    assert trainer_of(job, mesh).train()


def gradients(job: dict[str, Any], mesh: Any) -> None:
    """Of one step with the packings that the job names, to a file each; losses to another."""
    import torch
    from safetensors.torch import save_file

    from bernini.data.example import Example
    from bernini.data.parquet import ParquetData
    from bernini.parallel.fsdp import whole
    from bernini.training.feed import Picked

    trainer = trainer_of(job, mesh)
    stage: Any = trainer.stage
    if job["stage"] in ("vae", "understanding"):
        examples = [e for number in range(4) for e in stage.batches.feed.pick(0, number).examples]
        examples = list({example.key: example for example in examples}.values())
    else:
        data = ParquetData(job["features"])
        examples = [e for e in (data[number] for number in range(len(data))) if isinstance(e, Example)]

    class Chosen:
        def pick(self, step: int, number: int) -> Picked:
            return Picked(tuple(examples[place] for place in packing[number]), ())

    stage.batches.feed = Chosen()
    weights = trainer.weights
    start = {name: master.detach().clone() for name, master in weights.masters.items()}
    for name, packing in job["packings"].items():
        batch = [stage.micro(0, number) for number in range(len(packing))]
        losses, norm = trainer._update(batch)
        found = {n: weights.masters[n].grad for n in weights.masters if weights.masters[n].grad is not None}
        full = {n: whole(g.detach().clone(), weights.rows[n], mesh.world) for n, g in found.items()}
        if mesh.first:
            save_file({n: g.contiguous() for n, g in full.items() if g is not None}, f"{job['output']}.{name}")
            Path(f"{job['output']}.{name}.json").write_text(json.dumps({**losses, "norm": norm}))
        with torch.no_grad():
            for n, master in weights.masters.items():
                master.copy_(start[n])
        weights.publish()


def child(rank: int, size: int, port: int, jobs: list[dict[str, Any]], sequence: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
                       "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}  # fmt: skip
        from bernini.parallel import mesh as meshes

        mesh = meshes.alone() if size == 1 else meshes.start("cpu", sequence=sequence)
        for job in jobs:
            {"train": train, "gradients": gradients}[job["kind"]](job, mesh)
        meshes.stop()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


def steps_of(output: str) -> int:
    file = Path(output, "log.jsonl")
    return len(file.read_text().splitlines()) if file.is_file() else 0


def main() -> None:
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(HERE.parents[1] / "training"))
    import small  # noqa: F401
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp
    import torch.distributed.tensor
    import torch.utils.tensorboard
    from transformers import AutoTokenizer, UMT5EncoderModel  # noqa: F401

    import bernini.training.stages.joint
    import bernini.training.stages.understanding
    import bernini.training.stages.vae
    import bernini.training.trainer  # noqa: F401

    told = []
    for number, spec in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        started = time.time()
        port = free_port()
        pids = [child(rank, spec["size"], port, spec["jobs"], spec.get("sequence", 1)) for rank in range(spec["size"])]
        if "kill" in spec:
            steps, seconds = spec["kill"]
            while steps_of(spec["jobs"][0]["output"]) < steps:
                time.sleep(0.005)
            time.sleep(seconds)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        told.append(codes)
        print(f"round {number}: {spec['size']} ranks, {time.time() - started:.1f} s, {codes}", file=sys.stderr)
        if "kill" not in spec and any(codes):
            break
    print(json.dumps(told))


if __name__ == "__main__":
    main()
