"""The backend `emulated`: csrc/ as it stands, compiled for the host by the SIMT shim of tests/support/simt/. For tests alone."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fused_resnet.backends.passes import DTYPES
from fused_resnet.backends.passes_cuda import PassesCuda
from support.checkout import ROOT, TESTS
from support.simt import compile as simt

CSRC = ROOT / "csrc"
#: How it is compiled: plain, asan, ubsan or race; see docs/simt.md.
FLAVOUR = os.environ.get("SIMT_FLAVOUR", "plain")
NAMESPACE = "fused_resnet_emulated"


def build(csrc: Path = CSRC, flavour: str = FLAVOUR) -> Path:
    """The library of the sources in `csrc`. The first build takes a minute or two, a later one nothing."""
    torch_home = Path(torch.__file__).parent
    sources = [path for path in sorted(csrc.iterdir()) if path.suffix in (".cu", ".cpp") and path.name != "device.cpp"]
    return simt.library(
        [*sources, TESTS / "support" / "simt" / "device.cpp"], flavour, include=[csrc],
        flags=[
            f"-DFUSED_RESNET_NAMESPACE={NAMESPACE}", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL", "-Wno-unknown-pragmas",
            f"-isystem{torch_home / 'include'}",
        ],
        link=[f"-L{torch_home / 'lib'}", "-ltorch_cpu"],
    )  # fmt: skip


@cache
def operators() -> Any:
    """The operators of the library, by name."""
    torch.ops.load_library(build())
    return getattr(torch.ops, NAMESPACE)


class Emulated(PassesCuda):
    """The CUDA C++ kernels on CPU tensors."""

    name = "emulated"

    def why_not(self, device, dtype):
        if dtype not in DTYPES:
            return f"{self.name} takes float32, float16 and bfloat16, not {dtype}"
        return f"{self.name} takes CPU tensors" if device.type != "cpu" else simt.why_not()

    @property
    def operators(self) -> Any:
        return operators()
