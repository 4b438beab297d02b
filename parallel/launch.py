"""How a run of several processes begins, fails and ends: all ranks together, with one message.

    with running(device, sequence=2, agree={"recipe": recipe.to_dict(), "model": lambda: fingerprint(folder)}) as mesh:
        ...  # groups of the mesh; what is raised here ends every rank

**Begins.** Ranks meet at torchrun's store and tell each other which code they run and whatever else they have to agree
about. Whoever does not come within 45 s, or differs, is named.

**Fails.** Beside the work, a thread of every rank looks at the store twice a second. A rank that raises says so there;
one that died is missed by the others (at once on the same machine, after 30 s on another one); ranks that disagree in
their calls (:mod:`bernini.parallel.trace`) are found when they have not moved for a second. The first rank that knows
of a failure is the one that speaks: it raises a :class:`UserError`, or its own error if that is a fault of ours. All
others raise ``SystemExit`` with the same code and say nothing. A rank that does not get to raise, as it waits for one
that will never come, ends after three seconds more without having unwound, as if it had been killed.

**Ends.** A rank that has finished waits for all others to finish; then all let go of each other. A rank that comes to
its end knows that all have.

**Order.** A failing rank unwinds its own ``with`` blocks first and tells the others last; those end at their next
call, or are cut off wherever they are. So files must be written under other names and moved into place, as everything
here is. In the middle of the work failures are raised as :class:`Over`, which ``except Exception`` lets pass. What
``running`` raises is the end: the process has 20 s left for it.

Checking is always on. A call takes some ten microseconds more, and with gloo a message to the store, about 0.1 ms.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from bernini import __version__
from bernini.errors import UserError

from .mesh import Mesh, address, start, stop, torchrun
from .watch import GRACE, Over, Watch, leave_now, ranks_, theirs

MEETING = 45.0
"""Seconds for all ranks to come."""
LAST = 20
"""Seconds for a process to end after it has raised what it ends with."""


# --- what ranks have to agree about -----------------------------------------------------------------------------------


def own_code() -> dict[str, str]:
    """A checksum of each source file of the package, however it is installed."""
    found: dict[str, str] = {}
    for room in ("bernini", "bernini.kernels", "bernini.parallel", "bernini.offload"):
        spec = importlib.util.find_spec(room)
        for folder in map(Path, (spec and spec.submodule_search_locations) or ()):
            for file in folder.rglob("*.py"):
                name = "/".join([*room.split(".")[1:], *file.relative_to(folder).parts])
                found[name] = hashlib.blake2b(file.read_bytes(), digest_size=4).hexdigest()
    return found


def flat(thing: Any, name: str = "") -> dict[str, str]:
    """``{"recipe": {"steps": 3}}`` -> ``{"recipe.steps": "3"}``."""
    items: Any
    if isinstance(thing, Mapping):
        items = thing.items()
    elif isinstance(thing, list | tuple):
        items = enumerate(thing)
    else:
        return {name: str(thing)}
    return {key: value for at, part in items for key, value in flat(part, f"{name}.{at}" if name else str(at)).items()}


def difference(told: Mapping[int, Mapping[str, str]]) -> str | None:
    """What ranks do not agree about, in words.

    Args:
        told: by rank, what :func:`flat` made of all that they have to agree about.
    """
    names = dict.fromkeys(name for one in told.values() for name in one)
    differing = [name for name in names if len({one.get(name) for one in told.values()}) > 1]
    if not differing:
        return None
    name = differing[0]
    ranks: dict[str | None, list[int]] = {}
    for rank, one in sorted(told.items()):
        ranks.setdefault(one.get(name), []).append(rank)
    said = " and ".join(f"{'nothing' if value is None else value} on {ranks_(has)}" for value, has in ranks.items())
    more = f" ({len(differing) - 1} more differ)" if len(differing) > 1 else ""
    return f"{name} is {said}{more}; all processes need the same code, options and model"


# --- a run ------------------------------------------------------------------------------------------------------------


@contextmanager
def running(device: str = "cpu", *, sequence: int = 1, agree: Mapping[str, Any] | None = None) -> Iterator[Mesh]:
    """The mesh of the processes that torchrun started, for as long as the work in it takes; see above.

    In one process that torchrun did not start it is the trivial mesh and nothing else.

    Args:
        device: ``cpu`` or ``cuda``.
        sequence: ranks that share a sequence.
        agree: what must be the same for all, by name: texts, numbers, lists and mappings of them, or functions that
            return such (a function that raises ends the run like anything else that is raised). The package's code,
            torch's and Python's versions, ``device``, ``sequence`` and the number of processes are always compared.

    Raises:
        UserError: the run failed, and this rank is the one that says so.
        SystemExit: the run failed, and another rank says so. All have the same code: 2, 1 where a fault of ours was
            raised, 130 after an interrupt, 143 after SIGTERM.
    """
    if not torchrun():
        yield start(device, sequence=sequence)
        return
    watch, store = _meet(device)
    let_go = _heed_signals(watch)
    try:
        yield _begin(watch, store, device, sequence, agree or {})
        _finish(watch)
    except BaseException as error:
        _fail(watch, error)
    stop()
    let_go()


def _meet(device: str) -> tuple[Watch, Any]:
    """A watch, and the store for process groups."""
    from torch.distributed import PrefixStore, TCPStore

    rank, size = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE"))
    host, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
    first = rank == 0 and not theirs()
    patience = timedelta(seconds=MEETING)
    speaks = rank == 0 or os.environ.get("LOCAL_RANK") == "0"  # the first of each machine
    failed = f"rank {rank} of {size} could not meet the others at {address()}"

    def give_up() -> NoReturn:
        leave_now({"rank": 0, "text": f"{failed}: nobody answers", "code": 2}, 0 if speaks else 1)

    # Whatever else listens there may not answer, for which torch would wait forever.
    deadline = threading.Timer(MEETING + GRACE, give_up)
    deadline.daemon = True
    deadline.start()
    try:
        # Two connections: at one, one thread waits while another does.
        store, own = (
            TCPStore(host, port, is_master=master, timeout=patience, wait_for_workers=False)
            for master in (first, False)
        )
        attempt = f"bernini/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        mortal = torch.device(device).type == "cpu"
        return Watch(PrefixStore(f"{attempt}/watch", own), rank, size, mortal), PrefixStore(f"{attempt}/groups", store)
    except (RuntimeError, ValueError) as error:
        if not speaks:
            raise SystemExit(2) from None
        said = str(error).splitlines()[0]
        if "EADDRINUSE" in said or "in use" in said:
            said = "the port is in use; choose another with --master-port, or let torchrun --standalone find one"
        raise UserError(f"{failed}: {said}") from None
    finally:
        deadline.cancel()


def _begin(watch: Watch, store: Any, device: str, sequence: int, agree: Mapping[str, Any]) -> Mesh:
    watch.start()
    ranks, told = range(watch.size), dict[int, dict[str, str]]()
    told[watch.rank] = flat(
        {
            "the version of bernini": __version__,
            "the version of torch": torch.__version__,
            "the version of Python": platform.python_version(),
            "the number of processes": watch.size,
            "the device": device,
            "the size of a sequence group": sequence,
            **{name: value() if callable(value) else value for name, value in agree.items()},
            "code": own_code(),
        }
    )
    watch.store.set(f"facts/{watch.rank}", json.dumps(told[watch.rank]))

    def all_told() -> bool:
        for rank in ranks:
            if rank not in told and watch.store.check([f"facts/{rank}"]):
                told[rank] = json.loads(watch.store.get(f"facts/{rank}"))
                if said := difference(told):
                    watch.fail(said)
                    watch.check()
        return len(told) == watch.size

    if not watch.until(lambda: all_told() or watch.all_have("person"), MEETING):
        absent = [rank for rank in ranks if not watch.store.check([f"person/{rank}"])]
        watch.fail(f"{ranks_(absent)} of {watch.size} did not come to {address()} within {MEETING:.0f} s")
    watch.met = True
    watch.until(all_told)
    return start(device, sequence=sequence, store=store, wrap=watch.wrap)


def _finish(watch: Watch) -> None:
    """Waits for all to finish."""
    for trace in watch.traces:
        trace.ended = True
    watch.show()
    watch.store.set(f"done/{watch.rank}", "")
    watch.until(lambda: watch.all_have("done"))
    watch.look()
    watch.check()
    watch.store.set(f"left/{watch.rank}", "")
    watch.until(lambda: watch.all_have("left"))
    watch.end()
    _let_go(watch)


def _let_go(watch: Watch) -> None:
    """Of the store. It goes with rank 0 if it is not torchrun's, so that goes last."""
    if theirs():
        return
    with suppress(RuntimeError, Over):
        watch.store.set(f"gone/{watch.rank}", "")
        if watch.rank == 0:
            watch.until(lambda: watch.all_have("gone"), GRACE)


