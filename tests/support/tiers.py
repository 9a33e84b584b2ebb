"""Which tests run when. All of it is here, in tests/conftest.py, which asks this module, and in the markers of pyproject.toml.

| command | what runs | seeds |
|---|---|---|
| `make test` | every test, but of a parametrised one the fewest cases in which each value of each parameter occurs; none marked `full`, `slow` | of the test's name |
| `make test-all` | every case of every test; none marked `slow` | of the test's name |
| `make slow` | the tests marked `slow` | of the test's name |
| `make fuzz MINUTES=10` | drawn cases of the operators, for that long (tests/fuzz.py); what fails is kept and run by `make test` from then on | fresh |

So a new test needs no marker, and a new value of a parameter runs in `make test` at once. `pytest FILE` runs all cases of a file but slow ones, `--quick` those of `make test`,
`--fresh-seeds` draws new seeds, and FUSED_RESNET_TEST_SEED=N repeats one.
"""

import hashlib
from collections.abc import Hashable, Mapping


def number(name: str) -> int:
    """A whole number below 2³¹ that a name has for ever, on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1


def each_value(cases: Mapping[str, Mapping[str, Hashable]]) -> set[str]:
    """Names of few cases in which each value of each parameter occurs, of `cases`: name -> parameter -> value.

    Of the cases that bring most values which no chosen one has, a number of its name decides: values then meet in many ways, not the
    first of each with all of the others.
    """
    left = {name: set(values.items()) for name, values in cases.items()}
    missing = set().union(*left.values()) if left else set()
    chosen = set()
    while missing:
        best = max(left, key=lambda name: (len(left[name] & missing), number(name)))
        chosen.add(best)
        missing -= left.pop(best)
    return chosen
