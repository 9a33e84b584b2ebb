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
from .arguments import Unavailable, UsageError, add_form, blaming, one_of, positive

DESCRIPTION = """Prints registers, shared memory and spills of every kernel: of the Triton
kernels, which it compiles ahead of time, some minutes the first time, and then
keeps what it found in the user's cache; or of the CUDA kernels, from the native
library. Needs no GPU."""
EXAMPLES = """example:
  fused-resnet kernels
  fused-resnet kernels --name fprop --arch 90 --csv
  fused-resnet kernels --language cuda --name pool
  fused-resnet kernels --language cuda --page docs/kernels/cuda.md
"""
LANGUAGES = ("triton", "cuda")


def add_parser(commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "kernels", help="print registers and spills of the kernels", description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument(
        "--language", type=one_of(*LANGUAGES), default="triton", metavar="L", help="one of triton, cuda (default: triton)"
    )
    parser.add_argument("--name", default="", metavar="TEXT", help="only kernels whose name holds TEXT (default: all)")
    parser.add_argument("--arch", nargs="+", type=positive, metavar="SM", help="only these architectures: 80, 90 (default: all)")
    add_form(parser)
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.add_argument("--page", type=Path, metavar="FILE",
                        help="write the CUDA kernels' table into this page, with what they move and compute")  # fmt: skip
    parser.set_defaults(run=kernels)


def kernels(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    if args.page:
        return _write_page(args)
    source = _triton() if args.language == "triton" else native_kernels
    known = tuple(getattr(source, "ARCHITECTURES", (80, 90)))
    if unknown := [arch for arch in args.arch or () if arch not in known]:
        raise UsageError("--arch", f"expected some of {', '.join(map(str, known))}; got {unknown[0]}")
    architectures = tuple(args.arch or known)
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
        print("\n".join(fill(line, console().width) for line in (*LEGEND, _summary(source.HEADER, lines))))
    return 0


SM = 2  #: of a line's columns, the architecture's; figures begin there
UNITS = {"spilled": "spilled, bytes", "shared": "shared, bytes"}
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


def _triton() -> ModuleType:
    try:  # not at the top: Triton may be absent, and takes a while to import
        from ..kernels import inspect
    except ImportError as error:
        raise Unavailable(f"the kernels need Triton, which does not import here: {error}") from error
    if inspect.INTERPRETED:
        raise UsageError("TRITON_INTERPRET", "expected to be unset or 0, since the kernels are compiled here; got 1")
    return inspect
