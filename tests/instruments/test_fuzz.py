"""Cases of the operators that Hypothesis draws, by the eager backend, and those that failed once by any; `make fuzz` draws on, for every backend."""

import dataclasses
import json
import time

import fuzz
import pytest
import torch
from support.rule import PAIRS

from fused_resnet.backends import BACKENDS


@pytest.mark.parametrize("dtype", [dtype for backend, dtype in PAIRS if backend == "eager"], ids=str)
def test_drawn_cases_hold(dtype, seed):
    assert fuzz.search("eager", dtype, 6, seed) is None


def test_cases_that_failed_once_hold():
    failed = {case: found for case in fuzz.kept() if (found := fuzz.refused(case))}
    assert not failed


@pytest.mark.full
def test_a_fault_is_found_made_small_and_kept(monkeypatch, tmp_path, seed):
    """Planted: an output of more than four channels is a hundredth too large."""
    eager = BACKENDS["eager"]
    right = type(eager).norm_add_act

    def wrong(x, *args, **options):
        out, *rest = right(eager, x, *args, **options)
        return (out * 1.01 if out.shape[1] > 4 else out, *rest)

    monkeypatch.setattr(eager, "norm_add_act", wrong)
    case, reasons = fuzz.search("eager", torch.float32, 40, seed)
    assert fuzz.refused(case) == reasons and any(reason.startswith("output: ") for reason in reasons)
    assert 4 < case.shape.k <= 8 and case.shape.stride == case.shape.dilation == case.shape.groups == 1
    path = tmp_path / "regressions.json"
    for _ in range(2):
        fuzz.keep(case, path)
    assert fuzz.kept(path) == [case]
    assert json.loads(path.read_text())[0]["shape"] == dataclasses.asdict(case.shape)
    monkeypatch.undo()
    assert not fuzz.refused(case)


def test_a_search_ends_in_time():
    assert fuzz.search("eager", torch.float32, 10**6, 0, until=time.monotonic()) is None
