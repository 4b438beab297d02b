"""Ranks of the test of branches: ``python branches_worker.py FOLDER`` makes a video with one, two and three processes.

The one process makes its own first and has imported everything then; the others are forked from it. Frames come into
FOLDER; what the first process of each run said is printed as JSON.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

COMMAND = [
    "generate", "--prompt", "recolor the circle to blue", "--steps", "2", "--planning-steps", "1", "--decoder-steps",
    "1", "--size", "32x32", "--num-frames", "9", "--guidance-mode", "eq12", "--omega-vid", "1.5", "--omega-img", "1.2",
    "--device", "cpu",
]  # fmt: skip
RUNS: dict[str, tuple[int, Sequence[str]]] = {
    "two": (2, ()),
    "two off": (2, ("--branches", "off")),
    "three": (3, ("--share-from", "1")),
}


def work(folder: Path, name: str, rank: int, port: int) -> int:
    """One rank of a run."""
    import torch

    from bernini import cli
    from bernini.parallel import branches

    # Here, on one thread: where two that load weights come first, torch's pool, which a fork leaves broken, is renewed
    # by the one while the other finds none.
    torch.set_num_threads(torch.get_num_threads())
    size, options = RUNS[name]
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    if name == "three":  # as if exchanges cost nothing: so some ranks share a branch, in a group of their own
        branches.MACHINES["cpu"] = branches.Machine(5e10, 1e15, 0.0, 0.0)
    return cli.main([*COMMAND, *options, *files(folder, name)])


def files(folder: Path, name: str) -> list[str]:
    """Of a run."""
    return ["--video", str(folder / "in.mp4"), "--frames-dir", str(folder / name)]


def runs(folder: Path) -> dict[str, list[str]]:
    """What the first process of each run said."""
    found = {}
    for name, (size, _) in RUNS.items():
        with socket.create_server(("127.0.0.1", 0)) as place:
            port = place.getsockname()[1]
        ranks = []
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    file = os.open(folder / f"{name}-{rank}.txt", os.O_CREAT | os.O_WRONLY)
                    os.dup2(file, 1)
                    os.dup2(file, 2)
                    code = work(folder, name, rank, port)
                except BaseException:
                    import traceback

                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            ranks.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
        said = [(folder / f"{name}-{rank}.txt").read_text("utf-8") for rank in range(size)]
        assert not any(codes), (name, codes, said)
        found[name] = said[0].splitlines()
    return found


def main(folder: Path) -> None:
    """Also draws the source."""
    import torch

    import bernini.parallel.launch  # noqa: F401  # once, before the ranks are forked
    from bernini import cli
    from bernini.media import Clip
    from bernini.media_write import write_media

    torch.set_num_threads(1)
    at = torch.arange(32)
    circles = [((at[:, None] - 16) ** 2 + (at[None] - 8 - frame) ** 2 < 40)[..., None] for frame in range(9)]
    colors = torch.tensor([200, 40, 40]), torch.tensor([20, 20, 90])
    write_media(folder / "in.mp4", Clip(torch.stack([torch.where(c, *colors) for c in circles]).to(torch.uint8), 16))
    assert cli.main([*COMMAND, *files(folder, "one")]) == 0
    print(json.dumps(runs(folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
