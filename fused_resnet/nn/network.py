"""A network of residual blocks: stem, stages, head. Activations stay pending from the stem's convolution to the head."""

import torch
from torch import Tensor, nn

from .block import enter
from .chain import run
from .modules import compute_dtype, runs_modules


class ResidualNetwork(nn.Module):
    """The forward of all networks in `fused_resnet.models`. Subclasses make the modules, under torchvision's names."""

    conv1: nn.Conv2d
    bn1: nn.Module
    relu: nn.ReLU
    avgpool: nn.Module
    fc: nn.Module

    @property
    def maxpool(self) -> nn.Module | None:
        """The pool of the stem; None where there is none."""
        return self._modules.get("maxpool")

    def stages(self) -> list[nn.Module]:
        """layer1, layer2, …"""
        return [module for name, module in self._modules.items() if name.startswith("layer")]

    def forward(self, x: Tensor) -> Tensor:
        """Class scores [N, num_classes] of images x [N, C, H, W], in any layout; converted once, here, where it matters."""
        if not isinstance(x, torch.fx.Proxy):
            self._check_input(x)
        dtype = compute_dtype(x)
        if runs_modules(x, dtype):
            return self._forward_modules(x)
        stem = [self.conv1, self.bn1, self.relu, *([] if self.maxpool is None else [self.maxpool])]
        return self.fc(torch.flatten(run([*stem, *self.stages(), self.avgpool], enter(x, dtype)).finish(), 1))

    def _check_input(self, x: Tensor) -> None:
        weight = self.conv1.weight
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor; got {type(x).__name__}")
        if x.dim() != 4 or x.shape[1] != self.conv1.in_channels:
            raise ValueError(f"x: expected shape [N, {self.conv1.in_channels}, H, W]; got {list(x.shape)}")
        if x.device != weight.device:
            raise ValueError(f"x: expected a tensor on {weight.device}, where the network is; got one on {x.device}")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x: expected {weight.dtype}, the dtype of the network; got {x.dtype}")

    def _forward_modules(self, x: Tensor) -> Tensor:
        """PyTorch's own modules, one after the other."""
        x = self.relu(self.bn1(self.conv1(x)))
        if self.maxpool is not None:
            x = self.maxpool(x)
        for stage in self.stages():
            x = stage(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))
