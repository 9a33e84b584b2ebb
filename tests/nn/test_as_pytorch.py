"""Where PyTorch's modules give a number or an error, so do ours: odd parameters, batches, callers and derivatives."""

import copy

import pytest
import torch
from support.small import SIZE, assert_same, assert_same_state, network
from support.structures import Unit, Whole
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fused_resnet
from fused_resnet import BasicBlock, ConvBNAct2d, PreActBlock, ops
from fused_resnet.functional import conv_bn_act
from fused_resnet.nn import Stage


def conv_norm_relu(channels=4, **options) -> nn.Sequential:
    """A row that fuses."""
    conv = nn.Conv2d(3, channels, 3, padding=1, bias=False)
    return Stage(conv, nn.BatchNorm2d(channels, **options), nn.ReLU()).double()


def images(n=4, dtype=torch.float64):
    return torch.randn(n, 3, 8, 6, dtype=dtype)


def both(model: nn.Module) -> dict[str, nn.Module]:
    return {"eager": model, "off": copy.deepcopy(model)}


# ---- running statistics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
def test_half_statistics_are_blended_in_float32(momentum):
    """A batch variance above 65,504, whose blend half can hold."""
    found = {}
    for backend, model in both(conv_norm_relu(momentum=momentum).half()).items():
        with torch.no_grad():
            model[0].weight.fill_(1.0)
        model[1].running_var.fill_(20000.0), model[1].num_batches_tracked.fill_(9)
        x = torch.zeros(4, 3, 8, 6, dtype=torch.float16)
        x[::2] = 15.0  # sums of up to 27 · 15, and 0
        with fused_resnet.backend(backend):
            model(x * 2)
        found[backend] = model[1].running_var
    assert found["off"].isfinite().all() and found["eager"].isfinite().all()
    torch.testing.assert_close(found["eager"], found["off"], rtol=2e-3, atol=0)


class SharedByBranch(BasicBlock):
    """One norm for both convolutions."""

    def __init__(self, momentum):
        super().__init__(8, 8)
        self.bn1 = self.bn2 = nn.BatchNorm2d(8, momentum=momentum)


class SharedByShortcut(BasicBlock):
    """One norm for the branch's end and the projection; PyTorch tells it of the projection last."""

    def __init__(self, momentum):
        super().__init__(8, 8)
        self.bn2 = nn.BatchNorm2d(8, momentum=momentum)
        self.downsample = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), self.bn2)


def row_that_shares(momentum):
    norm = nn.BatchNorm2d(8, momentum=momentum)
    return Stage(
        ConvBNAct2d(8, 8, norm_layer=lambda c: norm),
        ConvBNAct2d(8, 8, norm_layer=lambda c: norm),
        ConvBNAct2d(8, 8, norm_layer=lambda c: norm),
    )


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("make", [SharedByBranch, SharedByShortcut, row_that_shares])
def test_a_norm_that_convolutions_share(make, momentum):
    models = both(make(momentum).double())
    for _ in range(3):
        x = torch.randn(3, 8, 5, 4, dtype=torch.float64) * 3 + 1
        for backend, model in models.items():
            with fused_resnet.backend(backend):
                model(x.clone()).square().sum().backward()
    assert_same_state(*models.values())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_norm_without_a_count(momentum):
    models = both(conv_norm_relu(momentum=momentum))
    x = images()
    for backend, model in models.items():
        model[1].num_batches_tracked = None
        with fused_resnet.backend(backend):
            model(x)
    assert_same_state(*models.values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_compiled_block_under_a_checkpoint_updates_statistics_once(reentrant):
    block = BasicBlock(8, 8).double()
    plain = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8, 6, 5, dtype=torch.float64, requires_grad=True)
    with fused_resnet.backend("eager"):
        checkpoint(compiled, x, use_reentrant=reentrant).square().sum().backward()
    plain(x.detach().clone().requires_grad_()).square().sum().backward()
    assert plain.bn1.num_batches_tracked == 1
    assert_same_state(block, plain)


# ---- parameters in odd places ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["attribute", "buffer", "weight too"])
def test_a_bias_that_is_no_parameter_is_added(where):
    """As FSDP, DataParallel's replicas and networks that make the weights of others hold it."""
    ours = network()
    leaves = {}
    models = both(ours)
    values = torch.randn(8, dtype=torch.float64)
    for backend, model in models.items():
        conv = model.conv1
        bias = leaves[backend] = values.clone().requires_grad_(where != "buffer")
        del conv._parameters["bias"]
        if where == "buffer":
            conv.register_buffer("bias", bias)
        else:
            conv.bias = bias
        if where == "weight too":
            weight = conv.weight
            del conv._parameters["weight"]
            conv.weight = weight * 2
    assert_same(*models.values(), steps=1)
    if where != "buffer":
        torch.testing.assert_close(leaves["eager"].grad, leaves["off"].grad, rtol=1e-6, atol=1e-8)


