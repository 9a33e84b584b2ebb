"""The backend `passes_cpu`: the passes as C++ kernels for CPUs (csrc/cpu/), for the instruction set that the machine has."""

from .. import native
from .passes_native import PassesNative


class PassesCpu(PassesNative):
    """The passes on CPUs, by PyTorch's threads."""

    name = "passes_cpu"
    library = native.CPU
    device_type = "cpu"

    def _declines_here(self, device, dtype):
        if reason := super()._declines_here(device, dtype):
            return reason
        native.cpu_instruction_set()  # chosen before the first kernel runs
        return None
