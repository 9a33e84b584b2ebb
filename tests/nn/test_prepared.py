"""What is kept of a network between two steps: every change to its modules is seen, and the blocks of a stage are one node of autograd."""

import copy
from types import MethodType

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet import models
from fused_resnet.nn.prepared import prepared


def network() -> nn.Module:
    """A small one, in float64, whose norms are no identity."""
    torch.manual_seed(0)
    model = models.resnet20(num_classes=3).double()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)
    return model


def step(model: nn.Module, backend: str) -> list[torch.Tensor]:
    """The output, and all gradients, of one step."""
    x = torch.linspace(-1, 2, 4 * 3 * 16 * 16, dtype=torch.float64).sin().view(4, 3, 16, 16).requires_grad_()
    with fused_resnet.backend(backend):
        out = model(x)
        wanted = [p for p in model.parameters() if p.requires_grad]
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *wanted])]


def agree(model: nn.Module) -> None:
    """The operators do what PyTorch's modules do, and tell the norms the same."""
    twin = copy.deepcopy(model)
    for a, b in zip(step(model, "eager"), step(twin, "off"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_weights_that_autocast_casts_are_those_of_each_forward():
    """A cast weight is a tensor of its own: kept, it would have another step's values, and its parameter no gradient."""
    model, x = models.resnet20(num_classes=3), torch.randn(4, 3, 16, 16)

    def gradients(of: nn.Module) -> tuple[torch.Tensor, ...]:
        with fused_resnet.backend("eager"), torch.autocast("cpu", dtype=torch.bfloat16):
            out = of(x)
        return torch.autograd.grad(out.float().square().sum(), list(of.parameters()))

    for _ in range(3):
        nothing_kept = copy.deepcopy(model)
        assert all(map(torch.equal, gradients(model), gradients(nothing_kept)))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.2)


def nodes(model: nn.Module) -> int:
    """Nodes of autograd that hold convolutions."""
    with fused_resnet.backend("eager"):
        waiting, seen = [model(torch.randn(2, 3, 16, 16, dtype=torch.float64)).grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return sum(node.name() == "NodeBackward" for node in seen)


def strided(block: nn.Module) -> None:
    block.conv1.padding, block.conv1.dilation = (2, 2), (2, 2)


def exchanged(block: nn.Module) -> None:
    block.conv2.weight = nn.Parameter(block.conv2.weight.detach() * 2)


def written(block: nn.Module) -> None:
    block.bn1.weight.data = block.bn1.weight.data * 3


def with_bias(block: nn.Module) -> None:
    block.conv1.bias = nn.Parameter(torch.ones(block.conv1.out_channels, dtype=torch.float64))


def hooked(block: nn.Module) -> None:
    block.relu.register_forward_hook(lambda module, args, out: out * 2)


def with_other_hooks(block: nn.Module) -> None:
    block.bn2._forward_hooks = type(block.bn2._forward_hooks)()
    block.bn2.register_forward_hook(lambda module, args, out: out * 2)


CHANGES = {
    "padding and dilation": strided,
    "another weight": exchanged,
    "another weight in the old one": written,
    "a bias": with_bias,
    "a hook": hooked,
    "a hook in another dictionary": with_other_hooks,
    "another module": lambda block: setattr(block, "relu", nn.Hardtanh(0.0, 0.5)),
    "another member's class": lambda block: setattr(
        block.bn1, "__class__", type("Mine", (nn.BatchNorm2d,), {"forward": lambda self, x: nn.BatchNorm2d.forward(self, x) * 2})
    ),
    "another epsilon": lambda block: setattr(block.bn1, "eps", 0.5),
    "another momentum": lambda block: setattr(block.bn1, "momentum", 0.9),
    "running statistics": lambda block: block.bn1.eval(),
    "a frozen weight": lambda block: block.conv2.weight.requires_grad_(False),
    "no affine map": lambda block: setattr(block.bn1, "bias", None),
    "a forward of its own": lambda block: setattr(
        block.conv2, "forward", MethodType(lambda self, x: nn.Conv2d.forward(self, x) * 2, block.conv2)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_steps_is_seen(change):
    model = network()
    agree(model)
    before = step(model, "eager")[0]
    CHANGES[change](model.layer2[1])
    agree(model)
    if change not in ("a bias", "another momentum", "a frozen weight"):  # which change no output
        assert not torch.allclose(step(model, "eager")[0], before)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda block: setattr(block.conv1.weight, "data", block.conv1.weight.data[:, :3]), "x: expected 3 channels"),
        (lambda block: setattr(block.bn1.weight, "data", block.bn1.weight.data[:3]), r"gamma: expected shape \[32\]"),
        (lambda block: setattr(block.bn1.weight, "data", block.bn1.weight.data.int()), "gamma: expected a floating dtype"),
    ],
)
def test_a_parameter_that_was_spoiled_between_two_steps_is_an_error_by_name(spoil, words):
    model = network()
    step(model, "eager")
    with torch.no_grad():
        model.layer2[1].requires_grad_(False)
        spoil(model.layer2[1])
    with pytest.raises((ValueError, TypeError), match=words):
        step(model, "eager")


def test_what_is_known_of_a_block_is_kept_and_does_not_keep_the_block():
    block = network().layer2[1]
    assert prepared(block) is prepared(block)
    assert prepared(copy.deepcopy(block)) is not prepared(block)
    block.relu.inplace = not block.relu.inplace
    first = prepared(block)
    block.eval()
    assert prepared(block) is not first


def test_the_blocks_of_a_stage_are_one_node(monkeypatch):
    """A hook parts them. Where processes share the gradients, each block is a node, whose gradients travel while others are computed."""
    model = network()
    assert nodes(model) == 1 + 3 + 2  # the stem; three stages; a projection that is no convolution's begins a node by itself
    handle = model.layer1[1].register_forward_hook(lambda *_: None)
    assert nodes(model) == 1 + 3 + 2 + 2
    agree(model)
    handle.remove()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 1)
    assert nodes(model) == 1 + 9
    agree(model)


def test_gradients_through_a_stage_with_a_projection_and_a_frozen_beginning():
    """Bottlenecks whose first block projects; then nothing before the last block wants a gradient."""
    torch.manual_seed(0)
    model = models.resnet50(num_classes=3).double()
    stage = model.layer2
    x = torch.randn(4, 256, 12, 12, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    for frozen in (False, True):
        for parameter in stage[:3].parameters():
            parameter.requires_grad_(not frozen)
        found = []
        for backend in ("eager", "off"):
            twin, given = copy.deepcopy(stage), x.clone().requires_grad_(not frozen)
            with fused_resnet.backend(backend):
                out = twin(given)
                wanted = [given, *twin.parameters()] if not frozen else list(twin[3].parameters())
                found.append([out.detach(), *torch.autograd.grad(out.square().sum(), wanted)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
