"""The executor of compiled kernels (tests/ptx): its arithmetic, the faults that it must report, and the kernels' tests run by it.

docs/executed.md has the table of all that was run.
"""

import math
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from ptx import faults, values
from ptx.parse import parse
from ptx.report import UnknownInstruction
from ptx.translate import translate

TESTS = Path(__file__).resolve().parent


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
