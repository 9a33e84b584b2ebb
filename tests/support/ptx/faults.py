"""Faults that the executor must report, planted in PTX: small kernels by hand, and what the compiler made, with a barrier or a check left out.

Each of `FAULTS` is a kernel of two warps that is right, and how one line of it goes wrong.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .machine import execute
from .memory import Segment
from .parse import parse
from .report import Report
from .translate import translate

THREADS, ELEMENTS = 64, 256

#: What every kernel begins with: %r1 the thread, %rd3 its float32 of x, %rd4 its float32 of y, %r3 its four bytes of shared memory.
PROLOGUE = """
.version 8.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry planted(.param .u64 .ptr .global .align 1 planted_param_0, .param .u64 .ptr .global .align 1 planted_param_1)
.reqntid 64
{
  .reg .b32 %r<64>;
  ld.param.b64 %rd1, [planted_param_0];
  ld.param.b64 %rd2, [planted_param_1];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, %ctaid.x;
  mul.wide.u32 %rd9, %r1, 4;
  add.s64 %rd3, %rd1, %rd9;
  add.s64 %rd4, %rd2, %rd9;
  mov.b32 %r4, global_smem;
  shl.b32 %r5, %r1, 2;
  add.s32 %r3, %r4, %r5;
  xor.b32 %r6, %r5, 128;
  add.s32 %r7, %r4, %r6;
"""
#: y = x.
COPY = "ld.global.b32 %r10, [%rd3]; st.global.b32 [%rd4], %r10;"
#: Four elements a thread.
WIDE = """
  shl.b32 %r11, %r1, 4; cvt.u64.u32 %rd5, %r11; add.s64 %rd6, %rd1, %rd5; add.s64 %rd7, %rd2, %rd5;
  ld.global.v4.b32 {%r12, %r13, %r14, %r15}, [%rd6]; st.global.v4.b32 [%rd7], {%r12, %r13, %r14, %r15};
"""
#: y of one warp is x of the other, by shared memory, where the next round may write.
EXCHANGE = """
  ld.global.b32 %r10, [%rd3]; st.shared.b32 [%r3], %r10; bar.sync 0; ld.shared.b32 %r11, [%r7]; st.global.b32 [%rd4], %r11;
  bar.sync 0; st.shared.b32 [%r3], %r11;
"""
#: The same between neighbours of a warp.
LANES = """
  ld.global.b32 %r10, [%rd3]; st.shared.b32 [%r3], %r10; bar.warp.sync -1; xor.b32 %r12, %r5, 4; add.s32 %r13, %r4, %r12;
  ld.shared.b32 %r11, [%r13]; st.global.b32 [%rd4], %r11;
"""
#: The same, through an asynchronous copy, with another in flight behind it.
ASYNCHRONOUS = """
  cp.async.ca.shared.global [%r3], [%rd3], 4; cp.async.commit_group;
  cp.async.ca.shared.global [%r3+256], [%rd3], 4; cp.async.commit_group;
  cp.async.wait_group 1; bar.sync 0; ld.shared.b32 %r11, [%r7]; st.global.b32 [%rd4], %r11;
"""
#: The sum of each pair of lanes, in the first 32 threads alone.
SHUFFLE = """
  setp.lt.u32 %p1, %r1, 32; ld.global.b32 %r10, [%rd3];
  @%p1 shfl.sync.bfly.b32 %r11, %r10, 1, 31, -1; @%p1 add.f32 %r12, %r10, %r11; @%p1 st.global.b32 [%rd4], %r12;
"""
#: A branch that every other warp takes, and a barrier behind it.
BRANCH = """
  ld.global.b32 %r10, [%rd3]; setp.lt.u32 %p1, %r1, 32; @%p1 bra $L__BB0_1; neg.f32 %r10, %r10;
$L__BB0_1:
  bar.sync 0; st.global.b32 [%rd4], %r10;
"""
#: y = ldmatrix of what all threads stored, by whole warps.
MATRIX = """
  ld.global.b32 %r10, [%rd3]; st.shared.b32 [%r3], %r10; bar.sync 0; and.b32 %r12, %r1, 15; shl.b32 %r13, %r12, 4; add.s32 %r14, %r4, %r13;
  setp.ge.u32 %p1, %r1, 0;
  @%p1 ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r11, %r15}, [%r14]; st.global.b32 [%rd4], %r11;
