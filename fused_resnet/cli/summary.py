"""`fused-resnet summary`: layer, output size, parameters and FLOPs of any network, beside the figures that the paper gives."""

import argparse

import torch

from .. import models
from ..bench.load import LoadError, builder
from ..bench.table import Column, Titled, show
from ..bench.trace import Trace
from ..bench.units import OUTSIDE
from ..roofline import Network, resnet
from .arguments import add_form, blaming, model_name, positive, traced
from .roofline import filled

DESCRIPTION = """Counts parameters and FLOPs of a network by layer: a convolution with its norm, a
linear layer, a pool. Beside them stands what He et al. 2015 say of their
networks. Needs no GPU and no memory for the network."""
EXAMPLES = """example:
  fused-resnet summary resnet50
  fused-resnet summary resnet56 --csv
  fused-resnet summary torchvision:mobilenet_v2 --size 192
"""
#: Billions of multiply-adds an image of 224²: He et al. 2015, table 1.
TABLE_1 = {"resnet18": 1.8, "resnet34": 3.6, "resnet50": 3.8, "resnet101": 7.6, "resnet152": 11.3}
#: Millions of parameters: table 6.
TABLE_6 = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85, "resnet110": 1.7, "resnet1202": 19.4}
TORCHVISION, PAPER = "torchvision's strides", "the paper's strides"
LARGE, SMALL = 224, 32  # pixels
IMAGES = 2  # a norm that trains wants two values a channel
NOTE = """torchvision strides in a bottleneck's 3x3 convolution, the paper in its first 1x1.
Without projections: shortcuts without the 1x1 convolutions where channels grow, as in the paper's option A.
"""


def add_parser(commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("summary", help="layers, parameters and FLOPs of a network", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("model", type=model_name, metavar="MODEL",
                        help="a network of this package, torchvision:NAME, timm:NAME, or MODULE:FUNCTION of your own")  # fmt: skip
    parser.add_argument(
        "--size", type=positive, metavar="PIXELS", help="of an image's side (default: 224, or 32 of networks for 32x32 images)"
    )
    add_form(parser)
    parser.set_defaults(run=summary)


def summary(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    size = args.size or (SMALL if _is_small(args.model) else LARGE)
    with blaming("MODEL", LoadError):
        step = traced(builder(args.model), "MODEL", args.model, (IMAGES, 3, size, size), torch.float32)
    tables: list[Titled] = [(f"{args.model}, images of {size} x {size}", _layers(step))]
    if args.model in TABLE_1:
        tables.append((f"billions of multiply-adds at {LARGE} x {LARGE}, beside table 1 of He et al. 2015", _beside_table_1()))
    if args.model in TABLE_6:
        tables.append(("millions of parameters, beside table 6 of He et al. 2015", _beside_table_6(args.model, step.parameters)))
    show(tables, args.form)
    if args.form == "table":
        flops = step.forward_flops / step.batch
        print(f"{step.parameters:,} parameters; an image {flops / 2e9:.3f} billion multiply-adds, {flops / 1e9:.3f} billion FLOPs")
        if args.model in TABLE_1:
            print(filled(NOTE + _unmatched()))
    return 0


def _is_small(name: str) -> bool:
    """Whether this is one of the networks for 32x32 images."""
    return name in models.list_models() and getattr(models, name).__module__ == models.cifar.__name__


def _layers(step: Trace) -> list[Column]:
    """A row a layer, in the order of the forward."""
    names = [name for name in step.shapes if name != OUTSIDE]
    flops = [step.layer_flops(name) / step.batch for name in names]
    return [
        ("layer", names, False),
        ("output", ["x".join(map(str, step.shapes[name][1:])) for name in names], False),
        ("parameters", [f"{step.layer_parameters.get(name, 0):,}" for name in names], True),
        ("multiply-adds,\nmillions", [f"{each / 2e6:,.2f}" for each in flops], True),
        ("of all", [f"{each * step.batch / step.forward_flops:.1%}" for each in flops], True),
    ]


def _counted(name: str) -> dict[str, float]:
    """Billions of multiply-adds an image, counted in different ways."""
    paper = resnet(name, 1, LARGE, stride_first=True)
    return {
        TORCHVISION: resnet(name, 1, LARGE).forward_flops / 2e9, PAPER: paper.forward_flops / 2e9,
        "without projections": (paper.forward_flops - _projections(paper)) / 2e9,
    }  # fmt: skip


def _projections(network: Network) -> int:
    """FLOPs of the convolutions of shortcuts."""
    return sum(block.projection.conv.flops for block in network.blocks if block.projection)


def _beside_table_1() -> list[Column]:
    counted = {name: _counted(name) for name in TABLE_1}
    ways = next(iter(counted.values()))
    figures = [(way, [f"{counted[name][way]:.2f}" for name in TABLE_1], True) for way in ways]
    return [("network", list(TABLE_1), False), *figures, ("the paper says", [f"{said}" for said in TABLE_1.values()], True)]


def _unmatched() -> str:
    """Of which of the paper's figures none of the counts is the rounded one."""
    names = [name for name, said in TABLE_1.items() if all(round(value, 1) != said for value in _counted(name).values())]
    words = [f"{name}'s {TABLE_1[name]} (by the paper's strides {_counted(name)[PAPER]:.2f})" for name in names]
    return f"Each figure of the paper is one of these counts, rounded, but {', '.join(words)}."


def _beside_table_6(name: str, parameters: int) -> list[Column]:
    return [("network", [name], False), ("counted", [f"{parameters / 1e6:.3f}"], True), ("the paper says", [f"{TABLE_6[name]}"], True)]
