"""``bernini generate``: options and case files -> jobs -> one loaded model -> files.

Everything that can be wrong is looked at before what takes long: options and outputs, then device and backend, then
the sources, then the checkpoint.
"""

from __future__ import annotations

import argparse
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .cases import Case, read_case, read_cases, to_request
from .cli_options import Place, place, request_options
from .cli_ranks import options, sizes, together
from .cli_screen import Stopwatch, progress_bar, quiet_libraries, say
from .errors import UserError
from .shipped import SAYS, shipped

if TYPE_CHECKING:
    from bernini.parallel.mesh import Mesh

    from .geometry import Geometry
    from .media import Clip
    from .pipeline import Bernini
    from .planner.stage import Planned
    from .request import Request, Settings


@dataclass(frozen=True)
class Job:
    """A request and where its result goes, both checked."""

    name: str
    request: Request
    settings: Settings
    output: Path | None
    frames_dir: Path | None = None
    plan_out: Path | None = None
    plan_image: Path | None = None


def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit code."""
    if args.model is None:
        args.model = str(shipped())
        say(f"no --model: {SAYS}")
    agree = {"option": options(args), "model": lambda: sizes(Path(args.model))}
    with together(args.device, agree=agree) as mesh:
        return _run(args, mesh) if args.inputs is None else _run_list(args, mesh)


def _run(args: argparse.Namespace, mesh: Mesh) -> int:
    case = Case("result", {}) if args.case is None else read_case(args.case, args.case_root)
    folder = args.case is not None and args.output is not None and args.output.is_dir()
    job = _job(case, args, _about(args), folder=folder)
    where = _place(args, mesh)
    quiet_libraries()
    with _enough_memory():
        job = _with_sources(job)
        _generate(_load(args, where, mesh), where, job, write=mesh.first)
    return 0


def _run_list(args: argparse.Namespace, mesh: Mesh) -> int:
    """All cases of a list with one model; those that fail are told apart from the others."""
    if args.frames_dir is not None:
        raise UserError("--frames-dir is for a single result, not for --inputs")
    for name in ("plan", "plan_out", "plan_image"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for a single result, not for --inputs")
    cases = read_cases(args.inputs, args.case_root)
    about = _about(args)
    where = _place(args, mesh)
    failures: list[str] = []

    def failed(name: str, why: str) -> None:
        failures.append(name)
        say(f"bernini generate: {why}")

    with _folder(args.output):
        jobs: dict[Path | None, Job] = {}
        for case in cases:
            try:
                if isinstance(case, UserError):
                    raise case
                job = _job(case, args, about, folder=True)
                if job.output in jobs:
                    raise UserError(f"{job.output} is the output of {jobs[job.output].name} already")
                jobs[job.output] = job
            except UserError as error:
                name = "a case" if isinstance(case, UserError) else case.name
                failed(name, str(error) if isinstance(case, UserError) else f"{name}: {error}")
        if jobs:
            quiet_libraries()
            with _enough_memory():
                model = _load(args, where, mesh)
        for job in jobs.values():
            try:
                with _enough_memory():
                    _generate(model, where, _with_sources(job), write=mesh.first)
            except UserError as error:
                failed(job.name, f"{job.name}: {error}")
            except Exception:  # a fault of ours, which the cases that wait shall not suffer from
                failed(job.name, f"{job.name}: {traceback.format_exc()}")
    lost = f"; {len(failures)} failed: {', '.join(failures)}" if failures else ""
    print(f"{args.inputs}: {len(cases) - len(failures)} of {len(cases)} cases made{lost}")
    return 2 if failures else 0


@contextmanager
def _folder(path: Path | None) -> Iterator[None]:
    """Makes the folder for results, and takes it away again if nothing came into it."""
    if path is None or path.is_dir():
        yield
        return
    try:
        if path.suffix:
            raise FileExistsError(0, "a file name, but a folder is needed for --inputs")
        path.mkdir()
    except OSError as error:
        raise UserError(f"--output {path}: cannot be made a folder ({error.strerror})") from None
    try:
        yield
    finally:
        with suppress(OSError):  # it is not empty
            path.rmdir()


@contextmanager
def _enough_memory() -> Iterator[None]:
    """Turns running out of memory into a sentence that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's error is a RuntimeError, the CPU's a bare one
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        raise UserError(
            "out of memory; fewer --num-frames, a smaller --size, --dtype bfloat16, --low-memory or a --memory limit "
            "take less"
        ) from error


# --- what is asked for ------------------------------------------------------------------------------------------------


def _job(case: Case, args: argparse.Namespace, about: tuple[bool, Geometry], *, folder: bool) -> Job:
    """A case with the command line's options over it.

    ``about``: whether the model has a planner, and its geometry.
    ``folder``: ``--output``, if given, is a folder, in which the file is named after the case's own output or the case.
    """
    from .frames_folder import check_frames_folder
    from .media_write import check_output, is_picture
    from .presets import TASKS
    from .request import settle

    asked = {**case.options, **request_options(args)}
    if "prompt" not in asked:
        raise UserError("give a --prompt, or a case file with --case")
    output: Path | None = case.output if folder or args.output is None else args.output
    still = output is not None and is_picture(output)
    request = to_request(asked, still=still)
    planner, geometry = about
    settings = settle(request, planner=planner, geometry=geometry)
    if folder and args.output is not None:
        suffix = ".png" if TASKS[settings.task].still else ".mp4"
        output = args.output / (case.name + suffix if output is None else output.name)
    if output is None and args.frames_dir is None:
        raise UserError("give an --output" + ("" if args.case is args.inputs is None else "; the case names none"))
    if output is not None:
        _check_not_a_source(output, request)
        try:
            check_output(output, settings.frames)
        except UserError as error:
            hint = "; the case names it, --output overrides it" if output is case.output else ""
            raise UserError(f"{error}{hint}") from None
    if args.frames_dir is not None:
        check_frames_folder(args.frames_dir)
    _check_plan(args, request, planner, output)
    return Job(case.name, request, settings, output, args.frames_dir, args.plan_out, args.plan_image)


