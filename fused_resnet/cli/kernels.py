"""`fused-resnet kernels`: registers, shared memory and spills of every Triton kernel. Needs no GPU."""

import argparse

from .arguments import Unavailable, UsageError

DESCRIPTION = """Compiles every Triton kernel ahead of time and prints registers, shared memory
and spills. Needs no GPU, and some minutes the first time."""
EXAMPLES = """example:
  fused-resnet kernels
  fused-resnet kernels --name pool
"""


def add_parser(commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "kernels", help="print registers and spills of the kernels", description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument("--name", default="", metavar="TEXT", help="only kernels whose name holds TEXT (default: all)")
    parser.set_defaults(run=kernels)


def kernels(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    try:  # not at the top: Triton may be absent, and takes a while to import
        from ..kernels import inspect
    except ImportError as error:
        raise Unavailable(f"the kernels need Triton, which does not import here: {error}") from error
    if inspect.INTERPRETED:
        raise UsageError("TRITON_INTERPRET", "expected to be unset or 0, since the kernels are compiled here; got 1")
    if (table := inspect.table(args.name)) is None:
        raise UsageError("--name", f"expected a part of a kernel's name, {', '.join(inspect.names())}; got {args.name!r}")
    print(table)
    return 0
