"""The backend `cudnn`: cuDNN's fused graphs wherever cuDNN takes them. See docs/backends.md."""

import torch

from .. import cudnn
from ..cudnn import work
from ..tuning import CUDNN, Task
from .convolutions import FusedConvolutions
from .passes_triton import PassesTriton


def why_not_device(device: torch.device) -> str | None:
    """Why no graph of cuDNN's runs on a device; None where cuDNN may be asked for each."""
    return cudnn.why_not() if device.type == "cuda" else f"cuDNN runs on CUDA GPUs, not on {device.type!r}"


def why_not_task(task: Task, device: torch.device) -> str | None:
    """Why cuDNN does not do a task on a device; None where it does. The first question builds the plan and tries it."""
    return why_not_device(device) or cudnn.why_not_task(task, device)


class Cudnn(FusedConvolutions, PassesTriton):
    """cuDNN runs convolutions, applied norms and batch norm's backward. What it refuses runs as passes in Triton."""

    name = "cudnn"

    def _why_not_here(self, device, dtype):
        return why_not_device(device) or super()._why_not_here(device, dtype) or self._why_not_dtype(device, dtype)

    def _why_not_dtype(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why cuDNN takes no graph of a dtype on this GPU; None where it takes one. Each graph is tried on a small problem."""
        from ..cudnn.probe import why_not_graphs

        name = str(dtype).removeprefix("torch.")
        found = why_not_graphs(name, device)
        if all(found.values()):
            return f"cuDNN takes no graph of {name} on this GPU: " + "; ".join(f"{graph}: {why}" for graph, why in found.items())
        return None

    def choose(self, task, device):
        return None if why_not_task(task, device) else CUDNN

    def norm_add_act(self, source, relu, save_mask):
        # Only where the mask is saved: cuDNN may round x·scale before it adds, and a mask that is made again would not know.
        made = work.norm_add_act(source) if save_mask else None
        return made or super().norm_add_act(source, relu, save_mask)

    def _inference_choice(self, x, weight, geometry):
        return CUDNN  # whose graph for it is not that of a convolution with statistics, and refuses by itself

    def norm_backward_apply(self, dz, y, mean, invstd, gamma, s1, s2):
        made = work.norm_backward_apply(dz, y, mean, invstd, gamma, s1, s2)
        return super().norm_backward_apply(dz, y, mean, invstd, gamma, s1, s2) if made is None else made
