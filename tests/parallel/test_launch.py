"""Runs of two processes that begin, fail and end together, each in time and with one message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import HashStore

from bernini.errors import UserError
from bernini.parallel import launch, watch
from bernini.parallel.group import Alone
from bernini.parallel.trace import Trace

WORKER = Path(__file__).with_name("launch_worker.py")
Ranks = list[tuple[int, float, str, str]]
SWAP = "world.exchange by __main__.swap"


@pytest.fixture(scope="module")
def runs() -> dict[str, Ranks]:
    """(exit code, seconds, standard output, standard error) of both ranks of every run."""
    done = subprocess.run(
        [sys.executable, "-P", WORKER], stdout=subprocess.PIPE, text=True, timeout=400, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
    )  # fmt: skip
    found: dict[str, Ranks] = json.loads(done.stdout)
    return found


def test_a_run_that_is_fine(runs: dict[str, Ranks]) -> None:
    """With a rank that keeps the other waiting, and one that finishes later."""
    for name in ("fine", "fine by hand"):
        assert [(code, out, err) for code, _, out, err in runs[name]] == [(0, "ended\n", "")] * 2


MORE = "; all processes need the same code, options and model"
MESSAGES = {
    "dies": f"rank 1 of 2 died; rank 0 was waiting in call 2, {SWAP}",
    "first dies": f"rank 0 of 2 died; rank 1 was waiting in call 2, {SWAP}",
    "first dies by hand": "rank 0 died, or cannot be reached any more at 127.0.0.1:",
    "dies beside work": "rank 1 of 2 died",
    "other options": f"recipe.optimizer.lr is 0.0001 on rank 0 and 0.001 on rank 1{MORE}",
    "odd world": "2 processes cannot share sequences in groups of 3; choose a number that divides 2",
    "one has no checkpoint": "models/a: there is no such folder (rank 1 of 2)",
    "one gives up": "clip.mp4: cannot be read (rank 1 of 2)",
    "other kinds": f"rank 0 is in {SWAP}, sends it float32[3], expects from it float32[3]",
    "other shapes": f"rank 0 is in {SWAP}, sends it float32[4], expects from it float32[4]",
    "fewer calls": f"rank 0 is in call 2, {SWAP}, while rank 1 has ended after 1 call",
    "other order": "rank 1 is in data.exchange by __main__.swap, sends it float32[3], expects from it float32[3]",
    "told to stop": "was told to stop (SIGTERM)",
    "one does not come": "rank 1 of 2 did not come to 127.0.0.1:",
    "port in use by hand": "the port is in use; choose another with --master-port, or let torchrun --stand",
}
ENDS = {
    "dies": [2, -9], "first dies": [-9, 2], "first dies by hand": [-9, 2], "dies beside work": [2, -9],
    "other shapes": [2, -6], "told to stop": [143, 143], "one does not come": [2, 0],
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_every_rank_ends_and_one_speaks(runs: dict[str, Ranks], name: str) -> None:
    ranks = runs[name]
    assert [code for code, *_ in ranks] == ENDS.get(name, [2, 2])
    assert all(seconds < 60 for _, seconds, _, _ in ranks)
    # gloo ends a process that is sent more than it expects, and says so in its own words
    said = [line for *_, err in ranks for line in err.splitlines() if "gloo" not in line]
    assert len(said) == 1 and MESSAGES[name] in said[0], said
    assert said[0].startswith(("command: ", "bernini: "))  # raised where the work is, or said in its place


def test_other_code_is_named(runs: dict[str, Ranks]) -> None:
    assert [code for code, *_ in runs["other code"]] == [2, 2]
    (said,) = (line for *_, err in runs["other code"] for line in err.splitlines())
    assert said.startswith("command: code.parallel/mesh.py is ") and said.endswith(f"and changed on rank 1{MORE}")


def test_a_fault_of_ours_has_one_traceback(runs: dict[str, Ranks]) -> None:
    (code, _, out, other), (own, _, _, said) = runs["one has a fault"]
    assert (code, own) == (1, 1) and other == ""
    assert said.count("Traceback") == 1 and "ZeroDivisionError: a fault of ours\n(rank 1 of 2; the others" in said
    assert out in ("", "ignored RuntimeError\n")  # nor does a rank go on that takes no notice


def test_torchrun_and_a_rank_that_is_killed() -> None:
    """The real launcher, its store, and processes whose texts hash differently."""
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, WORKER, "dies late"], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    died = float(done.stdout.split()[-1])  # by the machine's clock
    assert done.returncode == 1 and time.monotonic() - died < 60
    ours = [line for line in done.stderr.splitlines() if line.startswith(("command: ", "bernini: "))]
    assert ours == [f"{ours[0].split(':')[0]}: rank 1 of 2 died; rank 0 was waiting in call 2, {SWAP}"]
    assert done.stderr.count("Traceback") == 1  # torchrun's own


# --- parts ------------------------------------------------------------------------------------------------------------


def test_one_process_is_the_trivial_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    with launch.running("cpu", agree={"recipe": {"steps": 3}}) as mesh:
        assert mesh.alone and mesh.first and mesh.devices is None and isinstance(mesh.world, Alone)
    with pytest.raises(ZeroDivisionError), launch.running():
        _ = 1 / 0
    with pytest.raises(UserError, match="1 process cannot share sequences in groups of 2"), launch.running(sequence=2):
        raise AssertionError


def test_what_differs_is_named_with_all_its_ranks() -> None:
    told = {rank: launch.flat({"recipe": {"steps": 3 + (rank == 2), "data": [1, {"a": "b"}]}}) for rank in range(4)}
    assert told[0] == {"recipe.steps": "3", "recipe.data.0": "1", "recipe.data.1.a": "b"}
    assert launch.difference({0: told[0], 3: told[3]}) is None
    assert launch.difference(told) == f"recipe.steps is 3 on ranks 0, 1, 3 and 4 on rank 2{MORE}"
    del told[1]["recipe.data.0"]
    said = launch.difference(told)
    assert said == f"recipe.steps is 3 on ranks 0, 1, 3 and 4 on rank 2 (1 more differ){MORE}"
    assert launch.difference({0: {"a": "x"}, 1: {}}) == f"a is x on rank 0 and nothing on rank 1{MORE}"


def test_all_code_counts() -> None:
    code = launch.own_code()
    assert {"cli.py", "kernels/__init__.py", "parallel/launch.py", "offload/__init__.py", "training/trainer.py"} <= set(
        code
    )
    assert code == launch.own_code() and len(set(code.values())) > 100


def test_a_silent_rank_on_another_machine_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    one, other = watch.Watch(store, 0, 2), watch.Watch(store, 1, 2)
    store.set("person/1", json.dumps({"machine": "elsewhere", "pid": 1, "born": "0"}))
    one.met = other.met = True
    for _ in range(3):
        one.tick()
        other.tick()
    assert one.over is None
    monkeypatch.setattr(watch, "SILENCE", 0.2)
    one.tick()
    other.tick()
    one.tick()
    assert one.over is None  # it gave a sign
    time.sleep(0.3)
    one.tick()
    assert one.over == {"rank": 0, "text": "rank 1 of 2 died", "code": 2}
    other.tick()
    assert other.over == one.over
    with pytest.raises(watch.Over, match="rank 1 of 2 died"):
        other.check()
    one.fail("something else")
    assert one.over["text"] == "rank 1 of 2 died"  # the first counts


def test_ranks_that_wait_for_each_other_in_a_circle() -> None:
    """Each is in a call with the next one, which is in another one: no two disagree, and none will go on."""
    store = HashStore()
    ranks = [watch.Watch(store, rank, 3) for rank in range(3)]
    for own, (mine, also) in zip(ranks, [((0, 1), (0, 2)), ((1, 2), (0, 1)), ((0, 2), (1, 2))], strict=True):
        own.met = True
        own.traces = [Trace(members, members.index(own.rank)) for members in (mine, also)]
    for own in ranks[:2]:
        own.traces[0].begin("tell", [], [], True)
    for _ in range(4):
        for own in ranks:
            own.tick()
    assert all(own.over is None for own in ranks)  # rank 2 is at work
    ranks[2].traces[0].begin("tell", [], [], True)
    for _ in range(4):
        for own in ranks:
            own.tick()
    assert ranks[0].over is not None and ranks[0].over == ranks[1].over == ranks[2].over
    said = ranks[0].over["text"]
    assert said.startswith("ranks wait for each other: rank ") and said.count(" is in call 1, tell by ") == 3


def test_a_disagreement_is_found_between_ranks_that_wait() -> None:
    store = HashStore()
    ranks = [watch.Watch(store, rank, 2) for rank in range(2)]
    for own, kind in zip(ranks, ("tell", "gather"), strict=True):
        own.met, own.traces = True, [Trace((0, 1), own.rank)]
        own.tick()
        own.traces[0].begin(kind, [], [], True)
        own.tick()
        assert own.over is None  # it has moved
    ranks[0].tick()
    assert ranks[0].over is None  # the other one has not shown its notes
    ranks[1].tick()
    assert ranks[1].over is not None and ranks[1].over["rank"] == 1
    assert ranks[1].over["text"].startswith("ranks disagree in call 1: rank 1 is in gather by ")
