"""How a convolution's kernels are tiled, and who computes what: measured, or by rule of thumb."""

from .configuration import Configuration

__all__ = ["Configuration"]
