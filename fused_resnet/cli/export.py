"""`fused-resnet export`: a trained network as weights, torch.export's program or ONNX."""

import argparse
from pathlib import Path

from ..train.export import FORMATS, ExportError, export
from .arguments import Unavailable, UsageError, blaming
from .trained import add_trained, trained

KINDS = "; ".join(f"{suffix}: {what}" for suffix, (what, _) in FORMATS.items())
DESCRIPTION = f"""Writes a trained network for other programs, in the format of the file's suffix.
{KINDS}.
What was written is run before it counts: weights by torchvision's network where
there is one, ONNX by ONNX Runtime. The networks take normalised images, float32
[N, C, H, W], and give scores."""
EXAMPLES = """example:
  fused-resnet export runs/flowers resnet50.pth
  fused-resnet export runs/flowers resnet50.onnx
  fused-resnet export runs/flowers/best.pt resnet50.pt2
"""


def add_parser(commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("export", help="write a trained network for other programs", description=DESCRIPTION, epilog=EXAMPLES)
    add_trained(parser)
    parser.add_argument("file", type=Path, metavar="FILE", help=f"{KINDS}; replaced where it exists")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    if args.file.suffix not in FORMATS:
        raise UsageError("FILE", f"expected a name that ends in {', '.join(FORMATS)}; got {str(args.file)!r}")
    found = trained(args)
    try:
        with blaming("FILE", OSError):
            agreement = export(found.model, found.config.model, found.data, args.file)
    except ExportError as error:
        raise Unavailable(str(error)) from error
    what, size = FORMATS[args.file.suffix][0], args.file.stat().st_size / 1e6
    print(f"{args.file}: {found.config.model} after {found.epoch} epochs, {what}, {size:.1f} MB")
    print(f"It takes images of N x {' x '.join(map(str, found.data.image_shape))} and gives scores of {len(found.data.classes)} classes.")
    print(f"Pixels are in 0..1, normalised with {found.data.statistics_told()}.")
    if agreement is None:
        print("Not checked by another program: torchvision has no such network, or is not installed.")
    else:
        ours, own = f"{agreement.difference:.1e}", f"{agreement.own:.1e}"
        print(f"Checked by {agreement.by}. Its scores differ from float64's by {ours}, PyTorch's own in float32 by {own}.")
    return 0
