"""Case files: what is to be made, as the JSON objects that the public release comes with.

    {"task_type": "v2v", "prompt": "make it snow", "video": "in.mp4", "num_frames": 33, "output": "out.mp4"}

Only ``prompt`` is required, and every number has the public name of its option. A list of such objects is a ``.json``
file, or a ``.jsonl`` file with one of them per line. Only plain Python here: files are read and checked before any
heavy library is.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from .request import Request

PUBLIC_ROOT = Path("assets/testcases")  # where the public repository keeps the files that its own cases name
MOST = 1_000_000  # of frames, steps, pixels: more is a slip of the finger, and overflows further down
SCALES = ("vid", "img", "txt", "tgt")


@dataclass(frozen=True)
class Case:
    """One generation as a file describes it.

    ``options`` holds what the file sets, under the names of :class:`bernini.request.Request`'s fields (``omega_*``
    for the single scales); the paths of sources are those of files that exist.
    """

    name: str
    options: Mapping[str, Any]
    output: Path | None = None


# --- values, as the command line and case files have them ------------------------------------------------------------


def count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is not a whole number")
    if value < 1:
        raise ValueError(f"must be positive, got {value}")
    if value > MOST:
        raise ValueError(f"must be at most {MOST}, got {value}")
    return value


def seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise ValueError(f"must be a whole number from 0 to 2^64 - 1, got {value!r}")
    return value


def number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"must be a finite number, got {value}")
    return value


def rate(value: Any) -> float:
    value = number(value)
    if not 0.1 <= value <= 1000:
        raise ValueError(f"must be from 0.1 to 1000 frames per second, got {value:g}")
    return value


def positive(value: Any) -> float:
    value = number(value)
    if value <= 0:
        raise ValueError(f"must be positive, got {value:g}")
    return value


def thresholds(value: Any) -> tuple[float, ...]:
    values = tuple(map(number, value if isinstance(value, list | tuple) else [value]))
    if not 1 <= len(values) <= 3:
        raise ValueError(f"takes 1 to 3 numbers, got {len(values)}")
    return values


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be text, got {_kind(value)}")
    return value


def _paths(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    for path in values:
        if not isinstance(path, str) or not path:
            raise ValueError(f"must be a path or a list of paths, got {_kind(path)}")
    return values


def _kind(value: Any) -> str:
    if value == "":
        return "an empty text"
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), "null")


_KEYS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "task_type": ("task", text),
    "prompt": ("prompt", text),
    "neg_prompt": ("negative_prompt", text),
    "guidance_mode": ("mode", text),
    "video": ("videos", _paths),
    "image": ("images", _paths),
    "images": ("images", _paths),
    "output": ("output", text),
    "num_frames": ("num_frames", count),
    "height": ("height", count),
    "width": ("width", count),
    "fps": ("fps", rate),
    "seed": ("seed", seed),
    "num_inference_steps": ("steps", count),
    "flow_shift": ("flow_shift", positive),
    "max_image_size": ("max_size", count),
    **{f"omega_{name}": (f"omega_{name}", number) for name in SCALES},
    "omega_scale": ("switch_factor", number),
    "eta": ("eta", number),
    "norm_threshold": ("thresholds", thresholds),
    "momentum": ("momentum", number),
    "planning_step": ("planning_steps", count),
    "vit_denoising_step": ("decoder_steps", count),
    "vit_txt_cfg": ("vit_txt_cfg", number),
    "vit_img_cfg": ("vit_img_cfg", number),
}
"""The public name of each key, what it is called here, and the check of its value."""


# --- files ------------------------------------------------------------------------------------------------------------


def read_case(path: Path, case_root: Path | None = None) -> Case:
    """The case of a file.

    Args:
        case_root: stands for ``assets/testcases`` where the public repository's own cases name their sources.

    Raises:
        UserError: the file or a medium it names is missing, it is no JSON object, or a key or value is wrong.
    """
    return _case(path.stem, str(path), _parse(str(path), _read(path)), path.parent, case_root)


def read_cases(path: Path, case_root: Path | None = None) -> list[Case | UserError]:
    """The cases of a ``.json`` list or a ``.jsonl`` file; one that is wrong is an error in its place.

    Raises:
        UserError: the file is missing, or is not a list as a whole.
    """
    text, lines = _read(path), path.suffix.lower() == ".jsonl"
    if lines:
        items = [(f"{path}, line {n}", line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    elif path.suffix.lower() == ".json":
        value = _parse(str(path), text)
        if not isinstance(value, list):
            raise UserError(f"{path}: must hold a list of cases, holds {_kind(value)}; a single case is for --case")
        items = [(f"{path}, case {n}", item) for n, item in enumerate(value, 1)]
    else:
        raise UserError(f"{path}: a list of cases is a .json or a .jsonl file")
    if not items:
        raise UserError(f"{path}: holds no case")
    cases: list[Case | UserError] = []
    for n, (where, item) in enumerate(items, 1):
        try:
            value = _parse(where, item) if lines else item
            cases.append(_case(f"{path.stem}_{n:03d}", where, value, path.parent, case_root))
        except UserError as error:
            cases.append(error)
    return cases


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not JSON (not a text in UTF-8)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _parse(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        place = f"line {error.lineno}, column {error.colno}: {error.msg}" if isinstance(error, ValueError) else "nested"
        raise UserError(f"{where}: is not JSON ({place})") from None


def _case(name: str, where: str, value: Any, folder: Path, case_root: Path | None) -> Case:
    if not isinstance(value, dict):
        raise UserError(f"{where}: must hold a JSON object, holds {_kind(value)}")
    options: dict[str, Any] = {}
    for key, given in value.items():
        if key not in _KEYS:
            near = nearest(key, _KEYS)
            raise UserError(f"{where}: unknown key {key!r}{near or '; there are ' + ', '.join(_KEYS)}")
        if given is None:  # as if it was not there
            continue
        field, check = _KEYS[key]
        try:
            checked = check(given)
        except ValueError as error:
            raise UserError(f"{where}: {key}: {error}") from None
        if check is _paths:
            found = [_find(f"{where}: {key}", path, folder, case_root) for path in checked]
            options[field] = [*options.get(field, ()), *found]
        else:
            options[field] = checked
    if "prompt" not in options:
        raise UserError(f"{where}: the key 'prompt' is missing")
    output = options.pop("output", None)
    return Case(name, sized(options, where), None if output is None else _place(output, folder))


def sized(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``height`` and ``width`` joined to ``size``.

    Raises:
        UserError: one without the other.
    """
    joined = {name: value for name, value in options.items() if name not in ("height", "width")}
    if len(joined) < len(options):
        if "height" not in options or "width" not in options:
            raise UserError(f"{where}: height and width belong together, and only one is given")
        joined["size"] = (options["height"], options["width"])
    return joined


