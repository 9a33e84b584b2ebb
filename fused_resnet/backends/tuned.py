"""The backends `tuned_cuda` and `tuned_triton`: for each convolution what was measured to be fastest: Triton, cuDNN or the passes."""

from ..tuning import CUDNN
from . import cudnn
from .convolutions import FusedConvolutions
from .passes_cuda import PassesCuda
from .passes_triton import PassesTriton
from .triton import measured


class Tuned(FusedConvolutions):
    """What was not measured runs as passes: a kernel that nobody timed takes the place of none that people know to be good."""

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
