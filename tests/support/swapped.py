"""What the tests of `fuse` share: a network before and after it, step by step."""

import copy

import torch
from torch import nn

import fused_resnet


def shake(model: nn.Module) -> nn.Module:
    """Norms that do something: a gamma of zero, as some networks begin with, would make gradients of rounding noise."""
    for module in model.modules():
        if getattr(module, "running_var", None) is not None and module.weight is not None:
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model


def tensors(value) -> list[torch.Tensor]:
    """All tensors of a network's output, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in (value.values() if isinstance(value, dict) else value) for t in tensors(item)]


def run(model: nn.Module, x: torch.Tensor, backend: str, call: str | None = None) -> dict[str, torch.Tensor]:
    """One step: outputs, gradients of x and parameters, buffers. `call` names another method than forward."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    with fused_resnet.backend(backend):  # backward as well: activation checkpointing runs forward again in it
        outputs = tensors((model if call is None else getattr(model, call))(x))
        torch.manual_seed(2)
        sum((t * torch.randn(t.shape).to(t)).sum() for t in outputs).backward()  # drawn in float32: the same for all dtypes
    found = {f"output {i}": t.detach() for i, t in enumerate(outputs)} | {"dx": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return found | dict(model.named_buffers())


def assert_same_step(plain: nn.Module, fused: nn.Module, x: torch.Tensor, bound: float = 1e-9, call: str | None = None) -> None:
    """Outputs, every gradient and every buffer of a step agree; and that step did run operators of ours."""
    expected, found = run(plain, x, "off", call), run(fused, x, "eager", call)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        other = found[name]
        assert (value is None) == (other is None), name
        if value is not None:
            scale = max(value.double().norm().item(), 1e-3)
            assert (other.double() - value.double()).norm().item() <= bound * scale, name


def fused_copy(model: nn.Module) -> nn.Module:
    """A fused twin."""
    return fused_resnet.fuse(copy.deepcopy(model))


def why_not(model: nn.Module) -> dict[str, str]:
    """module -> reason, of what would not run fused with operators on ATen."""
    with fused_resnet.backend("eager"):
        return {row.name: row.reason for row in fused_resnet.report(model).rows if not row.fused}


def fused_rows(model: nn.Module) -> list[str]:
    """The modules that would run fused with operators on ATen."""
    with fused_resnet.backend("eager"):
        return [row.name for row in fused_resnet.report(model).rows if row.fused]


def unfused(model: nn.Module) -> dict[str, str]:
    """convolution -> reason, of those that would not run fused with operators on ATen."""
    with fused_resnet.backend("eager"):
        return {c.name: c.reason for c in fused_resnet.report(model).convolutions if not c.fused}
