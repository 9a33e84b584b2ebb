"""The native library for CPUs: equal bits whatever the threads and the instruction set, no newer instruction outside its place, errors.

That its passes are right is the business of test_passes.py, which runs them with the instruction set that this machine takes.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from support.checkout import ROOT, TESTS
from support.cpu_passes import PASSES, nhwc, results

import fused_resnet
from fused_resnet import backends, models, native
from fused_resnet.cli import info
from fused_resnet.environment import VariableError
from fused_resnet.reference import Reference
from fused_resnet.values import Source

pytestmark = pytest.mark.skipif(native.CPU.why_not() is not None, reason=f"native library for CPUs: {native.CPU.why_not()}")
CPU = torch.device("cpu")
#: No vector of any width, some of it; several parts and tiles; few rows of many channels; one value.
SHAPES = [(3, 13, 9, 11), (4, 64, 33, 31), (2, 520, 7, 7), (1, 1, 2, 1)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        for position, (a, b) in enumerate(zip(found[name], expected[name], strict=True)):
            assert torch.equal(a, b), (name, position)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def instruction_sets():
    """Those that this machine has, by name; the one in use comes back after the test."""
    names, before = [], native.cpu_instruction_set()
    for name in native.INSTRUCTION_SETS:
        try:
            names.append(native.use_instruction_set(name))
        except VariableError as error:
            assert name in str(error)
    yield names
    native.use_instruction_set(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape, dtype, seed, threads):
    threads(1)
    expected = results(shape, dtype, seed)
    for number in (2, 3, 7):
        threads(number)
        assert_same_bits(results(shape, dtype, seed), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_gives_the_same_bits(shape, dtype, seed, instruction_sets):
    assert instruction_sets[0] == "portable"
    native.use_instruction_set("portable")
    expected = results(shape, dtype, seed)
    for name in instruction_sets[1:]:
        assert native.use_instruction_set(name) == name
        assert_same_bits(results(shape, dtype, seed), expected)


def test_rounding_is_pytorchs_on_every_instruction_set(instruction_sets):
    """Ties, subnormal numbers, overflow, infinities and NaN: an affine map of one and zero only rounds."""
    words = torch.arange(0, 2**32, 65521).to(torch.uint32).view(torch.float32)  # a prime apart: every exponent, all low bits
    edges = torch.tensor(
        [0.0, -0.0, 65519.0, 65520.0, 2.0**-24, 2.0**-25, 1.5 * 2.0**-24, 2.0**-133, 3.3961775e38, torch.inf, -torch.inf, torch.nan]
    )
    x = torch.cat([words, edges])
    x = x[: len(x) // 24 * 24].view(1, -1, 1, 24).permute(0, 3, 1, 2)
    ones, zeros = torch.ones(24), torch.zeros(24)
    for name in instruction_sets:
        native.use_instruction_set(name)
        for dtype in DTYPES:
            given = x.to(dtype).contiguous(memory_format=torch.channels_last)
            out, _ = PASSES.norm_add_act(Source(given, scale=ones, bias=zeros), False, False)
            torch.testing.assert_close(out, given, rtol=0, atol=0, equal_nan=True)
            sums = PASSES.norm_add_act(Source(given, scale=ones, bias=zeros, residual=given), False, False)[0]
            torch.testing.assert_close(sums, (given.float() + given.float()).to(dtype), rtol=0, atol=0, equal_nan=True)
            fine = (given.float() * 0.7310585975646973).to(dtype)  # bits below those of the dtype
            scaled = PASSES.norm_add_act(Source(given, scale=ones * 0.7310585975646973, bias=zeros), False, False)[0]
            torch.testing.assert_close(scaled, fine, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def without_fma(monkeypatch):
    """This machine, as if it had no AVX2: that the library chooses the portable code by itself."""
    if platform.machine() != "x86_64":
        pytest.skip("other machines have fused multiplications in the portable code")
    before = native.cpu_instruction_set()
    monkeypatch.delenv("FUSED_RESNET_CPU_ISA", raising=False)
    monkeypatch.setattr(native, "_best", "portable")
    native.use_instruction_set("portable")
    backends._remembered.cache_clear()
    yield
    native.use_instruction_set(before)
    backends._remembered.cache_clear()


def test_a_machine_without_fma_keeps_pytorchs_modules_and_says_why(without_fma, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    why = "this CPU has no AVX2 with FMA and F16C"
    assert backends.resolve(CPU, torch.float32) == "off"
    found = info.collect()
    assert set(found["active"].values()) == {"off"} and found["left_by_auto"]["passes_cpu"].startswith(why)
    assert f"auto leaves it: {why}" in info.text(found)
    text = str(fused_resnet.report(models.resnet20()))
    assert text.startswith("0 of 19 convolutions fused: ") and f"passes_cpu: {why}" in text


def test_whoever_names_the_portable_kernels_gets_them_and_the_same_bits(without_fma, monkeypatch):
    """By the backend's name, and by the instruction set's."""
    y = nhwc((4, 24, 9, 9), torch.bfloat16)
    with fused_resnet.backend("passes_cpu"):
        assert backends.resolve(CPU, torch.bfloat16) == "passes_cpu"
    found = PASSES.batch_stats(y, None, None, 1e-5)
    monkeypatch.setenv("FUSED_RESNET_CPU_ISA", "portable")
    backends._remembered.cache_clear()
    assert backends.resolve(CPU, torch.bfloat16) == "passes_cpu"
    native.use_instruction_set(None)
    for ours, best in zip(found, PASSES.batch_stats(y, None, None, 1e-5), strict=True):
        assert torch.equal(ours, best)


#: In a process on a CPU of 2008: the choice, and what every pass makes.
OLD_CPU = """
import sys, torch
from support.cpu_passes import results
from fused_resnet import backends, native
assert backends.resolve(torch.device("cpu"), torch.float32) == "off"
assert native.cpu_instruction_set() == "portable"
torch.save([results((3, 13, 9, 11), dtype, 0) for dtype in (torch.float32, torch.bfloat16)], sys.argv[1])
"""


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("qemu-x86_64"), reason="needs an emulator of x86-64")
def test_a_processor_of_2008_gives_the_same_bits(tmp_path):
    """Emulated: it has SSE4.2, and neither AVX nor FMA. An instruction that it lacks would end the process."""
    path = tmp_path / "found.pt"
    command = ["qemu-x86_64", "-cpu", "Nehalem", sys.executable, "-c", OLD_CPU, path]
    # OPENBLAS_CORETYPE would ask NumPy for kernels of the real processor.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FUSED_RESNET_", "OPENBLAS_"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, TESTS)))}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for dtype, theirs in zip((torch.float32, torch.bfloat16), torch.load(path), strict=True):
        assert_same_bits(theirs, results((3, 13, 9, 11), dtype, 0))


def test_an_unknown_instruction_set_is_an_error_that_names_the_known():
    with pytest.raises(ValueError, match="FUSED_RESNET_CPU_ISA: expected one of portable, avx2, avx512, avx512_bf16, amx; got 'mmx'"):
        native.use_instruction_set("mmx")


def test_wide_registers_are_used_in_their_namespaces_alone():
    """The linker merges inline functions by name: one that was compiled for a newer machine must not serve an older one."""
    objdump = shutil.which("objdump") or pytest.skip("objdump is not installed")
    if platform.machine() != "x86_64":
        pytest.skip("the library holds one instruction set")
    code = subprocess.run([objdump, "-d", "-C", "--no-show-raw-insn", native.CPU.path], capture_output=True, text=True, check=True).stdout
    wide = set()
    for function in re.split(r"\n\n(?=[0-9a-f]+ <)", code)[1:]:
        name = function.partition("\n")[0]
        if re.search(r"%[yz]mm|%k[1-7]|\bv[a-z]+[ps][sd]\b", function):
            wide.add(name.partition("<")[2])
    assert any("fused_resnet::avx512::" in name for name in wide)
    assert [name for name in wide if not re.search(r"fused_resnet::(avx2|avx512|avx512_bf16|amx)::", name)] == []


def test_depends_on_libtorch_and_on_no_thread_pool_of_its_own():
    readelf = shutil.which("readelf") or pytest.skip("readelf is not installed")
    dynamic = subprocess.run([readelf, "--dynamic", "--wide", native.CPU.path], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[([^\]]+)\]", dynamic))
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if re.search("python|cuda|gomp|omp|tbb", name)]
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_tensors_at_any_address():
    x, (scale, bias) = nhwc((2, 64, 6, 6), torch.bfloat16), torch.rand(2, 64)
    flat = torch.empty(x.numel() + 1, dtype=x.dtype)
    shifted = flat[1:].view(2, 6, 6, 64).permute(0, 3, 1, 2).copy_(x)
    expected = Reference().norm_add_act(Source(x, scale=scale, bias=bias, residual=x), True, True)
    for given in (x, shifted):
        act, mask = PASSES.norm_add_act(Source(given, scale=scale, bias=bias, residual=given), True, True)
        assert torch.equal(act, expected[0]) and torch.equal(mask, expected[1])


def test_four_threads_at_once(seed):
    expected, found = results((4, 64, 33, 31), torch.bfloat16, seed), [None] * 4
    torch.manual_seed(seed)
    x = nhwc((4, 64, 33, 31), torch.bfloat16, 1.0)
    mean, invstd, _, scale, bias = expected["batch_stats"]
    source = Source(x, mean, invstd, scale, bias)

    def work(i):
        for _ in range(20):
            found[i] = PASSES.norm_add_act(source, True, False)[0], *PASSES.batch_moments(x)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    act = PASSES.norm_add_act(source, True, False)[0]
    assert all(torch.equal(a, act) and torch.equal(mean, expected["batch_moments"][0]) for a, mean, _ in found)
