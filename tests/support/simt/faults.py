"""The faults of faults.cu: how each is run, and what is reported of it."""

import ctypes

import numpy as np
from support.simt.kernels import pointer


def run(faults: ctypes.CDLL, name: str, mended: bool, blocks: int = 2, threads: int = 64) -> tuple[int, str]:
    """Status and message of a launch; what it left of its data is in `run.values`."""
    run.values = np.empty(64, np.float32)
    status = faults.run_fault(name.encode(), int(mended), blocks, threads, pointer(run.values))
    assert status >= 0, name
    return status, faults.simt_last_message().decode()


#: (name, threads of a block if not 64, what the message holds).
FAULTS = {
    "race": [
        ("missing_barrier", 64, r"thread 32: race: write of byte 128 of .*missing_barrier<false>\(.*\)::s, which nothing orders with the "
            r"read by block 0, thread 31 at"),
        ("write_after_read", 64, "thread 31: race: read of byte 252 of dynamic shared memory, .* the write by block 0, thread 63 at"),
        ("missing_syncwarp", 64, "race: read of byte .* the write by block 0, thread"),
        ("syncwarp_of_others", 64, "race: .* the (read|write) by block 0, thread"),
        ("blocks_write_one_byte", 64, r"block 1, thread 0: race: write of .* byte 5 past the pointer in argument 0 \(at byte 0 of it\), "
            r".* the write by block 0, thread 0"),
        ("block_reads_what_another_writes", 64, "block 1, thread 0: race: .* by block 0, thread 0"),
        ("ticket_without_release", 64, "block 1, thread 0: race: read of .* the write by block 0, thread 0"),
        ("ticket_without_acquire", 64, "block 1, thread 0: race: read of .* the write by block 0, thread 0"),
        ("plain_and_atomic", 64, r"thread 1: race: write of .*\(at byte 8 of it\), .* the atomic write by block 0, thread 0"),
        ("races_by_memcpy", 64, "block 1, thread 0: race: .* by block 0, thread 0"),
        ("writes_another_threads_variable", 64, "thread 1: access to a local variable of thread 0"),
    ],
    "plain": [
        ("divergent_barrier", 64, r"(?s)block 0: no thread can go on.*threads 0-39 wait in __syncthreads, at .*"
            r"threads 40-63 wait in __syncwarp, mask 0xffffffff of warp 1, for threads 32-39, at"),
        ("ended_before_barrier", 64, r"(?s)no thread can go on.*threads 0-6, 8-63 wait in __syncthreads, at .*thread 7 has ended"),
        ("barriers_of_two_kinds", 64, "thread 32: __syncthreads_or, while other threads of the block wait in __syncthreads"),
        ("shuffle_without_a_lane", 64, r"(?s)threads 0-4, 6-31 wait in __shfl_xor_sync, mask 0xffffffff of warp 0, for thread 5, at .*"
            r"threads 5, 32-63 wait in __syncthreads"),
        ("ended_before_ballot", 64, r"(?s)threads 32, 34-63 wait in __ballot_sync, mask 0xffffffff of warp 1, for thread 33, at"),
        ("shuffles_of_two_masks", 64, r"(?s)mask 0xffffffff of warp 0, for threads 0, 2, .*30, at"),
        ("mask_without_the_caller", 64, "thread 16: __shfl_sync: mask 0x0000ffff lacks lane 16, which calls"),
        ("mask_of_lanes_that_are_not_there", 40, "thread 32: __any_sync: mask 0xffffffff names lanes that the block, with 8 in this warp, "
            "does not have"),
        ("reads_a_lane_outside_the_mask", 64, "thread 0: __shfl_sync: lane 0 reads lane 8, which mask 0x000000ff lacks"),
        ("width_that_is_no_power_of_two", 64, "thread 0: __shfl_down_sync: width 12 is not a power of two up to 32"),
        ("recursion_without_end", 64, "block 0, thread 0: stack overflow: a thread has 65536 bytes of stack"),
        ("null_pointer", 64, "block 0, thread 3: access to .*nil.*, which is not mapped"),
        ("division_by_zero", 64, "block 0, thread 0: integer division by zero"),
    ],
    "ubsan": [
        ("static_shared_beyond_the_end", 64, "block 0, thread 63: undefined behaviour: array index 64 is out of bounds"),
        ("misaligned_vector_load", 64, "undefined behaviour: misaligned address: 0x.*, for an object of type .*float4.*, "
            "16-byte aligned"),
        ("integer_overflow", 64, r"thread 63: undefined behaviour: signed integer overflow of \+"),
        ("null_pointer", 64, "block 0, thread 3: undefined behaviour: access through a null pointer"),
    ],
}  # fmt: skip
ADDRESS_FAULTS = {
    "global_read_beyond_the_end": (r"heap-buffer-overflow", "READ of size 4", "block 1, thread 63"),
    "global_write_before_the_beginning": (r"heap-buffer-overflow", "WRITE of size 4", "block 0, thread 0"),
    "dynamic_shared_beyond_the_end": (r"use-after-poison", "WRITE of size 4", "block 0, thread 63"),
}
