"""What a checkpoint folder holds and what is wrong with it, from configs and file headers; no weights are read.

print(render(inspect("checkpoint")))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checkpoint import derive, expected_shapes, expert_tensors, mismatches
from .geometry import Geometry
from .layouts import ExpertPlace, Layout, read_layout
from .renderer.config import RendererConfig
from .renderer.sampler import Which
from .weights import CheckpointError, Found, Stored, read_json, scan

TOKENIZERS = ("tokenizer.json", "spiece.model", "sentencepiece.bpe.model", "vocab.json")
"""Files of which a tokenizer has at least one."""
BUNDLE_PARTS = {
    "diff_dec.transformer.": ("high-noise expert", (1095,)),
    "diff_dec_low.transformer_2.": ("low-noise expert", (1095,)),
    "mllm.": ("language model of the planner", (729,)),
    "t5_text_encoder.": ("text encoder", (242, 243)),  # with or without the second copy of the embedding
    "vit_decoder.net.": ("ViT-embedding decoder", (140,)),
    "connector.": ("connector", (12,)),
    "mask_tokens": ("mask token", (1,)),
}
"""Prefixes inside a full bundle: what they are, and how many tensors they have as released."""


@dataclass
class Component:
    """One folder with weights, or one prefix inside a bundle."""

    name: str
    what: str = ""
    files: int = 0
    bytes: int = 0
    """Of the files; of the tensors where several components share the files."""
    tensors: int = 0
    parameters: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    """Tensors per type, in the spelling of the format (``F32``, ``BF16``)."""
    config: RendererConfig | None = None
    """An expert's dimensions, from its tensors."""
    stated: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Dimensions that config.json states otherwise: (stated, found)."""
    problems: list[str] = field(default_factory=list)


@dataclass
class Report:
    """All about a checkpoint folder."""

    folder: Path
    layout: str = "unknown"
    """``diffusers``, ``raw``, ``bundle`` (see :mod:`bernini.layouts`) or ``unknown``."""
    model_type: str | None = None
    boundary: float | None = None
    """Timestep at which two experts take turns."""
    geometry: Geometry | None = None
    """Strides and defaults, where the layout is known and no value of theirs is wrong."""
    components: list[Component] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Worth knowing, and not wrong."""
    general: list[str] = field(default_factory=list)
    """What is wrong with the checkpoint as a whole."""

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong; empty for a sound checkpoint."""
        return self.general + [problem for component in self.components for problem in component.problems]

    @property
    def parameters(self) -> int:
        return sum(component.parameters for component in self.components)


def inspect(folder: str | Path) -> Report:
    """Looks through a checkpoint. What is broken is reported, not raised.

    Raises:
        CheckpointError: there is no such folder.
    """
    report = Report(Path(folder))
    if not report.folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    try:
        layout = read_layout(report.folder)
    except CheckpointError as error:
        report.general.append(str(error))
        _guess(report)
        return report
    report.layout, report.model_type = layout.kind, layout.model_type
    if layout.kind == "bundle":
        _bundle(report, layout)
    else:
        _renderer(report, layout)
    if len(layout.experts) == 2:
        report.boundary = layout.boundary
    try:
        report.geometry = Geometry.read(report.folder)
    except CheckpointError as error:
        report.general.append(str(error))
    return report


def _guess(report: Report) -> None:
    """Says what can be said without knowing the layout: the weights of every folder one level down."""
    try:
        value = read_json(report.folder / "config.json").get("model_type")
        report.model_type = None if value is None else str(value)
    except CheckpointError:
        pass  # said already
    for folder in sorted(path for path in report.folder.iterdir() if path.is_dir()):
        if any(folder.glob("*.safetensors*")):
            report.components.append(_counted(folder.name, "", scan(folder)))


def _renderer(report: Report, layout: Layout) -> None:
    if layout.remark:
        report.notes.append(layout.remark)
    for role, place in layout.experts.items():
        what = "the only expert" if len(layout.experts) == 1 else f"{role}-noise expert"
        report.components.append(_expert_folder(place, what, needs_config=layout.kind == "diffusers"))
    if layout.kind == "raw":
        report.notes.append(
            "a raw export: the experts only; vae, text_encoder and tokenizer come from another checkpoint"
        )
        return
    configs = [component.config for component in report.components if component.config is not None]
    _part(report, "vae", "video autoencoder", {"z_dim": {config.in_channels for config in configs}})
    _part(report, "text_encoder", "text encoder", {"d_model": {config.text_dim for config in configs}})
    _tokenizer(report, "tokenizer")
    if not (report.folder / "scheduler").is_dir():
        report.notes.append("no scheduler folder; it is not needed")


def _bundle(report: Report, layout: Layout) -> None:
    used = {place.which for place in layout.experts.values()}
    folder = report.folder / "bernini"
    found = scan(folder) if folder.is_dir() else Found(problems=[f"{folder}: no such folder"])
    report.general += found.problems
    left = dict(found.tensors)
    for prefix, (what, counts) in BUNDLE_PARTS.items():
        inside = {name: left.pop(name) for name in list(left) if name.removeprefix("ema.").startswith(prefix)}
        if not inside and (report.folder / prefix.rstrip(".")).is_dir():
            continue  # the text encoder: in the bundle, or in a folder of its own, which is looked at below
        component = _counted(prefix.rstrip("."), what, Found(tensors=inside))
        component.files, component.bytes = len({s.file for s in inside.values()}), sum(s.size for s in inside.values())
        report.components.append(component)
        where = f"{folder}: {prefix}*"
        high = prefix.startswith("diff_dec.")
        expert: Which | None = ("high" if high else "low") if "expert" in what else None
        if expert is not None and expert not in used:
            if inside:
                report.notes.append(f"{where}: not used; config.json skips the {what}")
            else:
                report.components.remove(component)
        elif not inside:
            component.problems.append(f"{where}: no such tensors ({what})")
        elif expert is not None:
            component.what = what if len(used) == 2 else "the only expert"
            file = report.folder / ("transformer_config.json" if high else "transformer_2_config.json")
            config = _config(component, file, needed=True)
            _check_expert(component, inside, expert, config, where)
        elif len(inside) not in counts:
            report.notes.append(f"{where}: {len(inside)} tensors; the released bundles have {counts[-1]}")
    if left:
        names = Counter(name.split(".")[0] for name in left)
        parts = ", ".join(f"{name} ({number} tensors)" for name, number in names.most_common())
        report.general.append(f"{folder}: tensors of unknown parts: {parts}")
    _part(report, "vae", "video autoencoder", {})
    _part(report, "t5_text_encoder", "text encoder", {})
    _tokenizer(report, "t5_tokenizer")
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if not (report.folder / "mllm" / name).is_file():
            report.general.append(f"{report.folder / 'mllm' / name}: no such file")


# --- parts ----------------------------------------------------------------------------------------------------------


def _counted(name: str, what: str, found: Found) -> Component:
    stored = found.tensors.values()
    return Component(
        name=name,
        what=what,
        files=len(found.files),
        bytes=sum(file.stat().st_size for file in found.files),
        tensors=len(stored),
        parameters=sum(tensor.numel for tensor in stored),
        dtypes=dict(Counter(tensor.dtype for tensor in stored).most_common()),
        problems=list(found.problems),
    )


def _config(component: Component, file: Path, *, needed: bool) -> dict[str, Any]:
    if not needed and not file.is_file():
        return {}
    try:
        return read_json(file)
    except CheckpointError as error:
        component.problems.append(str(error))
        return {}


def _expert_folder(place: ExpertPlace, what: str, *, needs_config: bool) -> Component:
    folder = place.folder
    if not folder.is_dir():
        return Component(folder.name, what, problems=[f"{folder}: no such folder"])
    found = scan(folder)
    mine = expert_tensors(found.tensors, place.which)
    component = _counted(folder.name, what, Found(found.files, mine, found.problems))
    config = _config(component, folder / "config.json", needed=needs_config)
    # With a shard gone, the list of the tensors that went with it would only hide the reason.
    if not found.problems:
        _check_expert(component, found.tensors, place.which, config, str(folder))
    return component


def _check_expert(
    component: Component, stored: Mapping[str, Stored], which: Which, config: Mapping[str, Any], where: str
) -> None:
    """Dimensions, and whether all tensors are there."""
    tensors = expert_tensors(stored, which)
    if not tensors:
        component.problems.append(f"{where}: its weights are not those of the {which}-noise expert of a renderer")
        return
    try:
        component.config, component.stated = derive(tensors, config)
        expected = expected_shapes(component.config)
    except (TypeError, ValueError) as error:
        component.problems.append(f"{where}: {error}")
        return
    component.problems += [f"{where}: {problem}" for problem in mismatches(tensors, expected)]
    if component.stated:
        says = ", ".join(f"{key} {stated} (tensors: {found})" for key, (stated, found) in component.stated.items())
        component.problems.append(f"{where}: its config.json states wrong dimensions: {says}")


def _part(report: Report, name: str, what: str, fits: Mapping[str, set[int]]) -> None:
    """A folder with weights of a stock model, whose config must fit the experts'."""
    folder = report.folder / name
    if not folder.is_dir():
        report.components.append(Component(name, what, problems=[f"{folder}: no such folder"]))
        return
    component = _counted(name, what, scan(folder))
    report.components.append(component)
    config = _config(component, folder / "config.json", needed=True)
    for key, values in fits.items():
        if key in config and any(value != config[key] for value in values):
            wanted = ", ".join(str(value) for value in sorted(values))
            component.problems.append(f"{folder}: {key} is {config[key]}, but the experts are made for {wanted}")