def _check_plan(args: argparse.Namespace, request: Request, planner: bool, output: Path | None) -> None:
    from .planner.plan_file import load_plan

    for path, ending in ((args.plan_out, ".safetensors"), (args.plan_image, ".png")):
        if path is None:
            continue
        if not planner:
            raise UserError(f"{path}: there will be no plan; this checkpoint has no planner")
        if path.suffix.lower() != ending:
            raise UserError(f"{path}: must end in {ending}")
        if path.is_dir() or not path.absolute().parent.is_dir():
            what = "is a folder" if path.is_dir() else f"the folder {path.parent} does not exist"
            raise UserError(f"{path}: {what}")
        if output is not None and path.resolve() == output.resolve():
            raise UserError(f"{path}: is the --output as well; the result would take its place")
        _check_not_a_source(path, request)
    if isinstance(request.plan, Path):
        load_plan(request.plan)


def _check_not_a_source(output: Path, request: Request) -> None:
    for source in (*request.videos, *request.images):
        if isinstance(source, Path) and source.exists() and output.exists() and source.samefile(output):
            raise UserError(f"{output}: is a source; the result would take its place")


def _with_sources(job: Job) -> Job:
    """With the files read, so that they are known to be good before a model is loaded."""
    from .sources import read_sources

    return replace(job, request=read_sources(job.request, job.settings))


# --- doing it ---------------------------------------------------------------------------------------------------------


def _about(args: argparse.Namespace) -> tuple[bool, Geometry]:
    """What requests depend on, from the checkpoint's configs: the weights are looked at last."""
    from .geometry import peek

    return peek(args.model, args.components)


def _place(args: argparse.Namespace, mesh: Mesh) -> Place:
    """Of several processes, each has its own GPU."""
    return place(args.device if mesh.alone else str(mesh.device), args.dtype, args.attention)


def _load(args: argparse.Namespace, where: Place, mesh: Mesh) -> Bernini:
    from bernini.parallel.policy import Policy
    from bernini.parallel.share import LEAST, Share

    from .pipeline import Bernini

    return Bernini.from_pretrained(
        args.model,
        device=where.device,
        dtype=where.dtype,
        attention=where.attention,
        low_memory=args.low_memory,
        memory=args.memory,
        vae_tiling=args.vae_tiling,
        components=args.components,
        share=Share(
            mesh.world,
            LEAST if args.share_from is None else args.share_from,
            args.branches == "auto",
            Policy(args.swap),
        ),
    )


def _generate(model: Bernini, where: Place, job: Job, *, write: bool) -> None:
    """``write``: whether this is the process that writes; the others only work."""
    from .sources import result_shape

    settings = job.settings
    choice = model.fit(job.request)
    frames, height, width = result_shape(job.request, settings)
    planning = settings.planning
    plans = f"{planning.steps} planning steps, " if planning is not None and job.request.plan is None else ""
    say(
        f"{job.name}: task {settings.task}, mode {settings.mode}, preset {settings.preset_name}, {plans}"
        f"{settings.steps} steps, "
        f"{frames} frame{'s' if frames > 1 else ''} of {height}x{width}, seed {job.request.seed}; {where.describe()}"
    )
    if choice is not None:
        say(f"{job.name}: {choice.describe()}")
    with progress_bar() as progress:
        watch = Stopwatch(progress)
        clip = model.generate(job.request, watch, partial(_write_plan, job) if write else None)
        summary = watch.summary()
    if model.placement is not None and model.placement.apart:
        say(f"{job.name}: {model.placement.describe()}")
    say(f"{job.name}: {summary}")
    for path, write_one in _writers(job, clip) if write else ():
        write_one()
        frames, height, width, _ = clip.frames.shape
        print(f"{path}: {frames} frame{'s' if frames > 1 else ''} of {height}x{width}", flush=True)


def _write_plan(job: Job, planned: Planned) -> None:
    """Written before anything is rendered: rendering is what takes long."""
    from .media_write import save_picture
    from .planner.plan_file import save_plan
    from .planner.plan_image import plan_image

    if job.plan_out is not None:
        save_plan(job.plan_out, planned.plan)
    if job.plan_image is not None:
        save_picture(job.plan_image, plan_image((planned.plan.visual, planned.plan.embeds), planned.sources))


def _writers(job: Job, clip: Clip) -> Sequence[tuple[Path, Callable[[], None]]]:
    from .frames_folder import write_frames
    from .media_write import write_media

    writers: list[tuple[Path, Callable[[], None]]] = []
    if job.output is not None:
        output = job.output
        writers.append((output, lambda: write_media(output, clip)))
    if job.frames_dir is not None:
        folder = job.frames_dir
        writers.append((folder, lambda: write_frames(folder, clip.frames)))
    return writers
