"""Which of PyTorch's modules the operators can stand for, and their parameters as the operators take them."""

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ..backends import resolve
from ..ops import Conv, ConvGeometry, Norm, Pending
from .activation import BatchStatistics, moments

_GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)


def observed(module: nn.Module) -> bool:
    """Whether somebody wants to see this very module called with tensors: a hook, or another call or forward in its place."""
    return (
        bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
        or any(_GLOBAL_HOOKS)
    )


def is_conv(module: nn.Module | None) -> bool:
    """A convolution that the operators can run: nn.Conv2d itself, without bias, padded with zeros by numbers."""
    return (
        type(module) is nn.Conv2d
        and module.bias is None
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and not observed(module)
    )


def is_norm(module: nn.Module | None) -> bool:
    """A norm that the operators can run: nn.BatchNorm2d itself, nn.SyncBatchNorm, or a frozen one."""
    return (type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) or is_frozen_norm(module)) and not observed(module)


def is_frozen_norm(module: nn.Module | None) -> bool:
    """torchvision's FrozenBatchNorm2d: its statistics, scale and shift are buffers, and training changes none of them."""
    return type(module).__name__ == "FrozenBatchNorm2d" and type(module).__module__ == "torchvision.ops.misc"


def is_relu(module: nn.Module | None) -> bool:
    """nn.ReLU itself."""
    return type(module) is nn.ReLU and not observed(module)


def is_max_pool(module: nn.Module | None) -> bool:
    """A square max pool that the operators can run."""
    return (
        type(module) is nn.MaxPool2d
        and all(isinstance(v, int) for v in (module.kernel_size, module.stride, module.padding))
        and module.kernel_size <= 16
        and module.dilation == 1
        and not module.ceil_mode
        and not module.return_indices
        and not observed(module)
    )


def is_global_avg_pool(module: nn.Module | None) -> bool:
    """A global average pool."""
    return type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1)) and not observed(module)


def sharing_group(norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> str:
    """The name of the process group that shares the batch's statistics with `norm`; "" where it keeps its own."""
    if type(norm) is not nn.SyncBatchNorm or not norm.training:
        return ""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return ""
    group = norm.process_group or distributed.group.WORLD
    return group.group_name if distributed.get_world_size(group) > 1 else ""


def conv_and_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d | nn.SyncBatchNorm, dtype: torch.dtype) -> Conv:
    """The two modules as an operator takes them, the weight in `dtype`."""
    training = (norm.training and not is_frozen_norm(norm)) or norm.running_mean is None
    running = (None, None) if training else (norm.running_mean, norm.running_var)
    return Conv(
        conv.weight.to(dtype),
        Norm(norm.weight, norm.bias, *running, training, norm.eps, sharing_group(norm)),
        ConvGeometry(list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups),
    )


def batch_statistics(norm: nn.BatchNorm2d | nn.SyncBatchNorm, out: Pending) -> tuple[BatchStatistics, ...]:
    """What `out` tells `norm`'s running statistics: nothing outside training."""
    if not norm.training or is_frozen_norm(norm) or not norm.track_running_stats:
        return ()
    return (BatchStatistics(norm, *moments(out, shared=bool(sharing_group(norm)))),)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast has convolutions of x run in; None where it is off, or leaves x as it is."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return None


def runs_modules(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether PyTorch's own modules run on x, in `dtype`: by choice, or since what is exported has to run without this package."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing() or resolve(x.device, dtype) == "off"


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that convolutions of x run in: autocast's, where it is on."""
    return autocast_dtype(x) or x.dtype
