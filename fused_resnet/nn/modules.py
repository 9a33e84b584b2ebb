"""Which of PyTorch's modules the operators can stand for, and their parameters as the operators take them."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from .. import ops
from ..backends import resolve
from ..ops import Conv, ConvGeometry, Norm, Pending, values_per_channel
from .activation import BatchStatistics

#: What a block asks of a module of its own: one of the predicates below, and the module.
Requirement = tuple[Callable[[nn.Module | None], bool], nn.Module | None]

#: Kinds of devices that have autocast. Asked once: the compiler of PyTorch 2.11 can't trace the question.
_AUTOCAST = frozenset(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))


def observed(module: nn.Module) -> bool:
    """Whether somebody wants to see this very module called with tensors: a hook, or another call or forward in its place."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
        or "_conv_forward" in module.__dict__
        or _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    )


def is_row(module: nn.Module | None) -> bool:
    """Whether a module is nn.Sequential, or of a subclass that calls its members as that does; also after `fuse`."""
    cls = getattr(type(module), "fuse_original", type(module))
    return isinstance(module, nn.Sequential) and cls.forward is nn.Sequential.forward and cls.__call__ is nn.Module.__call__


def is_unobserved(module: nn.Module | None) -> bool:
    """A module that nobody watches, or none."""
    return module is None or not observed(module)


def is_conv(module: nn.Module | None) -> bool:
    """A convolution that the operators can run: nn.Conv2d itself, without bias, padded with zeros by numbers."""
    return _is_plain_conv(module) and held(module, "bias") is None


def is_folded_conv(module: nn.Module | None) -> bool:
    """The same with a bias, as a convolution that holds a norm has."""
    return _is_plain_conv(module) and held(module, "bias") is not None


def _is_plain_conv(module: nn.Module | None) -> bool:
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str) and not observed(module)


def is_norm(module: nn.Module | None) -> bool:
    """A norm that the operators can run: nn.BatchNorm2d itself, nn.SyncBatchNorm, or torchvision's frozen one."""
    return (type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) or is_frozen_norm(module)) and not observed(module)


def is_local_norm(module: nn.Module | None) -> bool:
    """A norm of a tensor that exists, whose statistics no other process shares."""
    return is_norm(module) and not isinstance(module, nn.SyncBatchNorm)


def is_frozen_norm(module: nn.Module | None) -> bool:
    """torchvision's FrozenBatchNorm2d: its statistics, scale and shift are buffers, and training changes none of them."""
    return _is(module, "torchvision.ops.misc", "FrozenBatchNorm2d")


def is_frozen_norm_act(module: nn.Module | None) -> bool:
    """timm's FrozenBatchNormAct2d, the same with an activation behind it."""
    return _is(module, "timm.layers.norm_act", "FrozenBatchNormAct2d")


def is_norm_act(module: nn.Module | None) -> bool:
    """timm's BatchNormAct2d with a ReLU, frozen or not: a norm and its activation in one module."""
    return (
        (_is(module, "timm.layers.norm_act", "BatchNormAct2d") or is_frozen_norm_act(module))
        and not observed(module)
        and is_relu(module.act)
        and is_nothing(module.drop)
    )


def _is(module: nn.Module | None, where: str, name: str) -> bool:
    """Whether a module is of a class of another package, which need not be installed."""
    cls = type(module)
    return cls.__name__ == name and cls.__module__ == where


def is_relu(module: nn.Module | None) -> bool:
    """nn.ReLU itself."""
    return type(module) is nn.ReLU and not observed(module)


def is_nothing(module: nn.Module | None) -> bool:
    """A place that nothing stands in."""
    return module is None or (type(module) is nn.Identity and not observed(module))


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


def norm_of(norm: nn.Module) -> Norm:
    """A norm as an operator takes it."""
    gamma, beta = held(norm, "weight"), held(norm, "bias")
    if type(norm) is nn.BatchNorm2d and norm.training:  # the usual one
        return Norm(gamma, beta, None, None, True, norm.eps)
    training = uses_batch(norm)
    mean, var = (None, None) if training else (norm.running_mean, norm.running_var)
    return Norm(gamma, beta, mean, var, training, norm.eps, sharing_group(norm))


def geometry(conv: nn.Conv2d) -> ConvGeometry:
    """How a convolution moves over its input."""
    return ConvGeometry.of(conv.stride, conv.padding, conv.dilation, conv.groups)


def conv_and_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Conv:
    """The two modules as an operator takes them that reads x."""
    return Conv(weight_for(conv, x), norm_of(norm), geometry(conv))


