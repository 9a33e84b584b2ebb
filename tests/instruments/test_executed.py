"""The executor of compiled kernels (tests/support/ptx): its arithmetic, the faults that it must report, and the kernels' tests run by it.

docs/executed.md has the table of all that was run.
"""

import json
import math
import os
import random
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from support.checkout import ROOT, TESTS, file_of
from support.ptx import faults, values
from support.ptx.parse import parse
from support.ptx.report import UnknownInstruction
from support.ptx.translate import translate

# ---- arithmetic ---------------------------------------------------------------------------------------------------------------


def floats(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Of all bit patterns: each exponent as often as another, NaN and infinities among them."""
    width = torch.finfo(dtype).bits
    integer = {16: torch.int16, 32: torch.int32}[width]
    return torch.randint(-(2 ** (width - 1)), 2 ** (width - 1), (count,)).to(integer).view(dtype)


def same(found: np.ndarray, expected: torch.Tensor) -> bool:
    """Bit by bit, but for which NaN it is."""
    got = torch.from_numpy(np.ascontiguousarray(found)).view(expected.dtype)
    return bool(((got == expected) & (torch.signbit(got) == torch.signbit(expected)) | (got.isnan() & expected.isnan())).all())


@pytest.mark.parametrize("dtype, name", [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")])
def test_conversions_round_as_pytorchs(dtype, name):
    x = floats(200_000, torch.float32)
    with np.errstate(all="ignore"):
        assert same(getattr(values, name)(x.numpy()), x.to(dtype))
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    assert same(getattr(values, f"from_{name}")(bits.numpy().view("u2")), bits.view(dtype).float())


def rounded(exact: Fraction, dtype: str) -> float:
    """A fraction to the nearest of a dtype's numbers, ties to even."""
    near = np.array(float(exact), dtype)
    around = [np.nextafter(near, np.array(limit, dtype)) for limit in (-np.inf, np.inf)]
    return min((near, *around), key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view("u4" if dtype == "f4" else "u2")) & 1))


