"""Networks that are known by their structure alone: the same numbers, whatever changes afterwards, and what is left over says why."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.structures import DeepStem, Dense, Layer, OfLayers, PreUnit, Shuffle, Unit, Whole, conv
from support.swapped import assert_same_step, fused_copy, shake, unfused
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fused_resnet
from fused_resnet import models

#: name -> (network, the convolutions of it that no norm follows)
NETWORKS = {
    "plain blocks": (lambda: Whole(Unit(8, 8), Unit(8, 12, 2), Unit(12, 12, inplace=False), channels=12), ()),
    "layers": (lambda: Whole(OfLayers(8, 8), OfLayers(8, 12, 2), channels=12), ()),
    "attention": (lambda: Whole(OfLayers(8, 12, 2, attention=True), channels=12), ("blocks.0.layer.2.down", "blocks.0.layer.2.up")),
    "pre-activation": (lambda: Whole(PreUnit(8, 8), PreUnit(8, 12, 2), channels=12), ()),
    "dense": (lambda: Whole(Dense(8, 4), Dense(12, 4), channels=16), ()),
    "shuffled": (lambda: Whole(Shuffle(8), Shuffle(8), channels=8), ()),
    "other activations": (lambda: Whole(Layer(8, 8, act=nn.SiLU), Layer(8, 8, act=nn.LeakyReLU), channels=8), ()),
    "a bias": (lambda: Whole(Layer(8, 8, bias=True), Layer(8, 8, 1, act=None, bias=True), channels=8), ()),
}


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 24, dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
def test_structures_of_other_libraries(name, images):
    """A step in training and in eval mode, what is fused, and what is the same object still."""
    build, left = NETWORKS[name]
    plain = shake(build()).double()
    fused = copy.deepcopy(plain)
    before = [*fused.parameters(), *fused.buffers(), *fused.modules()]
    fused_resnet.fuse(fused)
    assert all(a is b for a, b in zip(before, [*fused.parameters(), *fused.buffers(), *fused.modules()], strict=True))
    assert unfused(fused) == dict.fromkeys(left, "no batch norm follows it")
    assert_same_step(plain, fused, images)
    plain.eval(), fused.eval(), plain.zero_grad(), fused.zero_grad()
    assert_same_step(plain, fused, images)
    fused.load_state_dict(plain.state_dict(), strict=True)
    classes = [type(m) for m in plain.modules()]
    assert [type(m) for m in fused_resnet.unfuse(fused).modules()] == classes and "_plans" not in vars(fused)


@pytest.mark.parametrize("name", NETWORKS)
def test_they_are_folded(name, images):
    """All norms behind a convolution are gone; what is before one stays."""
    model = shake(NETWORKS[name][0]()).double().eval()
    folded = fused_resnet.fold(model)
    norms = [m for m in folded.modules() if getattr(m, "running_mean", None) is not None]
    assert len(norms) == sum(isinstance(m, PreUnit | Dense) for m in model.modules())
    with torch.no_grad(), fused_resnet.backend("eager"):
        torch.testing.assert_close(folded(images), model(images), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(folded(images), model(images), rtol=1e-9, atol=1e-9)
    plain = fused_resnet.unfuse(folded)
    assert all(type(m).__module__.startswith(("torch.nn", "support.structures")) for m in plain.modules())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_fused_and_follows_itself(how, images):
    plain = shake(Whole(Unit(8, 12, 2), channels=12)).double()
    fused = fused_copy(plain)
    twin = copy.deepcopy(fused) if how == "deepcopy" else pickle.loads(pickle.dumps(fused))
    assert [type(m) for m in twin.modules()] == [type(m) for m in fused.modules()] and unfused(twin) == {}
    with torch.no_grad():
        fused.blocks[0].first.weight.zero_()
    assert_same_step(plain, twin, images)


def test_compiles_whole(images):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    plain = shake(Whole(Unit(8, 12, 2), channels=12)).double()
    fused, counter = fused_copy(plain), CompileCounterWithBackend("eager")
    fused.compile(backend=counter, fullgraph=True)
    assert_same_step(plain, fused, images)
    assert counter.frame_count == 1
    torch._dynamo.reset()


class Spelled(nn.Module):
    """Rows, a norm of a sum, and a sum, whose ReLUs are written in one of the ways that there are."""

    def __init__(self, relu):
        super().__init__()
        self.one, self.two, self.three = conv(3, 4), conv(4, 4), conv(4, 4)
        self.n1, self.n2, self.n3, self.n4 = (nn.BatchNorm2d(4) for _ in range(4))
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.n1(self.one(x)))
        x = self.relu(self.n2(self.two(x)) + x)
        return self.relu(self.n4(self.three(self.relu(self.n3(x)))))


RELUS = {
    "nn.ReLU": nn.ReLU(), "nn.ReLU in place": nn.ReLU(True), "torch.relu": torch.relu, "torch.relu_": torch.relu_, "a method": lambda x: x.relu(),
    "F.relu": F.relu, "F.relu in place": functools.partial(F.relu, inplace=True),
}  # fmt: skip


class Seen(TorchDispatchMode):
    """Keeps the names of the operators that it sees. `told`: whether it asks for this package's own."""

    def __init__(self, told: bool):
        super().__init__()
        self.sees_fused_operators, self.names = told, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", RELUS)