def test_numbers_for_stride_padding_and_dilation():
    models = both(network())
    for model in models.values():
        conv = model.conv1
        conv.stride, conv.padding, conv.dilation = 2, 3, (1,)
    assert_same(*models.values(), steps=1)


def test_a_stage_by_keyword():
    x = torch.randn(2, 16, 6, 5, dtype=torch.float64)
    models = both(network().layer2)
    outs = []
    for backend, model in models.items():
        with fused_resnet.backend(backend):
            outs.append(model(input=x))
    torch.testing.assert_close(*outs)


class Pooled(PreActBlock):
    """A projection behind a pool, as timm's resnetv2 "d" networks have it."""

    def __init__(self):
        super().__init__(8, 16, 2, nn.Conv2d(8, 16, 1, bias=False))
        self.pool = nn.AvgPool2d(2)

    def shortcut_modules(self):
        return self.pool, self.downsample

    def forward_modules(self, x):
        act = self.relu(self.bn1(x))
        return self.conv2(self.relu(self.bn2(self.conv1(act)))) + self.downsample(self.pool(act))


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_gradients_of_a_projection_behind_a_pool(dtype):
    """They have the weight's strides, or DistributedDataParallel warns and copies."""
    models = both(Pooled().float() if dtype else Pooled().double())
    x = torch.randn(3, 8, 6, 8, dtype=torch.float32 if dtype else torch.float64)
    for backend, model in models.items():
        with fused_resnet.backend(backend), torch.autocast("cpu", dtype, enabled=dtype is not None):
            model(x).float().square().sum().backward()
    assert all(p.grad.stride() == p.stride() for p in models["eager"].parameters())
    if dtype is None:
        assert_same_state(*models.values())


# ---- batches and images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
def test_an_empty_batch(mode):
    """As a detection head without a proposal meets it: empty results, gradients of zeros, a count that goes on."""
    models = both(network())
    for model in models.values():
        model.train(mode != "eval")
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and mode == "frozen":
                module.eval()
    for backend, model in models.items():
        x = torch.zeros((0, *SIZE[1:]), dtype=torch.float64, requires_grad=True)
        with fused_resnet.backend(backend):
            out = model(x)
        assert out.shape == (0, 5)
        out.sum().backward()
        assert x.grad.shape == x.shape
    assert_same_state(*models.values())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_empty_batch_through_layers_of_other_kinds(momentum):
    def layers():
        return Stage(conv_norm_relu(8, momentum=momentum), PreActBlock(8, 16, 2), PreActBlock(16, 16))

    models = both(layers().double())
    for backend, model in models.items():
        for n in (4, 0):
            torch.manual_seed(1)
            x = images(n).requires_grad_()
            with fused_resnet.backend(backend):
                out = model(x)
                assert conv_bn_act(x, torch.ones(2, 3, 1, 1).double(), None, None, None, None).shape == (n, 2, 8, 6)
            out.square().sum().backward()
    assert_same_state(*models.values())


WRONG_IMAGES = {
    "float64": lambda x: x.double(), "float16": lambda x: x.half(), "bfloat16": lambda x: x.bfloat16(),
    "NHWC": lambda x: x.permute(0, 2, 3, 1), "one image": lambda x: x[0], "grey": lambda x: x[:, :1],
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_IMAGES)
@pytest.mark.parametrize("what", ["row", "block", "preact"])
def test_wrong_images_are_pytorchs_error(what, kind):
    make = {"row": conv_norm_relu, "block": lambda: BasicBlock(3, 3), "preact": lambda: PreActBlock(3, 3)}[what]
    x, errors = WRONG_IMAGES[kind](images(dtype=torch.float32)), []
    for backend, model in both(make().float()).items():
        with fused_resnet.backend(backend), pytest.raises((RuntimeError, ValueError)) as error:
            model(x)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("what", ["torchvision", "structure"])
def test_images_of_another_dtype_than_a_fused_networks_without_a_head(what, dtype, torchvision_models):
    """Behind the last block nothing would notice."""
    resnet = torchvision_models.resnet
    plain = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1]) if what == "torchvision" else Whole(Unit(8, 8), channels=8)
    setattr(plain, "fc" if what == "torchvision" else "head", nn.Identity())
    fused, errors = fused_resnet.fuse(plain.to(dtype)), []
    for backend in ("eager", "off"):
        with fused_resnet.backend(backend), pytest.raises(RuntimeError) as error:
            fused(torch.randn(2, 3, 32, 32))
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_an_operators_error_about_channels_names_x():
    conv = ops.Conv(torch.zeros(4, 3, 1, 1), ops.Norm(None, None, None, None, True, 1e-5), ops.ConvGeometry.of(1, 0, 1, 1))
    with pytest.raises(ValueError, match=r"x: expected 3 channels, as weight \[4, 3, 1, 1\] reads with groups = 1; got 5"):
        ops.conv_stats(torch.zeros(2, 5, 4, 4).contiguous(memory_format=torch.channels_last), conv)


