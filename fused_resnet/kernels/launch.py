"""The one place where a kernel is launched, or recorded instead of launched: prepared once for a shape, called with tensors."""

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


#: Of each function that prepares launches, how many shapes stay prepared.
SHAPES = 4096
#: Whether this release of Triton starts a compiled kernel as `PreparedLaunch` does. An untested one is asked to launch by itself.
DIRECT = not INTERPRETED and versions.untested_triton() is None


class PreparedLaunch:
    """A launch of which all is known but its tensors: kernel, programs, numbers and constants. Made once for a shape.

    Triton binds, specialises and compiles a launch of each variant once. From then on what it compiled is called as Triton would call it,
    with the same arguments, and nothing is bound again. A variant is what Triton's specialisation sees of tensors: which are there, their
    dtypes, and which begin at a multiple of 16 bytes. Numbers, of which it looks for 1 and for multiples of 16, are those of the shape.

    Triton is asked to launch by itself where somebody watches launches (`knobs.runtime.launch_enter_hook`), debugs or instruments kernels,
    has hooks before a kernel, or compiles in the background; and where its release is not one that was tested.

    Raises TypeError where `numbers` are not the kernel's last parameters.
    """

    __slots__ = ("_arguments", "_constants", "_pointers", "_variants", "kernel", "programs", "stages", "warps")

    def __init__(self, kernel: Any, programs: int, warps: int, stages: int = 3, **numbers: Any) -> None:
        names = kernel.arg_names
        self.kernel, self.programs, self.warps, self.stages = kernel, programs, warps, stages
        self._pointers = tuple(names[: len(names) - len(numbers)])
        if set(names[len(self._pointers) :]) != set(numbers):
            raise TypeError(f"numbers: expected the last parameters of {kernel.__name__}; got {', '.join(numbers)} of {', '.join(names)}")
        self._constants = tuple(numbers[name] for name in names[len(self._pointers) :])
        self._variants: dict[tuple, Any] = {}

    def __call__(self, device: torch.device, **tensors: Tensor | None) -> None:
        """Launch on the current stream of `device`. A tensor that is not given is None. Raises TypeError for a name of no pointer."""
        arguments = [*map(tensors.get, self._pointers)]
        if _recorded is not None:
            _recorded.append(Launch(self.kernel, self.programs, self._by_name(tensors), self.warps, self.stages))
            return
        variant = (device, *[t if t is None else t.dtype if t.data_ptr() % 16 == 0 else (t.dtype,) for t in arguments])
        compiled = self._variants.get(variant)
        watched = self.kernel.pre_run_hooks or _watched()
        if compiled is None or watched:
            made = self._launched_by_triton(device, tensors)
            if DIRECT and not watched and isinstance(made, triton.compiler.CompiledKernel):
                self._variants[variant] = made
            return
        driver = triton.runtime.driver.active
        current = driver.get_current_device()
        if device.index not in (None, current):  # Triton launches on the current device, which need not be that of the tensors
            with torch.cuda.device(device):
                self(device, **tensors)
            return
        compiled.run(
            self.programs, 1, 1, driver.get_current_stream(current), compiled.function, compiled.packed_metadata, None, None, None,
            *arguments, *self._constants,
        )  # fmt: skip

    def _by_name(self, tensors: dict[str, Tensor | None]) -> dict[str, Any]:
        if unknown := tensors.keys() - set(self._pointers):
            raise TypeError(f"tensors: expected pointers of {self.kernel.__name__}; got {', '.join(sorted(unknown))}")
        return dict(zip(self.kernel.arg_names, (*map(tensors.get, self._pointers), *self._constants), strict=True))

    def _launched_by_triton(self, device: torch.device, tensors: dict[str, Tensor | None]) -> Any:
        """What Triton compiled, once it has launched that; in its interpreter None."""
        arguments = self._by_name(tensors)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return self.kernel[(self.programs,)](**arguments, num_warps=self.warps, num_stages=self.stages, **OPTIONS)


def _watched() -> bool:
    """Whether somebody wants to be told of launches, or wants kernels that are not the usual ones."""
    runtime = triton.knobs.runtime
    # A hook is a chain of functions, which may be none, or None.
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    watching = getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
    return bool(watching or runtime.debug or triton.knobs.compilation.instrumentation_mode)


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
    n, channels, height, width = x.shape
    return n * height * width, channels


def packed_mask(x: Tensor) -> Tensor:
    """An uninitialised packed ReLU mask of x: uint8 [N, H, W, ⌈C/8⌉]."""
    n, c, h, w = x.shape
    return torch.empty((n, h, w, (c + 7) // 8), dtype=torch.uint8, device=x.device)