def weight_for(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The weight of a convolution of x: in x's dtype, where autocast is on."""
    weight = held(conv, "weight")
    return weight if weight.dtype == x.dtype or not autocasts(x.device.type) else weight.to(x.dtype)


def takes(conv: nn.Conv2d, x: object) -> bool:
    """Whether a convolution can read x. Where it can't, PyTorch's own says what is wrong."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        return False
    weight = held(conv, "weight")
    return x.shape[1] == weight.shape[1] * conv.groups and (x.dtype == weight.dtype or autocast_dtype(x) is not None)


def held(module: nn.Module, name: str) -> Tensor | None:
    """module.<name>, a parameter or whatever holds its place: found sooner than by nn.Module's own search.

    FSDP, DataParallel's replicas and networks that make the weights of others keep tensors in a module's `__dict__`, where it looks first.
    """
    own = module.__dict__
    if name in own:
        return own[name]
    parameters = own["_parameters"]
    return parameters[name] if name in parameters else getattr(module, name)


def _is_frozen(norm: nn.Module) -> bool:
    """Whether the statistics are constants in training, too."""
    return is_frozen_norm(norm) or is_frozen_norm_act(norm)


def uses_batch(norm: nn.Module) -> bool:
    """Whether the batch's own statistics normalise."""
    if norm.training and (type(norm) is nn.BatchNorm2d or not _is_frozen(norm)):
        return True
    return norm.running_mean is None


def batch_statistics(norm: nn.BatchNorm2d | nn.SyncBatchNorm, out: Pending) -> tuple[BatchStatistics, ...]:
    """What `out` tells `norm`'s running statistics: nothing outside training."""
    if not norm.training or not getattr(norm, "track_running_stats", False):  # a frozen norm has no such attribute
        return ()
    if type(norm) is nn.SyncBatchNorm and sharing_group(norm):
        return (BatchStatistics(norm, out.mean, out.var, 0),)
    y, mean, _, var, *_ = out
    size = values_per_channel(y)
    return (BatchStatistics(norm, mean, var, size) if size else BatchStatistics(norm, None, None, 0),)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast has convolutions of x run in; None where it is off, or leaves x as it is."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if autocasts(kind) and x.dtype != torch.float64 else None


def autocasts(kind: str) -> bool:
    """Whether autocast is on for a kind of device, "cuda" or another."""
    return kind in _AUTOCAST and torch.is_autocast_enabled(kind)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that convolutions of x run in: autocast's, where it is on."""
    return autocast_dtype(x) or x.dtype


def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


# The compiler of PyTorch 2.11 takes the answer to be yes, always. So it asks here, and does not look inside.
_is_exporting._dynamo_marked_constant = True


def _own(cls: type[nn.Module], name: str) -> Callable:
    """A method as the class's own file defines it; where somebody has put another in its place, a function that is none of the class's."""
    method = getattr(cls, name)
    return method if method.__code__.co_filename == cls.__init__.__code__.co_filename else _own


#: The methods of PyTorch's modules that the operators stand for.
_STOOD_FOR = [(nn.Module, "__call__", _own(nn.Module, "__call__")), (nn.Conv2d, "_conv_forward", _own(nn.Conv2d, "_conv_forward"))]
for _cls in (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU, nn.Identity, nn.Sequential, nn.MaxPool2d, nn.AdaptiveAvgPool2d):
    _STOOD_FOR += (_cls, "forward", _own(_cls, "forward")), (_cls, "__call__", _STOOD_FOR[0][2])


def _looks_for_aten(mode: TorchDispatchMode) -> bool:
    """Whether a mode counts or changes ATen's operators, and would not know those of this package.

    PyTorch's own know that there are others. Another library's says so by an attribute `sees_fused_operators = True`.
    """
    return type(mode).__module__.partition(".")[0] != "torch" and not getattr(mode, "sees_fused_operators", False)


def replaced() -> bool:
    """Whether somebody has changed PyTorch's classes, or has a mode look at each call: PyTorch's modules then run."""
    if torch._C._len_torch_dispatch_stack() and any(_looks_for_aten(mode) for mode in _get_current_dispatch_mode_stack()):
        return True
    if torch._C._len_torch_function_stack():
        modes = torch.overrides._get_current_function_mode_stack()
        if any(type(mode) is not torch.utils._device.DeviceContext for mode in modes):
            return True
    return changed()


def changed() -> bool:
    """Whether somebody has changed the methods of PyTorch's classes that the operators stand for."""
    for cls, name, method in _STOOD_FOR:  # noqa: SIM110  (a generator costs the host as much as what it asks)
        if getattr(cls, name) is not method:
            return True
    return False


def runs_modules(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether PyTorch's own modules run on x, in `dtype`.

    By choice; since what is exported has to run without this package; since torch.fx traces, whose users, quantization for one, are about
    PyTorch's modules; or within a transform of torch.func and under forward-mode AD, for which the operators have no rules.
    """
    if (
        isinstance(x, torch.fx.Proxy)
        or _is_exporting()
        or torch.jit.is_tracing()
        or ops.is_transformed()
        or resolve(x.device, dtype) == "off"
    ):
        return True
    return not torch.compiler.is_compiling() and replaced()


def runs_fused(x: Tensor) -> bool:
    """Whether the operators take x, which may be anything that a module is called with; else PyTorch's own modules do."""
    return isinstance(x, Tensor) and x.is_floating_point() and not runs_modules(x, compute_dtype(x))


def met(requirements: Iterable[Requirement]) -> bool:
    """Whether all requirements are met."""
    for fits, module in requirements:  # noqa: SIM110  (a generator costs the host as much as what it asks)
        if not fits(module):
            return False
    return True


def why_not(requirements: Iterable[Requirement], names: Mapping[nn.Module, str]) -> str | None:
    """The first requirement that is not met, in words; None where all are. `names` are the modules' own."""
    for fits, module in requirements:
        if not fits(module):
            name = names.get(module, "a module")
            if module is not None and any(observed(m) for m in module.modules()):
                return f"{name} has a hook, or is compiled by itself"
            return f"{name} is {type(module).__name__}, {WANTED[fits]}"
    return None


WANTED = {
    is_unobserved: "not free of hooks",
    is_conv: "not an nn.Conv2d without bias, padded with zeros",
    is_folded_conv: "not an nn.Conv2d with the bias of a norm that it holds, padded with zeros",
    is_norm: "not an nn.BatchNorm2d",
    is_local_norm: "not an nn.BatchNorm2d of one process",
    is_norm_act: "not a BatchNormAct2d with an nn.ReLU",
    is_relu: "not an nn.ReLU",
    is_nothing: "for which the operators have no step",
}
