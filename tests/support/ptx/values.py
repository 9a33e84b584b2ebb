"""Arithmetic on arrays over threads, as PTX defines it: what NumPy has no operation for. Floats of 16 bits are their bits, uint16."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray

#: What a register holds in threads that never set it, by dtype: NaN, or a number that no address is.
POISON = {"f4": np.nan, "f8": np.nan, "i4": 0x7FC0DEAD, "u2": 0x7FDE, "i8": 0x7FFFDEAD0000DEAD, "?": False}


def fma(a: Array, b: Array, c: Array) -> Array:
    """a·b + c of float32, rounded once.

    The product is exact in float64, and the sum rounded to it; only where that lies halfway between two float32 does it matter which
    side the exact sum is on.
    """
    product, wide = a.astype("f8") * b, c.astype("f8")
    total = product + wide
    halfway = (total.view("u8") & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    if halfway.any():
        back = total - product
        lost = (product - (total - back)) + (wide - back)  # Knuth's two-sum: exact
        beyond = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
        total = np.where(halfway & (lost != 0) & np.isfinite(total), beyond, total)
    return total.astype("f4")


def truncated_division(a: Array, b: Array) -> Array:
    """a / b of integers, towards zero; all bits set where b is 0."""
    divisor = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // divisor
    if a.dtype.kind == "i":
        quotient += ((quotient * divisor != a) & ((a < 0) != (divisor < 0))).astype(a.dtype)
    return np.where(b == 0, a.dtype.type(-1 if a.dtype.kind == "i" else ~a.dtype.type(0)), quotient)


def remainder(a: Array, b: Array) -> Array:
    """a − b·(a / b) of integers."""
    return a - truncated_division(a, b) * b


def shift(direction: str, a: Array, by: Array, bits: int) -> Array:
    """shl or shr, of any distance."""
    distance = np.minimum(by, bits - 1).astype(a.dtype)
    if direction == "shl":
        return np.where(by >= bits, a.dtype.type(0), a << distance)
    return np.where(by >= bits, a.dtype.type(0), a >> distance) if a.dtype.kind == "u" else a >> distance


def bit_field(a: Array, position: Array, length: Array) -> Array:
    """bfe of 32 or 64 bits, extended by the field's own sign. Raises ValueError for a field that is empty or leaves the register."""
    position, length = position & 255, length & 255
    if (position + length > 8 * a.dtype.itemsize).any() or (length == 0).any():
        raise ValueError("bfe: expected a field within the register")
    full = a.astype("i8") if a.dtype.kind == "i" else a.astype("u8")
    left = (64 - position.astype("i8") - length).astype(full.dtype)
    return ((full << left) >> (64 - length).astype(full.dtype)).astype(a.dtype)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: bytes of a and b, chosen by four bits each, the highest of which repeats the byte's sign."""
    both = np.stack([a, b], -1).view("u1")  # [T, 8]
    out = np.empty((*a.shape, 4), "u1")
    for n in range(4):
        chosen = (selector >> np.uint32(4 * n)) & np.uint32(15)
        byte = np.take_along_axis(both, (chosen & 7).astype("i8")[:, None], 1)[:, 0]
        out[:, n] = np.where(chosen & 8, np.where(byte & 128, 255, 0), byte)
    return out.view("u4")[:, 0]


def bfloat16(x: Array) -> Array:
    """Of float32, rounded to nearest even."""
    bits = x.view("u4")
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype("u2")
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def float16(x: Array) -> Array:
    """Of float32, rounded to nearest even."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype("f2").view("u2"))


def from_bfloat16(bits: Array) -> Array:
    """float32 of bfloat16, exactly."""
    return (bits.astype("u4") << np.uint32(16)).view("f4")


def from_float16(bits: Array) -> Array:
    """float32 of float16, exactly."""
    return bits.view("f2").astype("f4")


def halves(operation: str | np.ufunc, kind: str, a: Array, b: Array, c: Array | None) -> Array:
    """add, sub, mul, fma, or a function of NumPy's, of 16-bit floats, rounded once; `kind` is "bf16" or "f16", with "x2" of two in 32 bits."""
    if kind.endswith("x2"):
        low, high = (
            halves(operation, kind[:-2], *(None if x is None else (x >> np.uint32(n)).astype("u2") for x in (a, b, c))) for n in (0, 16)
        )
        return low.astype("u4") | (high.astype("u4") << np.uint32(16))
    x, y, z = (None if v is None else (from_bfloat16(v) if kind == "bf16" else v.view("f2")).astype("f8") for v in (a, b, c))
    if not isinstance(operation, str):
        result = operation(x, y)
    else:
        result = x + y if operation == "add" else x - y if operation == "sub" else x * y if operation == "mul" else x * y + z
    if kind == "f16":
        return np.where(np.isnan(result), np.uint16(0x7FFF), result.astype("f2").view("u2"))
    single = result.astype("f4")  # to odd, so that the second rounding sees which side the first was on
    bits = single.view("u4")
    keep = (single == result) | ~np.isfinite(single) | ((bits & np.uint32(1)) == 1)
    return bfloat16(np.where(keep, bits, np.where(np.abs(single) > np.abs(result), bits - np.uint32(1), bits + np.uint32(1))).view("f4"))


def integer_pairs(operation: str, a: Array, b: Array, dtype: str) -> Array:
    """add, sub, min or max of two 16-bit integers in 32 bits."""
    function = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}[operation]
    return function(np.ascontiguousarray(a).view(dtype), np.ascontiguousarray(b).view(dtype)).view("u4")


def pack(parts: list[Array], dtype: str) -> Array:
    """One register of several narrower ones, the first lowest."""
    width = 8 * parts[0].dtype.itemsize
    out = parts[0].astype(dtype)
    for n, part in enumerate(parts[1:], 1):
        out = out | (part.astype(dtype) << np.dtype(dtype).type(width * n))
    return out


def high_product(a: Array, b: Array) -> Array:
    """The upper 64 bits of a product of int64 or uint64."""
    if a.dtype.kind == "i":  # a negative a is a + 2⁶⁴ as it is read there
        high = high_product(a.view("u8"), b.view("u8"))
        return high.view("i8") - np.where(a < 0, b, 0) - np.where(b < 0, a, 0)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    first = a1 * b0 + ((a0 * b0) >> half)
    second = a0 * b1 + (first & low)
    return a1 * b1 + (first >> half) + (second >> half)


def to_integer(x: Array, dtype: str) -> Array:
    """A rounded float as an integer: clamped, NaN as 0."""
    limits = np.iinfo(dtype)
    return np.clip(np.nan_to_num(x.astype("f8"), nan=0.0), limits.min, limits.max).astype(dtype)


def rsqrt(x: Array) -> Array:
    """1 / √x, rounded correctly but for a second rounding; a GPU's is off by up to two last bits."""
    return (1 / np.sqrt(x.astype("f8"))).astype(x.dtype)


def tf32(x: Array) -> Array:
    """float32 with 10 bits behind the point, rounded to nearest, halves away from zero."""
    bits = x.view("u4")
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, bits).view("f4")


def differ(a: Array, b: Array, width: int) -> Array:
    """Which bytes [threads, ·] are not those of the same values, of `width` bytes each: one NaN is as good as another, as on a GPU."""
    if width != 4:
        return a != b
    x, y = (np.ascontiguousarray(t).view("u4") for t in (a, b))
    with np.errstate(invalid="ignore"):
        nan = np.isnan(x.view("f4")) & np.isnan(y.view("f4"))
    return np.repeat((x != y) & ~nan, 4, 1)
