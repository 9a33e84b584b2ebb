"""Profile one training step: a Chrome trace, and the time of each kernel by name.

Under --out: <model>-<impl>-<dtype>.json.gz for chrome://tracing or Perfetto, and .txt with a line a kernel. The step is warm; what
the profiler itself costs is in the gaps between kernels, so take times of whole steps from bench/train.py.
"""

import sys
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fused_resnet import models
from fused_resnet.bench import program
from fused_resnet.bench.machine import collect_meta
from fused_resnet.bench.steps import IMPLEMENTATIONS, Batches, TrainingStep

WARMUP = 10


def profiled(step: TrainingStep, device: torch.device) -> profile:
    """The profile of one call of `step`, after `WARMUP` of them."""
    for _ in range(WARMUP if device.type == "cuda" else 1):
        step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as result:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return result


def table(result: profile, device: torch.device) -> str:
    """Total µs, part of the whole, calls and name of each kernel, the longest first; on a CPU, of each ATen operator."""
    if device.type == "cuda":
        events = [e for e in result.key_averages() if e.device_type == DeviceType.CUDA]
        taken = {e: e.self_device_time_total for e in events}
    else:
        taken = {e: e.self_cpu_time_total for e in result.key_averages()}
    whole = sum(taken.values())
    lines = [f"{'us':>12}{'part':>8}{'calls':>8}  name", f"{whole:>12.1f}{1:>8.1%}{sum(e.count for e in taken):>8}  all"]
    for event, us in sorted(taken.items(), key=lambda item: -item[1]):
        lines.append(f"{us:>12.1f}{us / whole:>8.1%}{event.count:>8}  {event.key}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The program; gives its exit status."""
    parser = program.arguments(
        "Profile one training step.", "python bench/profile_step.py --model resnet50 --impl ours:passes",
        tuple(IMPLEMENTATIONS), "bf16",
    )  # fmt: skip
    parser.add_argument("--model", choices=models.list_models(), default="resnet50", metavar="NAME")
    args = parser.parse_args(arguments)
    device, dtype = program.settle(args, ("eager_nhwc", "ours:passes"), small=(8, 64)), program.DTYPES[args.dtype]
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as in bench/train.py
    batches = Batches(args.batch, args.size, 1000, device)
    args.out.mkdir(parents=True, exist_ok=True)
    for impl in args.impl:
        result = profiled(TrainingStep(args.model, impl, dtype, batches), device)
        path = args.out / f"{args.model}-{impl.replace(':', '-')}-{args.dtype}"
        result.export_chrome_trace(str(path) + ".json.gz")
        meta = collect_meta(device, args.commit)
        head = f"{args.model}, {impl}, {args.dtype}, {args.batch} images of {args.size} x {args.size}\n{meta}\n\n"
        Path(str(path) + ".txt").write_text(head + table(result, device) + "\n", encoding="utf-8")
        print(f"written to {path}.json.gz and .txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
