"""Networks of other libraries: how many of the convolutions of a forward run fused after `fused_resnet.fuse`, and whether the numbers stay.

    python examples/count_fused.py --out counts.json                 # every library that is installed
    python examples/count_fused.py --library timm --library monai    # some
    python examples/count_fused.py --table before.json after.json    # the table of docs/drop-in.md

Each network has random weights. One step in float64 with the operators on ATen is compared with PyTorch's modules: output, gradients,
statistics.
"""

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet.backends import BACKENDS

Maker = Callable[[], nn.Module]


def torchvision() -> Iterator[tuple[str, Maker]]:
    from torchvision import models

    names = (
        "resnet18 resnet50 resnext50_32x4d wide_resnet50_2 regnet_x_400mf regnet_y_400mf densenet121 shufflenet_v2_x1_0 googlenet "
        "vgg11_bn mobilenet_v2 mnasnet1_0"
    )
    for name in names.split():
        extra = dict(aux_logits=False, init_weights=False) if name == "googlenet" else {}
        yield name, lambda name=name, extra=extra: getattr(models, name)(weights=None, **extra)
    for name in ("resnet18", "resnet50"):
        yield f"quantization.{name}", lambda name=name: getattr(models.quantization, name)(weights=None, quantize=False)
    yield "segmentation.deeplabv3_resnet50", lambda: models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None)


def timm() -> Iterator[tuple[str, Maker]]:
    import timm as library

    names = (
        "resnet18 resnet50 resnet50d resnext50_32x4d resnetv2_50 resnet50_clip regnetx_002 regnety_002 vovnet39a botnet26t_256 "
        "lambda_resnet26t cspresnet50 cspdarknet53 darknet53 seresnet50 ecaresnet26t skresnet18 resnest14d dla34 densenet121 resnetaa50 "
        "resnetblur50 res2net50_26w_4s repvgg_a0 hrnet_w18_small selecsls42 mobilenetv2_100 efficientnet_b0 xception41 inception_v3"
    )
    for name in names.split():
        yield name, lambda name=name: library.create_model(name)
    yield "resnet18, features", lambda: library.create_model("resnet18", features_only=True)
    yield "resnet50, features", lambda: library.create_model("resnet50", features_only=True)


def transformers() -> Iterator[tuple[str, Maker]]:
    from transformers import (
        RegNetConfig,
        RegNetModel,
        ResNetConfig,
        ResNetForImageClassification,
        RTDetrResNetBackbone,
        RTDetrResNetConfig,
    )

    kinds = (("basic", [2, 2, 2, 2]), ("bottleneck", [3, 4, 6, 3]))
    for kind, depths in kinds:
        options = dict(layer_type=kind, depths=depths, hidden_sizes=[64, 128, 256, 512])
        yield f"ResNet, {kind}", lambda options=options: ResNetForImageClassification(ResNetConfig(**options))
    for kind in "xy":
        yield f"RegNet {kind}", lambda kind=kind: RegNetModel(RegNetConfig(layer_type=kind))
    for kind, depths in kinds:
        options = dict(layer_type=kind, depths=depths, hidden_sizes=[64, 128, 256, 512] if kind == "basic" else [256, 512, 1024, 2048])
        yield f"RT-DETR's backbone, {kind}", lambda options=options: RTDetrResNetBackbone(RTDetrResNetConfig(**options))


def open_clip() -> Iterator[tuple[str, Maker]]:
    from open_clip.modified_resnet import ModifiedResNet

    yield "ModifiedResNet RN50", lambda: ModifiedResNet((3, 4, 6, 3), 1024, 32, image_size=64)


def pytorchcv() -> Iterator[tuple[str, Maker]]:
    from pytorchcv.model_provider import get_model

    names = (
        "resnet18 resnet50 preresnet18 preresnet50 resnetd50b wrn50_2 resnet20_cifar10 preresnet20_cifar10 resneta10 seresnet18 senet16 "
        "densenet121 darknet53 bn_vgg11b"
    )

    def make(name: str) -> nn.Module:
        model = get_model(name)
        if hasattr(model.features, "final_pool"):  # of 7×7: so that small images fit
            model.features.final_pool = nn.AdaptiveAvgPool2d(1)
        return model

    for name in names.split():
        yield name, lambda name=name: make(name)


