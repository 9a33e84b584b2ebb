"""`fuse`, `unfuse`, `report`: what they promise of any network."""

import copy
import functools
import io
import pickle

import pytest
import torch
from support.chains import RUNNABLE
from support.swapped import assert_same_step, fused_copy, fused_rows, run, shake, unfused, why_not
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fused_resnet
from fused_resnet import BasicBlock, Bottleneck, ConvBNAct2d, PreActBlock

torchvision = pytest.importorskip("torchvision")


@pytest.fixture
def resnet(torchvision_models):
    """A small network of torchvision's class, in float64."""
    from torchvision.models.resnet import BasicBlock as Block
    from torchvision.models.resnet import ResNet

    return shake(ResNet(Block, [2, 1, 1, 1], num_classes=4)).double()


@pytest.fixture
def images():
    return torch.randn(4, 3, 40, 36, dtype=torch.float64)


def test_unfuse_restores_every_class(resnet, images):
    classes = [type(m) for m in resnet.modules()]
    expected = copy.deepcopy(resnet)
    fused_resnet.fuse(resnet)
    assert [type(m) for m in resnet.modules()] != classes
    assert fused_resnet.unfuse(resnet) is resnet
    assert [type(m) for m in resnet.modules()] == classes
    with fused_resnet.backend("eager"):
        assert torch.equal(resnet(images), expected(images))


def test_fuse_is_idempotent_and_touches_one_instance(resnet):
    other = copy.deepcopy(resnet)
    classes = [type(m) for m in fused_resnet.fuse(resnet).modules()]
    assert [type(m) for m in fused_resnet.fuse(resnet).modules()] == classes
    assert isinstance(resnet, type(other)) and not any("Fused" in type(m).__name__ for m in other.modules())
    assert "Fused" not in type(other.layer1[0]).forward.__qualname__


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_fused_model_is_copied_fused(how, resnet, images):
    fused = fused_resnet.fuse(copy.deepcopy(resnet))
    if how == "deepcopy":
        twin = copy.deepcopy(fused)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(fused))
    else:
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert [type(m) for m in twin.modules()] == [type(m) for m in fused.modules()]
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(twin.parameters(), fused.parameters(), strict=True))
    assert_same_step(resnet, twin, images)


WATCHED = [
    "layer1.0",
    "layer1.0.conv1",
    "layer1.1.bn2",
    "layer2.0.relu",
    "layer2.0.downsample",
    "layer2.0.downsample.0",
    "layer3",
    "conv1",
    "maxpool",
    "avgpool",
]


@pytest.mark.parametrize("path", WATCHED)
def test_a_hook_is_called_and_its_block_alone_falls_back_while_it_is_there(path, resnet, images):
    fused = fused_copy(resnet)
    everything, seen = fused_rows(fused), []
    handle = fused.get_submodule(path).register_forward_hook(lambda m, args, out: seen.append((*args, out)))
    block = ".".join(path.split(".")[:2])
    inner = path.count(".") > 1
    stem = path == "conv1"
    assert fused_rows(fused) == [row for row in everything if not (inner and row == block) and not (stem and row == "")]
    if inner:
        assert "has a hook" in why_not(fused)[block]
    assert_same_step(resnet, fused, images)
    assert len(seen) == (2 if path.endswith("relu") else 1) and all(isinstance(t, torch.Tensor) for call in seen for t in call)
    handle.remove()
    assert fused_rows(fused) == everything


def test_a_stem_that_was_watched_when_fuse_was_called_is_fused_later():
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).double()
    handle = stem[0].register_forward_hook(lambda *_: None)
    fused_resnet.fuse(stem)
    assert why_not(stem) == {"": "a member has a hook"}
    handle.remove()
    assert fused_rows(stem) == [""]


def test_a_sequence_that_can_not_be_fused_says_why(images):
    conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
    plain = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    fused = fused_copy(plain)
    assert unfused(fused) == {"0": "it pads reflect, not with zeros by numbers"}
    with fused_resnet.backend("eager"):
        assert "0 of 1 convolutions fused" in str(fused_resnet.report(fused))
    assert_same_step(plain, fused, images)