"""


@dataclass(frozen=True)
class Fault:
    """A line of a kernel, what a fault makes of it, and what is reported."""

    kernel: str
    right: str
    wrong: str
    kind: str
    ctas: int = 1
    unwritten: bool = False  #: nobody has written x's last element


FAULTS = {
    "a load past the end": Fault(COPY, "[%rd3];", "[%rd3+772];", "out-of-bounds load"),
    "a load before the beginning": Fault(COPY, "[%rd3];", "[%rd3+-4];", "out-of-bounds load"),
    "a store past the end": Fault(COPY, "[%rd4]", "[%rd4+772]", "out-of-bounds store"),
    "a copy past the end": Fault(ASYNCHRONOUS, "[%r3], [%rd3], 4", "[%r3], [%rd3+772], 4", "out-of-bounds cp.async"),
    "16 bytes at a multiple of four": Fault(WIDE, "[%rd6];", "[%rd6+-4];", "misaligned load"),
    "16 bytes stored at a multiple of eight": Fault(WIDE, "[%rd7],", "[%rd7+-8],", "misaligned store"),
    "what nobody wrote": Fault(COPY, "[%rd3];", "[%rd3+768];", "load of bytes that nobody wrote", unwritten=True),
    "what nobody wrote, copied": Fault(
        ASYNCHRONOUS, "[%r3], [%rd3], 4", "[%r3], [%rd3+768], 4", "load of bytes that nobody wrote", unwritten=True
    ),
    "two programs at one place": Fault(COPY, "st.global", "add.s32 %r10, %r10, %r2; st.global", "two CTAs store different values", ctas=2),
    "a program that writes what another reads": Fault(COPY, "[%rd3];", "[%rd4];", "store over what another CTA loads", ctas=2),
    "a program that reads what another writes": Fault(COPY, "%r10;", "%r10; ld.global.b32 %r10, [%rd4+4];",
                                                      "load of what another CTA stores", ctas=2),
    "two threads at one place": Fault(COPY, "st.global.b32 [%rd4]", "st.global.b32 [%rd2]", "two threads store different values at once"),
    "no barrier before a read": Fault(EXCHANGE, "bar.sync 0; ld", "ld", "shared read after write without a barrier between warps"),
    "no barrier before a write": Fault(EXCHANGE, "bar.sync 0; st", "st", "shared write after read without a barrier between warps"),
    "no barrier between lanes": Fault(LANES, "bar.warp.sync -1; ", "", "shared read after write without a barrier within a warp"),
    "shared memory that nobody wrote": Fault(EXCHANGE, "ld.shared.b32 %r11, [%r7]", "ld.shared.b32 %r11, [%r7+256]",
                                             "shared read of bytes that nobody wrote"),
    "past the end of shared memory": Fault(EXCHANGE, "[%r7]", "[%r7+512]", "out-of-bounds shared read"),
    "before its beginning": Fault(EXCHANGE, "st.shared.b32 [%r3], %r10", "st.shared.b32 [%r3+-4], %r10", "out-of-bounds shared write"),
    "half a word in shared memory": Fault(EXCHANGE, "[%r7]", "[%r7+2]", "misaligned shared read"),
    "two threads at one word": Fault(EXCHANGE, "st.shared.b32 [%r3], %r10", "st.shared.b32 [%r4], %r10",
                                     "two threads write different values to shared memory at once"),
    "a copy that nobody waited for": Fault(ASYNCHRONOUS, "cp.async.wait_group 1; ", "", "shared read of a cp.async in flight"),
    "a wait for one group too few": Fault(ASYNCHRONOUS, "wait_group 1", "wait_group 2", "shared read of a cp.async in flight"),
    "a wait before the commit": Fault(ASYNCHRONOUS, "4; cp.async.commit_group;\n  cp.async.wait", "4;\n  cp.async.wait",
                                      "shared read of a cp.async in flight"),
    "no barrier behind the wait": Fault(ASYNCHRONOUS, "bar.sync 0; ", "", "shared read after write without a barrier between warps"),
    "a copy over a copy": Fault(ASYNCHRONOUS, "[%r3+256]", "[%r3]", "cp.async where another is in flight"),
    "a write over a copy": Fault(ASYNCHRONOUS, "cp.async.wait", "st.shared.b32 [%r3], %r1; cp.async.wait",
                                 "shared write where a cp.async is in flight"),
    "a copy over what is read": Fault(ASYNCHRONOUS, "st.global", "cp.async.ca.shared.global [%r3], [%rd3], 4; st.global",
                                      "cp.async over what was read without a barrier between warps"),
    "a part of a copy": Fault(ASYNCHRONOUS, "[%r3+256], [%rd3], 4", "[%r3+256], [%rd3], 4, 2", "cp.async of a part of its bytes"),
    "a lane that sleeps": Fault(SHUFFLE, "%r1, 32; ld", "%r1, 31; ld", "shfl from a lane that is not active"),
    "a barrier that half the threads pass": Fault(BRANCH, "bra $L__BB0_1;", "bra $L__BB0_1; bar.sync 0;",
                                                  "bar.sync in a part of the threads that must do it together"),
    "a matrix by half a warp": Fault(MATRIX, "setp.ge.u32 %p1, %r1, 0", "setp.ge.u32 %p1, %r1, 16",
                                     "ldmatrix in a part of the threads that must do it together"),
}  # fmt: skip

#: Instructions that nothing here runs, or not in this form.
UNKNOWN = (
    "atom.global.add.u32 %r10, [%rd3], 1;", "red.global.add.f32 [%rd3], 0f3F800000;", "add.sat.s32 %r10, %r1, %r2;", "add.rz.f32 %r10, %r1, %r2;",
    "mul.ftz.f32 %r10, %r1, %r2;", "ld.local.b32 %r10, [%rd3];", "ld.volatile.global.b32 %r10, [%rd3];", "st.shared::cluster.b32 [%r3], %r1;",
    "bar.sync 1;", "bar.sync 0, 32;", "bar.red.popc.u32 %r10, 0, %p1;", "shfl.sync.bfly.b32 %r10, %r1, 1, 15, -1;",
    "shfl.sync.up.b32 %r10, %r1, 1, 0, -1;", "vote.sync.ballot.b32 %r10, %p1, -1;", "cvt.rz.f16.f32 %rs1, %r1;", "cvt.sat.u8.s32 %rs1, %r1;",
    "setp.lt.f16x2 %p1, %r1, %r2;", "cp.async.bulk.commit_group;", "ex2.approx.f32 %r10, %r1;", "call f, (%r1);", "brx.idx %r1, table;",
    "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r10}, [%r3];", "fence.proxy.alias;", "mul.lo.s32 %r10, %q1, 2;",
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r10,%r11,%r12,%r13}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%r10,%r11,%r12,%r13};",
    "wgmma.mma_async.sync.aligned.m64n8k16.f16.f16.f16 {%r10,%r11}, %rd1, %rd2, %p1, 1, 1, 0, 0;", "tcgen05.wait::ld.sync.aligned;",
)  # fmt: skip


def program(body: str) -> str:
    """The PTX of a kernel."""
    return f"{PROLOGUE}{body}\n  ret;\n}}\n"


def run(body: str, ctas: int = 1, unwritten: bool = False) -> tuple[Report, np.ndarray, np.ndarray]:
    """(report, x, y) of a kernel of 64 threads; x and y are [256] float32, shared memory has 512 bytes."""
    memory = [_aligned(np.random.default_rng(0).standard_normal(ELEMENTS).astype("f4")), _aligned(np.zeros(ELEMENTS, "f4"))]
    lows = [array.ctypes.data for array in memory]
    segments = [Segment(low, low + 4 * ELEMENTS, array.view("u1"), low, name) for low, array, name in zip(lows, memory, "xy", strict=True)]
    if unwritten:
        segments[0].written = np.arange(4 * ELEMENTS) < 4 * (ELEMENTS - 1)
    report = Report()
    execute(translate(parse(program(body), 512)), ctas, lows, segments, report, counting=True)
    return report, *memory


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy that begins at a multiple of 128 bytes."""
    room = np.zeros(array.nbytes + 128, "u1")
    begin = -room.ctypes.data % 128
    room[begin : begin + array.nbytes] = array.view("u1")
    return room[begin : begin + array.nbytes].view(array.dtype)


