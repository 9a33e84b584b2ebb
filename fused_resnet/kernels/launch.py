"""The one place where a kernel is launched, or recorded instead of launched."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from .. import versions

#: Whether the kernels of this process run in Triton's interpreter: TRITON_INTERPRET=1 was set when they were imported.
INTERPRETED = triton.knobs.runtime.interpret
#: Of every compilation, beside warps and stages. Without the first, Triton 3.10 no longer makes one operation of a product and a sum.
OPTIONS = {"enable_fp_fusion": True}
#: Multiprocessors that a recorded launch is tiled for: those of an H100.
RECORDED_MULTIPROCESSORS = 132

if reason := versions.untested_triton():
    warnings.warn(reason, RuntimeWarning, stacklevel=2)  # once: at the first import of a kernel


@dataclass(frozen=True)
class Launch:
    """A kernel, the number of its programs, and what it is called with, by name."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    warps: int
    stages: int  #: of software pipelining; a kernel without a loop over tiles in shared memory does not care


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches of a `with` block instead of launching. For tensors on the device "meta", which hold nothing."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(kernel: Any, programs: int, device: torch.device, warps: int, stages: int = 3, **arguments: Any) -> None:
    """Launch `programs` programs of `kernel` on the current stream of `device`."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, programs, arguments, warps, stages))
        return
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](**arguments, num_warps=warps, num_stages=stages, **OPTIONS)


def multiprocessors(device: torch.device) -> int:
    """The multiprocessors of a GPU. On a CPU 1, since the interpreter runs programs one after another; a recorded launch has a GPU's."""
    if device.type == "cuda":
        return _multiprocessors(device)
    return 1 if _recorded is None else RECORDED_MULTIPROCESSORS


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def matrix_shape(x: Tensor) -> tuple[int, int]:
    """(rows, channels) of an activation [N, C, H, W]."""
    return x.numel() // x.shape[1], x.shape[1]


def packed_mask(x: Tensor) -> Tensor:
    """An uninitialised packed ReLU mask of x: uint8 [N, H, W, ⌈C/8⌉]."""
    n, c, h, w = x.shape
    return torch.empty((n, h, w, (c + 7) // 8), dtype=torch.uint8, device=x.device)
