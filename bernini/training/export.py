"""A trained model as a checkpoint: the folder it started from, with what was trained in place of what was there.

Configs, tokenizers and all that was not trained are copied as they are; layout, names and stored dtypes stay those of
the folder it started from.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint import Stored
from ..toy import new_folder
from ..weights import read_header

Places = Mapping[tuple[Path, int], Tensor]
"""Where a tensor lies (file, offset of its first byte) -> what is to be there."""


def places(stored: Mapping[str, Stored], tensors: Mapping[str, Tensor]) -> dict[tuple[Path, int], Tensor]:
    """Of a module: ``stored`` under its own names, as it was opened, and its present tensors."""
    return {(stored[name].file, stored[name].start): tensor for name, tensor in tensors.items() if name in stored}


def write_model(
    start: Path, folder: Path, replaced: Places, components: Mapping[str, Callable[[Path], None]] | None = None
) -> Path:
    """Writes a checkpoint; the folder appears complete or not at all. One that is there already is replaced.

    Args:
        start: the checkpoint that training started from.
        components: subfolders that are written anew by a function, rather than tensor by tensor.
    """
    components = components or {}
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    with new_folder(folder) as work:
        for file in sorted(start.rglob("*")):
            name = file.relative_to(start)
            if file.is_dir() or name.parts[0] in components:
                continue
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".safetensors" and _touched(file, replaced):
                _rewrite(file, work / name, replaced)
            else:
                shutil.copyfile(file, work / name)
        for part, write in components.items():
            write(work / part)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def _touched(file: Path, replaced: Places) -> bool:
    return any(path == file for path, _ in replaced)


def _rewrite(file: Path, target: Path, replaced: Places) -> None:
    header = read_header(file)
    tensors = {}
    with safe_open(str(file), framework="pt") as stored:
        for name, place in header.items():
            tensor = replaced.get((file, place.start))
            if tensor is None or place.size == 0:
                tensors[name] = stored.get_tensor(name)
            else:
                assert place.torch_dtype is not None and tuple(tensor.shape) == place.shape
                tensors[name] = tensor.detach().to("cpu", place.torch_dtype).contiguous()
        save_file(tensors, target, metadata=stored.metadata() or {"format": "pt"})
