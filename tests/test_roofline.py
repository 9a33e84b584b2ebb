"""The floor's figures, written down, and the rules that they are counted by."""

import pytest
import torch
from support.checkout import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fused_resnet
from fused_resnet import roofline
from fused_resnet.roofline import (
    DEPTHS,
    DESIGNS,
    INFERENCE,
    Design,
    floor_seconds,
    inference_step,
    resnet,
    saved_bytes,
    saved_layers,
    total_bytes,
    total_flops,
    training_step,
)

BATCH = 256
#: ResNet-50, 224², 2 bytes, batch 256: (MB per image, launches, images/s at 800 and at 500 TFLOP/s with 3.0 TB/s, and with 4.3 at
#: 500). An independent script counted them; `passes`, which it does not have, is counted by hand in a test below.
FIGURES = {
    "eager": (475.9, 508, 5981, 5585, 7330),
    "onepass": (332.4, 365, 8377, 7620, 9704),
    "+stats": (79.41e3 / BATCH, 312, 8932, 8076, None),
    "+pro": (76.05e3 / BATCH, 280, 9295, 8372, None),
    "+red": (264.6, 233, 10409, 9351, 11679),
    "+app": (63.23e3 / BATCH, 185, 11268, 10190, None),
    "+stemf": (60.35e3 / BATCH, 182, 11765, 10594, None),
    "+tail": (234.6, 181, 11811, 10621, 13265),
    "+fold": (223.7, 166, 12359, 11124, 13907),
}
PAPER_MULTIPLY_ADDS = {"resnet18": 1.8e9, "resnet34": 3.6e9, "resnet50": 3.8e9, "resnet101": 7.6e9, "resnet152": 11.3e9}


@pytest.fixture(scope="module")
def resnet50():
    return resnet("resnet50", BATCH)


@pytest.mark.parametrize("name", FIGURES)
def test_resnet50s_figures(resnet50, name):
    megabytes, launches, at_800, at_500, at_500_h200 = FIGURES[name]
    kernels = training_step(resnet50, DESIGNS[name])
    assert len(kernels) == launches
    assert total_bytes(kernels) / BATCH / 1e6 == pytest.approx(megabytes, rel=5e-4)
    for flops_per_s, bytes_per_s, expected in ((8e14, 3e12, at_800), (5e14, 3e12, at_500), (5e14, 4.3e12, at_500_h200)):
        if expected:
            assert BATCH / floor_seconds(kernels, flops_per_s, bytes_per_s) == pytest.approx(expected, rel=5e-4)


def test_passes_is_onepass_with_what_the_convention_writes_and_one_pass_pools(resnet50):
    """The difference to `onepass`, by hand, in elements per image."""
    inner = sum(layer.conv.output_norm.elements for block in resnet50.blocks for layer in block.branch[:-1])
    stem, pool = 64 * 112 * 112, 64 * 56 * 56
    last = 2048 * 7 * 7
    written_dz = inner / BATCH
    # forward: the stem's activation is neither written nor read again. Backward: one pass reads y and writes dz, where max pool's
    # backward wrote d, and the reduction read it and y. The two gradients of the pool's output are added before, not while read.
    stem_difference = (1 - 3) * stem + (2 - 3) * stem + (3 + 1 - 2) * pool
    tail_difference = (2 - 4) * last  # the activation is neither written nor read again
    expected = 2 * (written_dz + stem_difference + tail_difference)
    passes, onepass = (total_bytes(training_step(resnet50, DESIGNS[name])) / BATCH for name in ("passes", "onepass"))
    assert passes - onepass == expected
    assert passes / 1e6 == pytest.approx(334.6, rel=5e-4)
    kernels = training_step(resnet50, DESIGNS["passes"])
    assert len(kernels) == 363
    assert BATCH / floor_seconds(kernels, 8e14, 3e12) == pytest.approx(8327, rel=5e-4)
    assert BATCH / floor_seconds(kernels, 5e14, 3e12) == pytest.approx(7578, rel=5e-4)


