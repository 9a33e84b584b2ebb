"""Ask the gates of the benchmark about right implementations, again and again: none may be refused. Needs no GPU.

    python bench/fuzz_gate.py --draws 200

A draw is a network with weights of its own, conditioned and asked in the suites `train`, `inference` and `blocks`, and random operands of
every pass and convolution of the suite `kernels`; PyTorch's eager mode in both layouts and the operators on ATen are asked. Prints what
was refused, and how near the others came to their bounds. Exit status 1 where one was refused.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from fused_resnet import models
from fused_resnet.bench import accuracy, convolutions, passes
from fused_resnet.bench.gate import DRAWS, LATER_DRAWS, Gate
from fused_resnet.bench.networks import STEPS
from fused_resnet.bench.steps import Implementation, Subject
from fused_resnet.problem import ConvProblem, NormProblem
from fused_resnet.reference import Reference

CPU, BATCH = torch.device("cpu"), 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RIGHT = {"eager": Implementation("off", False), "eager_nhwc": Implementation("off", True), "operators": Implementation("eager", True)}


class Tally:
    """What was asked, refused, and how near to its bound the nearest came, by suite and dtype."""

    def __init__(self):
        self.asked, self.refused, self.nearest = {}, [], {}

    def add(self, key: tuple[str, str], who: str, status: str | None, nearness: float) -> None:
        """One answer. `nearness`: its error over the bound."""
        self.asked[key] = self.asked.get(key, 0) + 1
        self.nearest[key] = max(self.nearest.get(key, 0.0), nearness)
        if status:
            self.refused.append(f"{' '.join(key)} {who}: {status}")


def networks(seed: int, dtypes: Sequence[torch.dtype], tally: Tally) -> None:
    """The suites of networks and blocks."""
    for suite, kind in STEPS.items():
        for dtype in dtypes:
            key = suite, str(dtype).removeprefix("torch.")
            torch.manual_seed(seed)
            model = models.resnet50().layer2 if suite == "blocks" else models.resnet20()
            name, part, shape = ("block", model[0], (256, 8, 8)) if suite == "blocks" else ("resnet20", model, (3, 16, 16))
            gate = Gate(kind, Subject(name, lambda part=part: part, shape), dtype, BATCH, CPU)
            try:
                gate.prepare(None)
            except RuntimeError as error:
                tally.add(key, "the gate", str(error), 1.0)
                continue
            for who, how in RIGHT.items():
                step = gate.step(how, dtype, BATCH)
                for draw in (*DRAWS, *LATER_DRAWS):
                    truth, answer = gate.ask(step, draw, BATCH)
                    errors = truth.errors(answer, BATCH)
                    nearness = max(errors[name] / truth.bounds[name] for name in errors)
                    tally.add(key, who, truth.verdict(answer, BATCH)[1], nearness)


def kernels(seed: int, dtypes: Sequence[torch.dtype], tally: Tally) -> None:
    """The suite of kernels: every pass, every convolution."""
    norm, conv = NormProblem(4, 16, 8, 8), ConvProblem(4, 16, 8, 8, 24, 3, 3, (2, 2), (1, 1))
    for dtype in dtypes:
        torch.manual_seed(seed)
        made = [getattr(passes, name)(passes.Inputs(norm, dtype, CPU)) for name in passes.NAMES]
        for name in convolutions.NAMES:
            more = (ConvProblem(4, 16, 8, 8, 32, 1, 1, (2, 2)),) if "pair" in name else ()
            made.append(convolutions.make(name, convolutions.Place(name.removesuffix("_backward"), (conv, *more)), dtype, CPU))
        for case in (case for case in made if case.eager is not None):
            expected = case.ours(Reference())
            error, status = accuracy.error(case.eager(), expected, case.terms(expected), case.precision)
            nearness = error / accuracy.TOLERANCES[case.precision or dtype]
            tally.add(("kernels", str(dtype).removeprefix("torch.")), case.name, status, nearness)


def main() -> int:
    """The program; gives its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=200, metavar="N")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="of the first draw (default: 0)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="D",
                        help=f"some of {', '.join(DTYPES)} (default: all; a CPU takes most of the time for fp16)")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=float("inf"), metavar="S", help="stop after that many")
    args = parser.parse_args()
    tally, ends, draws = Tally(), time.monotonic() + args.seconds, 0
    dtypes = [DTYPES[name] for name in args.dtypes]
    for seed in range(args.first, args.first + args.draws):
        if time.monotonic() > ends:
            break
        networks(seed, dtypes, tally)
        kernels(seed, dtypes, tally)
        draws += 1
    print(f"{draws} draws, from seed {args.first}")
    for key, count in tally.asked.items():
        print(f"{' '.join(key):<20} {count:>6} answers, at most {tally.nearest[key]:.2f} of the bound")
    print("\n".join(tally.refused) or "none was refused")
    return int(bool(tally.refused))


if __name__ == "__main__":
    sys.exit(main())
