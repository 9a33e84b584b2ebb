"""`fused-resnet bench`: times kernels, blocks, training and inference against their peers, and writes JSON of one schema."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..bench import kernels, networks
from ..bench.load import LoadError
from ..bench.machine import collect_meta, current_commit, load_average, measure_ceilings
from ..bench.plot import plot_results
from ..bench.schema import SUITES, Results, Row, results_path, write_results
from ..bench.steps import IMPLEMENTATIONS, implementations
from ..bench.table import show, tables
from ..bench.timing import terminated_as_interrupted
from ..problem import ConvProblem, NormProblem
from ..processors import busy
from ..roofline import DEPTHS, resnet
from .arguments import UsageError, add_commit, add_form, add_model, blaming, device, one_of, positive

DESCRIPTION = """Times a suite and writes bench/results/<gpu>/<suite>-<date>-<commit>.json:

  kernels    every pass and every convolution of the backends on a network's
             shapes
  blocks     forward and backward of residual blocks
  train      training steps, optimizer included, and the time to the first step
  inference  forward in evaluation mode, ours with its norms folded

Results are compared with a reference before anything is timed; what is wrong
gets no figure. Peers take turns. What runs out of memory or time, or can't be
had here, is a row that says so, and the rest goes on. What was done is written
also where the run is stopped, by Ctrl-C or SIGTERM. On a CPU the cases are small
and timed by the wall clock: they show that the program works.

Exit code 1 where a result is wrong, or where an implementation of this package
did not run on a GPU, but for cudnn, which is optional. Of convolutions it prints
a line a shape, and where a kernel is slower than the passes."""
EXAMPLES = """example:
  fused-resnet bench train --model resnet18 resnet50 resnet152 --batch 64 128 256
  fused-resnet bench train --model resnet50 --largest 2048 --plot
  fused-resnet bench kernels --dtype fp16 --case norm_add_act --model resnet50
  fused-resnet bench kernels --case convolutions --model resnet50
  fused-resnet bench kernels --shape 64x56x56 256x14x14:512x1x1/2 --batch 64
  fused-resnet bench train --model timm:resnet50d my_models:make_net --batch 64
  fused-resnet bench inference --impl eager_nhwc compile ours --device cpu