def test_backward_hooks_and_pre_hooks_too(resnet, images):
    for register in ("register_full_backward_hook", "register_forward_pre_hook", "register_full_backward_pre_hook"):
        fused, calls = fused_copy(resnet), []
        relu = fused.layer1[0].conv2
        getattr(relu, register)(lambda *args, calls=calls: calls.append(len(args)) and None)
        assert "conv2 has a hook" in why_not(fused)["layer1.0"]
        assert_same_step(copy.deepcopy(resnet), fused, images)
        assert len(calls) == 1, register


class Changed(nn.Module):
    """A user's own network: our modules, a Sequential of PyTorch's, and a layer of another kind between."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        self.layer = ConvBNAct2d(8, 16, 3)
        self.blocks = nn.Sequential(
            BasicBlock(16, 16), nn.Dropout(0.0), PreActBlock(16, 16), PreActBlock(16, 32, stride=2),
            Bottleneck(32, 8), ConvBNAct2d(32, 24, 5, stride=2, groups=2),
        )  # fmt: skip
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3))

    def forward(self, x):
        return self.head(self.blocks(self.layer(self.stem(x))))


def test_a_network_of_ones_own(images):
    plain = shake(Changed()).double()
    fused = fused_copy(plain)
    assert fused_rows(fused) == ["", "layer", "blocks.0", "blocks.2", "blocks.3", "blocks.4", "blocks.5"] and unfused(fused) == {}
    assert_same_step(plain, fused, images)
    plain.eval(), fused.eval(), plain.zero_grad(), fused.zero_grad()
    assert_same_step(plain, fused, images)


@pytest.mark.parametrize("backend", [b for b in RUNNABLE if b not in ("triton", "tuned_triton", "tuned_cuda")])
def test_the_new_blocks_by_each_backend(backend, device):
    plain = shake(nn.Sequential(ConvBNAct2d(3, 8), PreActBlock(8, 8), PreActBlock(8, 16, 2))).to(device)
    x = torch.randn(2, 3, 9, 7, device=device)
    expected, eager = run(copy.deepcopy(plain).double(), x.double(), "off"), run(copy.deepcopy(plain), x, "off")
    ours = run(copy.deepcopy(plain), x, backend)
    for name, value in expected.items():
        if value is not None and value.dtype == torch.float64:
            scale = value.norm().clamp_min(1e-6)
            error, eagers = ((found[name] - value).norm() / scale for found in (ours, eager))
            assert error <= max(2 * eagers, 3e-5), (name, error, eagers)


def test_a_subclass_with_its_own_forward_is_followed(resnet, images):
    from torchvision.models.resnet import BasicBlock as Block

    class Halved(Block):
        def forward(self, x):
            return super().forward(x) * 0.5

    resnet.layer2[0].__class__ = Halved
    fused = fused_copy(resnet)
    assert isinstance(fused.layer2[0], Halved) and why_not(fused) == unfused(fused) == {}
    assert_same_step(resnet, fused, images)


class Greeting(torchvision.models.resnet.ResNet):
    """Somebody's subclass, which adds a method and keeps the forward."""

    def hello(self):
        return "hello"


def test_a_subclass_that_keeps_the_forward_is_fused_and_pickled(resnet, images):
    model = copy.deepcopy(resnet)
    model.__class__ = Greeting
    fused = fused_resnet.fuse(model)
    assert isinstance(fused, Greeting) and type(fused) is not Greeting and fused.hello() == "hello"
    assert_same_step(resnet, pickle.loads(pickle.dumps(fused)), images)


def test_on_a_cpu_the_network_runs_its_own_forward(resnet, images):
    fused = fused_copy(resnet)
    assert torch.equal(fused(images), resnet(images))
    rows = fused_resnet.report(fused).rows
    assert all(not row.fused and row.implementation == "off" for row in rows)


