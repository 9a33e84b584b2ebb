"""The backend `emulated`: csrc/ as it stands, compiled for the host by the SIMT shim of tests/simt/. For tests alone."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from simt import compile as simt

from fused_resnet.backends.passes import DTYPES
from fused_resnet.backends.passes_cuda import PassesCuda

CSRC = Path(__file__).resolve().parents[1] / "csrc"
#: How it is compiled: plain, asan, ubsan or race; see docs/simt.md.
FLAVOUR = os.environ.get("SIMT_FLAVOUR", "plain")
NAMESPACE = "fused_resnet_emulated"


@lru_cache(maxsize=1)
def build() -> Path:
    """The library; built at the first call, which takes a minute or two."""
    torch_home = Path(torch.__file__).parent
    device = CSRC.parent / "tests" / "simt" / "device.cpp"
    sources = [*sorted(CSRC.glob("*.cu")), *(p for p in sorted(CSRC.glob("*.cpp")) if p.name != "device.cpp"), device]
    return simt.library(
        sources, FLAVOUR, include=[CSRC],
        flags=[f"-DFUSED_RESNET_NAMESPACE={NAMESPACE}", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL", f"-isystem{torch_home / 'include'}"],
        link=[f"-L{torch_home / 'lib'}", "-ltorch_cpu"],
    )  # fmt: skip


@lru_cache(maxsize=1)
def load() -> None:
    """Make the operators known to PyTorch."""
    torch.ops.load_library(build())


class Emulated(PassesCuda):
    """The CUDA C++ kernels on CPU tensors."""

    name = "emulated"

    def declines(self, device, dtype):
        if dtype not in DTYPES:
            return f"{self.name} takes float32, float16 and bfloat16, not {dtype}"
        return f"{self.name} takes CPU tensors" if device.type != "cpu" else simt.missing()

    @property
    def operators(self) -> Any:
        load()
        return getattr(torch.ops, NAMESPACE)
