"""A residual network with a block of each kind, small enough to be run often: stem with pool, projections, stride, both blocks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet
from fused_resnet.models import BasicBlock, Bottleneck
from fused_resnet.nn import ResidualNetwork, Stage

#: Images for it.
SIZE = (4, 3, 20, 18)
CLASSES = 5


class SmallNetwork(ResidualNetwork):
    """torchvision's names; channels 8, 16, 32, 32, times `width`."""

    def __init__(self, norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d, width: int = 1):
        super().__init__()
        w = width

        def projection(inplanes: int, planes: int, stride: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), norm_layer(planes))

        self.conv1 = nn.Conv2d(3, 8 * w, 7, 2, 3, bias=False)
        self.bn1 = norm_layer(8 * w)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = Stage(
            Bottleneck(8 * w, 4 * w, 1, projection(8 * w, 16 * w, 1), norm_layer=norm_layer, base_width=128),
            Bottleneck(16 * w, 4 * w, norm_layer=norm_layer, base_width=128),
        )
        self.layer2 = Stage(Bottleneck(16 * w, 8 * w, 2, projection(16 * w, 32 * w, 2), norm_layer=norm_layer, groups=2))
        self.layer3 = Stage(BasicBlock(32 * w, 32 * w, norm_layer=norm_layer))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(32 * w, CLASSES)


def network(norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d, dtype: torch.dtype = torch.float64, width: int = 1) -> SmallNetwork:
    """With norms that are not the identity: running statistics, scale and shift are random, where there are any."""
    model = SmallNetwork(norm_layer, width).to(dtype)
    for module in model.modules():
        if not isinstance(module, nn.Linear):
            for name, least in (("running_mean", -0.5), ("running_var", 0.5), ("weight", 0.5), ("bias", -0.5)):
                t = getattr(module, name, None)
                if t is not None and t.dim() == 1:
                    t.data.copy_(torch.rand(t.shape) + least)
    return model


def nodes(model: nn.Module) -> int:
    """The convolutions of the operators in a forward: a projection shares its block's first."""
    norms = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    return norms - sum(getattr(m, "downsample", None) is not None for m in model.modules())


def step(model: nn.Module, x: torch.Tensor, backend: str, call=None) -> torch.Tensor:
    """Forward and backward of some loss; a gradient for x as well."""
    x.grad = None
    with fused_resnet.backend(backend):
        out = (call or (lambda m, t: m(t)))(model, x)
        F.cross_entropy(out, torch.arange(len(x)) % 5).backward()
    return out


def assert_same(ours: nn.Module, plain: nn.Module, steps: int = 2, call=None) -> None:
    """Outputs, gradients of the input and of parameters, buffers, over some steps of SGD."""
    for _ in range(steps):
        x = torch.randn(SIZE, dtype=torch.float64, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        out, expected = step(ours, x, "eager", call), step(plain, y, "off", call)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-7, atol=1e-9)
        assert_same_state(ours, plain)
        for model in (ours, plain):
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p -= 0.01 * p.grad
                        p.grad = None


def assert_same_state(ours: nn.Module, plain: nn.Module) -> None:
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9, msg=name)
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9, msg=name)
    for (name, a), b in zip(ours.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)