def test_a_report_knows_of_a_forward_that_was_put_in_a_network(resnet, images):
    """By a script that leaves the stem's norm out, say. A wrapper that calls the class's own, as accelerate's, changes nothing."""
    fused = fused_copy(resnet)
    with fused_resnet.backend("eager"):
        expected = str(fused_resnet.report(fused))
        fused.forward = functools.wraps(fused.forward)(lambda *args, _forward=fused.forward: _forward(*args))
        assert str(fused_resnet.report(fused)) == expected
        fused.forward = lambda x: fused.layer4(fused.layer3(fused.layer2(fused.layer1(fused.relu(fused.conv1(x))))))
        assert fused(images).shape[1] == 512
        lines = str(fused_resnet.report(fused)).splitlines()
    assert why_not(fused) == {"": "another forward was put in place of its class's"}
    assert unfused(fused) == {"conv1": "another forward was put in place of its class's"} and lines[-1] == "13 of 14 convolutions fused"


def test_report_is_a_table(resnet):
    before = fused_resnet.report(resnet)
    assert all(row.reason == "fuse(model) was not called on it" for row in before.rows)
    with fused_resnet.backend("eager"):
        text = str(fused_resnet.report(fused_resnet.fuse(resnet)))
    lines = text.splitlines()
    assert lines[0].split() == ["module", "class", "fused", "by", "why", "not"] and lines[-1] == "14 of 14 convolutions fused"
    assert lines[2].split() == ["layer1.0", "BasicBlock", "yes", "eager"]


def test_a_parametrized_convolution_falls_back_and_a_biased_one_does_not(resnet, images):
    nn.utils.parametrizations.weight_norm(resnet.layer1[0].conv1)
    resnet.layer1[1].conv2 = nn.Conv2d(64, 64, 3, padding=1, dtype=torch.float64)
    fused = fused_copy(resnet)
    assert set(unfused(fused)) == {"layer1.0.conv1"} and "ParametrizedConv2d" in unfused(fused)["layer1.0.conv1"]
    assert_same_step(resnet, fused, images)


def layer(pool: nn.Module | None = None, **options) -> nn.Module:
    """Convolution, norm and ReLU, and a pool behind them."""
    conv = nn.Conv2d(3, 8, 3, **(dict(padding=1, bias=False) | options))
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), *([] if pool is None else [pool])).double()


NOT_FUSED = {"reflected": dict(padding_mode="reflect"), "padding by name": dict(padding="same")}
OTHER_POOLS = {
    "dilated": nn.MaxPool2d(3, 2, 1, dilation=2), "rounded up": nn.MaxPool2d(3, 2, ceil_mode=True), "oblong": nn.MaxPool2d((3, 2)),
    "of 17": nn.MaxPool2d(17, 1), "with indices": nn.MaxPool2d(2, return_indices=True), "to two rows": nn.AdaptiveAvgPool2d((2, 1)),
    "to a column": nn.AdaptiveAvgPool2d((None, 1)),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*NOT_FUSED, *OTHER_POOLS])
def test_what_the_operators_have_no_step_for_stays_pytorchs(kind, images):
    plain = layer(**NOT_FUSED[kind]) if kind in NOT_FUSED else layer(OTHER_POOLS[kind])
    fused = fused_copy(plain)
    assert fused_rows(fused) == ([""] if kind in OTHER_POOLS else [])
    assert_same_step(plain, fused, images)


class Halves(nn.Module):
    """Gives two tensors, and Sum takes them."""

    def forward(self, x):
        return x.chunk(2, dim=1)


class Sum(nn.Module):
    def forward(self, halves):
        return halves[0] + 2 * halves[1]


def test_modules_of_a_sequence_may_hand_on_anything(images):
    plain = shake(nn.Sequential(layer(), Halves(), Sum(), nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())).double()
    assert_same_step(plain, fused_copy(plain), images)


def test_images_of_any_layout(resnet, images):
    """Channels first or last, slices, a single image; anything but a float tensor meets the original's own error."""
    fused = fused_copy(resnet.eval())
    wide = torch.zeros(4, 6, 40, 72, dtype=torch.float64)
    wide[:, ::2, :, ::2] = images
    for x in (
        images,
        images.contiguous(memory_format=torch.channels_last),
        wide[:, ::2, :, ::2],
        images[1:2],
        images[:1].expand(3, -1, -1, -1),
    ):
        assert_same_step(resnet, fused, x)
        resnet.zero_grad(), fused.zero_grad()
    for wrong in (images.long(), images[0, 0, 0]):
        with fused_resnet.backend("off"), pytest.raises((RuntimeError, ValueError)) as expected:
            resnet(wrong)
        with fused_resnet.backend("eager"), pytest.raises(expected.type):
            fused(wrong)


