"""Every operator in a closed chain, forward, all gradients and running statistics, against float64 PyTorch.

The rule: at most twice the error of PyTorch's own eager in the same dtype, each against the float64 result on its own ReLU
masks; and masks differ from float64's only where the pre-activation is within rounding of zero.
"""

import pytest
import torch
from support.chains import CHAINS, Ours, PyTorch, Shape, run
from support.rule import PAIRS, SHAPES, errors, inputs, loss_weight, matched_truth, refused_of_draws

import fused_resnet

TINY = Shape(16, 10, 1, 1, 3)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("backend, dtype", PAIRS, ids=str)
@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: c.__name__)
def test_error_is_at_most_twice_eagers(chain, backend, dtype, training, device):
    for shape in [*SHAPES, *([TINY] if dtype == torch.float32 else [])] if training else SHAPES[:2]:
        with fused_resnet.backend(backend):
            assert not refused_of_draws(chain, shape, dtype, training, device), shape


@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: c.__name__)
def test_float64_agrees_to_rounding(chain, device):
    for shape in [*SHAPES, TINY]:
        layers, x, r = inputs(shape, device)
        weight = loss_weight(chain, layers, x, r)
        with fused_resnet.backend("eager"):
            ours = run(chain, Ours, layers, x, r, weight, torch.float64)
        truth = run(chain, PyTorch, layers, x, r, weight, torch.float64)
        assert max(errors(ours, truth).values()) < 1e-12


def wrong_signs(masks, truth) -> list[float]:
    """For each mask: the largest |pre-activation| in float64 whose sign the mask contradicts, over the largest of all."""
    worst = []
    for mask, z in zip(masks, truth.preactivations, strict=True):
        worst.append((torch.where(mask != (z > 0), z.abs(), 0.0).max() / z.abs().max()).item())
    return worst


@pytest.mark.parametrize("backend, dtype", PAIRS, ids=str)
@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: c.__name__)
def test_masks_differ_only_within_rounding_of_zero(chain, backend, dtype, device):
    for shape in SHAPES[:3]:
        layers, x, r = inputs(shape, device)
        weight = loss_weight(chain, layers, x, r)
        with fused_resnet.backend(backend):
            ours = run(chain, Ours, layers, x, r, weight, dtype)
        truth = matched_truth(chain, layers, x, r, weight, ours)
        bound = 16 * torch.finfo(dtype).eps  # roundings of two convolutions and two norms
        assert max(wrong_signs(ours.masks, truth), default=0.0) <= bound
        if not ours.masks:
            continue
        ours.masks[0][0].logical_not_()  # the planted fault: an image's mask is turned
        assert max(wrong_signs(ours.masks, truth)) > bound
