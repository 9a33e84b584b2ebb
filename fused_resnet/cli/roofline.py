"""`fused-resnet roofline`: what a training step must cost, layer by layer, and the images/s that no implementation can beat."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from textwrap import fill

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..bench.fusion import designs
from ..bench.load import LoadError, builder
from ..bench.machine import measure_ceilings
from ..bench.table import Column, console, show
from ..communication import LINK_BYTES_PER_S, Sent, sent
from ..devices import DEVICES
from ..roofline import (
    DEPTHS,
    DESIGNS,
    INFERENCE,
    Kernel,
    floor_seconds,
    inference_step,
    resnet,
    saved_layers,
    total_bytes,
    total_flops,
    training_step,
)
from .arguments import UsageError, add_form, add_model, blaming, one_of, positive, positive_number, traced

DESCRIPTION = """Counts FLOPs and bytes of every kernel of a training step, in several designs,
and the floor: the time that no implementation of those kernels can beat. Needs
no GPU and no memory for the network.

The rules: a kernel moves every tensor that it touches once, nothing stays in a
cache between kernels, and it takes the longer of FLOPs/rate and
bytes/bandwidth. For ResNet-18 to 152 each step of fusion is a row, and there is
a table of inference; any other network is traced, and gets three rows: eager,
passes (one pass for element-wise operators that follow one another), fused
(such passes inside convolutions)."""
EXAMPLES = """example:
  fused-resnet roofline
  fused-resnet roofline --model resnet101 --batch 128 --device h200
  fused-resnet roofline --model resnet50 --tflops 500 --tbytes 3.0 --layers
  fused-resnet roofline --model torchvision:mobilenet_v2 --device a100
  fused-resnet roofline --model my_models:make_net --size 64
  fused-resnet roofline --model resnet50 --batch 32 --gpus 256 --link 25
