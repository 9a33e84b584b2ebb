"""`fused-resnet profile`: one training step of any network, by layer, against the roofline; a page, a picture, a trace."""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..bench.load import LoadError, builder
from ..bench.machine import current_commit
from ..bench.steps import Subject, implementations
from ..bench.table import Column, Titled, console, number, show
from ..profile.analysis import UNSTEADY, Profile, ProfileError, read_profile, write_profile
from ..profile.picture import draw_profiles
from ..profile.report import write_report
from ..profile.run import STAGES, profile_step
from .arguments import Unavailable, UsageError, add_commit, add_form, add_model, blaming, device, one_of, positive

DESCRIPTION = """Profiles one training step: time, rate, bandwidth, launches and the fraction of
the floor by layer, forward and backward, and the gaps between kernels.

The folder of the run gets
  report.html      one file that opens offline: roofline, time by layer, memory
  report.png       the same as a picture
  trace.json.gz    for Perfetto or chrome://tracing, with a track of layers
  profile.json     for --compare

On a CPU the times are the operators' own, and the report says so. --csv and
--json print what the page shows in tables: the step, layers, kernels."""
EXAMPLES = """example:
  fused-resnet profile --model resnet50 --impl ours --out runs/ours
  fused-resnet profile --model torchvision:resnet50 --impl compile --out runs/compile
  fused-resnet profile --model my_models:make_net --batch 32 --size 64
  fused-resnet profile --compare runs/compile runs/ours --out runs/compared
  fused-resnet profile --compare runs/compile runs/ours --csv > layers.csv
"""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FILES = ("report.html", "report.png", "trace.json.gz", "profile.json")
REPORT, PICTURE, TRACE, DATA = FILES
ON_GPU, ON_CPU = (256, 224), (8, 64)  # batch, pixels


def add_parser(commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("profile", help="profile a training step by layer", description=DESCRIPTION, epilog=EXAMPLES)
    add_model(parser, "resnet50")
    parser.add_argument("--impl", type=one_of(*implementations("train")), default="ours", metavar="IMPL",
                        help=f"{', '.join(implementations('train'))} (default: ours, fused where it is not)")  # fmt: skip
    parser.add_argument("--device", type=one_of("auto", "cpu", "cuda"), default="auto", metavar="D", help="auto (default), cpu, cuda")
    parser.add_argument("--dtype", type=one_of(*DTYPES), metavar="D", help="fp32, fp16, bf16 (default: bf16, fp32 on a CPU)")
    parser.add_argument("--batch", type=positive, metavar="N", help="images in a batch (default: 256, 8 on a CPU)")
    parser.add_argument("--size", type=positive, metavar="PIXELS", help="of an image's side (default: 224, 64 on a CPU)")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="show two runs side by side; nothing is run")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the run (default: runs/profile-MODEL-IMPL, runs/profile-compared)")
    add_commit(parser)
    add_form(parser)
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=profile)


