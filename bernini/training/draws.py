"""Random numbers that follow from a name: training is the same whatever is packed together, in whatever order, by
however many processes.

The convention of keys is ``(run seed, example key, step, purpose)``, for instance ``(0, "t2v/000017", 1200, "noise")``:

=============  =====================================================================================================
part           what it is
=============  =====================================================================================================
run seed       whole number, from the recipe
example key    ``Example.key``: no place in a batch, no rank, no number of a worker
step           optimizer step in which the example is used, counted from 0 over the whole run and kept on resume
purpose        one word for each thing that is drawn, so that a new one changes no other: ``"timestep"``, ``"noise"``,
               ``"posterior"`` (with the number of the source or ``"target"`` behind it), ``"drop"``, ``"mask"``
=============  =====================================================================================================

Where an example comes twice in a step, its repetition is a part of the key as well.
"""

from __future__ import annotations

import hashlib
import json

import torch


def generator(*key: int | str) -> torch.Generator:
    """A fresh generator on the CPU, seeded by the key's BLAKE2b hash.

    torch seeds its CPU generator with the lower 32 bits: among a million keys about a hundred pairs share their
    numbers. For noise that is harmless; do not take it for an identity.

    Raises:
        TypeError: a part of the key that is neither a whole number nor a string, or no key.
    """
    if not key or any(isinstance(part, bool) or not isinstance(part, int | str) for part in key):
        raise TypeError(f"draws: a key is made of whole numbers and strings, got {key!r}")
    # JSON tells 1 from "1" and ("ab", "c") from ("a", "bc").
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def uniform(*key: int | str) -> float:
    """The key's number in [0, 1): what drops are decided with."""
    return float(torch.rand((), dtype=torch.float64, generator=generator(*key)))
