"""The small trained model that comes with the package; docs/toy.md tells how it was trained."""

from __future__ import annotations

from pathlib import Path

from .errors import UserError

FOLDER = Path(__file__).parent / "assets" / "toy"
SAYS = "the shipped toy: videos of 32 x 32 pixels, one or two shapes on a plain background"


def shipped() -> Path:
    """Its checkpoint folder.

    Raises:
        UserError: this installation was built without it.
    """
    if not (FOLDER / "config.json").is_file():
        raise UserError(f"no model is shipped with this installation; give --model DIR ({FOLDER} is missing)")
    return FOLDER
