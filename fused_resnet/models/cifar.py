"""The networks for 32×32 images of He et al. 2015, section 4.2: 6n + 2 layers, with shortcuts and without."""

from collections.abc import Callable

from torch import Tensor, nn

from ..nn import ResidualNetwork, Stage
from .blocks import BasicBlock, PlainBlock, conv1x1, conv3x3
from .resnet import initialise


class PadShortcut(nn.Module):
    """Option A: an identity that takes every second pixel and pads the new channels with zeros. It has no parameters.

    [N, C, H, W] -> [N, C + 2·pad, ceil(H/stride), ceil(W/stride)]: zeros before and behind the old channels.
    """

    def __init__(self, stride: int, pad: int):
        super().__init__()
        self.stride, self.pad = stride, pad

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, self.pad, self.pad))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, pad={self.pad}"


class CifarResNet(ResidualNetwork):
    """A 3×3 stem of 16 channels, three stages of `blocks` basic blocks with 16, 32, 64 channels, an average pool, `fc`.

    depth: 6·blocks + 2. shortcut: "A" pads where channels grow (the paper's choice here), "B" projects, None leaves shortcuts
    out (the plain network). in_channels: of the images. width: channels of the stem and the first stage in place of 16; the
    next stages have twice and four times as many. Raises ValueError for any other value.
    """

    def __init__(self, depth: int, num_classes: int = 10, shortcut: str | None = "A", in_channels: int = 3, width: int = 16):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth: expected 6n + 2 with n of at least 1; got {depth}")
        if shortcut not in ("A", "B", None):
            raise ValueError(f'shortcut: expected "A", "B" or None; got {shortcut!r}')
        for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1; got {value}")
        if width < 2 or width % 2:  # option A pads on both sides
            raise ValueError(f"width: expected an even number of at least 2; got {width}")
        blocks = (depth - 2) // 6
        self.conv1 = conv3x3(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(width, width, blocks, 1, shortcut)
        self.layer2 = _stage(width, 2 * width, blocks, 2, shortcut)
        self.layer3 = _stage(2 * width, 4 * width, blocks, 2, shortcut)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(4 * width, num_classes)
        initialise(self)


def _stage(inplanes: int, planes: int, blocks: int, stride: int, shortcut: str | None) -> Stage:
    block = PlainBlock if shortcut is None else BasicBlock
    downsample: nn.Module | None = None
    if inplanes != planes and shortcut == "A":
        downsample = PadShortcut(stride, (planes - inplanes) // 2)
    elif inplanes != planes and shortcut == "B":
        downsample = nn.Sequential(conv1x1(inplanes, planes, stride), nn.BatchNorm2d(planes))
    first = block(inplanes, planes, stride, downsample)
    return Stage(first, *(block(planes, planes) for _ in range(1, blocks)))


def _builder(name: str, depth: int) -> Callable[..., CifarResNet]:
    def plain(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
        return CifarResNet(depth, num_classes, None, in_channels, width)

    def residual(num_classes: int = 10, shortcut: str = "A", in_channels: int = 3, width: int = 16) -> CifarResNet:
        return CifarResNet(depth, num_classes, shortcut, in_channels, width)

    build: Callable[..., CifarResNet] = plain if name.startswith("plain") else residual
    kind = f"The plain {depth}-layer network" if build is plain else f"ResNet-{depth}"
    build.__doc__ = f"{kind} for 32×32 images. See `CifarResNet`."
    build.__name__ = build.__qualname__ = name
    return build


resnet20 = _builder("resnet20", 20)
resnet32 = _builder("resnet32", 32)
resnet44 = _builder("resnet44", 44)
resnet56 = _builder("resnet56", 56)
resnet110 = _builder("resnet110", 110)
resnet1202 = _builder("resnet1202", 1202)
plain20 = _builder("plain20", 20)
plain32 = _builder("plain32", 32)
plain44 = _builder("plain44", 44)
plain56 = _builder("plain56", 56)
