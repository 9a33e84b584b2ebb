"""Says what a module is by what its class does. A subclass that keeps the methods of PyTorch's class counts as PyTorch's own."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.modules import norm_of, observed
from ..ops import Norm
from .trace import is_norm_and_act, type_of


def keeps(module: nn.Module | None, base: type, *methods: str) -> bool:
    """Whether a module is of class `base`, or of a subclass that keeps these methods and the way it is called."""
    cls = None if module is None else type_of(module)
    if cls is None or not issubclass(cls, base):
        return False
    return all(getattr(cls, name) is getattr(base, name) for name in ("forward", "__call__", *methods))


def is_conv_like(module: nn.Module | None) -> bool:
    """A convolution that the operators can run: padded with zeros by numbers, with a bias or without."""
    return isinstance(module, nn.Conv2d) and why_not_conv(module) is None


def why_not_conv(module: nn.Module) -> str | None:
    """Why the operators can't run a convolution, in words; None where they can."""
    if observed(module):
        return "it has a hook, or is compiled by itself"
    if not keeps(module, nn.Conv2d, "_conv_forward") or not holds_tensor(module, "weight"):
        return f"it is {type_of(module).__name__}, not an nn.Conv2d with a weight of its own"
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return f"it pads {module.padding if isinstance(module.padding, str) else module.padding_mode}, not with zeros by numbers"
    return None


def holds_tensor(module: nn.Module, name: str) -> bool:
    """Whether a module holds a tensor, or None, itself. A parametrization would make the tensor whenever it is read."""
    return name in module._parameters or name in vars(module)


def is_norm_like(module: nn.Module | None) -> bool:
    """A batch norm that the operators can run."""
    return module is not None and not observed(module) and (is_batch_norm(module) or frozen_eps(module) is not None)


def is_batch_norm(module: nn.Module) -> bool:
    """nn.BatchNorm2d, nn.SyncBatchNorm, or timm's with an activation."""
    if is_norm_and_act(module):
        return True
    return (keeps(module, nn.BatchNorm2d, "_check_input_dim") or type_of(module) is nn.SyncBatchNorm) and holds_tensor(module, "weight")


def frozen_eps(module: nn.Module) -> float | None:
    """The eps of a frozen norm, as many libraries have one: statistics, scale and shift are buffers. None for any other module."""
    buffers = module._buffers
    if set(buffers) - {"num_batches_tracked"} != _FROZEN or any(buffers[name] is None for name in _FROZEN):
        return None
    if module._parameters or any(type_of(member) is not nn.Identity for member in module._modules.values()):
        return None
    return _eps_of(type_of(module), float(vars(module).get("eps", 1e-5)), module)


_FROZEN = {"weight", "bias", "running_mean", "running_var"}
_frozen: dict[tuple[type, float], float | None] = {}


def _eps_of(cls: type, eps: float, module: nn.Module) -> float | None:
    """eps, if a copy of the module with other numbers computes (x − mean)·weight/√(var + eps) + bias."""
    if (cls, eps) not in _frozen:
        probe = copy.deepcopy(module).cpu().double()
        with torch.no_grad():
            size = probe.weight.numel()
            for step, buffer in enumerate((probe.weight, probe.bias, probe.running_mean, probe.running_var), 1):
                buffer.copy_(torch.linspace(0.001 * step, 0.5 + step, size, dtype=torch.float64))
            x = torch.linspace(-2, 2, 6 * size, dtype=torch.float64).reshape(2, size, 1, 3)
            expected = F.batch_norm(x, probe.running_mean, probe.running_var, probe.weight, probe.bias, False, 0.0, eps)
            try:
                fits = torch.allclose(probe(x), expected, rtol=1e-12, atol=1e-12)
            except Exception:  # whatever a module of these buffers does to other shapes
                fits = False
        _frozen[cls, eps] = eps if fits else None
    return _frozen[cls, eps]


def taken(norm: nn.Module) -> Norm:
    """A norm as an operator takes it."""
    eps = None if isinstance(norm, nn.modules.batchnorm._BatchNorm) or is_norm_and_act(norm) else frozen_eps(norm)
    return norm_of(norm) if eps is None else Norm(norm.weight, norm.bias, norm.running_mean, norm.running_var, False, eps)


def is_relu_like(module: nn.Module | None) -> bool:
    """A ReLU."""
    return keeps(module, nn.ReLU) and not observed(module)


def norm_forward(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm of a module that may hold an activation as well."""
    if not is_norm_and_act(norm):
        return norm(x)
    if isinstance(norm, nn.BatchNorm2d):
        return nn.BatchNorm2d.forward(norm, x)
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