def fastai() -> Iterator[tuple[str, Maker]]:
    from fastai.vision.models import xresnet

    for name in ("xresnet18", "xresnet50", "xse_resnet18"):
        yield name, lambda name=name: getattr(xresnet, name)()


def segmentation_models_pytorch() -> Iterator[tuple[str, Maker]]:
    import segmentation_models_pytorch as library

    for name in ("resnet18", "resnet50", "se_resnet50", "timm-regnetx_002", "densenet121"):
        yield f"Unet, {name}", lambda name=name: library.Unet(name, encoder_weights=None)
    yield "FPN, resnet50", lambda: library.FPN("resnet50", encoder_weights=None)


def monai() -> Iterator[tuple[str, Maker]]:
    from monai.networks import nets

    for name in ("resnet18", "resnet50"):
        yield name, lambda name=name: getattr(nets, name)(spatial_dims=2, n_input_channels=3)
    yield "SEResNet50", lambda: nets.SEResNet50(spatial_dims=2, in_channels=3)
    yield "DenseNet121", lambda: nets.DenseNet121(spatial_dims=2, in_channels=3, out_channels=5)


def torchreid() -> Iterator[tuple[str, Maker]]:
    from torchreid import models

    for name in ("resnet18", "resnet50", "resnet50mid", "osnet_x1_0", "se_resnet50"):
        yield name, lambda name=name: models.build_model(name, num_classes=5, pretrained=False)


def mmpretrain() -> Iterator[tuple[str, Maker]]:
    from mmpretrain.models import backbones

    yield "ResNet 18", lambda: backbones.ResNet(18)
    yield "ResNet 50", lambda: backbones.ResNet(50)
    yield "ResNetV1d 50", lambda: backbones.ResNetV1d(depth=50)
    yield "ResNeXt 50", lambda: backbones.ResNeXt(50)
    yield "SEResNet 50", lambda: backbones.SEResNet(50)
    yield "ResNet_CIFAR 18", lambda: backbones.ResNet_CIFAR(18)


def robustness() -> Iterator[tuple[str, Maker]]:
    # A module that newer releases of torchvision no longer have, and the library's other networks import.
    sys.modules.setdefault("torchvision.models.utils", torch.hub)
    from robustness.cifar_models import ResNet18, ResNet50
    from robustness.imagenet_models import resnet50

    yield "cifar ResNet18", ResNet18
    yield "cifar ResNet50", ResNet50
    yield "imagenet resnet50", lambda: resnet50()


def facenet_pytorch() -> Iterator[tuple[str, Maker]]:
    from facenet_pytorch import InceptionResnetV1

    yield "InceptionResnetV1", lambda: InceptionResnetV1(pretrained=None)


#: Height and width of what networks with this in their name are made for, where --size does not do.
SIZES = {"cifar": 32, "inception": 128, "bn_vgg": 224, "botnet": 256}

LIBRARIES = [
    torchvision, timm, transformers, open_clip, pytorchcv, fastai, segmentation_models_pytorch, monai, torchreid, mmpretrain, robustness,
    facenet_pytorch,
]  # fmt: skip


