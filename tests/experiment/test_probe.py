"""A look into a network sees what autograd computes, and changes nothing."""

import copy

import pytest
import torch
from support.trainings import CPU, one_thread, tiny_data
from torch import nn

from fused_resnet.experiment import degradation
from fused_resnet.experiment.probe import probe
from fused_resnet.models import get_model

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


class Apart(nn.Module):
    """A block's arithmetic, nothing in place, with every response at hand."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.seen = model, []

    def response(self, conv: nn.Module, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = norm(conv(x))
        y.retain_grad()
        self.seen.append(y)
        return y

    def forward(self, x):
        m = self.model
        x = self.response(m.conv1, m.bn1, x).relu()
        for stage in m.stages():
            for block in stage:
                inner = self.response(block.conv1, block.bn1, x).relu()
                out = self.response(block.conv2, block.bn2, inner)
                if block.shortcut:
                    out = out + (x if block.downsample is None else block.downsample(x))
                x = out.relu()
        return m.fc(m.avgpool(x).flatten(1))


@pytest.mark.parametrize("name", ["plain20", "resnet20"])
def test_a_probe_sees_what_autograd_computes_and_changes_nothing(name):
    model = get_model(name, num_classes=4, in_channels=1, width=4)
    images, labels = degradation.probed(tiny_data(), CPU)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = probe(model, images, labels)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    apart = Apart(copy.deepcopy(model).train())
    loss = nn.functional.cross_entropy(apart(images), labels)
    loss.backward()
    convs = [(key, m) for key, m in apart.model.named_modules() if isinstance(m, nn.Conv2d)]
    assert found.layers == [key for key, _ in convs] and len(convs) == 19
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    assert found.weights == pytest.approx([m.weight.grad.norm().item() for _, m in convs], rel=1e-3)
    assert found.outputs == pytest.approx([y.grad.norm().item() for y in apart.seen], rel=1e-3)
    assert found.responses == pytest.approx([y.std().item() for y in apart.seen], rel=1e-3)
    assert found.passed == found.outputs[0] / found.outputs[-1]


def test_a_projection_is_no_layer_of_the_depth():
    found = probe(get_model("resnet18", num_classes=4), torch.randn(4, 3, 32, 32), torch.arange(4))
    assert len(found.layers) == 17 and not any("downsample" in layer for layer in found.layers)
