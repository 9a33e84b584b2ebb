"""The networks against torchvision's own classes and against the paper."""

import copy

import pytest
import torch
from support.chains import DEVICE, LANGUAGES, RUNNABLE, calm
from torch import nn

import fused_resnet
from fused_resnet import models
from fused_resnet.backends import BACKENDS

TORCHVISION_BUILDERS = [
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
]  # fmt: skip


def worst_difference(a: nn.Module, b: nn.Module, x: torch.Tensor, backend: str) -> float:
    """The largest relative difference of output, gradients and buffers of a (PyTorch's modules) and b (by `backend`)."""
    out_a = a(x)
    with fused_resnet.backend(backend):
        out_b = b(x)
    t = torch.randn_like(out_a)
    (out_a * t).sum().backward()
    (out_b * t).sum().backward()
    pairs = [(out_a, out_b)]
    pairs += [(p.grad, q.grad) for p, q in zip(a.parameters(), b.parameters(), strict=True)]
    pairs += zip(a.buffers(), b.buffers(), strict=True)
    return max(((p.double() - q).norm() / p.double().norm().clamp_min(1e-30)).item() for p, q in pairs)


@pytest.fixture
def operator_calls(monkeypatch):
    """A list of (operator, backend) that grows while the operators run."""
    calls = []
    for backend in BACKENDS.values():
        for method in ("convolve", "convolve_backward", "norm_add_act_avg_pool", "norm_act_max_pool"):

            def wrapper(*args, _backend=backend, _method=method, _original=getattr(backend, method), **kwargs):
                calls.append((_method, _backend.name))
                return _original(*args, **kwargs)

            monkeypatch.setattr(backend, method, wrapper)
    return calls


@pytest.mark.parametrize("name", TORCHVISION_BUILDERS)
def test_builder_is_torchvisions(name, torchvision_models, operator_calls):
    """Same initial values from one seed, checkpoints both ways, and in float64 the same output, gradients, statistics."""
    seed = torch.initial_seed()
    theirs = getattr(torchvision_models, name)(num_classes=10)
    torch.manual_seed(seed)
    ours = models.get_model(name, num_classes=10)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    fresh = models.get_model(name, num_classes=10)
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(fresh.state_dict(), strict=True)
    del ours
    x = torch.randn(2, 3, 40, 36, dtype=torch.float64)
    assert worst_difference(theirs.double(), fresh.double(), x, "eager") < 1e-9
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in fresh.modules())
    pairs = sum(m.downsample is not None for m in fresh.modules() if hasattr(m, "downsample"))
    assert operator_calls.count(("convolve", "eager")) == norms - pairs  # a projection shares conv1's node
    assert operator_calls.count(("convolve_backward", "eager")) == norms - pairs


#: A block a stage: everything that a network is made of, small enough for Triton's interpreter.
CROPPED = {
    "basic": lambda: models.ResNet(models.BasicBlock, [1, 1, 1, 1], num_classes=10, width_per_group=64),
    "bottleneck": lambda: models.ResNet(models.Bottleneck, [2, 1, 1, 1], num_classes=10, width_per_group=16),
    "grouped": lambda: models.ResNet(models.Bottleneck, [1, 1, 1, 1], num_classes=10, groups=4, width_per_group=8),
    "dilated": lambda: models.ResNet(
        models.Bottleneck, [1, 1, 1, 2], num_classes=10, width_per_group=8, replace_stride_with_dilation=[False, True, True]
    ),
    "cifar A": lambda: models.CifarResNet(8, shortcut="A"),
    "cifar B": lambda: models.CifarResNet(8, shortcut="B"),
    "plain": lambda: models.CifarResNet(8, shortcut=None),
}


def outcome(model: nn.Module, x: torch.Tensor, weight: torch.Tensor, backend: str) -> dict[str, torch.Tensor]:
    """One step's output, gradients by kind of parameter, and running statistics, each as one long vector in float64."""
    model = copy.deepcopy(model)
    with fused_resnet.backend(backend):
        output = model(x)
    (output * weight.to(output.dtype)).sum().backward()
    vectors = {"output": [output.detach()]}
    for module in model.modules():
        tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        for name, tensor in tensors.items():
            value = tensor.grad if tensor.requires_grad else tensor
            vectors.setdefault(f"{type(module).__name__}.{name}", []).append(value)
    vectors.pop("BatchNorm2d.num_batches_tracked")
    return {name: torch.cat([v.double().flatten() for v in values]) for name, values in vectors.items()}


