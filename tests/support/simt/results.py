"""Kernels of kernels.cu against their known results, one function a kernel."""

import numpy as np
from support.simt.kernels import call


def selected_lane(how: int, lane: int, operand: int, width: int) -> int:
    """The lane that a shuffle reads, from the programming guide: another of the segment of `width` lanes, else the caller."""
    first = lane // width * width
    if how == 0:
        return first + operand % width
    if how == 1:
        return lane - operand if lane - operand >= first else lane
    if how == 2:
        return lane + operand if lane + operand < first + width else lane
    return lane ^ operand if lane ^ operand < first + width else lane  # lanes of earlier segments may be read


def check_sums(kernels, random):
    for threads, columns in ((32, 33), (96, 1000), (1024, 1500)):
        x = random.integers(-99, 99, (6, columns)).astype(np.float32)
        y = np.full(6, np.nan, np.float32)
        call(kernels, "sum_rows", x, y, 6, columns, threads)
        assert (y == x.sum(1)).all()
    x = random.integers(-(2**40), 2**40, (3, 300)).astype(np.float64)
    y = np.full(3, np.nan)
    call(kernels, "sum_rows_double", x, y, 3, 300)
    assert (y == x.sum(1)).all()


def check_ticket(kernels, random):
    drawn = np.zeros(1, np.uint32)
    for blocks in (1, 17, 40):  # the counter is back at 0 each time
        x = random.integers(-99, 99, (blocks, 128)).astype(np.float32)
        y, partial = np.full(1, np.nan, np.float32), np.full(blocks, np.nan, np.float32)
        call(kernels, "sum_by_ticket", x, partial, drawn, y, blocks)
        assert y[0] == x.sum()
        assert drawn[0] == 0


def check_scan(kernels, random):
    x = random.integers(-99, 99, (4, 160)).astype(np.int32)
    y = np.empty_like(x)
    call(kernels, "scan", x, y, 4)
    assert (y == x.cumsum(1)).all()


def check_masks(kernels, random):
    y = np.empty(32, np.int32)
    call(kernels, "two_masks", y)
    lane = np.arange(32)
    others = int((lane[lane % 3 != 0] % 2).sum()) + 100 + 1000
    assert (y == np.where(lane % 3 == 0, lane + 30 + 60 + 120, others)).all()


def check_shuffles(kernels, random):
    x = random.integers(-(2**62), 2**62, 32)
    y = np.empty_like(x)
    for how in range(4):
        for width in (1, 2, 4, 8, 16, 32):
            for operand in random.permutation(32)[:8]:
                call(kernels, "shuffle", how, int(operand), width, x, y)
                assert (y == x[[selected_lane(how, lane, operand, width) for lane in range(32)]]).all()


def check_predicates(kernels, random):
    y = np.empty(5, np.int32)
    call(kernels, "predicates", y)
    assert y.tolist() == [20, 1, 0, 1, 0]


def check_coordinates(kernels, random):
    y = np.zeros(3 * 4 * 5 * 6 * 7 * 2, np.uint32)
    call(kernels, "coordinates", y)
    assert (y == np.arange(y.size)).all()


def check_atomics(kernels, random):
    names = ["added", "incremented", "swapped", "greatest", "least", "wide", "real"]
    totals = np.zeros(1, np.dtype({"names": names, "formats": ["u4", "u4", "u4", "i4", "i4", "u8", "f4"]}, align=True))
    call(kernels, "atomics", totals)
    greatest = max(7 * i % 1000 for i in range(300))
    assert totals[0].tolist() == (900, 0, 600, greatest, -greatest, 300 * 2**33, 150.0)


def check_bits(kernels, random):
    x = random.integers(0, 2**32, (64, 3)).astype(np.uint32)
    x[0, 0], x[1, 0] = 0, 0x80000000
    y = np.empty((64, 4), np.uint32)
    call(kernels, "bits", x, y)
    for (a, b, selector), got in zip(x.tolist(), y.tolist(), strict=True):
        source = (a | b << 32).to_bytes(8, "little")
        permuted = int.from_bytes(bytes(source[selector >> 4 * i & 7] for i in range(4)), "little")
        assert got == [a.bit_count(), (a & -a).bit_length(), 32 - a.bit_length(), permuted]


def check_arithmetic(kernels, random):
    x = random.lognormal(0, 3, (64, 3)).astype(np.float32)
    y = np.empty((64, 12), np.float32)
    call(kernels, "arithmetic", x, y)
    (a, b, c), (wide_a, wide_b, wide_c) = x.T, x.T.astype(np.float64)
    root, fused = (1 / np.sqrt(wide_a)).astype(np.float32), (wide_a * wide_b + wide_c).astype(np.float32)
    apart = [root, root, 1 / a, np.sqrt(a), a / b, a * b, a + b, a * b + c, fused, fused, np.minimum(a, b), a]
    assert (y == np.stack(apart, 1)).all()
    assert (y[:, 7] != y[:, 8]).any()  # nothing is fused unasked


CHECKS = [value for name, value in sorted(globals().items()) if name.startswith("check_")]
