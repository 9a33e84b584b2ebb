"""Small faults, planted one at a time, and the test that sees each: `python tests/mutants.py`, which writes the table of docs/reliability.md.

A mutant is a line of the package that is made wrong in a copy of the checkout; the tests that should see it run there until the first fails.
One that no test sees survives, and the exit code is 1. At the end the tests that failed run unharmed, so that a failure is the mutant's. The
list is tests/support/mutations.py; tests/instruments/test_mutants.py holds that each still fits the code.

    python tests/mutants.py                       # all, two at a time: half an hour on two cores (`make mutants`)
    python tests/mutants.py --only "fsync" "eps"  # those whose name holds one of these words; the page stays as it is
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch
from support.checkout import ROOT
from support.mutations import MUTANTS, Mutant

from fused_resnet import native
from fused_resnet.files import with_section

PAGE = ROOT / "docs" / "reliability.md"
LIMIT_S = 900  #: of one mutant's tests: one that hangs is seen, too


class Outcome(NamedTuple):
    """What became of a mutant."""

    mutant: Mutant
    seen_by: str | None  #: the first test that failed; None where none did
    seconds: float


def copied(folder: Path) -> Path:
    """The files of the checkout that git knows or would take, and the native libraries, in `folder`."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    libraries = [path.relative_to(ROOT).as_posix() for path in (ROOT / "fused_resnet").glob("*.so")]
    for name in [*filter(None, names.split("\0")), *libraries]:
        if (ROOT / name).is_file():
            to = folder / name
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to)
    return folder


def build(copy: Path) -> None:
    """Make the native library for CPUs of a copy; the second time only what has changed. Raises CalledProcessError where it does not compile."""
    native.CPU.load()
    package, into = Path(torch.__file__).parent, copy / "build" / "cpu"
    include = f"{package / 'include'};{package / 'include/torch/csrc/api/include'}"
    commands = [["cmake", "--build", str(into)]]
    if not into.exists():
        settings = [f"-DTORCH_INCLUDE_DIRS={include}", f"-DTORCH_LIBRARY_DIR={package / 'lib'}"]
        # For this machine, and soon: a mutant need not be fast.
        settings += [f"-DFUSED_RESNET_CPU_ISAS={native.best_cpu_instruction_set()}", "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG"]
        commands.insert(0, ["cmake", "-S", str(copy / "csrc" / "cpu"), "-B", str(into), "-G", "Ninja", *settings])
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))  # of cmake and ninja, which pip installs
    for command in commands:
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PATH": path})
    library = "libfused_resnet_cpu.so"
    shutil.copy2(into / library, copy / "fused_resnet" / library)


def first_failure(copy: Path, tests: list[str]) -> str | None:
    """The first of the tests that fails in a copy; None where none does. Raises RuntimeError where they can't be run at all."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--quick", "-p", "no:cacheprovider", "--tb=no", "-rfE", *tests]
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"{' '.join(tests)} (not done in {LIMIT_S} s)"
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode != 1 or found is None:
        raise RuntimeError(f"{' '.join(tests)} could not be run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return found[1]


@contextmanager
def planted(copy: Path, mutant: Mutant) -> Iterator[None]:
    """The copy with the mutant in it; without it afterwards."""
    path = copy / mutant.path
    text = path.read_text(encoding="utf-8")
    path.write_text(mutant.applied(text), encoding="utf-8")
    try:
        if mutant.is_native:
            build(copy)
        yield
    finally:
        path.write_text(text, encoding="utf-8")


def run(mutants: list[Mutant], jobs: int) -> Iterator[Outcome]:
    """Each mutant's outcome, `jobs` at a time. Raises RuntimeError where a test that saw one fails without it, too."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:
        unharmed, free, saw = copied(Path(name) / "unharmed"), SimpleQueue(), []
        for mutant in mutants:  # before the first of them takes its time
            mutant.applied((unharmed / mutant.path).read_text(encoding="utf-8"))
        for job in range(jobs):
            free.put(copied(Path(name) / str(job)))

        def outcome(mutant: Mutant) -> Outcome:
            copy, start = free.get(), time.perf_counter()
            try:
                with planted(copy, mutant):
                    return Outcome(mutant, first_failure(copy, shlex.split(mutant.tests)), time.perf_counter() - start)
            finally:
                free.put(copy)

        # Those of the library last: a copy's stays a mutant's until the next is built.
        for found in pool.map(outcome, sorted(mutants, key=lambda mutant: mutant.is_native)):
            saw += [found.seen_by] if found.seen_by else []
            yield found
        if saw and (failed := first_failure(unharmed, saw)):
            raise RuntimeError(f"{failed} fails without a mutant")


def section(outcomes: list[Outcome]) -> str:
    """The page's table."""
    seen = sum(outcome.seen_by is not None for outcome in outcomes)
    lines = [f"{len(outcomes)} mutants, {seen} seen.", "", "| mutant | file | first test that fails |", "|---|---|---|"]
    for mutant, seen_by, _ in outcomes:
        lines.append(f"| {mutant.name} | `{mutant.path}` | " + (f"`{seen_by}` |".replace("tests/", "") if seen_by else "**none** |"))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="WORDS", help="mutants whose name holds one of these")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="mutants at a time, each in a process of one thread (default 2)")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"argument --jobs: expected at least 1, got {args.jobs}")
    mutants = [mutant for mutant in MUTANTS if not args.only or any(words in mutant.name for words in args.only)]
    if not mutants:
        parser.error(f"argument --only: expected a part of a mutant's name, such as {MUTANTS[0].name!r}; got {args.only}")
    outcomes = []
    for outcome in run(mutants, args.jobs):
        outcomes.append(outcome)
        print(f"{outcome.seconds:4.0f} s  {outcome.mutant.name}: {outcome.seen_by or 'SURVIVED'}", flush=True)
    if not args.only:
        table = section(sorted(outcomes, key=lambda o: MUTANTS.index(o.mutant)))
        PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), "python tests/mutants.py", table), encoding="utf-8")
    survivors = [outcome.mutant.name for outcome in outcomes if outcome.seen_by is None]
    print(f"{len(outcomes)} mutants, {len(survivors)} survived" + "".join(f"\n  {name}" for name in survivors))
    return bool(survivors)


if __name__ == "__main__":
    raise SystemExit(main())
