"""torchvision's residual networks, fused: the same numbers, the same keys, the same features."""

import copy

import pytest
import torch
from support.swapped import assert_same_step, fused_copy, fused_rows, run, shake, unfused, why_not
from torch import nn

import fused_resnet

BUILDERS = [
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
]  # fmt: skip


@pytest.fixture
def cropped(torchvision_models, monkeypatch):
    """torchvision.models, whose residual networks have at most two blocks a stage and are otherwise what their builders ask for."""
    resnet = torchvision_models.resnet

    def build(block, layers, weights, progress, **kwargs):
        return shake(resnet.ResNet(block, [2 if layers[0] > 2 else layers[0], 1, 1, 1], **kwargs))

    monkeypatch.setattr(resnet, "_resnet", build)
    return torchvision_models


@pytest.fixture
def images():
    return torch.randn(4, 3, 48, 40, dtype=torch.float64)


@pytest.mark.parametrize("name", BUILDERS)
def test_every_builder(name, cropped, images):
    """Forward, backward, statistics; eval mode; strict checkpoints both ways; nothing but classes has changed."""
    plain = getattr(cropped, name)(num_classes=5).double()
    fused = copy.deepcopy(plain)
    before = [*fused.parameters(), *fused.buffers(), *fused.modules()]
    assert fused_resnet.fuse(fused) is fused
    assert all(a is b for a, b in zip(before, [*fused.parameters(), *fused.buffers(), *fused.modules()], strict=True))
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert why_not(fused) == {} and len(fused_rows(fused)) == 1 + sum(
        type(m).__name__.startswith("Fused") and hasattr(m, "bn2") for m in fused.modules()
    )
    assert_same_step(plain, fused, images)
    fused.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(fused.state_dict(), strict=True)
    plain.eval(), fused.eval()
    plain.zero_grad(), fused.zero_grad()
    assert_same_step(plain, fused, images)


def test_dilation_and_zero_init(cropped, images):
    plain = cropped.resnet50(num_classes=3, replace_stride_with_dilation=[False, True, True], zero_init_residual=True).double()
    fused = fused_copy(shake(plain))
    assert why_not(fused) == {}
    assert_same_step(plain, fused, images)


@pytest.mark.parametrize("norm", ["GroupNorm", "InstanceNorm2d"])
def test_another_norm_layer_stays_as_it_is(norm, cropped, images):
    make = {"GroupNorm": lambda c: nn.GroupNorm(2, c), "InstanceNorm2d": lambda c: nn.InstanceNorm2d(c, affine=True)}[norm]
    plain = cropped.resnet18(num_classes=3, norm_layer=make).double()
    fused = fused_copy(plain)
    assert fused_rows(fused) == [] and f"bn1 is {norm}" in why_not(fused)["layer1.0"]
    assert_same_step(plain, fused, images)


def test_features_by_name(cropped, images):
    """create_feature_extractor of a fused network: its blocks are nodes, and stay fused."""
    from torchvision.models.feature_extraction import create_feature_extractor

    plain = cropped.resnet50(num_classes=3).double()
    nodes = {"relu": "stem", "layer1": "a", "layer3": "b", "layer4.0": "c", "flatten": "d"}
    ours, theirs = (create_feature_extractor(model, nodes) for model in (fused_copy(plain), copy.deepcopy(plain)))
    assert set(fused_rows(ours)) == {"layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0"}
    assert_same_step(theirs, ours, images)


def test_features_from_inside_a_block(cropped, images):
    """A fused block is one node; unfused, it is looked into, and the others stay fused."""
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    plain, inside = cropped.resnet50(num_classes=3).double(), ["layer1.0.conv2", "layer1.0.bn3", "layer2"]
    fused = fused_copy(plain)
    assert "layer1.0" in get_graph_node_names(fused)[0]
    with pytest.raises(ValueError, match=r"node: 'layer1\.0\.conv2' is not present in model"):
        create_feature_extractor(fused, inside)
    fused_resnet.unfuse(fused.layer1[0])
    ours, theirs = create_feature_extractor(fused, inside), create_feature_extractor(plain, inside)
    assert set(fused_rows(ours)) == {"layer1.1", "layer2.0"}
    assert_same_step(theirs, ours, images)