#: The convolutions in Triton take the interpreter long: each kind of block once.
WITH_TRITON = [(name, "triton") for name in ("basic", "bottleneck", "cifar B") if "triton" in RUNNABLE]


def in_tiers(name: str, passes: str):
    """In the interpreter a network takes as long as a hundred other cases: `make test` has the smallest."""
    interpreted = passes in ("passes_triton", "triton") and DEVICE.type == "cpu"
    return pytest.param(name, passes, marks=pytest.mark.full if interpreted and name != "cifar B" else ())


@pytest.mark.parametrize(
    "name, passes", [in_tiers(*case) for case in (*((name, passes) for name in CROPPED for passes in LANGUAGES), *WITH_TRITON)]
)
def test_passes_agree_with_float64_in_a_whole_network(name, passes, operator_calls, device):
    """In float32: at most twice PyTorch's error, or what sums in float32 explain: on a CPU PyTorch's batch norm sums in float64."""
    model = CROPPED[name]().to(device)
    calm(model)
    x, weight = torch.randn(8, 3, 13, 17, device=device), torch.randn(8, 10, device=device)
    truth = outcome(copy.deepcopy(model).double(), x.double(), weight, "off")
    eager, ours = (outcome(model, x, weight, backend) for backend in ("off", passes))
    for key, value in truth.items():
        error, eagers = ((run[key] - value).norm() / value.norm() for run in (ours, eager))
        assert error <= max(2 * eagers, 2e-5), (key, error, eagers)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    projections = sum(isinstance(m.downsample, nn.Sequential) for m in model.modules() if getattr(m, "downsample", None))
    assert operator_calls.count(("convolve", passes)) == norms - projections
    assert operator_calls.count(("convolve_backward", passes)) == norms - projections


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet50", dict(replace_stride_with_dilation=[False, True, True], zero_init_residual=True)),
        ("resnet18", dict(norm_layer=lambda c: nn.GroupNorm(2, c))),
        ("resnet50", dict(groups=2, width_per_group=32)),
    ],
    ids=["dilated", "group norm", "grouped"],
)
def test_options_are_torchvisions(name, options, torchvision_models):
    theirs, ours = getattr(torchvision_models, name)(num_classes=7, **options), models.get_model(name, num_classes=7, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    # A block that starts as zero makes gradients of rounding noise alone; give those norms something to do.
    for a, b in zip(theirs.modules(), ours.modules(), strict=True):
        if isinstance(a, nn.BatchNorm2d) and not a.weight.any():
            nn.init.ones_(a.weight), nn.init.ones_(b.weight)
    x = torch.randn(2, 3, 40, 36, dtype=torch.float64)
    assert worst_difference(theirs.double(), ours.double(), x, "eager") < 1e-9


def test_zero_init_residual_zeroes_the_last_norms():
    block = models.resnet50(zero_init_residual=True).layer1[0]
    assert not block.bn3.weight.any() and block.bn1.weight.all()
    assert not models.resnet18(zero_init_residual=True).layer1[0].bn2.weight.any()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (name, options)
        for name in models.list_models() if name not in TORCHVISION_BUILDERS and name != "resnet1202"
        for options in ([{}] if name.startswith("plain") else [{"shortcut": "A"}, {"shortcut": "B"}])
    ],
    ids=str,
)  # fmt: skip
def test_other_networks_equal_their_own_modules(name, options):
    ours = models.get_model(name, num_classes=5, **options).double()
    x = torch.randn(8, 3, 24, 20, dtype=torch.float64)  # eight values a channel in the last stage of plain34: fewer are ill-conditioned
    with fused_resnet.backend("off"):
        plain = copy.deepcopy(ours)
        assert worst_difference(plain, ours, x, "eager") < 1e-9


def parameters(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85), ("resnet110", 1.7), ("resnet1202", 19.4)],
)
def test_cifar_networks_have_the_papers_size(name, millions):
    """He et al. 2015, table 6."""
    assert parameters(models.get_model(name)) == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("name", ["resnet20", "plain20"])
def test_a_width_is_that_of_the_first_stage(name):
    narrow = models.get_model(name, width=6, in_channels=1)
    assert [stage[0].conv1.out_channels for stage in narrow.stages()] == [6, 12, 24]
    assert narrow(torch.randn(2, 1, 12, 12)).shape == (2, 10)


