"""The SIMT shim reports what is wrong with a kernel, and nothing of what is mended."""

import re
from pathlib import Path

import numpy as np
import pytest
from support.checkout import TESTS
from support.simt import compile as simt
from support.simt.faults import ADDRESS_FAULTS, FAULTS, run
from support.simt.kernels import IN_PROCESS, library, run_in

SIMT = TESTS / "support" / "simt"
LAUNCH_FAILURE, ILLEGAL_ADDRESS = 719, 700

pytestmark = pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))


def test_orders_differ_and_repeat():
    kernels = library("faults", "plain")

    def order_of(seed: int) -> list[int]:
        """Which of the threads that write one place are last, in each of a few launches."""
        kernels.simt_set_seed(seed)
        values = []
        for _ in range(8):
            assert run(kernels, "last_writer", mended=False)[0] == 0
            values.append(int(run.values[0]))
        kernels.simt_set_seed(0)
        return values

    assert order_of(0) == [2 * 64 - 1] * 8
    assert order_of(5) == order_of(5)
    assert len({*order_of(5), *order_of(6)}) > 4


@pytest.mark.parametrize("order", ["plain", "drawn"])
@pytest.mark.parametrize(
    "flavour, name, threads, message", [pytest.param(f, *case, id=f"{f}-{case[0]}") for f in FAULTS for case in FAULTS[f]]
)
def test_fault_is_reported(flavour, name, threads, message, order, seed):
    faults = library("faults", flavour)
    faults.simt_set_seed(seed + 1 if order == "drawn" else 0)
    status, got = run(faults, name, mended=False, threads=threads)
    faults.simt_set_seed(0)
    assert status == (ILLEGAL_ADDRESS if (flavour, name) == ("plain", "null_pointer") else LAUNCH_FAILURE)
    assert f"{name}<false>" in got.partition(": ")[0]
    assert f"{SIMT / 'faults.cu'}:" in got
    if order == "plain":  # in another order it may be another thread
        assert re.search(message, got), got
    assert run(faults, name, mended=True, threads=threads) == (0, "")  # after an error, too


@pytest.mark.parametrize("name", sorted({case[0] for cases in FAULTS.values() for case in cases} | {*ADDRESS_FAULTS}))
@pytest.mark.parametrize("flavour", IN_PROCESS)
def test_mended_kernel_is_not_reported(flavour, name, seed):
    faults = library("faults", flavour)
    threads = {case[0]: case[1] for cases in FAULTS.values() for case in cases}.get(name, 64)
    for order in (0, seed + 1, seed + 2):
        faults.simt_set_seed(order)
        assert run(faults, name, mended=True, threads=threads) == (0, "")
    faults.simt_set_seed(0)


@pytest.mark.parametrize("name", ADDRESS_FAULTS)
def test_bad_address_is_reported(name):
    program = """
import ctypes, sys
sys.exit(ctypes.CDLL(sys.argv[1]).run_fault(sys.argv[2].encode(), 0, 2, 64, (ctypes.c_float * 64)()))
"""
    result = run_in("asan", program, str(simt.library([SIMT / "faults.cu"], "asan")), name)
    assert result.returncode != 0
    for part in (*ADDRESS_FAULTS[name], f"{name}<false>", "faults.cu:"):
        assert part in result.stderr
    assert len(result.stderr) < 20_000


def test_faults_under_address_sanitizer():
    """What is no bad address is reported as elsewhere, and the process lives; nothing is wrong with what is mended."""
    program = """
import re
from support.simt.faults import ADDRESS_FAULTS, FAULTS, run
from support.simt.kernels import library
faults = library("faults", "asan")
for name, threads in [(n, 64) for n in ADDRESS_FAULTS] + [c[:2] for cases in FAULTS.values() for c in cases]:
    assert run(faults, name, mended=True, threads=threads) == (0, ""), name
for name, threads, message in FAULTS["plain"]:
    if name != "null_pointer":
        status, got = run(faults, name, mended=False, threads=threads)
        assert status == 719 and re.search(message.replace("65536", "262144"), got), got
        assert run(faults, name, mended=True, threads=threads) == (0, ""), name
print("done")
"""
    result = run_in("asan", program)
    assert result.stdout == "done\n", result.stderr


def test_uninitialised_shared_memory_is_seen():
    faults = library("faults", "plain")
    assert run(faults, "uninitialised_shared", mended=False) == (0, "")
    assert np.isnan(run.values[0::2]).all()
    assert (run.values[1::2] == 1).all()
    run(faults, "uninitialised_shared", mended=True)
    assert (run.values == 1).all()


def test_many_failures_take_no_more_memory():
    faults = library("faults", "plain")

    def pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    for attempt in range(90):
        if attempt == 30:
            before = pages()
        assert run(faults, "mask_without_the_caller", mended=False)[0] == LAUNCH_FAILURE
    assert pages() - before < 256  # 1 MiB: the stacks of one launch are four times that
