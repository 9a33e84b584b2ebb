"""How far the operators are off, beside PyTorch's eager: `python tests/errors.py`, which writes the table of docs/reliability.md.

Every chain of operators of the tests, in training and evaluation, in every shape, is run by every backend that runs here, in every dtype;
each result is held against float64 by the rule of tests/support/rule.py. Minutes on two cores, most of them in Triton's interpreter.
"""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import conftest  # noqa: F401  (the backends of the tests)
import torch
from support import tiers
from support.chains import CHAINS, DEVICE
from support.checkout import ROOT
from support.rule import PAIRS, SHAPES, inputs, loss_weight, margins

import fused_resnet
from fused_resnet.files import with_section

PAGE = ROOT / "docs" / "reliability.md"


class Row(NamedTuple):
    """Of a backend in a dtype: how many results eager has not exactly, their median error over eager's, and of all the largest share of what
    is allowed.
    """

    backend: str
    dtype: str
    results: int
    median: float
    most: float
    worst: str  #: the result with that share


def row(backend: str, dtype: torch.dtype) -> Row:
    """What all chains gave."""
    shares, ratios = {}, []
    for chain in CHAINS:
        for i, shape in enumerate(SHAPES):
            for training in (True, False):
                torch.manual_seed(tiers.number(f"{chain.__name__} {i}"))
                layers, x, r = inputs(shape, DEVICE)
                weight = loss_weight(chain, layers, x, r)
                with fused_resnet.backend(backend):
                    found = margins(chain, layers, x, r, weight, dtype, training=training)
                for name, margin in found.items():
                    which = f"{name} of {chain.__name__}"
                    shares[which] = max(margin.error / margin.allowed, shares.get(which, 0.0))
                    ratios += [margin.error / margin.eager] if margin.eager else []
    worst = max(shares, key=shares.get)
    median = torch.tensor(ratios, dtype=torch.float64).median().item()
    return Row(backend, str(dtype).removeprefix("torch."), len(ratios), median, shares[worst], worst)


def table(rows: list[Row]) -> Iterator[str]:
    """The page's lines."""
    yield "| backend | dtype | results that eager rounds | median error, eager's is 1 | largest share of what is allowed | which |"
    yield "|---|---|---|---|---|---|"
    for r in rows:
        yield f"| `{r.backend}` | {r.dtype} | {r.results:,} | {r.median:.2f} | {r.most:.2f} | {r.worst} |"


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rows = []
    for backend, dtype in PAIRS:
        rows.append(row(backend, dtype))
        print(rows[-1], flush=True)
    PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), "python tests/errors.py", "\n".join(table(rows))), encoding="utf-8")
    return any(r.most > 1 for r in rows)


if __name__ == "__main__":
    raise SystemExit(main())
