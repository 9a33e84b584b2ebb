"""The command `fused-resnet`, also `python -m fused_resnet`: one module a subcommand."""

import sys
from collections.abc import Sequence

from .._version import __version__
from ..data import DataError
from ..train import CheckpointError, SettingError, TrainingDiverged
from . import bench, demo, info, kernels, profile, roofline, train, tune
from .arguments import Parser, Unavailable, UsageError

EXAMPLES = """example:
  fused-resnet demo
  fused-resnet train --model resnet20 --data fashion-mnist-mini --epochs 8 --out runs/first
  fused-resnet train --resume runs/first
  fused-resnet bench train --model resnet50
  fused-resnet profile --model resnet50 --out runs/profile
  fused-resnet tune --model resnet50 --batch 256
  fused-resnet roofline --model resnet50 --device h100
  fused-resnet info --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (`sys.argv[1:]` by default) and returns its exit code.

    0: done. 1: it went wrong on the way (a full disk, a loss that is no number). 2: an argument, or a file that it
    stands for, can't be used; the line on stderr names it. 130: interrupted.
    """
    parser = Parser(
        prog="fused-resnet", description="Trains ResNets whose batch norms, activations and residuals are fused.",
        epilog=EXAMPLES,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"fused_resnet {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (train, demo, bench, profile, tune, roofline, info, kernels):
        command.add_parser(commands)
    args = parser.parse_args(argv)
    prog = f"{parser.prog} {args.command}"
    try:
        return args.run(args)
    except UsageError as error:
        return _failed(prog, str(error), 2)
    except SettingError as error:
        return _failed(prog, f"argument --{error.name.replace('_', '-')}: {error.reason}", 2)
    except (Unavailable, DataError, CheckpointError, TrainingDiverged, OSError) as error:
        return _failed(prog, str(error), 1)
    except KeyboardInterrupt:
        return _failed(prog, "interrupted", 130)


def _failed(prog: str, message: str, code: int) -> int:
    print(f"{prog}: error: {message}", file=sys.stderr)
    return code
