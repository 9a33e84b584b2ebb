"""Blocks as other libraries write them, small: the same structures under other names, none of which is known by its class."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, **(dict(bias=False) | options))


class Unit(nn.Module):
    """Two convolutions, a shortcut that may project, the sum in place."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, inplace: bool = True):
        super().__init__()
        self.first, self.first_norm = conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.second, self.second_norm = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.act = nn.ReLU(inplace)
        self.short = None
        if stride > 1 or inputs != outputs:
            self.short = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        kept = x
        out = self.act(self.first_norm(self.first(x)))
        out = self.second_norm(self.second(out))
        if self.short is not None:
            kept = self.short(x)
        out += kept
        return self.act(out)


class Layer(nn.Module):
    """Convolution, norm and activation in one, the activation optional."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1, act: type[nn.Module] | None = nn.ReLU, **options):
        super().__init__()
        self.convolution = conv(inputs, outputs, size, stride, **options)
        self.normalization = nn.BatchNorm2d(outputs)
        self.activation = nn.Identity() if act is None else act()

    def forward(self, hidden_state: Tensor) -> Tensor:
        return self.activation(self.normalization(self.convolution(hidden_state)))


class OfLayers(nn.Module):
    """A bottleneck of `Layer`s, attention before the sum if asked for, the shortcut pooled."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, attention: bool = False):
        super().__init__()
        self.layer = nn.Sequential(
            Layer(inputs, 4, 1), Layer(4, 4, 3, stride, groups=2), *([Attention(4)] if attention else []), Layer(4, outputs, 1, act=None)
        )
        self.shortcut = nn.Sequential(nn.AvgPool2d(stride), Layer(inputs, outputs, 1, act=None))
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.layer(x) + self.shortcut(x))


class Attention(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class PreUnit(nn.Module):
    """Norm and ReLU before each convolution; the projection reads the first activation."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, 3, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs)
        self.identity_conv = conv(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        act = F.relu(self.norm1(x))
        kept = x if self.identity_conv is None else self.identity_conv(act)
        return self.conv2(F.relu(self.norm2(self.conv1(act)))) + kept


class Dense(nn.Module):
    """Concatenates what it reads and what it makes."""

    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, 6, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(6), conv(6, growth)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(self.relu(self.norm2(out)))], 1)


class Shuffle(nn.Module):
    """Half of the channels pass by, and both are mixed."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv(half, half, 1), nn.BatchNorm2d(half), nn.ReLU(inplace=True), conv(half, half, 3, groups=half), nn.BatchNorm2d(half),
            conv(half, half, 1), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2, dim=1)
        out = torch.cat((one, self.branch(two)), dim=1)
        n, c, h, w = out.shape
        return out.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Frozen(nn.Module):
    """A norm of buffers alone, as detection networks have, whose eps is written in its forward."""

    def __init__(self, channels: int):
        super().__init__()
        for name, value in (("weight", 1.3), ("bias", 0.2), ("running_mean", -0.1), ("running_var", 0.7)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


class DeepStem(nn.Module):
    """Three convolutions and an average pool, by functions as well as modules."""

    def __init__(self, outputs: int):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 4, 3, 2), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(4, 4), Frozen(4)
        self.conv3, self.bn3 = conv(4, outputs, bias=True), nn.BatchNorm2d(outputs, affine=False)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = torch.relu_(self.bn2(self.conv2(x)))
        return self.pool(F.relu(self.bn3(self.conv3(x)), inplace=True))


class Whole(nn.Module):
    """A network of blocks, from images to scores."""

    def __init__(self, *blocks: nn.Module, channels: int):
        super().__init__()
        self.stem, self.blocks = DeepStem(8), nn.Sequential(*blocks)
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.head(x.view(x.size(0), x.size(1), -1).mean(2))