def test_inference_mode(resnet, images):
    fused = fused_copy(resnet.eval())
    with torch.inference_mode(), fused_resnet.backend("eager"):
        torch.testing.assert_close(fused(images), resnet(images), rtol=1e-9, atol=1e-9)


def test_norms_may_be_exchanged_after_fuse(resnet, images):
    """By convert_sync_batchnorm, which puts new modules in place: what is fused stays so."""
    fused = fused_copy(resnet)
    rows = fused_rows(fused)
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    assert shared is fused and fused_rows(shared) == rows
    assert type(shared.layer1[0].bn1) is nn.SyncBatchNorm
    assert_same_step(resnet, shared, images)


def test_one_block_may_be_unfused(resnet, images):
    fused = fused_copy(resnet)
    rows = fused_rows(fused)
    fused_resnet.unfuse(fused.layer1[0])
    assert fused_rows(fused) == [row for row in rows if row != "layer1.0"]
    assert why_not(fused) == {"layer1.0": "fuse(model) was not called on it"}
    assert_same_step(resnet, fused, images)


def test_other_ways_to_differentiate_run_pytorchs_modules(resnet, images):
    """Forward mode and torch.func, which look into no autograd function of ours."""
    fused = fused_copy(resnet).eval()
    resnet.eval()

    def tangent(model):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(images, torch.ones_like(images))
            return torch.autograd.forward_ad.unpack_dual(model(dual)).tangent

    def functional(model):
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        return torch.func.grad(lambda p: torch.func.functional_call(model, p, (images,)).square().sum())(parameters)["conv1.weight"]

    for derivative in (tangent, functional):
        with fused_resnet.backend("eager"):
            found = derivative(fused)
        assert found.norm() > 0
        torch.testing.assert_close(found, derivative(resnet))


def test_double_backward_is_an_error_and_never_a_wrong_number(resnet, images):
    fused = fused_copy(resnet)
    x = images.requires_grad_()
    with fused_resnet.backend("eager"):
        (dx,) = torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dx.square().sum().backward()


def test_what_is_exported_has_no_operator_of_ours(resnet, images):
    fused = fused_copy(resnet.eval())
    with fused_resnet.backend("eager"):
        program = torch.export.export(fused, (images,))
    assert not any("fused_resnet" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(images), resnet(images))


def test_compiles_whole(resnet, images):
    """One graph for the first batch size and one for any other, and the same steps; the compiler's own kernels are not at stake."""
    torch._dynamo.reset()
    fused, counter = fused_copy(resnet), CompileCounterWithBackend("eager")
    fused.compile(backend=counter, fullgraph=True)
    for count in (4, 4, 3, 2):
        assert_same_step(resnet, fused, images[:count])
        resnet.zero_grad(), fused.zero_grad()
    assert counter.frame_count == 2
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fused_resnet.fuse(3), TypeError, "model: expected a torch.nn.Module; got int"),
        (lambda: fused_resnet.unfuse(None), TypeError, "model: expected a torch.nn.Module; got NoneType"),
        (lambda: fused_resnet.report([]), TypeError, "model: expected a torch.nn.Module; got list"),
        (lambda: fused_resnet.fuse(torch.jit.script(nn.ReLU())), TypeError, "TorchScript"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_nothing_to_fuse_is_said():
    with pytest.warns(UserWarning, match="nothing of Linear can be fused"):
        fused_resnet.fuse(nn.Linear(2, 2))


def test_a_class_put_over_a_fused_one_is_not_lost(resnet):
    fused = fused_copy(resnet)
    block = fused.layer1[0]
    block.__class__ = type("Sharded", (type(block),), {})
    with pytest.raises(TypeError, match=r"model: expected layer1\.0 to have the class that fuse gave it; got Sharded"):
        fused_resnet.unfuse(fused)
