"""The calls of a native library's operators, for both native backends."""

import torch
from torch import Tensor

from ..native import Library
from .passes import Passes, backward_tensors, forward_tensors


class PassesNative(Passes):
    """Calls the operators of a native library, which have the names and arguments of the passes.

    The library is loaded at the first use: it is optional.
    """

    library: Library
    device_type: str

    def _why_not_here(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != self.device_type:
            return f"{self.name} runs on {self.device_type.upper()} tensors, not on {device.type!r}"
        if reason := self.library.why_not():
            return f"native library {reason}"
        return None

    @property
    def operators(self):
        """The namespace of the operators."""
        return self.library.operators

    # Each as in `Reference`, where the docstrings are. The kernels take float32 vectors without gaps; the statistics are, and a
    # norm's own parameters need not be.

    def batch_stats(self, y, gamma, beta, eps):
        return self.operators.batch_stats(y, float32_vector(gamma), float32_vector(beta), eps)

    def batch_moments(self, y):
        return self.operators.batch_moments(y)

    def merge_moments(self, counts, means, m2s, gamma, beta, eps):
        return self.operators.merge_moments(counts, means, m2s, float32_vector(gamma), float32_vector(beta), eps)

    def norm_add_act(self, source, relu, save_mask):
        return self.operators.norm_add_act(*forward_tensors(source), relu, save_mask)

    def norm_backward_reduce(self, d, dact, source, mask, relu):
        return self.operators.norm_backward_reduce(d, dact, *backward_tensors(source), mask, relu)

    def norm_backward_apply(self, dz, y, mean, invstd, gamma, s1, s2):
        return self.operators.norm_backward_apply(dz, y, mean, invstd, float32_vector(gamma), s1, s2)

    def norm_act_max_pool(self, source, kernel_size, stride, padding):
        return self.operators.norm_act_max_pool(source.x, source.scale, source.bias, kernel_size, stride, padding)

    def norm_act_max_pool_backward(self, dout, index, source, kernel_size, stride, padding):
        x, mean, invstd, scale, bias, *_ = source
        return self.operators.norm_act_max_pool_backward(dout, index, x, mean, invstd, scale, bias, kernel_size, stride, padding)

    def norm_add_act_avg_pool(self, source):
        return self.operators.norm_add_act_avg_pool(*forward_tensors(source))

    def norm_add_act_avg_pool_backward(self, dout, source, mask):
        return self.operators.norm_add_act_avg_pool_backward(dout, *backward_tensors(source), mask)


def float32_vector(vector: Tensor | None) -> Tensor | None:
    """`vector` as the kernels take it."""
    return None if vector is None else vector.to(torch.float32).contiguous()
