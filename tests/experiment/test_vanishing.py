"""Gradients of untrained networks by depth, with norms and shortcuts and without."""

import pytest
from support.trainings import CPU, one_thread, tiny_data
from torch import nn

from fused_resnet.data import load
from fused_resnet.experiment import vanishing

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


def test_without_a_norm_glorots_gradients_vanish_by_depth():
    """Each ReLU halves a square; with batch norm or from He's weights it does not."""
    chosen = [case for case in vanishing.cases([8, 20]) if not case.shortcut]
    found = {one.case: one.probe for one in vanishing.look(chosen, 1, load("fashion-mnist-mini", limit_train=64), CPU)}
    glorot = {case.depth: found[case].passed for case in chosen if case.init == "glorot" and not case.norm}
    # Of 18 layers behind the first one 0.7 each is left; twelve of them are what 20 has and 8 has not.
    assert glorot[20] / glorot[8] < 3 * 0.5**6
    for case in chosen:
        if case.norm or case.init == "he":
            assert found[case].passed > 0.02, case
    assert len(found) == 8


def test_networks_without_norms_have_none():
    data = tiny_data()
    for case in vanishing.cases([8]):
        model = vanishing.build(case, 1, data)
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        assert norms == (7 if case.norm else 0)
        assert model.layer1[0].shortcut == case.shortcut
        std = model.layer1[0].conv1.weight.std().item() * (16 * 9) ** 0.5
        assert std == pytest.approx(2**0.5 if case.init == "he" else 1.0, rel=0.1)
