"""The backend `executed`: Triton's kernels as compiled for sm_80 or sm_90, their PTX run on CPU tensors by tests/support/ptx. For tests alone.

A process runs them so where PTX_ARCHITECTURE is 80 or 90:

    PTX_ARCHITECTURE=90 python -m pytest tests/kernels/test_fprop.py -k bfloat16

Then they run compiled wherever they would be interpreted, in every test, and a launch that does what a sanitizer would report raises.
"""

import os

#: What the kernels of this process are compiled for; None: they are not, and run in Triton's interpreter where there is no GPU.
ARCHITECTURE = int(os.environ.get("PTX_ARCHITECTURE", "0")) or None
if ARCHITECTURE:
    os.environ["TRITON_INTERPRET"] = "0"  # before the kernels are imported

from contextlib import ExitStack  # noqa: E402

from fused_resnet.backends import BACKENDS  # noqa: E402
from fused_resnet.backends.triton import Triton  # noqa: E402
from fused_resnet.tuning import heuristics  # noqa: E402


class Executed(Triton):
    """All that Triton kernels can do, passes and convolutions, tiled as on a GPU."""

    name = "executed"

    def why_not(self, device, dtype):
        return f"{self.name} takes CPU tensors" if device.type != "cpu" else super().why_not(device, dtype)

    def _why_not_on_cpu(self, dtype):
        return None

    def choose(self, task, device):
        return heuristics.configuration(task, divmod(ARCHITECTURE, 10))


_installed = ExitStack()  # what is never undone


def install() -> None:
    """From here on every Triton kernel of this process runs compiled; and there is the backend."""
    from support.ptx.launches import executing

    _installed.enter_context(executing(ARCHITECTURE))
    BACKENDS[Executed.name] = Executed()
