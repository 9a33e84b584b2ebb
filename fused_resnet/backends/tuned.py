"""The backends `tuned_cuda` and `tuned_triton`: for each convolution the fastest that was measured, of Triton, cuDNN and the passes."""

from ..tuning import CUDNN
from . import cudnn
from .convolutions import FusedConvolutions
from .passes_cuda import PassesCuda
from .passes_triton import PassesTriton
from .triton import measured


class Tuned(FusedConvolutions):
    """A convolution that was not measured runs as passes: no kernel that nobody has timed takes their place."""

    def choose(self, task, device):
        entry = measured(device).entry(task)
        choice = entry.configuration if entry else None
        if choice == CUDNN and cudnn.why_not_task(task, device):  # measured with another cuDNN than is here
            return None
        return choice


class TunedCuda(Tuned, PassesCuda):
    """With the passes of the native library."""

    name = "tuned_cuda"

    def _why_not_here(self, device, dtype):
        return super()._why_not_here(device, dtype) or PassesTriton().why_not(device, dtype)


class TunedTriton(Tuned, PassesTriton):
    """With the passes in Triton."""

    name = "tuned_triton"