def profile(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    if args.compare:
        return _compare(args)
    where = device(args.device)
    with blaming("--model", LoadError):
        make = builder(args.model)
    commit, impl = args.commit or current_commit(), args.impl
    batch, size = ON_GPU if where.type == "cuda" else ON_CPU
    size = args.size or size
    dtype = DTYPES[args.dtype or ("bf16" if where.type == "cuda" else "fp32")]
    folder = _made(args.out or Path("runs") / f"profile-{args.model}-{impl}".replace(":", "-"))
    torch.backends.cudnn.benchmark = where.type == "cuda"  # as `fused-resnet bench` does
    subject = Subject(args.model, make, (3, size, size))
    try:
        with _stages(not args.no_progress) as begins:
            found = profile_step(subject, impl, dtype, args.batch or batch, where, commit, folder / TRACE, begins)
    except LoadError as error:
        raise UsageError("--model", str(error)) from error
    except RuntimeError as error:
        raise Unavailable(f"{args.model} with {impl} can't be profiled on {where}: {error}") from error
    write_profile(found, folder / DATA)
    _show([found], folder, args.form, FILES)
    return 0


def _made(folder: Path) -> Path:
    """The folder, made where it is not there. One that holds a run's profile is refused: it would be written over."""
    if (folder / DATA).exists():
        raise UsageError("--out", f"expected a folder without a profile; {folder} has a {DATA}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _stages(shown: bool) -> Iterator[Callable[[str], object]]:
    """Tells on standard error which of the stages has begun: a bar on a terminal, a line elsewhere."""
    if not shown or not sys.stderr.isatty():
        yield (lambda stage: print(stage, file=sys.stderr, flush=True)) if shown else (lambda stage: None)
        return
    columns = TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=len(STAGES), completed=-1)

        def begins(stage: str) -> None:
            progress.update(bar, description=stage, advance=1)

        yield begins


def _compare(args: argparse.Namespace) -> int:
    profiles = []
    for path in args.compare:
        with blaming("--compare", ProfileError, OSError):
            profiles.append(read_profile(path / DATA if path.is_dir() else path))
    folder = _made(args.out or Path("runs") / "profile-compared")
    _show(profiles, folder, args.form, (REPORT, PICTURE))
    return 0


def _show(profiles: list[Profile], folder: Path, form: str, files: Sequence[str]) -> None:
    """Writes page and picture, and tells of them in a few lines, or of all by tables for programs."""
    write_report(profiles, folder / REPORT)
    draw_profiles(profiles, folder / PICTURE)
    for p in profiles:
        if p.spread > UNSTEADY:
            print(f"warning: the {p.steps} recorded steps lie {p.spread:.0%} of their median apart: the machine was busy", file=sys.stderr)
    if form != "table":
        show(_tables(profiles), form)
        print(f"{folder}: {', '.join(files)}", file=sys.stderr)
        return
    for p in profiles:
        cpu = " (times of a CPU, no figure of a GPU)" if p.meta.device == "cpu" else ""
        console().print(
            f"{p.model}, {p.impl}, {p.dtype}, {p.batch} images: {number(p.step_ms)} ms a step, {number(p.images_per_s)} images/s{cpu}\n"
            f"  floor of the design {p.design} {number(p.floors_ms[p.design])} ms, of everything fused {number(p.floors_ms['fused'])} ms"
        )
    print(f"{folder}: {', '.join(files)}")


def _tables(profiles: Sequence[Profile]) -> list[Titled]:
    """(title, columns) of what the page shows in tables: a line a run, a line a layer and phase, a line a kernel or primitive."""
    steps, parts = [(p, p) for p in profiles], [(p, part) for p in profiles for part in p.parts]
    kernels = [(p, kernel) for p in profiles for kernel in p.kernels]
    primitives = [(p, primitive) for p in profiles for primitive in p.primitives]
    found = [
        ("steps", _columns(steps, {
            "device": lambda p: p.meta.device, "dtype": lambda p: p.dtype, "design": lambda p: p.design,
        }, {
            "batch": lambda p: p.batch, "ms": lambda p: p.step_ms, "images/s": lambda p: p.images_per_s, "gaps, ms": lambda p: p.gap_ms,
            "launches": lambda p: p.launches, "floor, ms": lambda p: p.floors_ms[p.design],
            "floor of everything fused, ms": lambda p: p.floors_ms["fused"], "peak MB": lambda p: p.peak_bytes / 1e6,
        })),
        ("layers", _columns(parts, {"layer": lambda part: part.layer, "phase": lambda part: part.phase}, {
            "ms": lambda part: part.ms, "TFLOP/s": lambda part: part.tflops, "GB/s": lambda part: part.gbytes_per_s,
            "of floor": lambda part: part.fraction, "launches": lambda part: part.launches,
        })),
        ("kernels", _columns(kernels, {"kernel": lambda kernel: kernel[0]}, {
            "calls": lambda kernel: kernel[1], "ms": lambda kernel: kernel[2],
        })),
        ("oneDNN's primitives", _columns(primitives, {
            "implementation": lambda one: one[0], "what": lambda one: one[1], "sizes": lambda one: one[2],
        }, {"calls": lambda one: one[3], "ms": lambda one: one[4]})),
    ]  # fmt: skip
    return found if primitives else found[:-1]


def _columns(lines: Sequence[tuple[Profile, Any]], texts: Mapping[str, Callable], figures: Mapping[str, Callable]) -> list[Column]:
    """Of (the run, what a line is about): the run's names, then what each function tells."""
    found = [(head, [getattr(p, head) for p, _ in lines], False) for head in ("model", "impl")]
    found += [(head, [tell(of) for _, of in lines], False) for head, tell in texts.items()]
    return found + [(head, [_figure(tell(of)) for _, of in lines], True) for head, tell in figures.items()]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
