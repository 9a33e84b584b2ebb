"""Training steps on a CPU, fused and eager in turn in one run.

    python bench/cpu_steps.py resnet50 bf16 --size 224 --batch 16
    python bench/cpu_steps.py resnet50 bf16 --cpu-time          # on a machine that others use

The wall clock says what a user waits; it needs a machine of its own, since threads wait for each other at barriers. `--cpu-time` counts one
thread of this process alone, though others still share caches and memory.
"""

import argparse
import os
import statistics
import time

import torch

import fused_resnet
from fused_resnet import backends, models, native

BACKENDS = ("off", "auto")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", choices=models.list_models())
    parser.add_argument("dtype", choices=("fp32", "bf16"))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread, not the wall clock")
    args = parser.parse_args()
    if args.cpu_time:
        torch.set_num_threads(1)
    clock = time.process_time if args.cpu_time else time.perf_counter
    torch.manual_seed(0)
    model = getattr(models, args.model)().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    images = torch.randn(args.batch, 3, args.size, args.size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (args.batch,))

    def step(backend: str) -> float:
        start = clock()
        with fused_resnet.backend(backend), torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.dtype == "bf16"):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return clock() - start

    for backend in BACKENDS * 2:
        step(backend)
    times = list(zip(*([step(backend) for backend in BACKENDS] for _ in range(args.rounds)), strict=True))
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    used = backends.resolve(torch.device("cpu"), dtype)
    print(
        f"{args.model}, {args.dtype}, batch {args.batch} at {args.size}x{args.size}, PyTorch {torch.__version__}, "
        f"{'CPU time' if args.cpu_time else 'wall clock'}, threads {torch.get_num_threads()}, load {os.getloadavg()[0]:.1f}, "
        f"backend {used}" + (f" ({native.cpu_instruction_set()})" if used == "passes_cpu" else "")
    )
    for name, pick in (("median", statistics.median), ("best", min)):
        eager, fused = (pick(t) * 1e3 for t in times)
        print(f"{name} of {args.rounds}: eager {eager:.0f} ms, fused {fused:.0f} ms, ratio {eager / fused:.2f}")
    ratios = sorted(eager / fused for eager, fused in zip(*times, strict=True))
    print(f"ratio round by round: {ratios[0]:.2f} to {ratios[-1]:.2f}, median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
