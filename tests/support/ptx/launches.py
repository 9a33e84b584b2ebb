"""Triton's launches on tensors of the CPU: each kernel compiled as a launch on a GPU would compile it, its PTX run by `machine`.

    with executing(90) as reports: ...      # sm_90; Triton's interpreter must not have taken the kernels

Within, `kernel[grid](…)` of any Triton kernel does that, and raises `report.Fault` for what a sanitizer would report. What the package's
kernels allocate holds 0xFF until somebody writes it.
"""

import ctypes
import hashlib
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from fused_resnet.kernels import inspect
from fused_resnet.kernels.launch import Launch

from .machine import execute
from .memory import Segment
from .parse import parse
from .report import Report
from .translate import Code, translate
from .values import Array

#: What was compiled stays here: PTX without machine code, which nothing else may find in Triton's own cache.
CACHE = Path(__file__).resolve().parents[3] / "build" / "ptx"
#: Modules whose `torch.empty` is memory that nobody has written.
KERNELS = "fused_resnet.kernels"


@dataclass
class Ran:
    """A launch that has run."""

    kernel: str
    key: str  #: equal for launches of the same code
    programs: int
    report: Report


_codes: dict[str, Code] = {}
#: Storages that kernels' modules allocated, by address: whether somebody wrote each byte, and whether the storage is alive.
_fresh: dict[int, tuple[Array, StorageWeakRef]] = {}


def ptx(launch: Launch, architecture: int, options: dict[str, Any]) -> tuple[str, int]:
    """(PTX, bytes of shared memory) of a launch. ptxas, which takes longest, is left out."""
    options = {"num_warps": launch.warps, "num_stages": launch.stages, **options}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(CUDABackend, "make_cubin", lambda self, *args, **more: b"left out"))
        stack.enter_context(triton.knobs.cache.scope())
        triton.knobs.cache.dir = str(CACHE / f"triton_{triton.__version__}")
        made = triton.compile(inspect.source(launch), target=GPUTarget("cuda", architecture, 32), options=options)
    return made.asm["ptx"], made.metadata.shared


def run(
    launch: Launch,
    architecture: int,
    options: dict[str, Any],
    counting: bool = False,
    most: int | None = None,
    edit: Callable[[str], str] | None = None,
) -> Ran:
    """Run a launch, or its first `most` programs, on the CPU tensors in its arguments; its report holds what was wrong.

    `edit` changes the PTX first.
    """
    key = f"{inspect.source(launch).hash()} {launch.warps} {launch.stages} {architecture} {sorted(options.items())}"
    code = _codes.get(key)
    if code is None or edit:
        text, shared = ptx(launch, architecture, options)
        code = translate(parse(edit(text) if edit else text, shared))
        if not edit:
            _codes[key] = code
    passed = [
        (name, launch.arguments[name]) for name, kind in inspect.source(launch).signature.items() if kind != "constexpr"
    ]  # fmt: skip
    bits = [_bits(value) for _, value in passed]
    bits += [0] * (len(code.program.parameters) - len(bits))  # scratch memory, of which these kernels have none
    report = Report()
    execute(code, launch.programs, bits, _segments(passed), report, counting, most)
    return Ran(launch.kernel.__name__, hashlib.sha256(key.encode()).hexdigest()[:16], launch.programs, report)


@contextmanager
def executing(
    architecture: int,
    counting: bool = False,
    raising: bool = True,
    most: int | None = None,
    edit: Callable[[str], str] | None = None,
) -> Iterator[list[Ran]]:
    """Run all Triton launches so within a `with` block; yields the list that they are appended to. `raising`: a fault is an error.

    `most`: of each launch the first so many programs alone. `edit` changes the PTX of each.
    """
    found: list[Ran] = []

    def launched(kernel, *args, grid, warmup, num_warps=4, num_stages=3, **keywords):
        names = [parameter.name for parameter in kernel.params]
        arguments = dict(zip(names, args, strict=False)) | {name: keywords.pop(name) for name in names if name in keywords}
        ran = run(Launch(kernel, grid[0], arguments, num_warps, num_stages), architecture, keywords, counting, most, edit)
        found.append(ran)
        if raising:
            ran.report.raise_faults(ran.kernel)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton.runtime.JITFunction, "run", launched))
        for name in ("empty", "empty_like"):
            stack.enter_context(mock.patch.object(torch, name, _allocating(getattr(torch, name))))
        yield found


def _allocating(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`make`, whose tensors hold 0xFF and count as not written where a kernel's module calls it."""

    def allocate(*args, **options):
        made = make(*args, **options)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if made.device.type == "cpu" and made.numel() and caller.startswith(KERNELS):
            for gone in [address for address, (_, storage) in _fresh.items() if storage.expired()]:
                del _fresh[gone]
            storage = made.untyped_storage()
            _memory(storage)[:] = 0xFF
            _fresh[storage.data_ptr()] = np.zeros(storage.nbytes(), bool), StorageWeakRef(storage)
        return made

    return allocate


def _memory(storage: torch.UntypedStorage) -> Array:
    """uint8, a view of the storage's memory."""
    return np.frombuffer((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()), "u1")


def _segments(passed: list[tuple[str, Any]]) -> list[Segment]:
    """Of the tensors among a launch's arguments; those that overlap are one."""
    extents = []
    for name, value in passed:
        if isinstance(value, Tensor) and value.numel():
            elements = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True)) + 1
            if value.untyped_storage().data_ptr() % 16:
                raise ValueError(f"{name}: expected a storage at a multiple of 16 bytes, as PyTorch allocates one")
            extents.append((value.data_ptr(), value.data_ptr() + elements * value.element_size(), name, value.untyped_storage()))
    merged: list[list] = []
    for low, high, name, storage in sorted(extents, key=lambda e: e[:2]):
        if merged and low < merged[-1][1]:
            merged[-1][1:3] = max(merged[-1][1], high), f"{merged[-1][2]}={name}"
        else:
            merged.append([low, high, name, storage])
    return [Segment(low, high, _memory(s), s.data_ptr(), name, _written(s)) for low, high, name, s in merged]


def _written(storage: torch.UntypedStorage) -> Array | None:
    """Of each byte, whether somebody wrote it: a kernel, or PyTorch, which leaves other bytes than 0xFF. None: all are."""
    known = _fresh.get(storage.data_ptr())
    if known is None or known[1].expired():
        return None
    written = known[0]
    written |= _memory(storage) != 0xFF
    return written


def _bits(value: Any) -> int:
    """What a launch hands over for an argument."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return struct.unpack("<I", struct.pack("<f", value))[0] if isinstance(value, float) else int(value)
