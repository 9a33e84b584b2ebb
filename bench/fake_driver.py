"""A driver for Triton without a GPU: a launch runs as on one, up to the call that would start the kernel. That call is written down.

    calls = install(90)      # sm_90; in a process of its own, in which Triton's interpreter has not taken the kernels
    with fused_resnet.backend("launched"): ...

Triton binds, specialises, compiles and looks up as it would there, and its cache holds what a GPU would load. Nothing is computed: results
hold what their memory held. Kernels keep what was loaded for the process, so nothing uninstalls the driver.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from fused_resnet.backends import BACKENDS
from fused_resnet.backends.triton import Triton
from fused_resnet.kernels import batch_stats, launch, max_pool, norm_backward
from fused_resnet.tuning import heuristics

#: Shared memory of a program, in bytes, that a GPU of the architecture has.
SHARED = {80: 166_912, 90: 232_448}
#: (least, most) of an argument of the type.
RANGES = {"i1": (0, 1), "u64": (0, 2**64 - 1)} | {f"i{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32, 64)}


@dataclass(frozen=True)
class Call:
    """What would have started a kernel."""

    kernel: str
    function: int  #: the loaded kernel: one for each variant, as a GPU's driver numbers them
    grid: tuple[int, int, int]
    stream: int
    packed: tuple[int, ...]  #: warps, clusters, bytes of shared memory
    arguments: tuple[Any, ...]  #: in the order of the kernel's signature, constants too


def check(name: str, kind: Any, value: Any) -> None:
    """Refuse an argument that Triton's own launcher can't hand over as `kind`, its type in a signature."""
    if kind == "constexpr":
        return
    if kind.startswith("*"):
        fits = value is None or isinstance(value, Tensor)
    elif kind in RANGES:
        least, most = RANGES[kind]
        fits = isinstance(value, int) and least <= value <= most
    else:
        fits = isinstance(value, float)
    if not fits:
        raise TypeError(f"{name}: expected what a kernel takes as {kind}; got {value!r}")


class Utils:
    """Loads kernels, as Triton's helper in C does."""

    def __init__(self, architecture: int) -> None:
        self.loaded: list[str] = []
        self._shared = SHARED[architecture]

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """(module, function, registers, spills, most threads) of a kernel's machine code."""
        if not binary:
            raise ValueError(f"{name}: expected machine code; got nothing")
        self.loaded.append(name)
        return len(self.loaded), len(self.loaded), 0, 0, 1024

    def unload_module(self, module: int) -> None:
        """From Triton 3.8 on, when a kernel is forgotten."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Of which Triton asks for the shared memory that a program may have."""
        return {"max_shared_mem": self._shared}


class FakeDriver(DriverBase):
    """What Triton asks of a GPU of an architecture: 80, or 90. `calls` collects the calls; None, which costs less, forgets them."""

    def __init__(self, architecture: int, calls: list[Call] | None) -> None:
        super().__init__()
        self.architecture, self.calls = architecture, calls
        self.utils = Utils(architecture)

    @classmethod
    def is_active(cls) -> bool:
        """Whether Triton may choose it by itself."""
        return False

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What starts a kernel."""
        calls = self.calls

        def launch_kernel(x: int, y: int, z: int, stream: int, function: int, packed: tuple[int, ...], *rest: Any) -> None:
            told, enter, leave, *arguments = rest
            if enter is not None:
                enter(told)
            if calls is not None:
                for (name, kind), value in zip(source.signature.items(), arguments, strict=True):
                    check(name, kind, value)
                calls.append(Call(source.fn.__name__, function, (x, y, z), stream, tuple(packed), tuple(arguments)))
            if leave is not None:
                leave(told)

        return launch_kernel

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return divmod(self.architecture, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("no launcher in C is built")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs that could be timed")


class Launched(Triton):
    """Passes and convolutions in Triton, tiled as on a GPU of the architecture, of CPU tensors."""

    name = "launched"

    def __init__(self, architecture: int) -> None:
        super().__init__()
        self._architecture = architecture

    def _why_not_on_cpu(self, dtype):
        return None

    def choose(self, task, device):
        return heuristics.configuration(task, divmod(self._architecture, 10))


def install(architecture: int, collect: bool = True) -> list[Call]:
    """Let this process launch by a fake driver, and let it have the backend "launched". The list that calls are written into.

    `collect`: whether they are; without, launching costs less. Raises RuntimeError where Triton's interpreter has taken the kernels, and
    ValueError for an architecture that nobody knows.
    """
    if launch.INTERPRETED:
        raise RuntimeError("the kernels can't be launched where TRITON_INTERPRET is set: unset it")
    if architecture not in SHARED:
        raise ValueError(f"architecture: expected one of {', '.join(map(str, SHARED))}; got {architecture!r}")
    calls: list[Call] = []
    triton.runtime.driver.set_active(FakeDriver(architecture, calls if collect else None))
    for module in (batch_stats, max_pool, norm_backward):  # a CPU has none
        mock.patch.object(module, "multiprocessors", lambda device: launch.RECORDED_MULTIPROCESSORS).start()
    BACKENDS[Launched.name] = Launched(architecture)
    return calls
