"""A network of residual blocks: stem, stages, head. Activations stay pending from the stem's convolution to the head."""

import torch
from torch import Tensor, nn

from .. import ops
from .activation import Activation, update_running_statistics
from .block import advance, enter
from .modules import (
    batch_statistics,
    compute_dtype,
    conv_and_norm,
    is_conv,
    is_global_avg_pool,
    is_max_pool,
    is_norm,
    is_relu,
    runs_modules,
)


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
        self._check_input(x)
        dtype = compute_dtype(x)
        if runs_modules(x, dtype):
            return self._forward_modules(x)
        a = self._stem(enter(x, dtype).x)
        for stage in self.stages():
            a = advance(stage, a)
        return self.fc(torch.flatten(self._pool(a), 1))

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

    def _stem(self, x: Tensor) -> Activation:
        if not (is_conv(self.conv1) and is_norm(self.bn1) and is_relu(self.relu)):
            x = self.relu(self.bn1(self.conv1(x)))
            return enter(x if self.maxpool is None else self.maxpool(x))
        out = ops.conv_stats(x, conv_and_norm(self.conv1, self.bn1, x.dtype))
        statistics = batch_statistics(self.bn1, out)
        if self.maxpool is None:
            return Activation(out, None, statistics)
        if is_max_pool(self.maxpool):
            pool = self.maxpool
            return Activation(ops.norm_act_max_pool(out, pool.kernel_size, pool.stride, pool.padding), None, statistics)
        update_running_statistics(statistics)
        return enter(self.maxpool(ops.norm_add_act(out)))

    def _pool(self, a: Activation) -> Tensor:
        if isinstance(a.x, Tensor) or not is_global_avg_pool(self.avgpool):
            return self.avgpool(a.finish())
        update_running_statistics(a.statistics)
        return ops.norm_add_act_avg_pool(a.x, a.residual)
