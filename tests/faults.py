"""What the benchmark's gate says of planted faults: `python tests/faults.py`, which writes the table of docs/benchmarks.md.

Each fault of tests/support/planted.py stands in as an implementation of each suite, in each dtype. A cell says how far the worst tensor is
from float64's, and what is allowed. Exit status 1 where a fault passed. A minute on two cores.
"""

import argparse
import re

import conftest  # noqa: F401  (the backends of the tests)
from support.checkout import ROOT
from support.gates import DTYPES, FAULTS, PLANTED, gate_of, verdicts

from fused_resnet.backends import BACKENDS
from fused_resnet.bench.networks import STEPS
from fused_resnet.files import with_section

PAGE = ROOT / "docs" / "benchmarks.md"


def cell(suite: str, dtype: str, fault: type) -> str:
    """What the gate says, before timing or after: "0.4 > 0.05", or "**passed**"."""
    BACKENDS["planted"] = fault()
    try:
        words = next(filter(None, verdicts(gate_of(suite, DTYPES[dtype]), PLANTED)), None)
    finally:
        del BACKENDS["planted"]
    if words is None:
        return "**passed**"
    error, allowed = re.search(r"is (\S+) from float64's; (\S+) is allowed", words).groups()
    return f"{float(error):.2g} > {float(allowed):.2g}"


def table() -> list[str]:
    """The page's lines."""
    heads = [f"{suite} {dtype}" for suite in STEPS for dtype in DTYPES]
    lines = [f"| fault | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for fault in dict.fromkeys(fault for _, fault in FAULTS):
        cells = [cell(suite, dtype, fault) if (suite, fault) in FAULTS else "" for suite in STEPS for dtype in DTYPES]
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", fault.__name__).capitalize().replace("relu", "ReLU")
        lines.append(f"| {words} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    lines = table()
    PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), "python tests/faults.py", "\n".join(lines)), encoding="utf-8")
    return int(any("**passed**" in line for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