"""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ALL = list(dict.fromkeys((*IMPLEMENTATIONS, *kernels.IMPLEMENTATIONS)))
#: Batch and image size where none is given: on a GPU, and on a CPU, where with fewer values a channel batch norm blows up any
#: rounding, and a comparison of gradients says nothing.
ON_GPU, ON_CPU = (256, 224), {"kernels": (4, 64), "blocks": (4, 64), "train": (8, 64), "inference": (8, 64)}
Job = tuple[str, Callable[[], list[Row]]]


def add_parser(commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("bench", help="time kernels, blocks, training, inference", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("suite", type=one_of(*SUITES), metavar="SUITE", help=", ".join(SUITES))
    add_model(parser, ["resnet18", "resnet50"])
    parser.add_argument("--shape", nargs="+", type=shape, default=[], metavar="SHAPE",
                        help="of the suite kernels, instead of a network's: 64x56x56, a tensor for the passes, channels first, or "
                             "64x56x56:128x3x3/2, a convolution that reads it with 128 filters, stride 2")  # fmt: skip
    parser.add_argument("--case", nargs="+", type=one_of(*kernels.GROUPS, *kernels.NAMES), metavar="CASE",
                        help=f"of the suite kernels: {', '.join(kernels.GROUPS)}, or some of {', '.join(kernels.NAMES)} "
                             "(default: all)")  # fmt: skip
    parser.add_argument("--impl", nargs="+", type=one_of(*ALL), metavar="IMPL",
                        help=f"of {', '.join(ALL)} (default: those of the suite that are installed; on a CPU neither "
                             "compilers nor cuDNN)")  # fmt: skip
    parser.add_argument("--device", type=one_of("auto", "cpu", "cuda"), default="auto", metavar="D", help="auto (default), cpu, cuda")
    parser.add_argument("--dtype", type=one_of(*DTYPES), metavar="D", help="fp32, fp16, bf16 (default: bf16, fp32 on a CPU)")
    parser.add_argument("--batch", nargs="+", type=positive, metavar="N", help="images in a batch (default: 256, few on a CPU)")
    parser.add_argument("--size", type=positive, metavar="PIXELS", help="of an image's side (default: 224, less on a CPU)")
    parser.add_argument("--repeats", type=positive, default=50, metavar="N", help="timed calls of each (default: 50)")
    parser.add_argument("--limit", type=positive, default=120, metavar="SECONDS",
                        help="for building one implementation of a case, for timing it, for finding its largest batch "
                             "(default: 120)")  # fmt: skip
    parser.add_argument("--largest", type=positive, default=0, metavar="N",
                        help="find the largest batch that fits, up to N images, and the throughput there")  # fmt: skip
    parser.add_argument("--plot", action="store_true", help="draw a picture beside the JSON")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), metavar="FOLDER", help="default: bench/results")
    add_commit(parser)
    add_form(parser)
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=bench)


def shape(text: str) -> NormProblem | ConvProblem:
    """The type of an argument: a tensor's shape, or a convolution's, for one image."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?::(\d+)x(\d+)x(\d+)(?:/(\d+))?)?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"expected CxHxW, or CxHxW:KxRxS with /STRIDE behind it or without; got {text!r}")
    c, h, w, *conv = (int(n) if n else None for n in found.groups())
    try:
        if conv[0] is None:
            return NormProblem(1, c, h, w)
        k, r, s, stride = conv
        return ConvProblem(1, c, h, w, k, r, s, (1 if stride is None else stride,) * 2, (r // 2, s // 2))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def bench(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    where = device(args.device)
    on_gpu = where.type == "cuda"
    args.commit = args.commit or current_commit()
    batch, size = ON_GPU if on_gpu else ON_CPU[args.suite]
    args.batch, args.size = args.batch or [batch], args.size or size
    dtype = DTYPES[args.dtype or ("bf16" if on_gpu else "fp32")]
    known = kernels.IMPLEMENTATIONS if args.suite == "kernels" else implementations(args.suite)
    chosen = _implementations(args, known, on_gpu)
    if args.suite == "kernels" and (others := [name for name in args.model if name not in DEPTHS]):
        raise UsageError("--model", f"expected some of {', '.join(DEPTHS)}, whose shapes are known; got {others[0]!r}; or use --shape")
    of_networks = tuple(suite for suite in SUITES if suite != "kernels")
    limited = (("--case", args.case, ("kernels",)), ("--shape", args.shape, ("kernels",)), ("--largest", args.largest, of_networks))
    for option, value, suites in limited:
        if value and args.suite not in suites:
            raise UsageError(option, f"expected the suite {' or '.join(suites)}; got {args.suite}")

    torch.backends.cudnn.benchmark = on_gpu  # for all peers: the framework's convolutions are chosen by measuring
    torch.manual_seed(0)
    load = load_average()
    ceilings = measure_ceilings(where, dtype, args.repeats)
    if note := busy():
        print(note, file=sys.stderr)
    common = where, dtype, ceilings, chosen, args.repeats, args.limit
    suite = kernels.Kernels(*common) if args.suite == "kernels" else networks.Networks(args.suite, *common, args.largest)
    with blaming("--model", LoadError):
        jobs = list(_jobs(args, suite))
    if not jobs:
        raise UsageError("--case", "expected cases of these shapes: passes of a tensor, convolutions without a projection of a convolution")
    with terminated_as_interrupted():
        rows, stopped = _run(jobs, not args.no_progress)
    if not rows:  # stopped before the first case was done
        raise KeyboardInterrupt
    if not stopped:  # another program may have slowed down the first measurement
        ceilings = ceilings.best(measure_ceilings(where, dtype, args.repeats))
        rows = suite.refined(rows, ceilings)
    rows = (kernels.ceiling_rows(ceilings, dtype) if args.suite == "kernels" else []) + rows

    results = Results(collect_meta(where, args.commit, load), rows)
    path = results_path(args.out, results)
    write_results(results, path)
    clock = "" if on_gpu else ", by the wall clock: no figure of a GPU"
    found, notes = tables(rows)
    show([(f"{args.suite} on {results.meta.device}{clock}", table) for table in found], args.form)
    out = sys.stdout if args.form == "table" else sys.stderr
    for note in notes:
        print(note, file=out)
    print(f"written to {path}", file=out)
    if args.plot:
        with blaming("--plot", ValueError):
            plot_results(results, path.with_suffix(".png"))
        print(f"picture: {path.with_suffix('.png')}", file=out)
    if stopped:
        raise KeyboardInterrupt
    return int(any(_failed(row, on_gpu) for row in rows))


def _implementations(args: argparse.Namespace, known: tuple[str, ...], on_gpu: bool) -> tuple[str, ...]:
    if others := [impl for impl in args.impl or () if impl not in known]:
        raise UsageError("--impl", f"expected some of {', '.join(known)} in the suite {args.suite}; got {others[0]!r}")
    return tuple(args.impl or [impl for impl in known if _by_default(args.suite, impl, on_gpu)])


def _by_default(suite: str, impl: str, on_gpu: bool) -> bool:
    """Whether an implementation is timed though nobody named it."""
    how = IMPLEMENTATIONS.get(impl)
    if how and (not how.installed or how.frozen or how.onnx):  # the last two are of CPUs, and slow to build
        return False
    if suite == "kernels" and impl in kernels.BY_NAME:
        return False
    return on_gpu or not impl.startswith(("compile", "cudnn"))


def _failed(row: Row, on_gpu: bool) -> bool:
    if row.impl == "ours:cudnn" and row.status.startswith("unsupported"):  # an optional package, and cuDNN's own answers
        return False
    return row.status.startswith("wrong") or (on_gpu and row.impl.startswith("ours") and row.status != "ok" and ":" not in row.case)


def _jobs(args, suite: kernels.Kernels | networks.Networks) -> Iterator[Job]:
    """(what it is called, what measures it) of every case."""
    subjects = [] if args.suite == "kernels" else networks.subjects(args.suite, args.model, args.size)
    names = [name for case in args.case or kernels.GROUPS for name in kernels.GROUPS.get(case, (case,))]
    for batch in args.batch:
        if args.shape:
            yield from suite.jobs_of_shapes([replace(shape, n=batch) for shape in args.shape], names)
        elif args.suite == "kernels":
            yield from suite.jobs([resnet(model, batch, args.size) for model in args.model], names)
        for subject in subjects:
            yield f"{subject.name}, batch {batch}", partial(suite.rows, subject, batch)


def _run(jobs: list[Job], enabled: bool) -> tuple[list[Row], bool]:
    """(the rows of all jobs, whether they were stopped before the last), with a bar on a terminal and a line a job elsewhere."""
    terminal = sys.stderr.isatty()
    columns = TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn()
    rows = []
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not (enabled and terminal)) as progress:
        task = progress.add_task("", total=len(jobs))
        try:
            for words, measured in jobs:
                progress.update(task, description=words)
                if enabled and not terminal:
                    print(words, file=sys.stderr, flush=True)
                rows += measured()
                progress.advance(task)
        except KeyboardInterrupt:
            return rows, True
    return rows, False
