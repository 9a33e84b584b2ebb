"""Training steps on a CPU, fused and eager in turn in one run.

    python bench/cpu_steps.py resnet50 bf16 --size 224 --batch 16
    python bench/cpu_steps.py resnet50 bf16 --cpu-time          # on a machine that others use

The wall clock says what a user waits; it needs a machine of its own, since threads wait for each other at barriers. `--cpu-time` counts one
thread of this process alone, though others still share caches and memory.
"""

import os
import statistics
import time

import torch
from cpu_training import Training, parser

from fused_resnet import backends, native

BACKENDS = ("off", "auto")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--cpu-time", action="store_true", help="CPU time of one thread, not the wall clock")
    args = options.parse_args()
    if args.cpu_time:
        torch.set_num_threads(1)
    clock = time.process_time if args.cpu_time else time.perf_counter
    training = Training(args)

    def step(backend: str) -> float:
        start = clock()
        training.step(backend)
        return clock() - start

    for backend in BACKENDS * 2:
        step(backend)
    times = list(zip(*([step(backend) for backend in BACKENDS] for _ in range(args.rounds)), strict=True))
    used = backends.resolve(torch.device("cpu"), training.dtype)
    print(
        f"{training.words}, {'CPU time' if args.cpu_time else 'wall clock'}, threads {torch.get_num_threads()}, "
        f"load {os.getloadavg()[0]:.1f}, "
        f"backend {used}" + (f" ({native.cpu_instruction_set()})" if used == "passes_cpu" else "")
    )
    for name, pick in (("median", statistics.median), ("best", min)):
        eager, fused = (pick(t) * 1e3 for t in times)
        print(f"{name} of {args.rounds}: eager {eager:.0f} ms, fused {fused:.0f} ms, ratio {eager / fused:.2f}")
    ratios = sorted(eager / fused for eager, fused in zip(*times, strict=True))
    print(f"ratio round by round: {ratios[0]:.2f} to {ratios[-1]:.2f}, median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
