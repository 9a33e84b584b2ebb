"""Time every pass on the shapes of ResNets against PyTorch's eager mode, torch.compile and cuDNN, and write bench/results JSON.

Each result is checked against the float64 reference first; what is wrong gets no figure. The device's own copy and matrix product,
timed in the same run, are the ceilings.
"""

import sys

import torch

from fused_resnet.bench import passes, program
from fused_resnet.bench.kernels import IMPLEMENTATIONS, Kernels, ceiling_rows
from fused_resnet.bench.machine import measure_ceilings
from fused_resnet.roofline import DEPTHS, resnet


def main(arguments: list[str] | None = None) -> int:
    """The program; gives its exit status."""
    parser = program.arguments(
        "Time every pass of the backends on the shapes of ResNets.", "python bench/kernels.py --dtype fp16 --batch 128",
        IMPLEMENTATIONS, "bf16",
    )  # fmt: skip
    program.add_timing(parser)
    parser.add_argument("--model", nargs="+", choices=DEPTHS, default=["resnet18", "resnet50"], help="whose shapes")
    parser.add_argument("--case", nargs="+", choices=passes.NAMES, default=passes.NAMES, help="the passes to time; all")
    args = parser.parse_args(arguments)
    device, dtype = program.settle(args, IMPLEMENTATIONS, small=(2, 32)), program.DTYPES[args.dtype]
    torch.manual_seed(0)
    ceilings = measure_ceilings(device, dtype, args.repeats)
    rows = ceiling_rows(ceilings, dtype)
    suite = Kernels(device, dtype, ceilings, tuple(args.impl), args.repeats, args.limit)
    for make, norm in passes.plan([resnet(model, args.batch, args.size) for model in args.model], args.case):
        print(f"{make.__name__} {norm}", file=sys.stderr, flush=True)
        rows += suite.rows(make(passes.Inputs(norm, dtype, device)))
    return program.report(rows, device, args.commit, args.out)


if __name__ == "__main__":
    sys.exit(main())
