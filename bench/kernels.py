"""Time every pass on ResNet-50's shapes against PyTorch's eager mode and torch.compile, and write bench/results JSON.

Each result is checked against the float64 reference first; what is wrong gets no figure. The device's own copy and matrix product,
timed in the same run, are the ceilings.
"""

import sys
from collections.abc import Callable

import torch

from fused_resnet.backends import BACKENDS
from fused_resnet.bench import passes, program
from fused_resnet.bench.machine import Ceilings, measure_ceilings
from fused_resnet.bench.passes import Case
from fused_resnet.bench.schema import Row
from fused_resnet.bench.timing import Times, attempt, measure
from fused_resnet.reference import Reference
from fused_resnet.roofline import resnet

IMPLEMENTATIONS = ("eager_nhwc", "compile", "ours:passes")


def peers(case: Case, implementations: list[str]) -> dict[str, Callable[[], tuple]]:
    """The implementations that there are of a case."""
    calls = {"ours:passes": lambda: case.ours(BACKENDS["passes"])}
    if case.eager is not None:
        torch.compiler.reset()  # else the shapes of a pass share one list of compiled versions, which is short
        calls["eager_nhwc"] = case.eager
        calls["compile"] = torch.compile(case.eager, dynamic=False, fullgraph=True)
    return {impl: calls[impl] for impl in implementations if impl in calls}


def check(calls: dict[str, Callable[[], tuple]], expected: tuple, device: torch.device, dtype: torch.dtype) -> dict[str, dict]:
    """What is known of each implementation before it is timed: its error, and its status where it is not to be timed."""
    facts = {}
    for impl, call in calls.items():
        facts[impl] = {}
        if impl.startswith("ours") and (reason := BACKENDS[impl.partition(":")[2]].declines(device, dtype)):
            facts[impl]["status"] = f"unsupported: {reason}"
            continue
        results = []
        if status := attempt(lambda call=call, results=results: results.extend(call())):
            facts[impl]["status"] = status
            continue
        error, status = passes.error(results, expected)
        facts[impl]["max_rel_error"] = finite(error)
        if status:
            facts[impl]["status"] = status
    return facts


def run(case: Case, dtype: torch.dtype, device: torch.device, ceilings: Ceilings, args) -> list[Row]:
    """Check and time a case. A row for each implementation."""
    calls = peers(case, args.impl)
    facts = check(calls, case.ours(Reference()), device, dtype)
    right = {impl: call for impl, call in calls.items() if "status" not in facts[impl]}
    times = measure(right, device, args.repeats, limit_s=args.limit)
    for impl, outcome in times.items():
        if isinstance(outcome, Times):
            rate = case.bytes / (outcome.median_ms * 1e-3)
            facts[impl] |= vars(outcome) | {"gbytes_per_s": rate / 1e9, "copy_fraction": rate / ceilings.bytes_per_s}
        else:
            facts[impl]["status"] = outcome
    name, norm = str(dtype).removeprefix("torch."), case.norm
    return [Row("kernels", case.name, impl, name, norm.n, [norm.c, norm.h, norm.w], **facts[impl]) for impl in calls]


def finite(value: float | None) -> float | None:
    """`value`; None where it is infinite, which JSON has no word for."""
    return None if value is None or value == float("inf") else value


def ceiling_rows(ceilings: Ceilings, dtype: torch.dtype) -> list[Row]:
    """The copy and the matrix product as rows of their own."""
    name, matmul = str(dtype).removeprefix("torch."), ceilings.flops_per_s / 1e12
    return [
        Row("kernels", "copy", "copy", "float32", None, None, **vars(ceilings.copy),
            gbytes_per_s=ceilings.bytes_per_s / 1e9, copy_fraction=1.0),
        Row("kernels", "matmul", "eager", name, None, None, **vars(ceilings.matmul), tflops=matmul, roofline_fraction=1.0),
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The program; gives its exit status."""
    parser = program.arguments(
        "Time every pass of the backends on ResNet-50's shapes.", "python bench/kernels.py --dtype fp16 --batch 128",
        IMPLEMENTATIONS, "bf16",
    )  # fmt: skip
    program.add_timing(parser)
    parser.add_argument("--case", nargs="+", choices=passes.NAMES, default=passes.NAMES, help="the passes to time; all")
    args = parser.parse_args(arguments)
    device, dtype = program.settle(args, IMPLEMENTATIONS, small=(2, 32)), program.DTYPES[args.dtype]
    torch.manual_seed(0)
    ceilings = measure_ceilings(device, dtype, args.repeats)
    rows = ceiling_rows(ceilings, dtype)
    for make, norm in passes.plan(resnet("resnet50", args.batch, args.size), args.case):
        print(f"{make.__name__} {norm}", file=sys.stderr, flush=True)
        rows += run(make(passes.Inputs(norm, dtype, device)), dtype, device, ceilings, args)
    return program.report(rows, device, args.commit, args.out)


if __name__ == "__main__":
    sys.exit(main())