def test_a_fused_product_is_rounded_once():
    """Most of these lie close to the middle of two numbers, where a second rounding would go wrong."""
    numbers = random.Random(0)
    a, b = (np.array([numbers.randrange(2**23, 2**24) for _ in range(1000)], "f4") for _ in range(2))
    exact = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    tie = [(1 << (p.bit_length() - 24)) // 2 - p % (1 << (p.bit_length() - 24)) for p in exact]
    c = np.array([t * (1 + numbers.choice((-1, 0, 1)) * 2.0**-22) for t in tie], "f4")
    expected = [rounded(p + Fraction(float(z)), "f4") for p, z in zip(exact, c, strict=True)]
    assert np.array_equal(values.fma(a, b, c), np.array(expected, "f4"))
    twice = (a.astype("f8") * b + c).astype("f4")
    assert not np.array_equal(twice, np.array(expected, "f4")), "no case is close enough to the middle"


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("operation", ["add", "sub", "mul", "fma"])
def test_arithmetic_of_halves_is_rounded_once(operation, kind):
    dtype, digits = {"bf16": (torch.bfloat16, 8), "f16": (torch.float16, 11)}[kind]
    x, y, z = (torch.randn(500).to(dtype) for _ in range(3))
    fractions = [[Fraction(v) for v in t.tolist()] for t in (x, y, z)]
    exact = [{"add": a + b, "sub": a - b, "mul": a * b, "fma": a * b + c}[operation] for a, b, c in zip(*fractions, strict=True)]
    bits = [t.view(torch.int16).numpy().view("u2") for t in (x, y, z)]
    found = torch.from_numpy(values.halves(operation, kind, *bits[:2], bits[2] if operation == "fma" else None)).view(dtype)
    for value, want in zip(found.tolist(), exact, strict=True):
        step = Fraction(2) ** (math.frexp(value)[1] - digits) if abs(value) >= 2.0**-14 else Fraction(2) ** -24
        assert abs(Fraction(value) - want) <= step / 2
    pairs = [torch.stack([t, t.flip(0)], 1).contiguous().view(torch.int32).flatten().numpy().view("u4") for t in (x, y, z)]
    both = values.halves(operation, f"{kind}x2", *pairs[:2], pairs[2] if operation == "fma" else None)
    assert np.array_equal(both.view("u2").reshape(-1, 2)[:, 0], found.view(torch.int16).numpy().view("u2"))


def test_integer_division_is_towards_zero():
    a, b = (np.array([7, -7, 7, -7, -(2**31), 5], "i4"), np.array([2, 2, -2, -2, 1, 0], "i4"))
    assert values.truncated_division(a, b).tolist() == [3, -3, -3, 3, -(2**31), -1]
    assert values.remainder(a, b)[:4].tolist() == [1, -1, 1, -1]


@pytest.mark.parametrize("dtype", ["i8", "u8"])
def test_the_high_half_of_a_product(dtype):
    limits = np.iinfo(dtype)
    numbers = [
        0,
        1,
        3,
        int(limits.min),
        int(limits.max),
        int(limits.max) // 3,
        6148914691236517206,
        *(random.getrandbits(62) for _ in range(20)),
    ]
    a, b = (np.array(x, dtype) for x in zip(*((x, y) for x in numbers for y in numbers), strict=True))
    with np.errstate(over="ignore"):
        assert values.high_product(a, b).tolist() == [(int(x) * int(y)) >> 64 for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("dtype", ["i4", "u4", "i8", "u8"])
def test_a_field_of_bits(dtype):
    bits = 8 * np.dtype(dtype).itemsize
    for position, length in ((0, 1), (25, 1), (3, 7), (0, bits), (bits - 5, 5)):
        for number in (0, 1, (1 << bits) - 1, 0x5A5A5A5A5A5A5A5A % (1 << bits), random.getrandbits(bits)):
            field = number >> position & ((1 << length) - 1)
            expected = field - (1 << length) if dtype[0] == "i" and field >> (length - 1) else field
            found = values.bit_field(np.array([number], f"u{bits // 8}").view(dtype), *(np.array([n], "i4") for n in (position, length)))
            assert found.tolist() == [expected], (number, position, length)
    with pytest.raises(ValueError, match="within the register"):
        values.bit_field(np.array([1], dtype), np.array([bits - 1], "i4"), np.array([2], "i4"))


def test_bytes_are_permuted_with_their_signs():
    a, b = np.array([0x83828180], "u4"), np.array([0x07060504], "u4")
    for selector in (0x3210, 0x7654, 0x0246, 0xF80B):
        found = int(values.permute(a, b, np.array([selector], "u4"))[0])
        parts = [0x80, 0x81, 0x82, 0x83, 4, 5, 6, 7]
        want = 0
        for n in range(4):
            chosen = selector >> 4 * n & 15
            byte = parts[chosen & 7]
            want |= ((0xFF if byte & 128 else 0) if chosen & 8 else byte) << 8 * n
        assert found == want, hex(selector)


# ---- faults -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", faults.FAULTS)
def test_a_planted_fault_is_reported(name):
    assert faults.caught(faults.FAULTS[name])


def test_the_kernels_without_faults_do_what_they_say():
    _, x, y = faults.run(faults.COPY)
    assert np.array_equal(y[:64], x[:64]) and not y[64:].any()
    _, x, y = faults.run(faults.WIDE)
    assert np.array_equal(y, x)
    for kernel in (faults.EXCHANGE, faults.ASYNCHRONOUS):
        _, x, y = faults.run(kernel)
        assert np.array_equal(y[:64], np.concatenate([x[32:64], x[:32]]))
    _, x, y = faults.run(faults.LANES)
    assert np.array_equal(y[:64], x[:64].reshape(-1, 2)[:, ::-1].reshape(-1))
    _, x, y = faults.run(faults.SHUFFLE)
    assert np.array_equal(y[:32], x[:32].reshape(-1, 2).sum(1).repeat(2)) and not y[32:].any()
    _, x, y = faults.run(faults.BRANCH)
    assert np.array_equal(y[:64], np.concatenate([x[:32], -x[32:64]]))


def test_sectors_and_wavefronts_are_counted():
    report, *_ = faults.run(faults.COPY)
    assert report.counts["load sectors"] == 2 * 4 and report.share("load") == report.share("store") == 1
    assert report.instructions["ld.global.b32"] == 2 and report.instructions["st.global.b32"] == 2  # of two warps
    half = "setp.lt.u32 %p1, %r1, 32; @%p1 bra $L__BB0_1; neg.f32 %r10, %r4;\n$L__BB0_1:\n  abs.f32 %r10, %r4;"
    found = faults.run(half)[0].instructions
    assert (found["neg.f32"], found["abs.f32"]) == (1, 2)
    spread = "shl.b32 %r11, %r1, 3; cvt.u64.u32 %rd5, %r11; add.s64 %rd6, %rd1, %rd5; ld.global.b32 %r12, [%rd6];"
    assert faults.run(spread)[0].share("load") == 0.5
    report, *_ = faults.run(faults.EXCHANGE)
    assert report.counts["barriers"] == 2 and report.conflicts("read") == report.conflicts("write") == 1
    column = "and.b32 %r11, %r1, 3; shl.b32 %r12, %r11, 7; add.s32 %r13, %r4, %r12; st.shared.b32 [%r13], 0;"
    assert faults.run(column)[0].conflicts("write") == 4  # four words of one bank
    assert faults.run(faults.ASYNCHRONOUS)[0].counts["max groups in flight"] == 2


@pytest.mark.parametrize("line", faults.UNKNOWN, ids=lambda line: line.split()[0])
def test_an_unknown_instruction_is_not_guessed(line):
    with pytest.raises(UnknownInstruction, match=line.split()[0].replace(".", r"\.").rstrip(";")):
        translate(parse(faults.program(line), 512))


# ---- kernels ------------------------------------------------------------------------------------------------------------------


def process(architecture: int, *arguments: str) -> str:
    """What a process of Python prints whose Triton kernels run compiled."""
    environment = os.environ | {"PTX_ARCHITECTURE": str(architecture), "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}"}
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def check(outcomes: list[dict]) -> None:
    """No result further off than the rule allows, no fault, the same bits each time."""
    assert outcomes
    for outcome in outcomes:
        assert outcome["ratios"] and max(outcome["ratios"].values()) <= 1, outcome
        assert not outcome["faults"] and outcome["same_bits"], outcome


cuda_free = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels itself")


@cuda_free
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arithmetic", ["bfloat16", *(pytest.param(a, marks=pytest.mark.slow) for a in ("float16", "float32", "tf32"))])
@pytest.mark.parametrize("architecture", [80, pytest.param(90, marks=pytest.mark.full)])
def test_some_of_the_kernels_run_clean(architecture, arithmetic):
    check([json.loads(line) for line in process(architecture, "-m", "tests.support.ptx.measure", arithmetic, "--every", "17").splitlines()])


@cuda_free
@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("arithmetic", ["bfloat16", "float16", "float32", "tf32"])
@pytest.mark.parametrize("architecture", [80, 90])
def test_all_kernels_run_clean(architecture, arithmetic):
    check([json.loads(line) for line in process(architecture, "-m", "tests.support.ptx.measure", arithmetic).splitlines()])


@cuda_free
@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    "arguments",
    [
        ("test_passes.py", "-k", "executed"),
        ("test_operators.py", "-k", "executed"),
        ("test_fprop.py", "--quick"),
        ("test_dgrad.py", "--quick"),
        ("test_wgrad.py", "--quick"),
    ],
    ids=lambda a: a[0],
)
def test_the_kernels_own_tests_pass(arguments, architecture):
    file, *options = arguments
    assert " passed" in process(
        architecture, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(file_of(file)), *options
    )


#: Errors of a step's outputs, gradients and statistics, ours over eager's, both against float64; and whether a second step has the same bits.
STEP = """
import conftest, copy, json, torch
from support.swapped import run, shake
from fused_resnet.models import resnet20
torch.manual_seed(0)
torch.backends.cudnn.allow_tf32 = False
model, x = shake(resnet20()).to(memory_format=torch.channels_last), torch.randn(2, 3, 8, 8)
exact = run(copy.deepcopy(model).double(), x.double(), "off")
steps = {name: run(copy.deepcopy(model), x, backend) for name, backend in (("eager", "eager"), ("ours", "executed"), ("again", "executed"))}
off = {name: {k: ((t.double() - exact[k]).norm() / exact[k].norm().clamp_min(1e-30)).item() for k, t in step.items()} for name, step in steps.items()}
print(json.dumps({"errors": {k: (off["ours"][k], off["eager"][k]) for k in exact},
                  "same": all(torch.equal(t, steps["again"][k]) for k, t in steps["ours"].items())}))
"""


@cuda_free
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("architecture", [80, 90])
def test_a_step_of_resnet20(architecture):
    """In float32, where hardly any value rounds to another side of zero: what a flipped mask does to a gradient is no error of a kernel."""
    found = json.loads(process(architecture, "-c", STEP).splitlines()[-1])
    assert found["same"] and len(found["errors"]) > 100
    for name, (ours, eager) in found["errors"].items():
        assert ours <= max(2 * eager, 8 * torch.finfo(torch.float32).eps), name


#: How much of a convolution of positive numbers a product of float32 loses, and one of TF32.
LOSS = """
import conftest, json, torch
from support.ptx import cases
from fused_resnet.kernels.fprop import fprop
from fused_resnet.problem import ConvProblem
from fused_resnet.values import ConvGeometry, Source, nhwc
problem, geometry = ConvProblem(2, 32, 8, 8, 32, 1, 1, (1, 1), (0, 0)), ConvGeometry((1, 1), (0, 0), (1, 1), 1)
torch.manual_seed(0)
x, weight = nhwc(torch.randn(2, 32, 8, 8).abs()), nhwc(torch.randn(32, 32, 1, 1).abs())
tiles = cases.tiles_of("fprop", problem, torch.float32, "act", ARCHITECTURE)
exact = torch.conv2d(x.double(), weight.double()).mean()
lost = [1 - fprop(Source(x), weight, geometry, False, False, tiles, tf32)[0].double().mean() / exact for tf32 in (False, True)]
print(json.dumps([value.item() for value in lost]))
"""


@cuda_free
@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_tf32_cuts_operands_off(architecture):
    """Each loses 0 to 2⁻¹⁰ of itself, always towards zero, so that products of TF32 are too small by the same share everywhere."""
    script = LOSS.replace("ARCHITECTURE", str(architecture))
    of_float32, of_tf32 = json.loads(process(architecture, "-c", script).splitlines()[-1])
    assert abs(of_float32) < 1e-6
    assert 6e-4 < of_tf32 < 8e-4  # docs/training-modes.md says so


@cuda_free
@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("architecture", [80, 90])
def test_no_line_that_matters_can_be_taken_out_unseen(architecture):
    """Each barrier, wait, fence and mask of compiled kernels: without it there is a report, or the results are the same bits."""
    for line in process(architecture, "-m", "tests.support.ptx.measure", "bfloat16", "--mutants").splitlines():
        mutants = json.loads(line)
        assert mutants["reported"] and not mutants["silent"], mutants
