"""`fused_resnet.recompute`: what a network keeps between forward and backward, and when it lets go of it."""

import copy
import gc

import pytest
import torch
from support.recomputed import WAYS, Alive, held, images, loss_of
from support.small import network

import fused_resnet
from fused_resnet.nn import recompute


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("backend, dtype", WAYS)
def test_what_is_saved_is_less_by_the_inside_of_the_branches(backend, dtype):
    """By hand, in values: what a block's convolutions hand on, and where a backend keeps it, the activation behind each.

    No more is held while the graph is kept after a backward, and nothing once the graph is gone, though nobody collects circles.
    """
    plain = network(dtype=dtype)
    again, x = fused_resnet.recompute(copy.deepcopy(plain)), images(dtype)
    pixels = {"layer1": 5 * 5, "layer2": 3 * 3, "layer3": 3 * 3}
    inside = 4 * sum(
        conv.out_channels * (pixels["layer1"] if (name, i) == ("layer2", 1) else pixels[name])
        for name in pixels
        for block in getattr(plain, name)
        for i, (conv, _) in enumerate(block.branch()[:-1], 1)
    )
    kinds = 1 if backend == "triton" else 2
    groups = 4 * 16 * 5 * 5 if backend == "triton" else 0  # the framework's convolution, of an activation that is kept
    expected = (kinds * inside + groups) * dtype.itemsize
    assert held(plain, x, backend)[0] - held(again, x, backend)[0] == expected
    if backend != "eager":  # the interpreter has circles of its own
        return
    gc.disable()
    try:
        with Alive(x, *again.parameters(), *again.buffers()) as alive:
            loss = loss_of(again, x, backend)
            before = alive.bytes()
            loss.backward(retain_graph=True)
            again.zero_grad()
            assert alive.bytes() == before > 0
            del loss
            assert alive.bytes() == 0
    finally:
        gc.enable()


def test_the_memory_test_sees_what_is_not_let_go_of(monkeypatch):
    """A value that outlives its last reader, and one that its maker holds in a circle."""
    again, x = fused_resnet.recompute(network()), images()

    def hold(self, keeper):
        return self.get()

    monkeypatch.setattr(recompute._Again, "handed_to", hold)
    with Alive(x, *again.parameters(), *again.buffers()) as alive:
        loss = loss_of(again, x, "eager")
        before = alive.bytes()
        loss.backward(retain_graph=True)
        again.zero_grad()
        assert alive.bytes() > before


def test_a_block_is_made_again_when_its_backward_comes_and_let_go_of_as_it_passes():
    """While the gradient of a block's first convolution is at hand, nothing of the blocks behind it is there."""
    again, x = fused_resnet.recompute(network()), images()
    alive = Alive(x, *again.parameters(), *again.buffers())
    seen, blocks = [], [block for stage in again.stages() for block in stage]
    values = []
    original = recompute._Again.get
    with pytest.MonkeyPatch.context() as patch, alive:
        patch.setattr(recompute._Again, "get", lambda self: values.append(self) or original(self))
        for block in blocks:
            block.conv1.weight.register_hook(lambda g: seen.append(sum(v._tensor is not None for v in set(values))))
        loss_of(again, x, "eager").backward()
    assert seen == [0] * len(blocks) and len(set(values)) == 14


@pytest.mark.parametrize("kept", ["conv3", "conv2", "bn3", "late", "fc"])
def test_frozen_parameters_cost_no_memory(kept):
    """What no node saves is not held for us: an activation four times as wide as what could be made of it."""
    plain = network()
    for name, p in plain.named_parameters():
        p.requires_grad_(kept in name or (kept == "late" and name.startswith(("layer3", "fc"))))
    again, x = fused_resnet.recompute(copy.deepcopy(plain)), images()
    assert held(again, x)[0] <= held(plain, x)[0]
    a, b = results_of_parameters(plain, x), results_of_parameters(again, x)
    assert all((p is None) == (q is None) and (p is None or torch.equal(p, q)) for p, q in zip(a, b, strict=True))


def results_of_parameters(model, x):
    """The gradients of parameters, where the images need none."""
    model.zero_grad()
    loss_of(model, x, "eager").backward()
    return [p.grad for p in model.parameters()]
