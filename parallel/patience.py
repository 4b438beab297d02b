"""Work that takes some ranks long, while the others wait: files that are read and written, samples that are made.

A rank that waits in a collective is given up after :data:`bernini.parallel.mesh.PATIENCE`; here all ranks say to each
other that they are still at it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from bernini.errors import UserError

from .group import Group

T = TypeVar("T")


def patiently(world: Group, work: Callable[[], T]) -> T:
    """What ``work`` returns, when it is done on every rank. It must not talk to the others.

    Raises:
        Exception: on the rank where ``work`` raised it; on the others a UserError with the words of the first of them.
    """
    if world.size == 1:
        return work()
    with ThreadPoolExecutor(1, thread_name_prefix="work") as pool:
        future, pause = pool.submit(work), 0.01
        while True:
            wait([future], pause)
            error = future.exception() if future.done() else None
            told = world.tell((future.done(), None if error is None else str(error) or type(error).__name__))
            if all(done for done, _ in told):
                break
            pause = min(1.0, 2 * pause)
    failed = next((said for _, said in told if said is not None), None)
    if failed is not None and future.exception() is None:
        raise UserError(failed)
    return future.result()
