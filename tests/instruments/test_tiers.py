"""The tiers: which cases `make test` runs, and that a test has the same seed every time."""

import itertools

import conftest
import pytest
from support import tiers

pytest_plugins = ["pytester"]
SUITE = """
import pytest

@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("backend, device", [("eager", "cpu"), ("triton", "cpu"), ("triton", "cuda"), ("cudnn", "cuda")])
@pytest.mark.parametrize("training", [True, False])
def test_many(dtype, backend, device, training):
    print("case", dtype, backend, device, training)

@pytest.mark.full
def test_more(seed):
    pass

def test_one(seed):
    print("seed of one", seed)
"""


@pytest.fixture
def suite(pytester):
    """Runs SUITE with this project's conftest, which brings the tiers."""
    pytester.makeini("[pytest]\nmarkers =\n    full: more\n    slow: slow\n    gpu: gpu\n")
    pytester.makepyfile(test_suite=SUITE)
    return lambda *flags: pytester.runpytest_inprocess("-p", "no:cacheprovider", "-s", *flags, plugins=[conftest])


def test_each_value_occurs_in_few_cases():
    values = [range(15), range(4), range(2)]
    cases = {str(case): dict(zip("abc", case, strict=True)) for case in itertools.product(*values)}
    chosen = tiers.each_value(cases)
    assert len(chosen) == 15
    for axis, wanted in zip("abc", values, strict=True):
        assert {cases[name][axis] for name in chosen} == set(wanted)
    assert chosen == tiers.each_value(dict(reversed(cases.items())))  # the order of collection decides nothing
    assert len({(cases[name]["b"], cases[name]["c"]) for name in chosen}) > 4  # values meet in many ways
    assert tiers.each_value({}) == set()


def test_the_quick_tier_has_each_value_and_nothing_marked_full(suite):
    everything = suite()
    everything.assert_outcomes(passed=26)
    result = suite("--quick")
    result.assert_outcomes(passed=5, deselected=21)
    cases = [line.split()[1:] for line in result.outlines if line.lstrip(".").startswith("case")]
    assert {case[0] for case in cases} == {"float32", "float16", "bfloat16"}
    assert {(case[1], case[2]) for case in cases} == {("eager", "cpu"), ("triton", "cpu"), ("triton", "cuda"), ("cudnn", "cuda")}
    assert {case[3] for case in cases} == {"True", "False"}


def test_a_test_has_the_seed_of_its_name(suite, monkeypatch):
    monkeypatch.delenv("FUSED_RESNET_TEST_SEED", raising=False)

    def seed(*flags):
        (line,) = [line for line in suite("-k", "one", *flags).outlines if "seed of one" in line]
        return int(line.split()[-1])

    assert seed() == seed() == tiers.number("test_suite.py::test_one")
    assert seed("--fresh-seeds") != seed()
    monkeypatch.setenv("FUSED_RESNET_TEST_SEED", "17")
    assert seed() == 17
