"""The bytes and launches of a whole training step, counted from what the operators launch, against the designs that were counted by hand."""

import pytest
import torch

import fused_resnet
from fused_resnet import models, roofline
from fused_resnet.bench import traffic

BATCH = 256
#: MB an image of ResNet-50 at 224², 2 bytes, batch 256, by an independent script: one pass each; and everything fused but the stem's pool.
INDEPENDENT = {"passes_triton": 332.44, "triton": 234.99}
DESIGN = {"passes_triton": "passes", "triton": "triton"}


@pytest.fixture(scope="module", params=DESIGN)
def step(request):
    """(backend, launches of ResNet-50)"""
    return request.param, resnet50(request.param).moved


def resnet50(backend: str, recompute: bool = False) -> traffic.Traffic:
    shape = (BATCH, 3, 224, 224)
    return traffic.training_step(lambda: fused_resnet.recompute(models.resnet50(), recompute), shape, torch.bfloat16, backend)


def test_executed_bytes_are_those_of_the_design(step):
    name, moved = step
    total = sum(m.bytes for m in moved) / BATCH / 1e6
    kernels = roofline.training_step(roofline.resnet("resnet50", BATCH), roofline.DESIGNS[DESIGN[name]])
    assert total == pytest.approx(roofline.total_bytes(kernels) / BATCH / 1e6, rel=0.01)
    assert total == pytest.approx(INDEPENDENT[name], rel=0.03)


def test_partial_results_are_few_and_apart(step):
    """Some 10 MB an image, a third of it splits of gradients of weights, without which multiprocessors would be idle."""
    name, moved = step
    workspace = sum(m.workspace for m in moved) / BATCH / 1e6
    assert 0 < workspace < {"passes_triton": 0.5, "triton": 11}[name]
    _, vectors, partial = traffic.by_name(moved)["merge_moments_kernel"]
    assert 0 < vectors < partial


def test_launches_are_fewer_than_eagers(step):
    """Eager's 508 are of whole tensors, without its vectors, as ours are; of ours also what merges partial results."""
    name, moved = step
    eager = len(roofline.training_step(roofline.resnet("resnet50", BATCH), roofline.DESIGNS["eager"]))
    finalise = sum("finalise" in m.name or "merge" in m.name for m in moved)
    most = len(roofline.training_step(roofline.resnet("resnet50", BATCH), roofline.DESIGNS[DESIGN[name]]))
    assert len(moved) - finalise <= most + 4 < eager  # passes: dy of each projection is a pass of its own
    assert len(moved) < eager
    convolutions = sum(row[0] for kernel, row in traffic.by_name(moved).items() if "conv" in kernel)
    assert convolutions == 53 + 52 + 53


def test_a_kernel_that_moves_more_is_seen(monkeypatch):
    """The planted fault: dgrad's prologue is given up, so that a pass makes dy."""
    monkeypatch.setattr("fused_resnet.backends.convolutions.pays_to_apply_norm", lambda problem: False)
    worse = traffic.training_step(lambda: models.resnet50(), (8, 3, 224, 224), torch.bfloat16, "triton").moved
    fine = roofline.total_bytes(roofline.training_step(roofline.resnet("resnet50", 8), roofline.DESIGNS["triton"]))
    assert sum(m.bytes for m in worse) > 1.02 * fine


@pytest.mark.parametrize("name", DESIGN)
def test_recomputation_saves_and_costs_what_the_design_says(name):
    """Held between forward and backward: to the byte. Moved and launched beyond the step without it: what the inside of the blocks takes."""
    network = roofline.resnet("resnet50", BATCH)
    pooled = (
        2 * BATCH * network.features
    )  # the average pool's output, which the classifier keeps; the roofline counts convolutions' tensors
    plain, again = resnet50(name), resnet50(name, recompute=True)
    designs = [roofline.DESIGNS[DESIGN[name] + suffix] for suffix in ("", ", recompute")]
    assert [t.saved - pooled for t in (plain, again)] == [roofline.saved_bytes(network, design) for design in designs]
    steps = [roofline.training_step(network, design) for design in designs]
    assert len(again.moved) - len(plain.moved) == len(steps[1]) - len(steps[0])
    moved = [sum(m.bytes for m in t.moved) for t in (plain, again)]
    assert moved[1] - moved[0] == pytest.approx(roofline.total_bytes(steps[1]) - roofline.total_bytes(steps[0]), rel=0.01)
    assert sum(m.workspace for m in again.moved) == sum(m.workspace for m in plain.moved), "no statistics are taken again"