def test_plain_networks_have_no_shortcut():
    """The output of a block whose branch is zero is zero, whatever comes in."""
    for block in (models.plain34().layer2[0], models.plain20().layer2[0]):
        nn.init.zeros_(block.bn2.weight)
        for backend in ("off", "eager"):
            with fused_resnet.backend(backend):
                assert not block(torch.randn(2, block.conv1.in_channels, 8, 8)).any()
    assert sum(isinstance(m, nn.Conv2d) for m in models.plain34().modules()) == 33
    assert sum(isinstance(m, nn.Conv2d) for m in models.plain20().modules()) == 19


def test_pad_shortcut_is_option_a():
    x = torch.randn(2, 4, 5, 6)
    out = models.cifar.PadShortcut(2, 2)(x)
    assert out.shape == (2, 8, 3, 3)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2]) and not out[:, :2].any() and not out[:, 6:].any()


@pytest.mark.parametrize("backend", ["eager", *LANGUAGES])
def test_a_hook_sees_tensors_and_changes_nothing(backend, device):
    """On a stage, a block, or a module inside a block: the hook is called with tensors, and the result is the same."""
    model = models.resnet20(num_classes=4).to(device)
    x = torch.randn(2, 3, 12, 12, device=device)
    with fused_resnet.backend(backend):
        expected = copy.deepcopy(model)(x)
        for path in ("layer1", "layer2.0", "layer2.1.conv2", "layer3.0.bn1", "layer1.2.relu", "conv1", "avgpool", "layer2.0.downsample"):
            watched, seen = copy.deepcopy(model), []
            watched.get_submodule(path).register_forward_hook(lambda m, args, out, seen=seen: seen.append((*args, out)))
            out = watched(x)
            assert seen and all(isinstance(t, torch.Tensor) for call in seen for t in call), path
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
            for (name, a), b in zip(watched.named_buffers(), copy.deepcopy(model).buffers(), strict=True):
                if name.endswith("num_batches_tracked"):
                    assert a == b + 1, f"{path}: {name} was told of {a - b} batches"


