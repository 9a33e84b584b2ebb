"""`fused-resnet predict`: what a trained network takes images for, with probabilities."""

import argparse
import json
from contextlib import nullcontext

import torch

from .. import backends, data
from ..bench.table import show
from .arguments import add_form, blaming, chosen_backend, device, positive
from .trained import add_computation, add_trained, trained

DESCRIPTION = """The most probable classes of images, with their names and the softmax of the
network's scores. An image is made grey or coloured, resized and cut as an
evaluation does it."""
EXAMPLES = """example:
  fused-resnet predict runs/flowers rose.jpg
  fused-resnet predict runs/flowers/best.pt *.jpg --top 1 --csv
"""


def add_parser(commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("predict", help="classes of images, with probabilities", description=DESCRIPTION, epilog=EXAMPLES)
    add_trained(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files of images")
    parser.add_argument("--top", type=positive, default=5, metavar="N", help="classes of an image (default: 5)")
    add_computation(parser)
    add_form(parser)
    parser.set_defaults(run=predict)


@torch.no_grad()
def predict(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    found = trained(args)
    where = device(args.device)
    model = found.model.to(where)
    rows: list[tuple[str, str, float]] = []
    with backends.backend(args.backend) if args.backend else nullcontext():
        chosen_backend(where, "fp32", args.backend)
        for path in args.images:
            with blaming("IMAGE", data.DataError):
                image = found.data.read(path)
            # In double precision, so that probabilities add up to one in every digit that is shown.
            chances = model(image.to(where)).double().softmax(1)[0]
            best = chances.topk(min(args.top, len(chances)))
            rows += [(path, found.data.classes[i], value) for value, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
    if args.form == "json":
        print(json.dumps([{"image": path, "class": name, "probability": value} for path, name, value in rows], indent=1))
        return 0
    paths, names, values = zip(*rows, strict=True)
    figures = [f"{value:.6f}" if args.form == "csv" else f"{100 * value:.2f}%" for value in values]
    title = f"{found.config.model} after {found.epoch} epochs"
    show([(title, [("image", list(paths), False), ("class", list(names), False), ("probability", figures, True)])], args.form)
    return 0
