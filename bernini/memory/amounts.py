"""Amounts of memory as people write them. Imports nothing, so that a mistyped one is answered at once."""

from __future__ import annotations


def amount(size: int) -> str:
    """``11.5 GiB``, ``320 MiB``."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def whole(size: int) -> str:
    """As :func:`amount`, so rounded that it is enough and the option takes it: ``11776MiB``."""
    return f"{-(-size // 2**20)}MiB"


def memory_size(text: str) -> int:
    """Bytes from ``12GiB``, ``12G`` (the same), ``500MiB`` or, in powers of ten, ``12GB``.

    Raises:
        ValueError: none of these.
    """
    letters = text.strip().lower().lstrip("0123456789.")
    figure = text.strip()[: len(text.strip()) - len(letters)]
    units = {f"{unit}{end}": (1000 if end == "b" else 1024) ** power
             for power, unit in enumerate("kmgt", 1) for end in ("", "b", "ib")}  # fmt: skip
    try:
        size = int(float(figure) * units[letters.strip()])
    except (KeyError, ValueError):
        raise ValueError(f"{text!r} is not an amount of memory, e.g. 12GiB or 800MiB") from None
    if size < 1:
        raise ValueError(f"must be more than nothing, is {text}")
    return size
