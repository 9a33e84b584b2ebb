"""The two blocks of He et al. 2015 (figure 5), their plain counterpart, the pre-activation block, and a single layer."""

from collections.abc import Callable

from torch import Tensor, nn

from ..nn import Block, PreActivation
from ..nn.modules import Requirement, is_local_norm, is_norm, is_relu


def conv3x3(inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A 3×3 convolution that keeps the size at stride 1."""
    return nn.Conv2d(inplanes, planes, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False)


def conv1x1(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    """A 1×1 convolution."""
    return nn.Conv2d(inplanes, planes, 1, stride, bias=False)


class BasicBlock(Block):
    """Two 3×3 convolutions; the first one strides."""

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ):
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        if groups != 1 or base_width != 64:
            raise ValueError(f"groups, base_width: BasicBlock supports 1 and 64 only; got {groups} and {base_width}")
        if dilation > 1:
            raise NotImplementedError(f"dilation: BasicBlock supports 1 only; got {dilation}")
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def branch(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2)]


class PlainBlock(BasicBlock):
    """A basic block without its shortcut: what a plain network is made of."""

    shortcut = False


class Bottleneck(Block):
    """1×1, 3×3, 1×1; the 3×3 convolution strides, as in torchvision ("v1.5"; the paper's strides in the first)."""

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ):
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def branch(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]


class ConvBNAct2d(Block):
    """relu(norm(conv(x))): a layer by itself, or a member of a `Stage`, whose next member then normalises it while loading.

    in_channels, out_channels, kernel_size, stride, dilation, groups: as in nn.Conv2d. padding: by default what keeps the size at
    stride 1 for an odd kernel. norm_layer: called with the number of channels; nn.BatchNorm2d by default.
    """

    shortcut = False
    downsample = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ):
        super().__init__()
        padding = (kernel_size - 1) // 2 * dilation if padding is None else padding
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False)
        self.bn = (norm_layer or nn.BatchNorm2d)(out_channels)
        self.relu = nn.ReLU(inplace=True)

    def branch(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.conv, self.bn)]


class PreActBlock(PreActivation):
    """x + conv2(relu(bn2(conv1(relu(bn1(x)))))), the basic block of He et al. 2016 (figure 4e).

    inplanes, planes, stride: as of `BasicBlock`. downsample: the projection, a convolution without a norm, which reads the first
    activation; by default a 1×1 convolution where the shape changes, else none. norm_layer: called with the number of channels.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Conv2d | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ):
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        if downsample is None and (stride != 1 or inplanes != planes):
            downsample = conv1x1(inplanes, planes, stride)
        self.bn1 = norm_layer(inplanes)
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn2 = norm_layer(planes)
        self.conv2 = conv3x3(planes, planes)
        self.relu = nn.ReLU()  # not in place: without a projection x is read again
        self.downsample = downsample

    def layers(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.bn1, self.conv1), (self.bn2, self.conv2)]

    def shortcut_modules(self) -> tuple[nn.Module | None, nn.Module | None]:
        return None, self.downsample

    def norm_requirements(self) -> list[Requirement]:
        return [(is_local_norm, self.bn1), (is_norm, self.bn2), (is_relu, self.relu)]

    def forward_modules(self, x: Tensor) -> Tensor:
        act = self.relu(self.bn1(x))
        out: Tensor = self.conv2(self.relu(self.bn2(self.conv1(act))))
        return out + (x if self.downsample is None else self.downsample(act))
