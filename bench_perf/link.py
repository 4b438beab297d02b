"""Two processes with a slow link between them: network namespaces, a pair of virtual devices, a filter for the rate.

No rights are needed where users may make namespaces of their own (``unshare -Urn``). The first process and whoever
directs are in one namespace, the second process in another; all traffic between the two goes through the link. A
process is told what to do by lines on its standard input and answers by lines on its standard output.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("unshare", "nsenter", "ip", "tc")
ENDED = "rank {} has ended; what it said is above"
DEVICES, ADDRESSES = ("bernini0", "bernini1"), ("10.77.0.1", "10.77.0.2")
MTU = 32 << 10
"""Bytes of a packet at most."""
INSIDE = ("unshare", "--user", "--map-root-user", "--net")
"""Runs a program in a network of its own, where it may do as it likes."""


def missing() -> str | None:
    """Why there can be no such link here, or ``None``."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"there is no {' and no '.join(absent)} here"
    device = f"ip link add {DEVICES[0]} type veth peer name {DEVICES[1]}"
    shaped = f"{device} && tc qdisc add dev {DEVICES[0]} root tbf rate 1gbit burst 128kb limit 1mb"
    tried = subprocess.run([*INSIDE, "sh", "-c", shaped], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"no network namespaces here: {' '.join(tried.stderr.split()) or f'exit code {tried.returncode}'}"
    return None


class Pair:
    """Two processes of a module, each on a core of its own; made by a process that runs :data:`INSIDE`.

    Args:
        module: run as ``python -m module rank NUMBER FOLDER``.
        folder: where they meet.
    """

    def __init__(self, module: str, folder: Path) -> None:
        command = [sys.executable, "-m", module, "rank"]
        self._ranks: list[subprocess.Popen[str]] = []
        for rank, before in enumerate(([], ["unshare", "--net"])):
            environment = {**os.environ, "GLOO_SOCKET_IFNAME": DEVICES[rank], "OMP_NUM_THREADS": "1"}
            environment["OMP_WAIT_POLICY"] = "passive"
            self._ranks.append(
                subprocess.Popen(
                    [*before, *command, str(rank), str(folder)], cwd=ROOT, env=environment, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                )
            )  # fmt: skip

    def connect(self) -> None:
        """The link, without a limit yet. Both processes must have said something: then the second has its network."""
        _do("ip", "link", "add", DEVICES[0], "type", "veth", "peer", "name", DEVICES[1])
        _do("ip", "link", "set", DEVICES[1], "netns", str(self._ranks[1].pid))
        for rank, device in enumerate(DEVICES):
            self._at(rank, "ip", "link", "set", "lo", "up")
            self._at(rank, "ip", "address", "add", f"{ADDRESSES[rank]}/24", "dev", device)
            # Large packets: what a network card cuts and joins by itself would be this core's work here.
            self._at(rank, "ip", "link", "set", device, "mtu", str(MTU), "up")

    def limit(self, rate: float) -> None:
        """So many bytes per second, each way."""
        burst = max(2 * MTU, int(rate * 0.001))  # what passes at once after a pause
        for rank, device in enumerate(DEVICES):
            # The queue never drops: senders that wait would be another thing than a slow link.
            shape = ("rate", f"{8 * rate:.0f}bit", "burst", str(burst), "limit", str(256 << 20))
            self._at(rank, "tc", "qdisc", "replace", "dev", device, "root", "tbf", *shape)

    def _at(self, rank: int, *command: str) -> None:
        _do(*(("nsenter", "-t", str(self._ranks[1].pid), "--net") if rank else ()), *command)

    def ask(self, *words: Any) -> list[Any]:
        """Tells both the same; what each answers.

        Raises:
            RuntimeError: one has ended.
        """
        for number, rank in enumerate(self._ranks):
            assert rank.stdin is not None
            try:
                rank.stdin.write(json.dumps(words) + "\n")
                rank.stdin.flush()
            except BrokenPipeError:
                raise RuntimeError(ENDED.format(number)) from None
        return self.answers()

    def answers(self) -> list[Any]:
        found = []
        for number, rank in enumerate(self._ranks):
            assert rank.stdout is not None
            line = rank.stdout.readline()
            if not line:
                raise RuntimeError(ENDED.format(number))
            found.append(json.loads(line))
        return found

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        for rank in self._ranks:
            if kind is not None:
                rank.kill()
            assert rank.stdin is not None
            with suppress(BrokenPipeError):  # it ended with something unread
                rank.stdin.close()
        for rank in self._ranks:
            rank.wait()


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def answer(what: Any) -> None:
    """A process's answer."""
    print(json.dumps(what), flush=True)


def commands() -> Any:
    """What a process is told, one after the other."""
    for line in sys.stdin:
        yield json.loads(line)


def inside(command: Sequence[str]) -> int:
    """Runs a program in a network of its own; its exit code."""
    return subprocess.run([*INSIDE, *command], cwd=ROOT, check=False).returncode