def test_a_network_that_was_traced_first_is_fused_by_its_structure(cropped, images):
    from torchvision.models.feature_extraction import create_feature_extractor

    plain = create_feature_extractor(cropped.resnet18(num_classes=3).double(), ["layer1", "layer2.0.bn2"])
    fused = fused_copy(plain)
    assert unfused(fused) == {}
    assert_same_step(plain, fused, images)


@pytest.mark.parametrize("trainable", [0, 3, 5])
def test_detection_backbone(trainable, cropped, images):
    """resnet_fpn_backbone: frozen batch norm, frozen layers, IntermediateLayerGetter."""
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    plain = shake(resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=trainable)).double()
    fused = fused_copy(plain)
    assert {"body", "body.layer1.0", "body.layer4.0"} <= set(fused_rows(fused)) and why_not(fused) == {}
    assert_same_step(plain, fused, images)
    assert sum(p.grad is None for p in fused.body.parameters()) > 0 or trainable == 5


@pytest.mark.parametrize("training", [True, False])
def test_detection_heads_without_a_proposal(training, torchvision_models):
    """Version 2's have convolutions with norms, which then see an empty batch."""
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

    heads = (
        FastRCNNConvFCHead((8, 7, 7), [8, 8], [16], norm_layer=nn.BatchNorm2d),
        MaskRCNNHeads(8, [8, 8], 1, norm_layer=nn.BatchNorm2d),
    )
    for head in heads:
        plain = shake(head).double().train(training)
        fused, outs = fused_copy(plain), []
        assert unfused(fused) == {}
        for model, backend in ((plain, "off"), (fused, "eager")):
            x = torch.zeros(0, 8, 7, 7, dtype=torch.float64, requires_grad=True)
            with fused_resnet.backend(backend):
                outs.append(model(x))
            outs[-1].sum().backward()
            assert x.grad.shape == x.shape
        assert outs[0].shape == outs[1].shape and outs[0].shape[0] == 0
        assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), fused.buffers(), strict=True))


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet101"])
def test_segmentation(name, cropped, images):
    """Dilated backbone and head, with the auxiliary output."""
    plain = shake(getattr(cropped.segmentation, name)(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)).double()
    for module in plain.modules():
        if isinstance(module, nn.Dropout):  # draws in the order of memory, which differs
            module.p = 0.0
    fused = fused_copy(plain)
    assert {"", "backbone", "backbone.layer4.0"} <= set(fused_rows(fused))
    assert unfused(fused) == dict.fromkeys(("classifier.4", "aux_classifier.4"), "no batch norm follows it")
    assert_same_step(plain, fused, images)


def test_layer_getter_gives_what_is_asked_for_in_order(cropped, images):
    from torchvision.models._utils import IntermediateLayerGetter

    plain = IntermediateLayerGetter(cropped.resnet18().double(), {"maxpool": "p", "layer2": "q"})
    fused = fused_copy(plain)
    assert_same_step(plain, fused, images)
    with fused_resnet.backend("eager"):
        assert list(fused(images)) == ["p", "q"]


def test_float32_in_tritons_interpreter(torchvision_models, device):
    """The kernels themselves, on torchvision's blocks behind a stem: tiny, with every operator of a network."""
    block = torchvision_models.resnet.BasicBlock
    projection = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    stem = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)]
    plain = shake(nn.Sequential(*stem, block(8, 8), block(8, 16, 2, projection), *head)).to(device)
    fused, truth = fused_copy(plain), copy.deepcopy(plain).double()
    x = torch.randn(4, 3, 10, 12, device=device)
    expected, eager, ours = run(truth, x.double(), "off"), run(plain, x, "off"), run(fused, x, "passes_triton")
    for name, value in expected.items():
        if value.dtype == torch.float64:
            error, eagers = ((found[name] - value).norm() / value.norm().clamp_min(1e-6) for found in (ours, eager))
            assert error <= max(2 * eagers, 2e-5), (name, error, eagers)
