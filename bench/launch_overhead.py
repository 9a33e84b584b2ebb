"""What the launches of a training step cost the host: real launches of the Triton kernels, by a driver without a GPU.

    python bench/launch_overhead.py                      # ResNet-50's step by the backend triton, sm_90
    python bench/launch_overhead.py --beside v0.1.0      # the same of another commit, side by side

Triton binds, specialises and looks up each launch as on a GPU, up to the call that would start the kernel
(fake_driver.py). That call, the CUDA driver's time and a GPU's allocator are not in the figures. A process for each commit
steps in turn, in one thread, on tiny images; a figure is the least time of each call of a function over all rounds, summed. The first run
compiles the kernels: minutes.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
#: What the backend calls, each with all that it launches.
FUNCTIONS = {
    "fprop": ("fprop",),
    "dgrad": ("dgrad",),
    "wgrad": ("wgrad",),
    "batch_stats": ("batch_stats", "merge_moments"),
    "norm_add_act": ("norm_add_act",),
    "norm_backward": ("norm_backward_reduce", "norm_backward_apply"),
    "max_pool": ("norm_act_max_pool", "norm_act_max_pool_backward"),
    "avg_pool": ("norm_add_act_avg_pool", "norm_add_act_avg_pool_backward"),
}
STEP = "whole step"


class Step:
    """A training step on tiny images, whose launches are timed."""

    def __init__(self, model: str, size: int) -> None:
        import torch
        from fake_driver import Launched, install

        import fused_resnet

        install(90, collect=False)
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.taken: list[tuple[str, int]] = []
        for module, names in FUNCTIONS.items():
            place = importlib.import_module(f"fused_resnet.kernels.{module}")
            for name in names:
                setattr(place, name, self._timed(name, getattr(place, name)))
        layout = torch.channels_last
        self._model = fused_resnet.models.get_model(model).to(torch.bfloat16).to(memory_format=layout)
        self._images = torch.zeros(2, 3, size, size, dtype=torch.bfloat16).contiguous(memory_format=layout)
        self._choice = lambda: fused_resnet.backend(Launched.name)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter_ns()
            result = function(*args, **options)
            self.taken.append((name, time.perf_counter_ns() - start))
            return result

        return timed

    def __call__(self) -> list[tuple[str, int]]:
        """(function, nanoseconds) of each call in the order of the calls, and of the whole step."""
        self.taken.clear()
        self._model.zero_grad(set_to_none=True)
        start = time.perf_counter_ns()
        with self._choice():
            result = self._model(self._images)
            result.backward(result)
        return [*self.taken, (STEP, time.perf_counter_ns() - start)]


def work(args: argparse.Namespace) -> None:
    """Answer each line of standard input by the times of a step."""
    step = Step(args.model, args.size)
    for _ in sys.stdin:
        print(json.dumps(step()), flush=True)


def checkout(commit: str, folder: str) -> Path:
    """The sources of a commit, in `folder`. Raises CalledProcessError where there is no such commit."""
    archive = subprocess.run(["git", "archive", commit], cwd=HERE.parent, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    return Path(folder)


class Worker:
    """A process that steps with the sources of a folder."""

    def __init__(self, root: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, *sys.argv, "--work"]
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> list[tuple[str, int]]:
        """The times of a step."""
        assert self._process.stdin and self._process.stdout
        print(file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the process that launches has ended: its error is above")
        return [(name, taken) for name, taken in json.loads(line)]

    def end(self) -> None:
        """Let it end."""
        self._process.communicate()


def least(rounds: list[list[tuple[str, int]]]) -> dict[str, tuple[int, float]]:
    """{function: (calls, seconds)}: of each call of a step its least time. Raises ValueError where steps call different functions."""
    if len({tuple(name for name, _ in step) for step in rounds}) != 1:
        raise ValueError("rounds: expected steps that call the same functions in the same order")
    found: dict[str, list[int]] = defaultdict(list)
    for calls in zip(*rounds, strict=True):
        found[calls[0][0]].append(min(taken for _, taken in calls))
    return {name: (len(times), sum(times) / 1e9) for name, times in found.items()}


def table(columns: dict[str, dict[str, tuple[int, float]]]) -> list[str]:
    """Lines: a function each, its calls, microseconds a call and milliseconds a step of each column; then the sum, and the whole step."""
    first = next(iter(columns.values()))
    names = sorted((name for name in first if name != STEP), key=lambda name: -first[name][1])
    lines = [f"{'':32} {'calls':>5}" + "".join(f" {name[:12]:>12} µs {'ms':>7}" for name in columns)]
    for name in names:
        cells = "".join(f" {1e6 * seconds / calls:>15.1f} {1e3 * seconds:>7.2f}" for calls, seconds in (c[name] for c in columns.values()))
        lines.append(f"{name:32} {first[name][0]:>5}{cells}")
    launches = {column: sum(seconds for name, (_, seconds) in c.items() if name != STEP) for column, c in columns.items()}
    lines.append(f"{'together':38}" + "".join(f" {'':>15} {1e3 * launches[column]:>7.2f}" for column in columns))
    lines.append(f"{STEP:38}" + "".join(f" {'':>15} {1e3 * c[STEP][1]:>7.2f}" for c in columns.values()))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50", help="a network of this package")
    parser.add_argument("--size", type=int, default=64, help="pixels of an image's side; the host's time hardly depends on it")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--beside", metavar="COMMIT", help="another commit of this repository, in a column of its own")
    parser.add_argument("--work", action="store_true", help="as this program calls itself")
    args = parser.parse_args()
    if args.work:
        work(args)
        return 0
    import torch
    import triton

    with tempfile.TemporaryDirectory() as folder:
        roots = {args.beside: checkout(args.beside, folder)} if args.beside else {}
        workers = {name: Worker(root) for name, root in (roots | {"here": HERE.parent}).items()}
        for worker in workers.values():  # the first step compiles, and the second still fills caches
            worker.step(), worker.step()
        rounds: dict[str, list[list[tuple[str, int]]]] = {name: [] for name in workers}
        for _ in range(args.rounds):
            for name, worker in workers.items():
                rounds[name].append(worker.step())
        for worker in workers.values():
            worker.end()
    print(f"{args.model}, training step, Triton {triton.__version__}, PyTorch {torch.__version__}, Python {sys.version.split()[0]}, "
          f"least of {args.rounds} rounds, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    columns = {name: least(steps) for name, steps in rounds.items()}
    print("\n".join(table(columns)))
    print(json.dumps({"launch_overhead": {name: {k: v[1] for k, v in column.items()} for name, column in columns.items()}}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
