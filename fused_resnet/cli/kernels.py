"""`fused-resnet kernels`: registers, shared memory and spills of every kernel. Needs no GPU."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from types import ModuleType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import native_kernels
from ..bench.table import console, show
from ..roofline import DEPTHS, resnet
from ..tuning.task import KINDS
from .arguments import Unavailable, UsageError, add_form, blaming, one_of, positive
from .roofline import DTYPES

DESCRIPTION = """Prints registers, shared memory and spills of every kernel: of the Triton
kernels, which it compiles ahead of time, some minutes the first time, and then
keeps what it found in the user's cache; or of the CUDA kernels, from the native
library. Needs no GPU.

Of the Triton kernels it also prints three bounds of a launch's time: what it
moves, what it multiplies, and what its warps issue, counted in the machine
code. A bound is not a measurement. --sum adds up a training step's
convolutions."""
EXAMPLES = """example:
  fused-resnet kernels
  fused-resnet kernels --name fprop --arch 90 --csv
  fused-resnet kernels --sum resnet50 --batch 256
  fused-resnet kernels --language cuda --name pool
  fused-resnet kernels --language cuda --page docs/kernels/cuda.md
"""
LANGUAGES = ("triton", "cuda")


def add_parser(commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("kernels", help="print registers and spills of the kernels", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--language", type=one_of(*LANGUAGES), default="triton", metavar="L", help="one of triton, cuda (default: triton)")
    parser.add_argument("--name", default="", metavar="TEXT", help="only kernels whose name holds TEXT (default: all)")
    parser.add_argument("--arch", nargs="+", type=positive, metavar="SM", help="only these architectures: 80, 90 (default: all)")
    parser.add_argument("--sum", type=one_of(*DEPTHS), metavar="MODEL",
                        help=f"add up the convolutions of a training step: {', '.join(DEPTHS)}")  # fmt: skip
    parser.add_argument("--batch", type=positive, default=256, metavar="N", help="of --sum, images in a batch (default: 256)")
    parser.add_argument("--dtype", type=one_of(*DTYPES), default="bf16", metavar="D", help="of --sum: bf16 (default), fp16, fp32")
    add_form(parser)
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.add_argument("--page", type=Path, metavar="FILE",
                        help="write the CUDA kernels' table into this page, with what they move and compute")  # fmt: skip
    parser.set_defaults(run=kernels)


def kernels(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    if args.page:
        return _write_page(args)
    source = triton_kernels() if args.language == "triton" else native_kernels
    known = tuple(getattr(source, "ARCHITECTURES", (80, 90)))
    if unknown := [arch for arch in args.arch or () if arch not in known]:
        raise UsageError("--arch", f"expected some of {', '.join(map(str, known))}; got {unknown[0]}")
    architectures = tuple(args.arch or known)
    if args.sum:
        return _sum(args, source)
    try:
        if source is native_kernels:
            lines = [line for line in source.rows(args.name) if int(line[SM].rstrip("a")) in architectures]
        else:
            with _progress(not args.no_progress) as begins:
                lines = list(source.rows(args.name, architectures=architectures, begins=begins))
    except FileNotFoundError as error:
        raise Unavailable(str(error)) from error
    if not lines:
        raise UsageError("--name", f"expected a part of a kernel's name, {', '.join(source.names())}; got {args.name!r}")
    columns = [(UNITS.get(head, head), [line[i] for line in lines], i >= SM) for i, head in enumerate(source.HEADER)]
    show([(f"{args.language} kernels", columns)], args.form)
    if args.form == "table":
        told = [*LEGEND, _summary(source.HEADER, lines)]
        if source is not native_kernels:
            told += [*map(source.assumptions, architectures), BOUND]
        print("\n".join(fill(line, console().width) for line in told))
    return 0


def _sum(args: argparse.Namespace, inspect: ModuleType) -> int:
    """The convolutions of a step, one a line, and their sums."""
    if inspect is native_kernels:
        raise UsageError("--sum", "expected --language triton, whose kernels the convolutions are")
    architecture = args.arch[0] if args.arch else 90
    if len(args.arch or ()) > 1:
        raise UsageError("--arch", f"expected one with --sum; got {' '.join(map(str, args.arch))}")
    network, dtype = resnet(args.sum, args.batch), str(DTYPES[args.dtype]).removeprefix("torch.")
    with _progress(not args.no_progress) as begins:
        works = inspect.step(network, dtype, architecture, begins=begins)
    lines = [
        (f"{work.count}x", str(work.task).partition(", batch")[0], _tiles(work.configuration), str(work.programs), *(
            f"{1e6 * seconds:.1f}" for seconds in (work.bounds.bytes, work.bounds.products, work.bounds.issue, work.bounds.workspace)
        ), f"{work.bounds.bound / work.bounds.floor:.2f}")
        for work in works
    ]  # fmt: skip
    heads = ("", "convolution", "tiles, warps,\nstages, splits", "programs", "bytes,\nus", "products,\nus", "issue,\nus",
             "partial\nresults, us", "bound\nover floor")  # fmt: skip
    kinds = [kind for kind in KINDS if any(work.task.kind == kind for work in works)]
    totals = [(words, *_total(works, kinds_)) for words, kinds_ in [(kind, (kind,)) for kind in kinds] + [("all", tuple(kinds))]]
    total_heads = ("", "floor, ms", "issue, ms", "larger of both, ms", "partial results, ms", "bound\nover floor")
    tables = [(heads, lines, 2), (total_heads, totals, 0)]
    titles = (f"a training step's convolutions: {args.sum}, batch {args.batch}, {args.dtype}, sm_{architecture}", "their sum")
    show([(title, [(head, [line[i] for line in of], i > texts) for i, head in enumerate(names)])
          for title, (names, of, texts) in zip(titles, tables, strict=True)], args.form)  # fmt: skip
    if args.form == "table":
        print("\n".join(fill(line, console().width) for line in (inspect.assumptions(architecture), BOUND)))
    return 0


def _tiles(c) -> str:
    return f"{c.block_m}x{c.block_n}x{c.block_k}, {c.warps}, {c.stages}, {c.splits}"


def _total(works: Sequence, kinds: Sequence[str]) -> tuple[str, ...]:
    """Milliseconds: floor, issue bound, the larger of both of each, partial results; and the third over the first."""
    found = [(work.count, work.bounds) for work in works if work.task.kind in kinds]
    floor, issue, bound, partial = (
        1e3 * sum(count * getattr(b, name) for count, b in found) for name in ("floor", "issue", "bound", "workspace")
    )
    return f"{floor:.2f}", f"{issue:.2f}", f"{bound:.2f}", f"{partial:.2f}", f"{bound / floor:.2f}"


BOUND = "Bounds, not measurements: no launch of these kernels is faster, and a real one is slower."
SM = 2  #: of a line's columns, the architecture's; figures begin there
UNITS = {
    "spilled": "spilled, bytes", "shared": "shared, bytes", "bytes": "bytes, us", "products": "products, us", "issue": "issue, us",
    "of floor": "bound\nover floor",
}  # fmt: skip
LEGEND = (
    "registers and spilled: of a thread; what did not fit into registers is spilled to memory. shared: of a block. occupancy: the part of "
    "a multiprocessor's threads that the registers let run at once. 16-byte: loads and stores of global memory of 16 bytes, of all.",
)


def _summary(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    spilled, registers = ([int(line[header.index(head)]) for line in lines] for head in ("spilled", "registers"))
    kernels, spilling = len({line[0] for line in lines}), sum(value > 0 for value in spilled)
    return f"{len(lines)} variants of {kernels} kernels; {spilling} spill, {sum(spilled)} bytes in all; at most {max(registers)} registers."


@contextmanager
def _progress(shown: bool) -> Iterator[Callable[[int, int, str], object]]:
    """Tells on a terminal which kernel is compiled, or read from the cache."""
    columns = TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn()
    shown = shown and sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as progress:
        bar = progress.add_task("", total=None)
        yield lambda number, of, kernel: progress.update(bar, completed=number, total=of, description=kernel)


def _write_page(args: argparse.Namespace) -> int:
    if args.language != "cuda":
        raise UsageError("--page", "expected --language cuda, whose kernels have such a page")
    try:
        with blaming("--page", ValueError):
            native_kernels.write_page(args.page)
    except FileNotFoundError as error:
        raise Unavailable(str(error)) from error
    print(f"written to {args.page}")
    return 0


def triton_kernels() -> ModuleType:
    try:  # not at the top: Triton may be absent, and takes a while to import
        from ..kernels import inspect
    except ImportError as error:
        raise Unavailable(f"the kernels need Triton, which does not import here: {error}") from error
    if inspect.INTERPRETED:
        raise UsageError("TRITON_INTERPRET", "expected to be unset or 0, since the kernels are compiled here; got 1")
    return inspect
