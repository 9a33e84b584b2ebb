"""Runs cases of one kind of arithmetic for one architecture, and prints what came out, a line of JSON each.

    PTX_ARCHITECTURE=90 python -m tests.support.ptx.measure bfloat16 [--every 17] [--traffic | --mutants]

`--every` takes one of so many cases, `--traffic` counts sectors and bank conflicts of the first programs at ResNet-50's shapes, `--mutants` takes
lines out of compiled kernels.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import conftest  # noqa: F401  Triton's interpreter stays away, and the emulated backend is there, before the operators are imported
import torch

from support import executed, tiers
from support.ptx import cases, mutants, traffic
from support.ptx.launches import Ran, executing
from support.ptx.report import Report


@dataclass
class Outcome:
    """What one case came to."""

    kernel: str  #: or pass
    arithmetic: str
    architecture: int
    words: str
    ratios: dict[str, float] = field(default_factory=dict)  #: of each result, its error in units of what is allowed
    faults: list[str] = field(default_factory=list)
    same_bits: bool = True  #: when run again
    codes: list[str] = field(default_factory=list)  #: one of each launch, equal for the same code
    unfenced: bool = False  #: a wgmma read what cp.async wrote with no fence.proxy.async behind
    seconds: float = 0.0


def bits(found: tuple[torch.Tensor | None, ...]) -> list[bytes | None]:
    """The bytes of tensors."""
    return [None if t is None else t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in found]


def launches(run: Callable[[], tuple], architecture: int) -> tuple[tuple, list[Ran]]:
    """What a case returns, and its launches."""
    with executing(architecture, raising=False) as ran:
        return run(), ran


def outcome(make: Callable[[], cases.Case], arithmetic: str, architecture: int) -> Outcome:
    """Run a case twice and judge it."""
    begin = time.perf_counter()
    case = make()
    made = Outcome(case.kernel, arithmetic, architecture, case.words)
    found, ran = launches(case.run, architecture)
    again, _ = launches(case.run, architecture)
    report = Report()
    for each in ran:
        report.merge(each.report)
        made.codes.append(f"{each.kernel} {each.key}")
    made.faults = [str(finding) for finding in report.findings.values()]
    made.unfenced = report.counts["wgmma of unfenced copies"] > 0
    made.ratios = {what: float(ratio) for what, ratio in case.judge(found).items()}
    made.same_bits = bits(found) == bits(again)
    made.seconds = round(time.perf_counter() - begin, 2)
    return made


def outcomes(arithmetic: str, architecture: int, every: int) -> Iterator[Outcome]:
    """Of one of `every` cases; each draws its numbers by a seed of its own."""
    torch.manual_seed(tiers.number(f"{arithmetic} {architecture}"))
    makers = [*(cases.all_passes(arithmetic) if arithmetic != "tf32" else ()), *cases.convolutions(arithmetic, architecture)]
    first = list(cases.ARITHMETIC).index(arithmetic) * 5 + architecture  # so that other kinds take others
    for n in range(first % every, len(makers), every):
        torch.manual_seed(n)
        yield outcome(makers[n], arithmetic, architecture)


def main() -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser()
    parser.add_argument("arithmetic", choices=cases.ARITHMETIC)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--traffic", action="store_true")
    parser.add_argument("--mutants", action="store_true")
    asked = parser.parse_args()
    if asked.traffic:
        found = traffic.measured(asked.arithmetic, executed.ARCHITECTURE)
    elif asked.mutants:
        found = mutants.all_kernels(executed.ARCHITECTURE)
    else:
        found = outcomes(asked.arithmetic, executed.ARCHITECTURE, asked.every)
    for each in found:
        print(json.dumps(asdict(each)), flush=True)


if __name__ == "__main__":
    main()