def test_global_hook_sees_every_module():
    model, seen = models.resnet20(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    try:
        with fused_resnet.backend("eager"):
            model(torch.randn(2, 3, 8, 8))
    finally:
        handle.remove()
    assert seen.count("Conv2d") == 19 and seen.count("BasicBlock") == 9


def test_a_stage_or_block_by_itself_gives_tensors():
    model = models.resnet18()
    x = torch.randn(2, 64, 8, 8)
    for module in (model.layer1, model.layer1[1]):
        expected = copy.deepcopy(module)
        with fused_resnet.backend("eager"):
            out = module(x)
        torch.testing.assert_close(out, expected(x), rtol=1e-4, atol=1e-5)
        for a, b in zip(module.buffers(), expected.buffers(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
@pytest.mark.parametrize("track", [True, False])
def test_running_statistics_as_batch_norm_keeps_them(momentum, track):
    def norm(channels):
        return nn.BatchNorm2d(channels, momentum=momentum, track_running_stats=track)

    ours = models.resnet18(norm_layer=norm, num_classes=3).double()
    plain = copy.deepcopy(ours)
    for _ in range(3):
        x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
        with fused_resnet.backend("eager"):
            a = ours(x)
        torch.testing.assert_close(a, plain(x))
    for (name, a), b in zip(ours.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    ours.eval(), plain.eval()
    with fused_resnet.backend("eager"):
        torch.testing.assert_close(ours(x), plain(x))


def test_frozen_norms_and_frozen_weights_have_right_gradients():
    ours = models.resnet18(num_classes=3).double()
    ours(torch.randn(2, 3, 33, 33, dtype=torch.float64))
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    ours.conv1.requires_grad_(False)
    ours.layer2[0].bn1.weight.requires_grad_(False)
    ours.layer3[0].downsample.requires_grad_(False)
    plain = copy.deepcopy(ours)
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    plain(x).square().sum().backward()
    with fused_resnet.backend("eager"):
        ours(x).square().sum().backward()
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=name)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_any_layout_of_images_is_taken(layout):
    x = torch.randn(2, 3, 16, 16)
    given = {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": torch.randn(2, 6, 16, 32)[:, ::2, :, ::2].copy_(x),
        "expanded": x[:, :1].expand(2, 3, 16, 16),
    }[layout]
    model = models.resnet20(num_classes=4)
    expected = copy.deepcopy(model)(given.clone())
    with fused_resnet.backend("eager"):
        torch.testing.assert_close(model(given), expected, rtol=1e-4, atol=1e-5)


def test_autocast_runs_convolutions_in_its_dtype():
    model = models.resnet20(num_classes=4)
    x = torch.randn(2, 3, 16, 16)
    plain = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain(x)
        with fused_resnet.backend("eager"):
            out = model(x)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected.float(), rtol=0.1, atol=0.1)
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


class Float32GroupNorm(nn.GroupNorm):
    """As autocast runs a group norm on a GPU, though not on a CPU."""

    def forward(self, x):
        return super().forward(x.float())


def test_autocast_where_some_norms_are_none_of_ours():
    """What follows a norm that gives float32 goes on in autocast's dtype: the next block, and a block with that in its shortcut."""
    model = models.resnet18(num_classes=4)
    model.layer1[0].bn2 = Float32GroupNorm(8, 64)
    model.layer2[0].downsample = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(64, 128, 1, bias=False), Float32GroupNorm(8, 128))
    plain = copy.deepcopy(model)
    x = torch.randn(8, 3, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain(x)
        with fused_resnet.backend("eager"):
            out = model(x)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected.float(), rtol=0.1, atol=0.1)
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: models.get_model("resnet51"), ValueError, "model: expected one of resnet18.*got 'resnet51'"),
        (lambda: models.resnet50(replace_stride_with_dilation=[True]), ValueError, "replace_stride_with_dilation: expected"),
        (lambda: models.resnet18(groups=2), ValueError, "groups, base_width"),
        (lambda: models.resnext50_32x4d(groups=4), ValueError, "groups: expected 32"),
        (lambda: models.resnet20(shortcut="C"), ValueError, 'shortcut: expected "A", "B"'),
        (lambda: models.resnet20(in_channels=0), ValueError, "in_channels: expected at least 1"),
        (lambda: models.plain20(width=0), ValueError, "width: expected an even number of at least 2; got 0"),
        (lambda: models.resnet20(width=7), ValueError, "width: expected an even number of at least 2; got 7"),
        (lambda: models.CifarResNet(21), ValueError, "depth: expected 6n"),
        (lambda: models.resnet18(weights="no such weights"), ValueError, "weights: expected"),
        (lambda: models.resnet20()(torch.randn(3, 8, 8)), ValueError, r"x: expected shape \[N, 3, H, W\]; got \[3, 8, 8\]"),
        (lambda: models.resnet20()(torch.randn(2, 1, 8, 8)), ValueError, r"x: expected shape \[N, 3, H, W\]"),
        (lambda: models.resnet20()(torch.randint(9, (2, 3, 8, 8))), TypeError, "x: expected torch.float32"),
        (lambda: models.resnet20()(torch.randn(2, 3, 8, 8, device="meta")), ValueError, "x: expected a tensor on cpu"),
        (lambda: models.resnet20()([1]), TypeError, "x: expected a tensor; got list"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_one_value_per_channel_is_refused_in_pytorchs_words():
    model = models.resnet18()
    x = torch.randn(1, 3, 32, 32)
    messages = []
    for backend in ("off", "eager"):
        with fused_resnet.backend(backend), pytest.raises(ValueError, match="Expected more than 1 value per channel") as info:
            model(x)
        messages.append(str(info.value))
    assert messages[0] == messages[1]


def test_weights_are_read_from_a_path(tmp_path):
    source = models.resnet18(num_classes=6)
    path = tmp_path / "weights.pt"
    torch.save(source.state_dict(), path)
    loaded = models.resnet18(weights=path)
    assert loaded.fc.out_features == 6
    assert all(torch.equal(p, q) for p, q in zip(loaded.state_dict().values(), source.state_dict().values(), strict=True))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="weights: expected a state_dict"):
        models.resnet18(weights=str(path))
    torch.save({"a": 1}, path)
    with pytest.raises(ValueError, match="weights: expected a state_dict of a network"):
        models.resnet18(weights=path)
    with pytest.raises(ValueError, match="num_classes: expected 6"):
        torch.save(source.state_dict(), path)
        models.resnet18(weights=path, num_classes=5)