def _tokenizer(report: Report, name: str) -> None:
    folder = report.folder / name
    if not folder.is_dir():
        report.general.append(f"{folder}: no such folder")
    elif not any((folder / file).is_file() for file in TOKENIZERS):
        report.general.append(f"{folder}: holds none of {', '.join(TOKENIZERS)}")


# --- as text --------------------------------------------------------------------------------------------------------


def render(report: Report) -> str:
    """The report for people: a line about the whole, a table of the parts, what is to be noted, what is wrong."""
    kinds = {
        "diffusers": "Bernini-R, diffusers layout",
        "raw": "Bernini-R, raw export",
        "bundle": "full Bernini bundle",
        "unknown": "unknown layout",
    }
    lines = [f"{report.folder}: {kinds[report.layout]} (model_type {report.model_type})"]
    if report.boundary is not None:
        lines[0] += f", experts take turns at timestep {report.boundary:g}"
    columns: list[Callable[[Component], str]] = [
        lambda c: c.name,
        lambda c: c.what,
        lambda c: f"{c.files} file" + ("" if c.files == 1 else "s"),
        lambda c: _amount(c.bytes, "B"),
        lambda c: f"{c.tensors} tensors",
        lambda c: f"{_amount(c.parameters)} parameters",
        lambda c: ", ".join(c.dtypes) or "-",
    ]
    cells = [[column(component) for column in columns] for component in report.components]
    widths = [max(len(row[number]) for row in cells) for number in range(len(columns))] if cells else []
    for component, row in zip(report.components, cells, strict=True):
        padded = [
            text.rjust(width) if number in (2, 3, 4, 5) else text.ljust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(padded).rstrip())
        if component.config is not None:
            lines.append(" " * (widths[0] + 4) + _dimensions(component.config))
    if report.geometry is not None:
        lines.append(f"  {report.geometry.describe()}")
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"problem: {problem}" for problem in report.problems] or ["no problems found"]
    return "\n".join(lines)


def _dimensions(config: RendererConfig) -> str:
    return (
        f"{config.num_layers} layers, {config.num_attention_heads} heads x {config.attention_head_dim}, "
        f"feed-forward {config.ffn_dim}, text {config.text_dim}, "
        f"channels {config.in_channels} in, {config.out_channels} out"
    )


def _amount(number: int, unit: str = "") -> str:
    """Three digits and a prefix: ``14.3 G``, ``57.2 GB``."""
    value = float(number)
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5 or prefix == "T":
            break
        value /= 1000
    return f"{value:.3g} {prefix}{unit}".rstrip()
