"""Ranks of small runs, most of which fail on purpose.

``torchrun ... launch_worker.py NAME`` is a rank of one run. ``python launch_worker.py`` is all ranks of all runs at
once, forked from a process that has imported everything, without torchrun; it prints what became of them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from bernini.errors import UserError
from bernini.parallel import launch
from bernini.parallel.group import Group, Message
from bernini.parallel.mesh import Mesh

AT_ONCE, SECONDS = 4, 300


def swap(mesh: Mesh, group: str = "world", elements: int = 3) -> torch.Tensor:
    """Sends the own rank to the other one; what that sent."""
    members: Group = getattr(mesh, group)
    found = torch.empty(elements)
    other = 1 - members.rank
    members.exchange([Message(other, torch.full((elements,), float(members.rank)))], [Message(other, found)])
    return found


def fine(rank: int) -> None:
    with launch.running(sequence=2, agree={"recipe": {"steps": 3, "data": [1, 2]}, "model": lambda: "m"}) as mesh:
        for step in range(100):
            assert swap(mesh, "sequence").tolist() == [1.0 - rank] * 3
            if step == 50 and rank == 1:
                time.sleep(3)  # slow is not dead
        rows = mesh.world.gather(torch.full((rank + 1, 2), float(rank)), [1, 2])
        assert rows.tolist() == [[0, 0], [1, 1], [1, 1]] and mesh.world.tell(rank) == [0, 1] and mesh.data.size == 1
        time.sleep(2 * rank)
    print("ended", flush=True)


def dies(rank: int, who: int) -> None:
    with launch.running() as mesh:
        swap(mesh)
        if rank == who:
            os.kill(os.getpid(), signal.SIGKILL)
        swap(mesh)


def dies_late(rank: int) -> None:
    """After the ranks have compared their notes and found nothing."""
    with launch.running() as mesh:
        swap(mesh)
        if rank == 1:
            time.sleep(3)
            print(time.monotonic(), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        swap(mesh)


def dies_beside_work(rank: int) -> None:
    with launch.running():
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(100)  # the other one does not listen


def other_code(rank: int) -> None:
    if rank == 1:
        code = {**launch.own_code(), "parallel/mesh.py": "changed"}
        launch.own_code = lambda: code
    with launch.running():
        raise AssertionError("began")


def other_options(rank: int) -> None:
    with launch.running(agree={"recipe": {"steps": 3, "optimizer": {"lr": 1e-3 if rank else 1e-4}}}):
        raise AssertionError("began")


def odd_world(rank: int) -> None:
    with launch.running(sequence=3):
        raise AssertionError("began")


def one_has_no_checkpoint(rank: int) -> None:
    def fingerprint() -> str:
        if rank == 1:
            raise UserError("models/a: there is no such folder")
        return "m"

    with launch.running(agree={"model": fingerprint}):
        raise AssertionError("began")


def one_gives_up(rank: int) -> None:
    with launch.running() as mesh:
        swap(mesh)
        if rank == 1:
            raise UserError("clip.mp4: cannot be read")
        swap(mesh)


def one_has_a_fault(rank: int) -> None:
    with launch.running() as mesh:
        swap(mesh)
        try:
            if rank == 1:
                raise ZeroDivisionError("a fault of ours")
            swap(mesh)
        except RuntimeError as error:  # of gloo; what went on in spite of it would be told at its next call
            print(f"ignored {type(error).__name__}", flush=True)
            swap(mesh)


def other_kinds(rank: int) -> None:
    with launch.running() as mesh:
        swap(mesh)
        if rank == 0:
            swap(mesh)
        else:
            mesh.world.tell("something")


def other_shapes(rank: int) -> None:
    with launch.running() as mesh:
        swap(mesh)
        swap(mesh, elements=4 - rank)
        time.sleep(100)


def fewer_calls(rank: int) -> None:
    with launch.running() as mesh:
        swap(mesh)
        if rank == 0:
            swap(mesh)


def other_order(rank: int) -> None:
    with launch.running() as mesh:
        for group in ("world", "data") if rank == 0 else ("data", "world"):
            swap(mesh, group)


def told_to_stop(rank: int) -> None:
    with launch.running() as mesh:
        swap(mesh)
        if rank == 1:
            time.sleep(1)  # the other one waits in C++ by then
            for process in (Path(os.environ["PIDS"], str(rank)).read_text() for rank in (0, 1)):
                os.kill(int(process), signal.SIGTERM)
            time.sleep(100)
        swap(mesh)


def one_does_not_come(rank: int) -> None:
    launch.MEETING = 3.0
    if rank == 0:
        with launch.running():
            raise AssertionError("began")


def port_in_use(rank: int) -> None:
    launch.MEETING = 3.0
    with launch.running():
        raise AssertionError("began")


RUNS = {
    "fine": fine,
    "fine by hand": fine,
    "dies late": dies_late,
    "dies": lambda rank: dies(rank, 1),
    "first dies": lambda rank: dies(rank, 0),
    "first dies by hand": lambda rank: dies(rank, 0),
    "dies beside work": dies_beside_work,
    "other code": other_code,
    "other options": other_options,
    "odd world": odd_world,
    "one has no checkpoint": one_has_no_checkpoint,
    "one gives up": one_gives_up,
    "one has a fault": one_has_a_fault,
    "other kinds": other_kinds,
    "other shapes": other_shapes,
    "fewer calls": fewer_calls,
    "other order": other_order,
    "told to stop": told_to_stop,
    "one does not come": one_does_not_come,
    "port in use by hand": port_in_use,
}


def main(name: str, rank: int) -> int:
    """A command, as the command line has them."""
    try:
        RUNS[name](rank)
    except UserError as error:
        print(f"command: {error}", file=sys.stderr)
        return 2
    return 0


def ends(work: Callable[[], int]) -> None:
    """Ends a forked process as Python would, without its slow tidying up."""
    code: Any = 1
    try:
        code = work()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def hosts(port: int) -> int:
    """The store of all runs but those by hand, as torchrun has one."""
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    while store:
        time.sleep(100)
    return 0


def all_runs() -> None:
    """Prints, as JSON, {run: [[exit code, seconds, standard output, standard error] of each rank]}."""
    names = sys.argv[1:] or [name for name in RUNS if name != "dies late"]
    sockets = {name: socket.create_server(("127.0.0.1", 0)) for name in ["agent", *names]}
    ports = {name: place.getsockname()[1] for name, place in sockets.items()}
    for name, place in sockets.items():
        if not name.startswith("port in use"):
            place.close()
    agent = os.fork()
    if agent == 0:
        ends(lambda: hosts(ports["agent"]))
    folder = Path(tempfile.mkdtemp())
    began, ranks = time.monotonic(), {}
    found: dict[str, list] = {name: [None, None] for name in names}

    def reap(most: int) -> None:
        while len(ranks) > most and time.monotonic() < began + SECONDS:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                time.sleep(0.01)
                continue
            name, rank, since = ranks.pop(pid)
            said = [(folder / name / f"{rank}.{stream}").read_text() for stream in ("out", "err")]
            found[name][rank] = [os.waitstatus_to_exitcode(status), time.monotonic() - since, *said]

    for name in names:
        reap(2 * (AT_ONCE - 1))
        (folder / name).mkdir()
        for rank in (0, 1):
            pid = os.fork()
            if pid == 0:
                for number, stream in ((1, "out"), (2, "err")):
                    file = os.open(folder / name / f"{rank}.{stream}", os.O_CREAT | os.O_WRONLY)
                    os.dup2(file, number)
                (folder / name / str(rank)).write_text(str(os.getpid()))
                agent = "by hand" not in name
                os.environ |= {
                    "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "PIDS": str(folder / name),
                    "MASTER_PORT": str(ports["agent" if agent else name]), "TORCHELASTIC_RESTART_COUNT": name,
                    "TORCHELASTIC_USE_AGENT_STORE": str(agent),
                }  # fmt: skip
                ends(lambda name=name, rank=rank: main(name, rank))
            ranks[pid] = name, rank, time.monotonic()
    reap(0)
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    os.kill(agent, signal.SIGKILL)
    print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.exit(main(sys.argv[1], int(os.environ["RANK"])))
    all_runs()
