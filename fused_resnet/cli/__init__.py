"""The command `fused-resnet`, also `python -m fused_resnet`: one module a subcommand."""

import os
import signal
import sys
from collections.abc import Sequence

from .. import environment
from .._version import __version__
from ..data import DataError
from ..train import CheckpointError, SettingError, TrainingDiverged
from . import bench, demo, evaluate, experiment, export, info, kernels, predict, profile, roofline, summary, train, tune
from .arguments import Parser, Unavailable, UsageError

EXAMPLES = """example:
  fused-resnet demo
  fused-resnet train --model resnet20 --data fashion-mnist-mini --epochs 8 --out runs/first
  fused-resnet train --resume runs/first
  fused-resnet evaluate runs/first
  fused-resnet predict runs/first shirt.png
  fused-resnet export runs/first resnet20.onnx
  fused-resnet experiment degradation --minutes 60
  fused-resnet bench train --model resnet50
  fused-resnet profile --model resnet50 --out runs/profile
  fused-resnet tune --model resnet50 --batch 256
  fused-resnet roofline --model resnet50 --device h100
  fused-resnet summary resnet50
  fused-resnet info --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (`sys.argv[1:]` by default) and returns its exit code.

    0: done. 1: it went wrong on the way (a loss that is no number). 2: an argument, an environment variable, or a file or
    folder that one stands for, can't be used; the line on stderr names it. 130 and 143: SIGINT or SIGTERM
    ended it. 141: nobody reads the output.
    """
    try:
        try:
            return _main(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        return _unread()


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="fused-resnet", description="Trains ResNets whose batch norms, activations and residuals are fused.",
        epilog=EXAMPLES,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"fused_resnet {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (train, evaluate, predict, export, demo, experiment, bench, profile, tune, roofline, summary, info, kernels):
        command.add_parser(commands)
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    prog = f"{parser.prog} {args.command}"
    try:
        environment.check()
        return args.run(args)
    except BrokenPipeError:
        raise
    except (UsageError, environment.VariableError) as error:
        return _failed(prog, str(error), 2)
    except SettingError as error:
        return _failed(prog, f"argument --{error.name.replace('_', '-')}: {error.reason}", 2)
    except (Unavailable, DataError, CheckpointError, TrainingDiverged, OSError) as error:
        return _failed(prog, str(error), 1)
    except KeyboardInterrupt as error:
        return _failed(prog, str(error) or "interrupted", 130)


def _unread() -> int:
    """Ends as a program of the shell does whose reader is gone (`| head`), without a word. Returns the exit code."""
    # What is still in the buffer would be written once more at the end, and fail again.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
    return 128 + signal.SIGPIPE


def _failed(prog: str, message: str, code: int) -> int:
    print(f"{prog}: error: {message}", file=sys.stderr)
    return code