def tensors(value: object) -> list[Tensor]:
    """All tensors of an output, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors(item)] if isinstance(value, list | tuple) else []


def prepared(model: nn.Module) -> nn.Module:
    """In float64 and training, without draws; norms that are no identity."""
    model.double()
    model.train()
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model


def step(model: nn.Module, images: Tensor, backend: str) -> dict[str, Tensor]:
    """One step: outputs, gradients, buffers."""
    torch.manual_seed(1)
    with fused_resnet.backend(backend):
        outputs = tensors(model(images))
        torch.manual_seed(2)
        sum((t * torch.randn(t.shape).to(t)).sum() for t in outputs).backward()
    found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: b.detach().clone() for name, b in model.named_buffers()}


def forward(model: nn.Module, images: Tensor, backend: str) -> dict[str, Tensor]:
    """Outputs alone."""
    with fused_resnet.backend(backend), torch.no_grad():
        return {f"output {i}": t for i, t in enumerate(tensors(model(images)))}


def count(make: Maker, size: int, quick: bool) -> dict:
    """Convolutions that a forward calls, those of them that run fused, and the largest relative difference of a step."""
    model, step_of = prepared(make()), forward if quick else step
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    plain, called = copy.deepcopy(model), set()
    names = {id(m): name for name, m in plain.named_modules()}
    kinds = tuple(getattr(nn, f"Conv{kind}{n}d") for kind in ("", "Transpose") for n in (1, 2, 3))
    handles = [m.register_forward_hook(lambda m, *_: called.add(names[id(m)])) for m in plain.modules() if isinstance(m, kinds)]
    expected = step_of(plain, images, "off")
    for handle in handles:
        handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused = fused_resnet.fuse(model)
    weights = {m.weight.data_ptr(): name for name, m in fused.named_modules() if isinstance(m, kinds)}
    ran, eager = set(), BACKENDS["eager"]
    original = eager.convolve

    def convolve(source, convs, *rest):
        ran.update(weights.get(conv.weight.data_ptr(), "?") for conv in convs)
        return original(source, convs, *rest)

    eager.convolve = convolve
    try:
        found = step_of(fused, images, "eager")
    finally:
        del eager.convolve
    expected = {name: t for name, t in expected.items() if t.is_floating_point() and t.numel()}
    least = 1e-9 * max(t.norm().item() for t in expected.values())
    error = max(((found[name] - t).norm() / t.norm().clamp_min(least)).item() for name, t in expected.items())
    return {"fused": len(ran & called), "convolutions": len(called), "error": error, "left": sorted(called - ran)}


def report(args: argparse.Namespace) -> dict[str, dict]:
    """The counts of all networks that are asked for, printed as they come."""
    results = {}
    for library in LIBRARIES:
        if args.library and library.__name__ not in args.library:
            continue
        try:
            networks = list(library())
        except Exception as error:
            print(f"{library.__name__}: skipped, {type(error).__name__}: {error}", flush=True)
            continue
        for name, make in networks:
            if args.only and args.only not in name:
                continue
            try:
                result = count(make, next((size for part, size in SIZES.items() if part in name.lower()), args.size), args.quick)
            except Exception as error:
                print(f"{library.__name__:28} {name:32} failed, {type(error).__name__}: {error}", flush=True)
                continue
            results[f"{library.__name__}: {name}"] = result
            print(f"{library.__name__:28} {name:32} {result['fused']:4} of {result['convolutions']:4}   {result['error']:.0e}", flush=True)
            if args.left:
                print("    left:", " ".join(result["left"]))
    return results


def table(first: str, second: str) -> None:
    """Two files of counts as a table in Markdown."""
    with open(first, encoding="utf-8") as one, open(second, encoding="utf-8") as two:
        old, new = json.load(one), json.load(two)
    print("| library | network | convolutions | fused before | fused now | |\n|---|---|---|---|---|---|")
    for key, result in new.items():
        library, _, name = key.partition(": ")
        share = 100 * result["fused"] / result["convolutions"]
        before = old.get(key, {}).get("fused", "–")
        print(f"| {library} | {name} | {result['convolutions']} | {before} | {result['fused']} | {share:.0f}% |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", action="append", metavar="NAME", help="one of " + ", ".join(f.__name__ for f in LIBRARIES))
    parser.add_argument("--only", metavar="TEXT", help="networks whose name holds this")
    parser.add_argument("--size", type=int, default=64, metavar="PIXELS", help="height and width of the images")
    parser.add_argument("--quick", action="store_true", help="compare outputs alone, without backward")
    parser.add_argument("--left", action="store_true", help="name the convolutions that did not run fused")
    parser.add_argument("--out", metavar="FILE", help="write the counts as JSON")
    parser.add_argument("--table", nargs=2, metavar=("BEFORE", "AFTER"), help="print a table of two such files")
    args = parser.parse_args()
    if args.table:
        table(*args.table)
        return
    results = report(args)
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
