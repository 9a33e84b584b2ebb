"""What it costs that OpenMP's threads sleep at barriers, or spin there: training steps of a process for each setting, in turn.

    python bench/cpu_waiting.py resnet20 bf16 --size 32 --batch 128
    python bench/cpu_waiting.py resnet20 bf16 --size 32 --batch 128 --busy      # without the default, which takes minutes then

OpenMP reads its variables once, so each setting has a process of its own; all have the same network, and one of them works at a time.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch
from cpu_training import Training, parser

from fused_resnet.processors import WAITING

POLICIES: dict[str, dict[str, str]] = {
    "default": {},
    **{f"{turns} turns": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": str(turns)} for turns in (100_000, 30_000, 10_000, 0)},
}


def work(args: argparse.Namespace) -> None:
    """Answer each line of standard input by the milliseconds of a step."""
    training = Training(args)

    def step() -> float:
        start = time.perf_counter()
        training.step("auto")
        return 1e3 * (time.perf_counter() - start)

    step()
    for _ in sys.stdin:
        print(step(), flush=True)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--busy", action="store_true", help="beside a process that computes all the time")
    options.add_argument("--work", action="store_true", help="as this program calls itself")
    args = options.parse_args()
    if args.work:
        work(args)
        return
    plain = {name: value for name, value in os.environ.items() if name not in WAITING}
    workers = {}
    for policy, value in POLICIES.items():
        if args.busy and not value:
            continue
        environment = plain | value
        command = [sys.executable, *sys.argv, "--work"]
        workers[policy] = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(worker: subprocess.Popen) -> float:
        print("step", file=worker.stdin, flush=True)
        return float(worker.stdout.readline())

    for worker in workers.values():  # the first call finds all built
        ask(worker)
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if args.busy else None
    try:
        times = list(zip(*([ask(worker) for worker in workers.values()] for _ in range(args.rounds)), strict=True))
    finally:
        for process in (*workers.values(), *([other] if other else [])):
            process.terminate()
            process.wait()
    print(f"{args.model}, {args.dtype}, batch {args.batch} at {args.size}x{args.size}, PyTorch {torch.__version__}, "
          f"threads {torch.get_num_threads()}, load {os.getloadavg()[0]:.1f}, {args.rounds} rounds")  # fmt: skip
    for policy, taken in zip(workers, times, strict=True):
        ratio = statistics.median(here / first for here, first in zip(taken, times[0], strict=True))
        print(f"{policy}: median {statistics.median(taken):.1f} ms, {min(taken):.1f} to {max(taken):.1f}, {ratio:.3f} of the first's")


if __name__ == "__main__":
    main()