class Tagged(torch.Tensor):
    """A subclass with a tag that travels along, whose new_empty wants a tuple: as medical imaging has it."""

    @staticmethod
    def of(t, tag):
        out = t.as_subclass(Tagged)
        out.tag = tag
        return out

    def new_empty(self, size, dtype=None, device=None, requires_grad=False, **kwargs):
        return Tagged.of(self.as_subclass(torch.Tensor).new_empty(size=tuple(size), dtype=dtype, device=device, **kwargs), None)


def test_a_tensor_subclass_with_a_new_empty_of_its_own():
    models = both(network())
    x = torch.randn(SIZE, dtype=torch.float64)
    outs = []
    for backend, model in models.items():
        with fused_resnet.backend(backend):
            out = model(Tagged.of(x.clone(), "scan 1"))
        out.square().sum().backward()
        outs.append(out)
    assert isinstance(outs[0], Tagged) == isinstance(outs[1], Tagged)
    torch.testing.assert_close(outs[0].as_subclass(torch.Tensor), outs[1].as_subclass(torch.Tensor))
    assert_same_state(*models.values())


# ---- derivatives -----------------------------------------------------------------------------------------------------


def in_every_way(model: nn.Module, x: torch.Tensor) -> dict:
    """The derivatives of torch.func and torch.autograd that are not one plain backward, each a function without arguments."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def loss(params, x):
        return torch.func.functional_call(model, (params, buffers), (x[None] if x.dim() == 3 else x,)).square().sum()

    def out(x):
        return torch.func.functional_call(model, (params, buffers), (x,))

    def dual():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(out(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    leaf = x.clone().requires_grad_()
    basis = torch.eye(5, dtype=x.dtype)[:, None, :].expand(5, len(x), 5)
    return {
        "jvp": lambda: torch.func.jvp(out, (x,), (torch.ones_like(x),))[1],
        "dual": dual,
        "grad": lambda: torch.func.grad(loss, argnums=1)(params, x),
        "vjp": lambda: torch.func.vjp(out, x)[1](torch.ones(len(x), 5, dtype=x.dtype))[0],
        "jacrev": lambda: torch.func.jacrev(lambda t: out(t).sum(0))(x),
        "jacfwd": lambda: torch.func.jacfwd(lambda s: out(x * s))(torch.ones((), dtype=x.dtype)),
        "per-sample": lambda: torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)["conv1.weight"],
        "is_grads_batched": lambda: torch.autograd.grad(out(leaf), leaf, basis, is_grads_batched=True)[0],
        "vectorised jacobian": lambda: torch.autograd.functional.jacobian(lambda t: out(t).sum(0), x, vectorize=True),
        "hessian": lambda: torch.func.hessian(lambda s: out(x * s).square().sum())(torch.ones((), dtype=x.dtype)),
    }


WAYS = ["jvp", "dual", "grad", "vjp", "jacrev", "jacfwd", "per-sample", "is_grads_batched", "vectorised jacobian", "hessian"]


@pytest.mark.parametrize("way", WAYS)
def test_other_derivatives(way):
    model = network().eval()
    x = torch.randn(2, *SIZE[1:], dtype=torch.float64)
    found = []
    for backend in ("eager", "off"):
        with fused_resnet.backend(backend):
            found.append(in_every_way(model, x)[way]())
    assert found[1].abs().max() > 1e-6
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("make", [network, lambda: fused_resnet.fuse(Whole(Unit(8, 8), channels=8).double())], ids=["ours", "structure"])
def test_an_ensemble_in_one_call(make):
    """Of `torch.func.stack_module_state`, whose parameters each have a dimension for the members."""
    models, x = [make().eval() for _ in range(3)], torch.randn(SIZE, dtype=torch.float64)
    parameters, buffers = torch.func.stack_module_state(models)

    def member(parameters, buffers):
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    with fused_resnet.backend("eager"):
        found = torch.func.vmap(member)(parameters, buffers)
        expected = torch.stack([model(x) for model in models])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_transforms_in_a_compiled_graph():
    model, x = network().eval(), torch.randn(2, *SIZE[1:], dtype=torch.float64)

    def gradients(x):
        return torch.func.vmap(torch.func.grad(lambda t: model(t[None]).square().sum()))(x)

    with fused_resnet.backend("eager"):
        torch.testing.assert_close(torch.compile(gradients, fullgraph=True, backend="eager")(x), gradients(x))


@pytest.mark.parametrize("way", ["jvp", "per-sample"])
def test_other_derivatives_of_one_layer(way):
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    x = images()

    def layer(x, weight):
        return conv_bn_act(x if x.dim() == 4 else x[None], weight, None, None, None, None, padding=1).square().sum()

    def run():
        if way == "jvp":
            return torch.func.jvp(lambda t: layer(t, weight), (x,), (x,))[1]
        return torch.func.vmap(torch.func.grad(layer, argnums=1), in_dims=(0, None))(x, weight)

    with fused_resnet.backend("eager"):
        found = run()
    with fused_resnet.backend("off"):
        torch.testing.assert_close(found, run(), rtol=1e-8, atol=1e-10)


def test_an_operator_refuses_tangents():
    conv = ops.Conv(torch.randn(4, 3, 1, 1), ops.Norm(None, None, None, None, True, 1e-5), ops.ConvGeometry.of(1, 0, 1, 1))
    x = images(dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    with fused_resnet.backend("eager"), forward_ad.dual_level(), pytest.raises(RuntimeError, match=r'forward-mode.*backend\("off"\)'):
        ops.conv_stats(forward_ad.make_dual(x, torch.ones_like(x)), conv)


SECOND = {
    "hvp": lambda f, x: torch.autograd.functional.hvp(f, x, torch.ones_like(x)),
    "vhp": lambda f, x: torch.autograd.functional.vhp(f, x, torch.ones_like(x)),
    "hessian": lambda f, x: torch.autograd.functional.hessian(f, x),
    "double backward's jvp": lambda f, x: torch.autograd.functional.jvp(f, x, torch.ones_like(x)),
}


@pytest.mark.parametrize("way", SECOND)
@pytest.mark.parametrize("what", ["network", "layer", "recompute", "preact", "structure"])
def test_second_derivatives_name_the_way_out(what, way):
    if what == "layer":
        weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
        model, x = (lambda t: conv_bn_act(t, weight, None, None, None, None)), images(2)
    elif what == "preact":
        model, x = PreActBlock(3, 3).double(), images(2)
    elif what == "structure":
        model, x = fused_resnet.fuse(Whole(Unit(8, 8), channels=8).double()), torch.randn(2, *SIZE[1:], dtype=torch.float64)
    else:
        model, x = network(), torch.randn(2, *SIZE[1:], dtype=torch.float64)
        if what == "recompute":
            fused_resnet.recompute(model)
    with fused_resnet.backend("eager"), pytest.raises(RuntimeError, match=r'double backward.*backend\("off"\)'):
        SECOND[way](lambda t: model(t).square().sum(), x)
    if what == "layer":
        with fused_resnet.backend("off"):
            SECOND[way](lambda t: model(t).square().sum(), x[:, :, :3, :3])


@pytest.mark.parametrize("what", ["layer's input", "block's input", "weight", "gamma"])
def test_what_backward_reads_is_guarded_by_its_version(what):
    """Autograd's own error, as from PyTorch's modules."""
    block = BasicBlock(3, 3).double()
    x = images().contiguous(memory_format=torch.channels_last)
    changed = {"layer's input": x, "block's input": x, "weight": block.conv1.weight, "gamma": block.bn2.weight}[what]
    with fused_resnet.backend("eager"):
        out = conv_bn_act(x, block.conv1.weight, None, None, None, None) if what == "layer's input" else block(x)
        loss = out.square().sum()
    with torch.no_grad():
        changed.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_output_that_nothing_keeps_may_be_changed_in_place():
    """PyTorch refuses, since its ReLU keeps it. Ours keeps a mask; the gradients are those of the same step out of place."""
    block = BasicBlock(3, 3).double()
    other, x = copy.deepcopy(block), images()
    with fused_resnet.backend("eager"):
        block(x).mul_(torch.full((), 3.0)).square().sum().backward()
    (other(x) * 3.0).square().sum().backward()
    assert_same_state(block, other)


# ---- TorchScript -----------------------------------------------------------------------------------------------------


def test_a_fused_network_can_be_scripted(torchvision_models):
    """It compiles the modules that were there before, and leaves the network as it is."""
    model = fused_resnet.fuse(torchvision_models.resnet.ResNet(torchvision_models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)).eval()
    classes = [type(m) for m in model.modules()]
    scripted, x = torch.jit.script(model), torch.randn(2, 3, 32, 32)
    assert [type(m) for m in model.modules()] == classes and any("Fused" in cls.__name__ for cls in classes)
    torch.testing.assert_close(scripted(x), model(x))
    torch.testing.assert_close(scripted(x), torch.jit.trace(model, x)(x))