@pytest.mark.parametrize("name, megabytes", [("eager", 43.8), ("+tail", 34.5), ("+fold", 34.5), ("passes", 41.2),
                                             ("triton", 34.7), ("triton, recompute", 28.1), ("passes, recompute", 28.1)])  # fmt: skip
def test_saved_for_backward(resnet50, name, megabytes):
    assert saved_bytes(resnet50, DESIGNS[name]) / BATCH / 1e6 == pytest.approx(megabytes, abs=0.05)


def test_what_a_layer_saves(resnet50):
    """By hand, bytes of an image: raw outputs, the activation behind them where it is kept, a block's output with its mask."""
    narrow, wide = 2 * 64 * 56 * 56, 2 * 256 * 56 * 56
    stem, pool, images = 2 * 64 * 112 * 112, 2 * 64 * 56 * 56, 2 * 3 * 224 * 224
    expected = {
        "eager": (images + 2 * stem, pool + 8 * pool // 2, 2 * narrow, 2 * wide, wide),
        "passes": (images + stem, pool + pool // 2, 2 * narrow, 2 * wide + wide // 16, wide),
        "+fold": (images + stem, pool, narrow, 2 * wide + wide // 16, wide),
    }
    for name, figures in expected.items():
        saved = saved_layers(resnet50, DESIGNS[name])
        layers = ("conv1", "maxpool", "layer1.0.conv2", "layer1.0.conv3", "layer1.0.downsample.0")
        assert tuple(saved[layer] / BATCH for layer in layers) == figures
        last = 2 * 2048 * 7 * 7
        assert saved["layer4.2.conv3"] / BATCH == (2 * last if name == "eager" else last + last // 16)


@pytest.mark.parametrize("name", DEPTHS)
def test_each_step_of_fusion_moves_less(name):
    network = resnet(name, 32)
    totals = {design: total_bytes(training_step(network, DESIGNS[design])) for design in DESIGNS}
    order = ["eager", "onepass", "+stats", "+pro", "+red", "+app", "+stemf", "+tail", "+fold"]
    assert [totals[n] for n in order] == sorted((totals[n] for n in order), reverse=True)
    assert totals["+stats"] < totals["passes"] < totals["eager"]


@pytest.mark.parametrize("name", DEPTHS)
def test_every_design_computes_the_same(name):
    """Forward three times, less the gradient of the images that nobody asks for; and once more what is made again."""
    network = resnet(name, 8)
    expected = 3 * network.forward_flops - network.stem.conv.flops
    inner = sum(layer.conv.flops for block in network.blocks for layer in block.branch[:-1])
    for design in DESIGNS.values():
        assert total_flops(training_step(network, design)) == expected + inner * design.recompute


@pytest.mark.parametrize("name", PAPER_MULTIPLY_ADDS)
def test_flops_of_the_papers_table(name):
    """He et al. 2015, table 1, which strides in the first 1x1 and rounds to one place, not always to the nearest."""
    multiply_adds = resnet(name, 1, stride_first=True).forward_flops / 2
    assert multiply_adds == pytest.approx(PAPER_MULTIPLY_ADDS[name], abs=0.1e9)


def test_torchvisions_stride_placement():
    assert resnet("resnet50", 1).forward_flops / 2 == pytest.approx(4.1e9, rel=0.01)


@pytest.mark.parametrize("name", DEPTHS)
def test_layers_flops_and_parameters_are_the_models(name):
    """The description here against the modules: names, shapes, FLOPs as PyTorch counts them."""
    network = resnet(name, 2)
    with FakeTensorMode():  # shapes without numbers
        model = getattr(fused_resnet.models, name)()
        with FlopCounterMode(display=False) as counter, fused_resnet.backend("off"):
            model(torch.empty(2, 3, 224, 224))
    weights = {n.removesuffix(".weight"): p.shape for n, p in model.named_parameters() if p.dim() == 4}
    assert {layer.name: (c := layer.conv) and (c.k, c.c, c.r, c.s) for layer in network.layers} == weights
    assert network.parameters == sum(p.numel() for p in model.parameters())
    assert counter.get_total_flops() == network.forward_flops


def test_bytes_scale_with_batch_and_itemsize():
    """Activations do; what the weights cost does not depend on the batch."""
    design = DESIGNS["onepass"]
    one, two, four = (total_bytes(training_step(resnet("resnet18", n), design)) for n in (1, 2, 4))
    assert four - two == 2 * (two - one)
    narrow, wide = (total_bytes(training_step(resnet("resnet18", 64), design, itemsize)) for itemsize in (2, 4))
    assert 1.9 < wide / narrow < 2


def test_a_kernel_takes_the_longer_of_its_two_times():
    kernel = roofline.Kernel("conv1", "fprop", flops=600, bytes=10)
    assert kernel.seconds(100, 10) == 6
    assert kernel.seconds(1000, 10) == 1


def test_a_design_without_anything_is_onepass():
    assert DESIGNS["onepass"] == Design()


def test_unknown_network_is_named():
    with pytest.raises(ValueError, match="^name: unknown network 'resnet51'; expected one of resnet18"):
        resnet("resnet51", 1)


def test_the_table_of_the_documents_is_what_is_counted(resnet50):
    document = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = [[cell.strip(" *") for cell in line.split("|")[2:-1]] for line in document.splitlines() if line.count("|") == 7]
    figures = [row for row in rows if row[0].replace(".", "").isdecimal()]
    expected = []
    for design in DESIGNS.values():
        kernels, saved = training_step(resnet50, design), saved_bytes(resnet50, design)
        megabytes = [f"{bytes_ / BATCH / 1e6:.1f}" for bytes_ in (total_bytes(kernels), saved)]
        floors = [f"{BATCH / floor_seconds(kernels, rate, 3e12):,.0f}" for rate in (8e14, 5e14)]
        expected.append([megabytes[0], str(len(kernels)), megabytes[1], *floors])
    assert figures == expected


def test_inference_by_hand(resnet50):
    """MB of an image, of all outputs y by their extents; what the designs differ in, and what all of them move."""
    # Each stage's inner convolutions, last ones and projection, in values; a stage's first inner 1x1 is at the larger extent.
    inner, last, projections = 64 * 112**2, 0, 0
    for blocks, width, extent in ((3, 64, 56), (4, 128, 28), (6, 256, 14), (3, 512, 7)):
        before = extent if width == 64 else 2 * extent
        inner += width * (before**2 + (2 * blocks - 1) * extent**2)
        last += blocks * 4 * width * extent**2
        projections += 4 * width * extent**2
    moved = {design: total_bytes(inference_step(resnet50, design)) / BATCH / 2 for design in INFERENCE}
    assert moved["eager"] == moved["folded"], "a bias is added as a norm is applied"
    assert moved["passes"] - moved["epilogue"] == 2 * (inner + last + projections)  # written and read once more
    assert moved["folded"] - moved["passes"] == 2 * inner + 4 * last  # the ReLU; that and the addition
    assert moved["epilogue"] > inner + last + projections + last  # with each block's residual


@pytest.mark.parametrize("name", DEPTHS)
def test_every_design_of_inference_computes_the_forward(name):
    network = resnet(name, 8)
    for design in INFERENCE:
        kernels = inference_step(network, design)
        assert total_flops(kernels) == network.forward_flops
        assert sum(kernel.work == "fprop" for kernel in kernels) == len(network.layers) + 1
    assert len(inference_step(network, "epilogue")) == len(network.layers) + 3


def test_the_table_of_inference_in_the_documents_is_what_is_counted(resnet50):
    document = (ROOT / "docs" / "drop-in.md").read_text(encoding="utf-8")
    section = document.partition("\n## Inference")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.count("|") == 6]
    expected = []
    for design in INFERENCE:
        kernels = inference_step(resnet50, design)
        floors = [f"{BATCH / floor_seconds(kernels, rate, 3e12):,.0f}" for rate in (8e14, 5e14)]
        expected.append([design, f"{total_bytes(kernels) / BATCH / 1e6:.1f}", str(len(kernels)), *floors])
    assert [[row[0].partition(":")[0].strip("`"), *row[1:]] for row in rows[2:]] == expected