def test_a_relu_is_fused_however_it_is_written(name, images):
    """The same operators run for each."""
    found = []
    for relu in (RELUS["nn.ReLU"], RELUS[name]):
        plain, seen = shake(Spelled(relu)).double(), Seen(told=True)
        with fused_resnet.backend("eager"), seen:
            fused_copy(plain)(images)
        found.append([operator for operator in seen.names if operator.startswith("fused_resnet::") or "relu" in operator])
        assert_same_step(plain, fused_copy(plain), images)
    assert found[0] == found[1] and len(found[0]) > 4 and not any("aten" in operator for operator in found[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_tells_statistics_once(reentrant, images):
    """The second forward, in backward, tells the norms nothing, that of a sum among them."""
    plain = shake(Whole(Unit(8, 8), PreUnit(8, 12, 2), channels=12)).double()
    fused, x = fused_copy(plain), images.clone().requires_grad_()
    with fused_resnet.backend("eager"):
        checkpoint(fused, x, use_reentrant=reentrant).square().sum().backward()
    plain(images).square().sum().backward()
    for (name, a), b in zip((*fused.named_buffers(), *fused.named_parameters()), (*plain.buffers(), *plain.parameters()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)
        if a.requires_grad and "conv3.bias" not in name:  # a bias before a norm has no gradient but rounding
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-7, msg=name)


# ---- what changes after fuse ----------------------------------------------------------------------------------------------


class Switched(nn.Module):
    """A layer whose forward depends on attributes."""

    def __init__(self):
        super().__init__()
        self.body, self.norm = conv(3, 4), nn.BatchNorm2d(4)
        self.scale, self.steps = 1.0, ["relu"]

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        x = self.norm(self.body(x))
        if self.training:
            x = x * self.scale
        for step in self.steps:
            x = getattr(F, step)(x)
        return x + x if twice else x


def change(module: Switched, what: str) -> None:
    """Something that a user may do to a network at any time."""
    if what == "an attribute":
        module.scale = 3.0
    elif what == "a list":
        module.steps.append("silu")
    elif what == "eval mode":
        module.eval()
    elif what == "another convolution":
        module.body = nn.Conv2d(3, 4, 1, bias=False).double()
        torch.nn.init.ones_(module.body.weight)
    elif what == "another norm":
        module.norm = nn.GroupNorm(2, 4).double()
    elif what == "padding by name":
        module.body.padding = "same"
    elif what == "padding with what lies opposite":
        module.body.padding_mode = "circular"
        module.body._reversed_padding_repeated_twice = [1, 1, 1, 1]
    elif what == "a convolution's own arithmetic":
        module.body._conv_forward = lambda x, weight, bias: F.conv2d(x, 2 * weight, bias, padding=1)
    elif what == "a parametrization":
        nn.utils.parametrizations.weight_norm(module.body)
    elif what == "a hook":
        module.norm.register_forward_hook(lambda m, args, out: out + 1)


CHANGES = [
    "an attribute", "a list", "eval mode", "another convolution", "another norm", "padding by name", "padding with what lies opposite",
    "a convolution's own arithmetic", "a parametrization", "a hook",
]  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_after_fuse_is_seen(what, images):
    plain = shake(Switched()).double()
    fused = fused_copy(plain)
    assert_same_step(plain, fused, images)
    plain.zero_grad(), fused.zero_grad()
    change(plain, what), change(fused, what)
    assert_same_step(plain, fused, images)


@pytest.mark.parametrize("build, bare", [(lambda: PreUnit(3, 4, 2), ("conv2", "identity_conv")), (lambda: Dense(3, 4), ("conv2",))])
def test_a_bias_that_a_convolution_without_a_norm_is_given_is_added(build, bare, images):
    plain = shake(build()).double()
    fused = fused_copy(plain)
    assert_same_step(plain, fused, images)
    plain.zero_grad(), fused.zero_grad()
    for model in (plain, fused):
        for name in bare:
            model.get_submodule(name).bias = nn.Parameter(torch.linspace(-1, 1, 4, dtype=torch.float64))
    assert_same_step(plain, fused, images)


def test_a_hook_is_called_and_the_row_is_whole_again_when_it_is_gone(images):
    plain = shake(Whole(Unit(8, 8), Unit(8, 8), channels=8)).double()
    fused, seen = fused_copy(plain), []
    handle = fused.blocks[1].first.register_forward_hook(lambda m, args, out: seen.append(out))
    assert unfused(fused) == {"blocks.1.first": "it has a hook, or is compiled by itself"}
    assert_same_step(plain, fused, images)
    assert len(seen) == 1 and isinstance(seen[0], Tensor)
    handle.remove()
    assert unfused(fused) == {}


def test_arguments_by_keyword_and_others_than_the_defaults(images):
    plain = shake(Switched()).double()
    fused = fused_copy(plain)
    with fused_resnet.backend("eager"), torch.no_grad():
        for arguments in (dict(x=images), dict(x=images, twice=False), dict(x=images, twice=True)):
            torch.testing.assert_close(fused(**arguments), plain(**arguments), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fused(images, True), plain(images, True), rtol=1e-9, atol=1e-9)
        for wrong in ((images, True, 3), ()):
            with pytest.raises(TypeError):
                fused(*wrong)


@pytest.mark.parametrize("when", ["before fuse", "after fuse"])
@pytest.mark.parametrize(
    "what", ["a block's forward", "nn.ReLU's forward", "nn.BatchNorm2d's call", "nn.Conv2d's arithmetic", "a call of one's own"]
)
def test_changes_on_a_class_are_noticed(what, when, images, monkeypatch, torchvision_models):
    from torchvision.models.resnet import BasicBlock, ResNet

    class Louder(BasicBlock):
        if what == "a call of one's own":

            def __call__(self, *args):
                return 2 * super().__call__(*args)

    plain = shake(ResNet(Louder, [1, 1, 1, 1], num_classes=3)).double()
    fused = fused_copy(plain) if when == "after fuse" else None
    if what == "a block's forward":
        monkeypatch.setattr(
            BasicBlock, "forward", lambda self, x: self.relu(self.bn1(self.conv1(x)) if self.downsample is None else self.downsample(x))
        )
    elif what == "nn.ReLU's forward":
        monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: F.leaky_relu(x, 0.3))
    elif what == "nn.BatchNorm2d's call":
        monkeypatch.setattr(nn.BatchNorm2d, "__call__", lambda self, x: 2 * nn.Module.__call__(self, x))
    elif what == "nn.Conv2d's arithmetic":
        monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, x, w, b: F.conv2d(x, w, b, self.stride, self.padding) + 1)
    fused = fused or fused_copy(plain)
    with fused_resnet.backend("off"):
        expected = plain(images)
    with fused_resnet.backend("eager"):
        torch.testing.assert_close(fused(images), expected, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            torch.testing.assert_close(fused_resnet.fold(plain.eval())(images), plain(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("whose", ["structure", "torchvision", "this package"])
def test_a_torch_function_mode_sees_pytorchs_calls(whose, images, torchvision_models):
    class Doubled(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            return 2 * out if function is F.batch_norm else out

    resnet = torchvision_models.resnet
    plain = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1]) if whose == "torchvision" else Whole(Unit(8, 8), channels=8)
    if whose == "this package":
        plain = nn.Sequential(models.ConvBNAct2d(3, 8), models.BasicBlock(8, 8))
    plain = shake(plain).double().eval()
    fused = fused_copy(plain)
    with fused_resnet.backend("off"), Doubled():
        expected = plain(images)
    with fused_resnet.backend("eager"), Doubled():
        torch.testing.assert_close(fused(images), expected)
    with fused_resnet.backend("eager"), torch.device("cpu"):  # a mode as well, which leaves calls as they are
        assert_same_step(plain, fused, images)


@pytest.mark.parametrize("told", [False, True])
def test_a_mode_that_counts_operators_of_aten_sees_them(images, told):
    seen = Seen(told)
    fused = fused_copy(shake(Whole(Unit(8, 8), channels=8)).double())
    with fused_resnet.backend("eager"), seen:
        fused(images).sum().backward()
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert seen.names.count("aten::native_batch_norm") == (0 if told else norms)
    assert any("fused_resnet::" in name for name in seen.names) == told


# ---- sequences with a forward of their own --------------------------------------------------------------------------------


class Halving(nn.Sequential):
    """A shortcut that does more than call its members."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class Backwards(nn.Sequential):
    """Calls its members last to first."""

    def forward(self, x: Tensor) -> Tensor:
        for member in reversed(list(self)):
            x = member(x)
        return x


def test_a_shortcut_with_a_forward_of_its_own_is_heeded(images):
    shortcut = Halving(conv(8, 8, 1), nn.BatchNorm2d(8))
    plain = shake(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), fused_resnet.BasicBlock(8, 8, downsample=shortcut))).double()
    fused = fused_copy(plain)
    assert unfused(fused) == {}
    assert_same_step(plain, fused, images)
    with torch.no_grad():
        torch.testing.assert_close(fused_resnet.fold(plain.eval())(images), plain(images), rtol=1e-9, atol=1e-9)


def test_neighbours_are_folded_only_where_they_call_each_other(images):
    plain = shake(Backwards(nn.BatchNorm2d(3), conv(3, 3), nn.BatchNorm2d(3))).double().eval()
    folded = fused_resnet.fold(plain)
    assert [type(m) for m in folded] == [nn.Identity, nn.Conv2d, nn.BatchNorm2d]
    with torch.no_grad():
        torch.testing.assert_close(folded(images), plain(images), rtol=1e-9, atol=1e-9)


def test_a_convolution_with_two_norms_and_a_norm_with_two_convolutions_are_not_folded(images):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.norm = conv(3, 4), conv(4, 4), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.two(F.relu(self.norm(self.one(x)))))

    plain = shake(Shared()).double()
    assert_same_step(plain, fused_copy(plain), images)
    folded = fused_resnet.fold(plain.eval())
    assert isinstance(folded.norm, nn.BatchNorm2d)
    with torch.no_grad():
        torch.testing.assert_close(folded(images), plain(images), rtol=1e-9, atol=1e-9)


# ---- report ---------------------------------------------------------------------------------------------------------------


def test_a_report_counts_convolutions(images):
    fused = fused_copy(NETWORKS["attention"][0]().double())
    with fused_resnet.backend("eager"):
        text = str(fused_resnet.report(fused))
    assert text.splitlines()[-1] == "7 of 9 convolutions fused"
    assert "not fused: blocks.0.layer.2.down, blocks.0.layer.2.up: no batch norm follows it" in text
    with fused_resnet.backend("off"):
        text = str(fused_resnet.report(fused))
    assert text.count("\n") == 0 and text.startswith("0 of 9 convolutions fused: the backend in force leaves tensors")


@pytest.mark.parametrize("whose", ["structure", "torchvision", "this package"])
def test_quantization_sees_every_convolution(whose, torchvision_models):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    resnet = torchvision_models.resnet
    theirs = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    plain, fused = theirs, models.ResNet(models.BasicBlock, [1, 1, 1, 1], num_classes=5)
    if whose == "structure":
        plain = Whole(Unit(8, 8), channels=8)
    if whose != "this package":
        fused = fused_copy(plain)
    x = torch.randn(1, 3, 16, 16)
    counts = []
    for model in (plain.eval(), fused.eval()):
        prepared = prepare_fx(model, get_default_qconfig_mapping(), x)
        counts.append(sum("Observer" in type(m).__name__ for m in prepared.modules()))
    assert counts[0] == counts[1] > 5


def test_what_nothing_fuses_keeps_its_layout(images):
    plain = nn.Sequential(fused_resnet.BasicBlock(3, 3, norm_layer=lambda c: nn.GroupNorm(1, c)), nn.Conv2d(3, 3, 1)).double()
    with fused_resnet.backend("eager"):
        assert fused_copy(plain)(images).is_contiguous() and fused_copy(DeepStem(4).double())(images).dim() == 4
