"""`fused-resnet tune`: measures which convolutions of a network are faster as Triton kernels or cuDNN's graphs, and keeps what it found."""

import argparse
import importlib.metadata
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import backends
from ..backends.cudnn import why_not_device
from ..bench.journal import Journal
from ..bench.load import LoadError, builder
from ..bench.machine import current_commit
from ..bench.schema import DATE_FORMAT
from ..bench.table import Column, number, show
from ..bench.tune import Outcome, in_order, tasks_of, tune
from ..cudnn.probe import why_not_graphs
from ..tuning import Entry, Table, Task
from ..tuning.table import Meta, TableError, add_to_table, path_of, read_table
from ..tuning.task import KINDS
from .arguments import Unavailable, add_commit, add_form, add_model, blaming, device, one_of, positive

DESCRIPTION = """Times every convolution of a network's training step, forward and backward, as
the passes do it, as a Triton kernel with several tilings and as cuDNN's graph, each checked
first, and writes the fastest of each to a table in the user's cache, which the
backend `tuned`, and so `auto`, reads from then on. It goes on where it stopped:
what the table has is not measured again, unless --again.

A choice serves batches of half to twice the size. Nothing is tuned while a
network trains."""
EXAMPLES = """example:
  fused-resnet tune --model resnet50 --batch 256 --dtype bf16
  fused-resnet tune --model resnet18 resnet50 --batch 64 256 --limit 3600 --candidates 16
"""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def add_parser(commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("tune", help="measure which kernels a network should use", description=DESCRIPTION, epilog=EXAMPLES)
    add_model(parser, ["resnet50"])
    parser.add_argument("--batch", nargs="+", type=positive, metavar="N", help="images in a batch (default: 256, 2 on a CPU)")
    parser.add_argument("--dtype", type=one_of(*DTYPES), metavar="D", help="fp32, fp16, bf16 (default: bf16, fp32 on a CPU)")
    parser.add_argument("--size", type=positive, metavar="PIXELS", help="of an image's side (default: 224, 16 on a CPU)")
    parser.add_argument("--device", type=one_of("auto", "cpu", "cuda"), default="auto", metavar="D", help="auto (default), cpu, cuda")
    parser.add_argument("--kind", nargs="+", type=one_of(*KINDS), metavar="KIND", help="fprop, dgrad, wgrad (default: all)")
    parser.add_argument("--candidates", type=positive, default=8, metavar="N", help="configurations of each kernel (default: 8)")
    parser.add_argument("--repeats", type=positive, default=30, metavar="N", help="timed calls of each (default: 30)")
    parser.add_argument("--limit", type=positive, default=1800, metavar="SECONDS",
                        help="of the whole run: what is left is done by the next (default: 1800)")  # fmt: skip
    parser.add_argument("--task-limit", type=positive, default=120, metavar="SECONDS", help="of one task (default: 120)")
    parser.add_argument("--again", action="store_true", help="measure also what the table has")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the table (default: tuned/ in the user's cache)")
    add_commit(parser)
    add_form(parser)
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand. Exit status 1 where a configuration gave a wrong result, or a task could not be timed."""
    where = device(args.device)
    on_gpu = where.type == "cuda"
    commit = args.commit or current_commit()
    dtype = DTYPES[args.dtype or ("bf16" if on_gpu else "fp32")]
    size = args.size or (224 if on_gpu else 16)
    name = torch.cuda.get_device_name(where) if on_gpu else where.type
    path = path_of(name, args.out)
    # Without --out the file is where the user's cache is.
    with blaming("--out", TableError, OSError) if args.out else blaming("the tuning table in the user's cache", TableError, OSError):
        table = read_table(path)[1] if path.exists() else Table()
    torch.backends.cudnn.benchmark = on_gpu  # the passes' convolution is the fastest that cuDNN finds
    torch.manual_seed(0)
    counts: dict[Task, int] = {}
    try:
        with blaming("--model", LoadError):
            for make in [builder(model) for model in args.model]:
                for batch in args.batch or [256 if on_gpu else 2]:
                    counts |= tasks_of(make, (batch, 3, size, size), dtype, where)
    except RuntimeError as error:
        raise Unavailable(f"nothing can be tuned on {where}: {error}") from error
    tasks = [task for task in in_order(counts) if not args.kind or task.kind in args.kind]
    todo = [task for task in tasks if args.again or table.entry(task, reach=1.0) is None]

    def keep(entry: Entry) -> None:
        date = datetime.now(timezone.utc).strftime(DATE_FORMAT)
        add_to_table(path, Meta(name, torch.__version__, importlib.metadata.version("triton"), commit, date), [entry])

    print(cudnn_answers(dtype, where), file=sys.stderr)
    outcomes = _tune(todo, table, where, args, keep, Journal(path.with_suffix(".journal")))
    backends.forget_choices()
    show([("" if on_gpu else "by the interpreter and a CPU's clock: no figure of a GPU", _columns(tasks, table, outcomes))], args.form)
    left = len(todo) - len(outcomes)
    words = f"{path}: {len(outcomes)} tasks measured" + (f", {left} left: run it again to go on" if left else "")
    print(words, file=sys.stdout if args.form == "table" else sys.stderr)
    wrong = any(status.startswith("wrong") for outcome in outcomes.values() for status in outcome.failed.values())
    return int(wrong or any(outcome.entry is None for outcome in outcomes.values()))


def cudnn_answers(dtype: torch.dtype, where: torch.device) -> str:
    """What cuDNN's fused graphs are good for here, in a dtype: asked and tried before anything is timed, never assumed."""
    if reason := why_not_device(where):
        return f"cuDNN's graphs are no candidates: {reason}"
    found = why_not_graphs(str(dtype).removeprefix("torch."), where)
    refused = [f"\n  {graph}: {reason}" for graph, reason in found.items() if reason]
    return f"cuDNN's graphs: {len(found) - len(refused)} of {len(found)} may be candidates" + "".join(refused)


def _tune(todo: list[Task], table: Table, where: torch.device, args: argparse.Namespace, keep, journal: Journal) -> dict[Task, Outcome]:
    """The outcome of each task that there was time for. The table is written after each: what was measured is not lost."""
    outcomes: dict[Task, Outcome] = {}
    ends, terminal = time.monotonic() + args.limit, sys.stderr.isatty()
    shown = TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*shown, console=Console(stderr=True), transient=True, disable=args.no_progress or not terminal) as progress:
        bar = progress.add_task("", total=len(todo))
        for task in todo:
            if (left := ends - time.monotonic()) <= 0:
                break
            progress.update(bar, description=str(task))
            outcome = tune(task, table, where, args.candidates, args.repeats, min(left, args.task_limit), journal)
            if outcome.entry:
                keep(outcome.entry)
            elif time.monotonic() >= ends:  # it was not given the time that it has: the next run does it
                break
            outcomes[task] = outcome
            if not args.no_progress and not terminal:
                print(_line(task, outcomes[task]), file=sys.stderr, flush=True)
            progress.advance(bar)
    return outcomes


def _choice(entry: Entry) -> str:
    return "passes" if entry.configuration is None else str(entry.configuration)


def _line(task: Task, outcome: Outcome) -> str:
    words = "; ".join(f"{name}: {status}" for name, status in outcome.failed.items())
    entry = outcome.entry
    found = f"{_choice(entry)} {number(entry.ms)} ms, passes {number(entry.passes_ms)} ms" if entry else "nothing was timed"
    return f"{task}: {found}" + (f" ({words})" if words else "")


def _columns(tasks: list[Task], table: Table, outcomes: dict[Task, Outcome]) -> list[Column]:
    lines = []
    for task in tasks:
        if entry := table.entry(task, reach=1.0):
            failed = outcomes[task].failed if task in outcomes else {}
            words = "; ".join(f"{name}: {status}" for name, status in failed.items())
            lines.append((str(task), _choice(entry), number(entry.ms), number(entry.passes_ms), number(entry.passes_ms - entry.ms), words))
    heads = ("task", "choice", "ms", "passes, ms", "saved, ms", "failed")
    return [(head, [line[i] for line in lines], 2 <= i < 5) for i, head in enumerate(heads)]
