"""Cases of the operators that Hypothesis draws, by the rule of support/rule.py: `make fuzz MINUTES=10`, or `python tests/fuzz.py --minutes 10`.

A case is a closed chain of operators (chains.py), a backend, a dtype, a shape and a seed. One that fails is made as small as Hypothesis can, printed, and kept in
tests/regressions.json, which tests/instruments/test_fuzz.py runs from then on: mend the fault, and commit the file with it.
"""

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import conftest  # noqa: F401  Triton's interpreter and the emulated backend, before the operators are imported
import hypothesis
import torch
from hypothesis import strategies as st
from support.chains import CHAINS, DEVICE, Shape
from support.rule import PAIRS, refused_of_draws

import fused_resnet

REGRESSIONS = Path(__file__).with_name("regressions.json")
BY_NAME = {chain.__name__: chain for chain in CHAINS}
IN_CHANNELS = (1, 2, 3, 7, 8, 16, 17, 24, 33, 64, 130)
OUT_CHANNELS = IN_CHANNELS[1:]  # a norm in training takes the scale of a filter away: of a filter of one value no gradient is left
#: Multiplications of the largest convolution of a case: about a second. Interpreted ones take longer.
MOST_WORK = 2_000_000
MOST_INTERPRETED_WORK = 100_000
#: Of a channel. With fewer the gradient of a norm in training is what rounding leaves of it, in PyTorch's operators as in ours.
LEAST_VALUES = 16


class TimeUp(BaseException):
    """Ends a search, which Hypothesis would go on with after an Exception."""


@dataclass(frozen=True)
class Case:
    """A chain of tests/support/chains.py on random tensors; all of it can be written as JSON."""

    chain: str
    backend: str
    dtype: str
    training: bool
    shape: Shape
    seed: int

    @classmethod
    def of_json(cls, fields: dict) -> "Case":
        return cls(**{**fields, "shape": Shape(**fields["shape"])})


def refused(case: Case) -> list[str]:
    """What the rule has against a case."""
    torch.manual_seed(case.seed)
    with fused_resnet.backend(case.backend):
        return refused_of_draws(BY_NAME[case.chain], case.shape, getattr(torch, case.dtype), case.training, DEVICE)


@st.composite
def shapes(draw: Callable, sizes: tuple[int, ...], most_work: int) -> Shape:
    """Small and odd: windows that overlap or leave gaps, groups, dilation, images of a pixel."""
    size = draw(st.sampled_from(sizes))
    c, k = draw(st.sampled_from(IN_CHANNELS)), draw(st.sampled_from(OUT_CHANNELS))
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 7, 8, c) if c % g == 0 and k % g == 0]))
    shape = Shape(
        draw(st.integers(1, 9)), c, draw(st.integers(1, 33)), draw(st.integers(1, 33)), k, size=size, stride=draw(st.integers(1, 3)),
        groups=groups, dilation=draw(st.integers(1, 3)),
    )  # fmt: skip
    p, q = shape.inner_size()
    hypothesis.assume(c // groups * size**2 > 1)  # as OUT_CHANNELS
    hypothesis.assume(min(p, q) > 0 and shape.n * ((p + 1) // 2) * ((q + 1) // 2) >= LEAST_VALUES)
    hypothesis.assume(shape.n * p * q * k * max(9 * k, c // groups * size**2) <= most_work)
    return shape


def cases(backend: str, dtype: torch.dtype) -> st.SearchStrategy[Case]:
    """What is drawn for a backend and a dtype."""
    names, seeds = st.sampled_from(sorted(BY_NAME)), st.integers(0, 2**31 - 1)
    # PyTorch 2.13's bfloat16 convolution on a CPU writes garbage where a filter of 2x2 is padded: eager's own error is then past 1e19.
    sizes = (1, 3, 5, 7) if dtype == torch.bfloat16 and DEVICE.type == "cpu" else (1, 2, 3, 5, 7)
    work = MOST_INTERPRETED_WORK if backend == "triton" and DEVICE.type == "cpu" else MOST_WORK
    return st.builds(Case, names, st.just(backend), st.just(str(dtype).removeprefix("torch.")), st.booleans(), shapes(sizes, work), seeds)


def search(backend: str, dtype: torch.dtype, examples: int, seed: int, until: float = float("inf")) -> tuple[Case, list[str]] | None:
    """Draw cases; the smallest that fails with what the rule has against it, or None. Ends at `until`, of time.monotonic()."""
    failed = None

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, print_blob=False, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(cases(backend, dtype))
    def hold(case: Case) -> None:
        nonlocal failed
        if time.monotonic() > until:
            raise TimeUp
        found = refused(case)
        if found:
            failed = case, found
            raise AssertionError(found)

    try:
        hold()
    except (AssertionError, TimeUp):
        return failed
    return None


def kept(path: Path = REGRESSIONS) -> list[Case]:
    """The cases that failed once."""
    return [Case.of_json(fields) for fields in json.loads(path.read_text())]


def keep(case: Case, path: Path = REGRESSIONS) -> None:
    """Add a case to the file, once."""
    cases = dict.fromkeys([*kept(path), case]) if path.exists() else [case]
    path.write_text("[\n" + ",\n".join(json.dumps(asdict(case)) for case in cases) + "\n]\n")


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns 1 where a case failed."""
    parser = argparse.ArgumentParser(description="Draw cases of the operators, and keep those that fail.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--examples", type=int, default=20, help="of a backend and dtype before it is the next one's turn")
    args = parser.parse_args(arguments)
    until, draws, failures = time.monotonic() + 60 * args.minutes, random.SystemRandom(), 0
    turns = itertools.cycle(PAIRS)
    for turn in itertools.count(1):
        if time.monotonic() > until:
            break
        backend, dtype = next(turns)
        if found := search(backend, dtype, args.examples, draws.randrange(2**31), until):
            case, reasons = found
            failures += 1
            keep(case)
            print(f"{case}\n    " + "\n    ".join(reasons), flush=True)
        if turn % len(PAIRS) == 0:
            print(f"{turn * args.examples} cases of {len(PAIRS)} backends and dtypes, {failures} failed", flush=True)
    print(f"{failures} failed" + f"; kept in {REGRESSIONS}" * bool(failures))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