"""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MEASURED = "measured"
#: What the rows of the tables are; a name with a plus has what stands above it, too.
WORDS = {
    "eager": "convolution, statistics, norm, ReLU, addition apart",
    "onepass": "one pass for statistics, one to apply; one to reduce, one to apply",
    "+stats": "statistics in the epilogue of the forward convolution",
    "+pro": "norm and ReLU in the prologue of a block's inner convolutions",
    "+red": "gradient addition, mask and sums in dgrad's epilogue",
    "+app": "the norm's backward in the prologues of dgrad and wgrad",
    "+stemf": "the stem's norm, ReLU and pool in one pass, both ways",
    "+tail": "the last norm, addition, ReLU and average pool likewise",
    "+fold": "block boundaries in the next convolution's prologue",
    "passes": "what the backend passes does",
    "triton": "what the backend triton does",
    "recompute": "what blocks keep between convolutions is made again",
}
TRACED_WORDS = {
    "eager": "every operator a kernel",
    "passes": "one pass for element-wise operators that follow one another",
    "fused": "such passes inside convolutions",
}
INFERENCE_WORDS = {
    "eager": "convolution, norm, ReLU, addition apart",
    "folded": "no norm; the bias is a kernel behind the convolution",
    "passes": "convolution, then one pass",
    "epilogue": "one kernel a convolution",
}
#: For the table of layers: eager, passes, everything fused.
SHOWN = {"eager": "eager", "passes": "passes", "+fold": "fused", "fused": "fused"}


def add_parser(commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("roofline", help="FLOPs, bytes and floors of a training step", description=DESCRIPTION, epilog=EXAMPLES)
    add_model(parser, "resnet50")
    parser.add_argument("--batch", type=positive, default=256, metavar="N", help="images in a batch (default: 256)")
    parser.add_argument("--size", type=positive, default=224, metavar="PIXELS", help="height and width of an image (default: 224)")
    parser.add_argument("--dtype", type=one_of(*DTYPES), default="bf16", metavar="D", help="bf16 (default), fp16, fp32")
    parser.add_argument("--device", type=one_of(*DEVICES, MEASURED), metavar="D",
                        help=f"published peaks of {', '.join(DEVICES)}; {MEASURED}: a copy and a matrix product "
                             "timed here and now (default: measured where there is a GPU, else h100)")  # fmt: skip
    parser.add_argument("--tflops", type=positive_number, metavar="RATE", help="in place of the device's, 10^12 FLOP/s")
    parser.add_argument("--tbytes", type=positive_number, metavar="RATE", help="in place of the device's, 10^12 bytes/s")
    parser.add_argument("--issue", action="store_true",
                        help="also what the instructions of the row triton's convolutions allow: compiles them, minutes once")  # fmt: skip
    parser.add_argument("--gpus", type=positive, metavar="N", help="also what N GPUs send each other in a step, --batch images each")
    parser.add_argument("--link", type=positive_number, metavar="RATE",
                        help=f"of a GPU, each way, 10^9 bytes/s (default: {LINK_BYTES_PER_S / 1e9:g}, a port of 400 Gbit/s)")  # fmt: skip
    parser.add_argument("--layers", action="store_true", help="a row for each layer as well; saved: for backward, of an image")
    add_form(parser)
    parser.set_defaults(run=roofline)


def roofline(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    dtype = DTYPES[args.dtype]
    with blaming("--model", LoadError):
        make = builder(args.model)
        if args.model in DEPTHS:
            network = resnet(args.model, args.batch, args.size)
            kernels = {name: training_step(network, design, dtype.itemsize) for name, design in DESIGNS.items()}
            saved = {name: saved_layers(network, design, dtype.itemsize) for name, design in DESIGNS.items()}
            forward = network.forward_flops
        else:
            step = traced(make, "--model", args.model, (args.batch, 3, args.size, args.size), dtype)
            ways = designs(step)
            kernels = {name: step.kernels(ops) for name, ops in ways.items()}
            saved = {name: step.saved_layers(ops) for name, ops in ways.items()}
            forward = step.forward_flops
    if args.issue and args.model not in DEPTHS:
        raise UsageError("--issue", f"expected --model to be one of {', '.join(DEPTHS)}; got {args.model}")
    if args.gpus == 1:
        raise UsageError("--gpus", "expected at least 2; got 1")
    if args.link and not args.gpus:
        raise UsageError("--link", "expected --gpus beside it")
    flops_per_s, bytes_per_s, words = _rates(args, dtype)
    images = f"{args.batch} images of {args.size} x {args.size}, {args.dtype}"
    ridge = flops_per_s / bytes_per_s
    words = (
        f"{args.model}, {images}\n{_flops(args, forward)}\n"
        f"{words}: {flops_per_s / 1e12:,.1f} TFLOP/s, {bytes_per_s / 1e12:,.3f} TB/s, ridge {ridge:,.0f} FLOP/byte"
    )
    print(filled(words), file=sys.stdout if args.form == "table" else sys.stderr)
    legend = (
        "design: how a step is divided into kernels, each row's besides what stands above it.\n"
        "floor: the time that no implementation of these kernels can beat.\n"
        + _legend(kernels, WORDS if args.model in DEPTHS else TRACED_WORDS)
    )
    columns = _designs_table(kernels, saved, args.batch, flops_per_s, bytes_per_s)
    if args.issue:
        found, words = _issue(args, network, dtype, kernels, flops_per_s, bytes_per_s)
        columns.append(("with its instructions,\nms", [found if name == "triton" else "" for name in kernels], True))
        legend += f"\n{words}"
    tables = [("a training step, by design", columns, legend)]
    if args.model in DEPTHS:
        steps = {name: inference_step(network, name, dtype.itemsize) for name in INFERENCE}
        inference = _inference_table(steps, args.batch, flops_per_s, bytes_per_s)
        tables.append(("inference, by design", inference, _legend(steps, INFERENCE_WORDS)))
    if args.gpus:
        tables.append(_communication(args, make, min(floor_seconds(step, flops_per_s, bytes_per_s) for step in kernels.values())))
    if args.layers:
        tables.append(("by layer, forward and backward", _layers_table(kernels, saved, args.batch, flops_per_s, bytes_per_s), ""))
    if args.form != "table":
        show([(title, columns) for title, columns, _ in tables], args.form)
        return 0
    for title, columns, legend in tables:
        show([(title, columns)])
        if legend:
            print(filled(legend))
    return 0


def _issue(args: argparse.Namespace, network, dtype: torch.dtype, kernels, flops_per_s: float, bytes_per_s: float) -> tuple[str, str]:
    """(milliseconds of the row triton where its convolutions issue their instructions, too; what is assumed)."""
    from .kernels import BOUND, triton_kernels

    inspect, architecture = triton_kernels(), 80 if (args.device or "").startswith("a100") else 90
    gpu = replace(inspect.ASSUMED[architecture], bytes_per_s=bytes_per_s, flops_per_s=flops_per_s * (dtype.itemsize // 2))
    works = inspect.step(network, str(dtype).removeprefix("torch."), architecture, gpu)
    more = sum(work.count * (work.bounds.bound - work.bounds.floor) for work in works)
    words = "with its instructions: the floor, but a convolution takes at least as long as its warps issue. "
    words += f"{BOUND} {inspect.assumptions(architecture, gpu)}"
    return f"{1e3 * (floor_seconds(kernels['triton'], flops_per_s, bytes_per_s) + more):,.2f}", words


def _rates(args: argparse.Namespace, dtype: torch.dtype) -> tuple[float, float, str]:
    """(FLOP/s, bytes/s, where they come from)."""
    name = args.device or (MEASURED if torch.cuda.is_available() else "h100")
    if args.tflops and args.tbytes:
        return args.tflops * 1e12, args.tbytes * 1e12, "as given"
    if name == MEASURED:
        where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        ceilings = measure_ceilings(where, dtype)
        flops, moved = ceilings.flops_per_s, ceilings.bytes_per_s
        words = torch.cuda.get_device_name() if where.type == "cuda" else "this CPU, not a GPU"
        words += ", measured: a large copy and a large matrix product"
    else:
        device = DEVICES[name]
        flops, moved = device.flops_per_s(dtype.itemsize), device.bytes_per_s
        words = f"{device.title}, published peaks ({device.source})"
    given = [f"{option} as given" for option, value in (("rate", args.tflops), ("bandwidth", args.tbytes)) if value]
    return (
        args.tflops * 1e12 if args.tflops else flops,
        args.tbytes * 1e12 if args.tbytes else moved,
        ", ".join([words, *given]),
    )


def _flops(args: argparse.Namespace, forward: int) -> str:
    words = f"forward {forward / args.batch / 2e9:.2f} billion multiply-adds an image"
    if args.model in DEPTHS and DEPTHS[args.model][1]:
        paper = resnet(args.model, 1, args.size, stride_first=True).forward_flops / 2e9
        words += f", torchvision's, which strides in the 3x3; {paper:.2f} with the paper's stride in the first 1x1"
    return words


def filled(text: str) -> str:
    """Each line broken where the console ends; what goes on is set in."""
    return "\n".join(fill(line, console().width, subsequent_indent="    ") for line in text.splitlines())


def _legend(shown: Iterable[str], words: dict[str, str]) -> str:
    """A line for each design that is shown, and for what is added to one behind a comma."""
    names = dict.fromkeys(part for name in shown for part in name.split(", "))
    return "\n".join(f"  {name:<10}{words[name]}" for name in names)


def _columns(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[Column]:
    """The first column is a text, the others are figures."""
    return [(head, [line[i] for line in lines], i > 0) for i, head in enumerate(heads)]


def _designs_table(kernels, saved, batch: int, flops_per_s: float, bytes_per_s: float) -> list[Column]:
    kept, lines = {name: sum(layers.values()) / batch / 1e6 for name, layers in saved.items()}, []
    heads = ("design", "GFLOP/image", "MB/image", "FLOP/byte", "launches", "saved for backward,\nMB/image", "less than eager,\nMB/image",
             "floor, ms", "floor, images/s", "memory-bound\npart of floor")  # fmt: skip
    for name, step in kernels.items():
        flops, moved, floor = total_flops(step), total_bytes(step), floor_seconds(step, flops_per_s, bytes_per_s)
        memory = sum(k.bytes / bytes_per_s for k in step if k.bytes / bytes_per_s >= k.flops / flops_per_s)
        lines.append((
            name, f"{flops / batch / 1e9:,.1f}", f"{moved / batch / 1e6:,.1f}", f"{flops / moved:,.0f}", f"{len(step):,}",
            f"{kept[name]:,.1f}", f"{max(0, kept['eager'] - kept[name]):,.1f}",
            f"{1e3 * floor:,.2f}", f"{batch / floor:,.0f}", f"{memory / floor:.0%}",
        ))  # fmt: skip
    return _columns(heads, lines)


def _inference_table(steps: dict[str, list[Kernel]], batch: int, flops_per_s: float, bytes_per_s: float) -> list[Column]:
    lines = []
    for name, step in steps.items():
        floor = floor_seconds(step, flops_per_s, bytes_per_s)
        lines.append((name, f"{total_bytes(step) / batch / 1e6:,.1f}", f"{len(step):,}", f"{1e3 * floor:,.2f}", f"{batch / floor:,.0f}"))
    return _columns(("design", "MB/image", "launches", "floor, ms", "floor, images/s"), lines)


def _communication(args: argparse.Namespace, make: Callable[[], torch.nn.Module], floor: float) -> tuple[str, list[Column], str]:
    """What GPUs send each other, beside the lowest floor of a step, in seconds."""
    with FakeTensorMode():
        model = make()
    norms = [module.num_features for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    ways, link = sent(sum(p.numel() for p in model.parameters()), norms, args.gpus), (args.link or LINK_BYTES_PER_S / 1e9) * 1e9
    lines = [
        (name, "" if way.messages is None else f"{way.messages:,}", f"{way.bytes / 1e6:,.1f}", f"{1e3 * way.seconds(link):,.2f}",
         f"{way.seconds(link) / floor:.0%}")
        for name, way in ways.items()
    ]  # fmt: skip
    columns = _columns(("way", "messages", "MB sent\nby a GPU", f"ms at\n{link / 1e9:g} GB/s", "of a step's\nlowest floor"), lines)
    legend = "Gradients leave while backward goes on: a GPU waits for what takes longer. Latency is not counted: it decides +sync-bn.\n"
    return f"what {args.gpus} GPUs send each other in a step", columns, legend + _ways(ways)


def _ways(ways: dict[str, Sent]) -> str:
    return "\n".join(f"  {name:<14}{way.what}" for name, way in ways.items())


def _layers_table(
    kernels: dict[str, list[Kernel]], saved: dict[str, dict[str, int]], batch: int, flops_per_s: float, bytes_per_s: float
) -> list[Column]:
    """A row a layer, forward and backward together, in the order of eager's forward."""
    shown = {name: head for name, head in SHOWN.items() if name in kernels}
    heads = [f"{head}:\n{figure}" for head in shown.values() for figure in ("MB/image", "FLOP/byte", "floor, ms", "saved, MB")]
    lines = []
    for layer in dict.fromkeys(kernel.layer for kernel in kernels["eager"]):
        steps = {name: [k for k in kernels[name] if k.layer == layer] for name in shown}
        row = [layer, f"{total_flops(steps['eager']) / batch / 1e9:,.3f}"]
        for name, step in steps.items():
            moved, kept = total_bytes(step), saved[name].get(layer)
            row += [
                f"{moved / batch / 1e6:,.2f}", f"{total_flops(step) / moved:,.0f}" if moved else "",
                f"{1e3 * floor_seconds(step, flops_per_s, bytes_per_s):,.3f}", f"{kept / batch / 1e6:,.2f}" if kept else "",
            ]  # fmt: skip
        lines.append(row)
    return _columns(("layer", "GFLOP/image", *heads), lines)