def nearest(word: str, words: Any) -> str:
    """``; did you mean 'word'?`` if some word is near."""
    near = difflib.get_close_matches(word, list(words), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _candidates(path: str, folder: Path, case_root: Path | None) -> list[Path]:
    given = Path(path).expanduser()
    places = [folder / given, given]  # both are the path itself where that is absolute
    if case_root is not None and given.is_relative_to(PUBLIC_ROOT):
        places.append(case_root / given.relative_to(PUBLIC_ROOT))
    return list(dict.fromkeys(places))


def _find(where: str, path: str, folder: Path, case_root: Path | None) -> Path:
    """The file a case names: beside the case, else from the working directory, else in the public collection."""
    places = _candidates(path, folder, case_root)
    for place in places:
        if place.exists():
            return place
    raise UserError(f"{where}: {path}: no such file{_sought(path, places, case_root)}")


def _place(path: str, folder: Path) -> Path:
    """Where a case wants its result: beside the case or from the working directory, the first whose folder exists.

    Never in the public collection, which is there to be read.
    """
    places = _candidates(path, folder, None)
    return next((place for place in places if place.parent.is_dir()), places[-1])


def _sought(path: str, places: list[Path], case_root: Path | None) -> str:
    if Path(path).is_absolute():
        return ""
    text = f"; looked for {', '.join(str(place.absolute()) for place in places)}"
    if case_root is None and Path(path).is_relative_to(PUBLIC_ROOT):
        text += f"; --case-root DIR tells where {PUBLIC_ROOT} is"
    return text


# --- requests ---------------------------------------------------------------------------------------------------------


def to_request(options: Mapping[str, Any], *, still: bool) -> Request:
    """A request from options under its fields' names, with ``omega_vid`` and the like gathered into ``scales``."""
    from .request import Request

    scales = {name: options[f"omega_{name}"] for name in SCALES if f"omega_{name}" in options}
    fields = {name: value for name, value in options.items() if not name.startswith("omega_")}
    return Request(scales=scales, still=still, **fields)
