"""Memory that a training step on a CPU keeps for its backward, and its peak, by the resident set: eager, fused, fused with `recompute`.

    python bench/cpu_memory.py resnet50 bf16 --size 224 --batch 16

Each way runs in a process of its own, in NHWC, after steps that make what lives for ever: gradients, momenta, buffers of libraries. `kept`
is what the process has grown by when forward is done and its graph is alive; `peak` is the most within the step, above the same start.
glibc is told to give each tensor pages of its own, which go back to the system with it (`MALLOC_MMAP_THRESHOLD_`). Linux alone.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from cpu_training import Training, parser

import fused_resnet
from fused_resnet import backends

WAYS = {"eager": "off", "fused": "auto", "fused, recompute": "auto"}  #: the backend of each
STATUS = Path("/proc/self/status")


def resident(name: str = "VmRSS") -> int:
    """Bytes of this process in memory now; with "VmHWM" the most since `forget_peak`."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def forget_peak() -> None:
    """Let the peak begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(args: argparse.Namespace) -> dict[str, int | str]:
    """A step in one way: {"kept": bytes, "peak": bytes, "backend": its name}."""
    training = Training(args)
    if args.way.endswith("recompute"):
        fused_resnet.recompute(training.model)
    with fused_resnet.backend(WAYS[args.way]):
        for _ in range(2):
            training.optimizer.zero_grad(set_to_none=False)
            training.loss().backward()
            training.optimizer.step()
        gc.collect()
        fused_resnet.release_memory()  # what is kept from step to step counts as the step's
        forget_peak()
        start = resident()
        loss = training.loss()
        kept = resident() - start
        loss.backward()
        return {"kept": kept, "peak": resident("VmHWM") - start, "backend": backends.resolve(torch.device("cpu"), training.dtype)}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--way", choices=WAYS, help="one alone, printed as JSON; as this program calls itself")
    args = options.parse_args()
    if args.way:
        print(json.dumps(measure(args)))
        return
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = {}
    for way in WAYS:
        command = [sys.executable, *sys.argv, "--way", way]
        found[way] = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    print(f"{args.model}, {args.dtype}, batch {args.batch} at {args.size}x{args.size}, PyTorch {torch.__version__}")
    for way, bytes_of in found.items():
        figures = (
            f"{name} {bytes_of[name] / 1e6:,.0f} MB, {bytes_of[name] / found['eager'][name]:.2f} of eager's" for name in ("kept", "peak")
        )
        print(f"{way} ({bytes_of['backend']}): {'; '.join(figures)}")


if __name__ == "__main__":
    main()
