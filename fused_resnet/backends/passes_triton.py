"""The backend `passes_triton`: the passes as Triton kernels (fused_resnet/kernels/). It runs without the native library."""

import importlib.util
import os

import torch

from .. import versions
from .passes import Passes


class PassesTriton(Passes):
    """Calls the Triton kernels. Triton is imported at the first use: it takes a while, and a machine may lack it."""

    name = "passes_triton"

    def _why_not_here(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed (pip install triton; Linux only)"
        if device.type == "cpu":
            return self._why_not_on_cpu(dtype)
        return None if device.type == "cuda" else f"{self.name} runs on CUDA GPUs, not on {device.type!r}"

    def _why_not_on_cpu(self, dtype: torch.dtype) -> str | None:
        wanted = "on a CPU the Triton kernels run in Triton's interpreter alone: set TRITON_INTERPRET=1"
        if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
            return wanted
        if dtype == torch.bfloat16:
            return "Triton's interpreter cuts bfloat16 off where a GPU rounds; float32 and float16 are right"
        if (versions.installed("triton") or (0,)) < (3, 7) and versions.installed("numpy") >= (2, 4):
            return "the interpreter of Triton 3.6 does not run with NumPy 2.4 or later: pip install 'numpy<2.4'"
        from ..kernels.launch import INTERPRETED

        return None if INTERPRETED else f"{wanted} before Triton is first imported"

    # Each as in `Reference`, where the docstrings are.

    def batch_stats(self, *args):
        from ..kernels.batch_stats import batch_stats

        return batch_stats(*args)

    def batch_moments(self, *args):
        from ..kernels.batch_stats import batch_moments

        return batch_moments(*args)

    def merge_moments(self, *args):
        from ..kernels.batch_stats import merge_moments

        return merge_moments(*args)

    def norm_add_act(self, source, relu, save_mask):
        from ..kernels.norm_add_act import norm_add_act

        return norm_add_act(source, relu, save_mask)

    def norm_backward_reduce(self, d, dact, source, mask, relu):
        from ..kernels.norm_backward import norm_backward_reduce

        return norm_backward_reduce(d, dact, source, mask, relu)

    def norm_backward_apply(self, *args):
        from ..kernels.norm_backward import norm_backward_apply

        return norm_backward_apply(*args)

    def norm_act_max_pool(self, source, kernel_size, stride, padding):
        from ..kernels.max_pool import norm_act_max_pool

        return norm_act_max_pool(source, kernel_size, stride, padding)

    def norm_act_max_pool_backward(self, dout, index, source, kernel_size, stride, padding):
        from ..kernels.max_pool import norm_act_max_pool_backward

        return norm_act_max_pool_backward(dout, index, source, kernel_size, stride, padding)

    def norm_add_act_avg_pool(self, source):
        from ..kernels.avg_pool import norm_add_act_avg_pool

        return norm_add_act_avg_pool(source)

    def norm_add_act_avg_pool_backward(self, dout, source, mask):
        from ..kernels.avg_pool import norm_add_act_avg_pool_backward

        return norm_add_act_avg_pool_backward(dout, source, mask)