def caught(fault: Fault) -> bool:
    """Whether the executor reports a fault, and nothing of the kernel without it."""
    if fault.kernel.count(fault.right) != 1:
        raise ValueError(f"{fault.right!r} is not once in the kernel: the fault has lost its place")
    clean, _, _ = run(fault.kernel, unwritten=fault.unwritten)
    faulty, _, _ = run(fault.kernel.replace(fault.right, fault.wrong), fault.ctas, fault.unwritten)
    return not clean.findings and any(finding.kind == fault.kind for finding in faulty.findings.values())


def mutations(text: str) -> Iterator[tuple[str, str]]:
    """(what, PTX) of a compiled kernel: each barrier and wait removed, each wait for one group too few, each mask ignored, one at a time."""
    begin = text.index("\n{")
    for pattern, name, replacement in (
        (r"bar\.sync\s+0;", "barrier {n} removed", ""),
        (r"cp\.async\.wait_group\s+\d+;", "wait {n} removed", ""),
        (r"(cp\.async\.wait_group)\s+(\d+);", "wait {n} for one group too few", lambda m: f"{m[1]} {int(m[2]) + 1};"),
        (r"wgmma\.wait_group\S*\s+\d+;", "wgmma's wait {n} removed", ""),
        (r"fence\.proxy\.async\S*;", "fence {n} removed", ""),
        (r"@%p\d+ (ld|st)\.global", "mask {n} of {m[1]} ignored", lambda m: f"{m[1]}.global"),
        (r"(cp\.async\.c[ag][^;]*), %r\d+;", "mask {n} of a copy ignored", lambda m: f"{m[1]};"),
    ):
        for n, found in enumerate(re.finditer(pattern, text[begin:])):
            at = begin + found.start()
            new = replacement if isinstance(replacement, str) else replacement(found)
            yield name.format(n=n, m=found), text[:at] + new + text[begin + found.end() :]
