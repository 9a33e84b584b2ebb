"""The ImageNet networks, with torchvision's signatures, module names, state_dict keys and order, and initial values.

He et al. 2015, table 1 (ResNet, plain); Xie et al. 2016 (ResNeXt); Zagoruyko & Komodakis 2016 (Wide ResNet).
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..nn import ResidualNetwork, Stage
from .blocks import BasicBlock, Bottleneck, PlainBlock, conv1x1
from .weights import load_weights


class ResNet(ResidualNetwork):
    """torchvision.models.ResNet, argument for argument.

    Raises ValueError where `replace_stride_with_dilation` is not None or three booleans, or `layers` not four positive counts.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ):
        super().__init__()
        dilate = replace_stride_with_dilation or (False, False, False)
        if len(dilate) != 3:
            raise ValueError(f"replace_stride_with_dilation: expected None or three booleans; got {dilate!r}")
        if len(layers) != 4 or min(layers) < 1:
            raise ValueError(f"layers: expected four positive counts; got {layers!r}")
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1; got {num_classes}")
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)  # type: ignore[misc]  # nn.Module keeps it, and the property finds it
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2, dilate=dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2, dilate=dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2, dilate=dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        initialise(self)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, BasicBlock | Bottleneck):
                    _, last_norm = module.branch()[-1]
                    nn.init.zeros_(last_norm.get_parameter("weight"))

    def _make_layer(self, block: type[BasicBlock | Bottleneck], planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> Stage:
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        downsample = None
        if block.shortcut and (stride != 1 or self.inplanes != planes * block.expansion):
            downsample = nn.Sequential(conv1x1(self.inplanes, planes * block.expansion, stride), self._norm_layer(planes * block.expansion))
        common = (self.groups, self.base_width)
        members = [block(self.inplanes, planes, stride, downsample, *common, first_dilation, self._norm_layer)]
        self.inplanes = planes * block.expansion
        for _ in range(1, blocks):
            members.append(block(self.inplanes, planes, 1, None, *common, self.dilation, self._norm_layer))
        return Stage(*members)


def initialise(network: nn.Module) -> None:
    """He et al. 2015 ("Delving deep into rectifiers"), by fan-out, as torchvision does it; norms are the identity."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm) and module.weight is not None:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def _resnet(
    name: str, block: type[BasicBlock | Bottleneck], layers: Sequence[int], weights: Any, progress: bool, kwargs: dict[str, Any]
) -> ResNet:
    state = load_weights(name, weights, progress)
    if state is not None:
        classes = state["fc.weight"].shape[0]
        if kwargs.setdefault("num_classes", classes) != classes:
            raise ValueError(f"num_classes: expected {classes}, as in weights; got {kwargs['num_classes']}")
    model = ResNet(block, layers, **kwargs)
    if state is not None:
        model.load_state_dict(state)
    return model


def _builder(name: str, block: type[BasicBlock | Bottleneck], layers: Sequence[int], summary: str, **fixed: Any) -> Callable[..., ResNet]:
    def build(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
        for key, value in fixed.items():
            if kwargs.setdefault(key, value) != value:
                raise ValueError(f"{key}: expected {value} for {name}; got {kwargs[key]}")
        return _resnet(name, block, layers, weights, progress, kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{summary}

    weights: None, the path of a state_dict, or a name or member of torchvision's weights, where torchvision is installed.
    progress: whether a download shows its progress. kwargs: the arguments of `ResNet`.
    """
    return build


resnet18 = _builder("resnet18", BasicBlock, (2, 2, 2, 2), "ResNet-18.")
resnet34 = _builder("resnet34", BasicBlock, (3, 4, 6, 3), "ResNet-34.")
resnet50 = _builder("resnet50", Bottleneck, (3, 4, 6, 3), "ResNet-50.")
resnet101 = _builder("resnet101", Bottleneck, (3, 4, 23, 3), "ResNet-101.")
resnet152 = _builder("resnet152", Bottleneck, (3, 8, 36, 3), "ResNet-152.")
resnext50_32x4d = _builder("resnext50_32x4d", Bottleneck, (3, 4, 6, 3), "ResNeXt-50, 32×4d.", groups=32, width_per_group=4)
resnext101_32x8d = _builder("resnext101_32x8d", Bottleneck, (3, 4, 23, 3), "ResNeXt-101, 32×8d.", groups=32, width_per_group=8)
resnext101_64x4d = _builder("resnext101_64x4d", Bottleneck, (3, 4, 23, 3), "ResNeXt-101, 64×4d.", groups=64, width_per_group=4)
wide_resnet50_2 = _builder("wide_resnet50_2", Bottleneck, (3, 4, 6, 3), "Wide ResNet-50-2.", width_per_group=128)
wide_resnet101_2 = _builder("wide_resnet101_2", Bottleneck, (3, 4, 23, 3), "Wide ResNet-101-2.", width_per_group=128)
plain18 = _builder("plain18", PlainBlock, (2, 2, 2, 2), "The plain 18-layer network: ResNet-18 without shortcuts.")
plain34 = _builder("plain34", PlainBlock, (3, 4, 6, 3), "The plain 34-layer network: ResNet-34 without shortcuts.")
