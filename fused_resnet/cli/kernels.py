"""`fused-resnet kernels`: registers, shared memory and spills of every kernel. Needs no GPU."""

import argparse
from pathlib import Path
from types import ModuleType

from .. import native_kernels
from .arguments import Unavailable, UsageError, blaming, one_of

DESCRIPTION = """Prints registers, shared memory and spills of every kernel: of the Triton
kernels, which it compiles ahead of time, some minutes the first time; or of the
CUDA kernels, from the native library. Needs no GPU."""
EXAMPLES = """example:
  fused-resnet kernels
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
    parser.add_argument("--page", type=Path, metavar="FILE",
                        help="write the CUDA kernels' table into this page, with what they move and compute")  # fmt: skip
    parser.set_defaults(run=kernels)


def kernels(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    if args.page:
        return _write_page(args)
    source = _triton() if args.language == "triton" else native_kernels
    try:
        table = source.table(args.name)
    except FileNotFoundError as error:
        raise Unavailable(str(error)) from error
    if table is None:
        raise UsageError("--name", f"expected a part of a kernel's name, {', '.join(source.names())}; got {args.name!r}")
    print(table)
    return 0


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
