"""What modules are, by what their classes do: a subclass that keeps the methods of PyTorch's is as good as PyTorch's own."""

from torch import Tensor, nn

from ..nn.modules import is_frozen_norm, observed
from .trace import type_of


def keeps(module: nn.Module | None, base: type, *methods: str) -> bool:
    """Whether a module is of a class, or of a subclass that keeps these methods and the way it is called."""
    cls = None if module is None else type_of(module)
    if cls is None or not issubclass(cls, base):
        return False
    return all(getattr(cls, name) is getattr(base, name) for name in ("forward", "__call__", *methods))


def is_conv_like(module: nn.Module | None) -> bool:
    """A convolution that the operators can run: padded with zeros by numbers, with a bias or without."""
    return isinstance(module, nn.Conv2d) and why_no_conv(module) is None


def why_no_conv(module: nn.Module) -> str | None:
    """Why the operators can't run a convolution, in words; None where they can."""
    if observed(module):
        return "it has a hook, or is compiled by itself"
    if not keeps(module, nn.Conv2d, "_conv_forward") or not holds_tensor(module, "weight"):
        return f"it is {type_of(module).__name__}, not an nn.Conv2d with a weight of its own"
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return f"it pads {module.padding if isinstance(module.padding, str) else module.padding_mode}, not with zeros by numbers"
    return None


def holds_tensor(module: nn.Module, name: str) -> bool:
    """Whether a module keeps a tensor, or None, as it is: no parametrization makes it when it is read."""
    return name in module._parameters or name in vars(module)


def is_norm_like(module: nn.Module | None) -> bool:
    """A batch norm that the operators can run."""
    if module is None or observed(module):
        return False
    return is_batch_norm(module) or is_frozen_norm(module)


def is_batch_norm(module: nn.Module) -> bool:
    """nn.BatchNorm2d, nn.SyncBatchNorm, or timm's, which has an activation as well."""
    cls = type_of(module)
    if (cls.__module__, cls.__name__) == ("timm.layers.norm_act", "BatchNormAct2d"):
        return True
    return (keeps(module, nn.BatchNorm2d, "_check_input_dim") or cls is nn.SyncBatchNorm) and holds_tensor(module, "weight")


def is_relu_like(module: nn.Module | None) -> bool:
    """A ReLU."""
    return keeps(module, nn.ReLU) and not observed(module)


def norm_forward(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm alone, of a module that may have an activation behind it."""
    return nn.BatchNorm2d.forward(norm, x) if not keeps(norm, nn.BatchNorm2d) and isinstance(norm, nn.BatchNorm2d) else norm(x)
