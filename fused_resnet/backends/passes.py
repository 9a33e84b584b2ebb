"""What all implementations of the passes share: the devices and dtypes that they take, and the tensors of a source that a kernel reads."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..reference import Reference, ones
from ..values import Source

CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def forward_tensors(source: Source) -> tuple[Tensor | None, ...]:
    """What a forward kernel reads: x, scale, bias; the residual, and its scale and bias where it is raw."""
    x, _, _, scale, bias, residual, _, _, residual_scale, residual_bias = source
    return x, scale, bias, residual, residual_scale, residual_bias


def backward_tensors(source: Source) -> tuple[Tensor | None, ...]:
    """What a backward kernel reads: x, mean, invstd, scale, bias; of a raw residual itself, mean and invstd."""
    x, mean, invstd, scale, bias, residual, residual_mean, residual_invstd, _, _ = source
    return x, mean, invstd, scale, bias, None if residual_mean is None else residual, residual_mean, residual_invstd


class Passes(Reference, ABC):
    """The framework's convolution, and one trip over memory where eager PyTorch makes three.

    A subclass overrides the passes with kernels of its language. The operators that are made of them stay the reference's.
    """

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend can't take tensors of `dtype` on `device`; None where it can."""
        if dtype not in DTYPES:
            return f"{self.name} takes float32, float16 and bfloat16, not {dtype}"
        if reason := self._why_not_here(device, dtype):
            return reason
        if device.type == "cuda":
            if torch.version.hip:
                return "the kernels are written and checked for NVIDIA GPUs, and this PyTorch is built for AMD's"
            if (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
                return f"the GPU's compute capability is {capability[0]}.{capability[1]}; {CAPABILITY[0]}.{CAPABILITY[1]} is the least"
        ones(1, torch.float32, device)  # what kernels read beside tensors is made now, and not by the first of them
        return None

    @abstractmethod
    def _why_not_here(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why the kernels' language can't take such tensors; None where it can."""