def _fail(watch: Watch, error: BaseException) -> NoReturn:
    """Tells the others, and raises what this rank ends with."""
    watch.unwinding = True
    own = watch.over is None
    if own and not isinstance(error, UserError) and _of_others(error):  # what is the matter with them?
        with suppress(Over):
            watch.until(watch.lost, GRACE)
        own = watch.over is None
    name = f"rank {watch.rank} of {watch.size}"
    if not own:
        pass
    elif isinstance(error, UserError):
        watch.fail(f"{error} ({name})")
    elif isinstance(error, KeyboardInterrupt):
        watch.fail("interrupted", 130)
    elif isinstance(error, SystemExit):
        watch.fail(f"{name} left with {error.code}", error.code if isinstance(error.code, int) else 1)
    elif _of_others(error):
        watch.fail(f"{name} lost the others{watch.where}: {_first_line(error)}")
    else:
        last = traceback.extract_tb(error.__traceback__)[-1]
        watch.fail(f"{name} failed: {_first_line(error)} ({last.filename}:{last.lineno})", 1)
    over = watch.over
    assert over is not None
    watch.end()
    watch.over = None
    _let_go(watch)
    if threading.current_thread() is threading.main_thread():
        # Whatever hangs from here on, torch's threads for one, ends with the process.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LAST)
    if over["rank"] != watch.rank:
        raise SystemExit(over["code"]) from None
    if own and not isinstance(error, UserError) and not _of_others(error):
        error.add_note(f"({name}; the others have ended with it)")
        raise error
    raise UserError(over["text"]) from None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _of_others(error: BaseException) -> bool:
    """Whether an error comes from talking to other ranks."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    places = (os.path.join("torch", "distributed"), os.path.join("parallel", "group.py"))
    spoken = any(place in file for file in files for place in places)
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and spoken)


def _heed_signals(watch: Watch) -> Callable[[], None]:
    """Wakes the watch when a signal comes, even where the main thread waits in C++. Returns what undoes it."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None

    def nothing(number: int, frame: FrameType | None) -> None:
        """The watch has been told."""

    before = signal.signal(signal.SIGTERM, nothing)
    wakeup = signal.set_wakeup_fd(watch.awake, warn_on_full_buffer=False)

    def undo() -> None:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, before)

    return undo
