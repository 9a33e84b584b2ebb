"""The backend `passes_cuda`: the passes as CUDA C++ kernels of the native library (csrc/)."""

from .. import native
from .passes_native import PassesNative


class PassesCuda(PassesNative):
    """The passes on CUDA GPUs."""

    name = "passes_cuda"
    library = native.CUDA
    device_type = "cuda"
