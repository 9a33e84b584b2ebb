"""timm's residual networks, fused: its own model tests, written anew."""

import copy
import re

import pytest
import torch
from support.chains import calm
from support.swapped import assert_same_step, fused_copy, fused_rows, shake, unfused, why_not

import fused_resnet
from fused_resnet.backends import BACKENDS

timm = pytest.importorskip("timm")

#: Names of networks with a step between norm and addition (or another norm, or another activation) in some or all blocks.
OTHER_STEPS = re.compile(
    r"^(.*se_?res.*|.*eca.*|.*gc.*|sk.*|senet.*|.*aa.*|.*blur.*|.*_gn|.*rs\d+.*|.*_evos|.*_frn|.*bit.*|resnext.*_frelu|.*cbam.*)$"
)
#: The pruned ones and BiT are networks of fixed sizes; all blocks of either hold a step or norm that falls back.
NAMES = [name for module in ("resnet", "resnetv2") for name in timm.list_models(module=module) if not name.endswith(("_pruned", "_bit"))]


def make(name: str, **kwargs):
    """A network of that name with a block a stage (two in the first) and few channels, otherwise what its builder asks for."""
    v2 = "resnetv2" in name
    channels = (128, 128, 128, 128) if v2 else (32, 32, 64, 64)
    small = dict(layers=(2, 1, 1, 1), channels=channels, num_classes=5)
    return shake(timm.create_model(name, **(small | kwargs)))


@pytest.fixture
def images():
    return torch.randn(4, 3, 64, 64, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_every_variant(name, images):
    """Forward, backward, statistics, features; strict checkpoints both ways; what is fused, and why the rest is not."""
    plain = make(name).double()
    fused = fused_copy(plain)
    assert list(fused.state_dict()) == list(plain.state_dict())
    reasons = why_not(fused)
    assert all(reasons.values())
    if not OTHER_STEPS.match(name):
        assert reasons == {} and len(fused_rows(fused)) >= 5, reasons
    assert_same_step(plain, fused, images)
    fused.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(fused.state_dict(), strict=True)


@pytest.mark.parametrize("name", ["resnet50", "resnet50d", "resnet18", "resnext50_32x4d", "resnetv2_50", "resnetv2_50d"])
def test_features(name, images):
    """forward_features, forward_intermediates, forward_head, and features_only."""
    plain = make(name).double()
    assert_same_step(plain, fused_copy(plain), images, call="forward_features")
    plain.zero_grad()
    assert_same_step(plain, fused_copy(plain), images, call="forward_intermediates")
    fused = fused_copy(plain)
    with fused_resnet.backend("eager"):
        assert fused.forward_head(fused.forward_features(images), pre_logits=True).shape == (4, fused.num_features)
        assert len(fused.forward_intermediates(images, indices=[1, 3], intermediates_only=True)) == 2
    plain = make(name, features_only=True).double()
    fused = fused_copy(plain)
    assert len(fused_rows(fused)) >= 5
    assert_same_step(plain, fused, images)


@pytest.mark.parametrize("name", ["resnet26d", "resnetv2_50"])
def test_the_classifier_is_exchanged(name, images):
    fused = fused_copy(make(name).double())
    assert fused.get_classifier().weight.shape[0] == 5 and fused.num_classes == 5
    fused.reset_classifier(3)
    with fused_resnet.backend("eager"):
        assert fused(images).shape == (4, 3)
    fused.reset_classifier(0)
    with fused_resnet.backend("eager"):
        assert fused(images).shape == (4, fused.num_features)


def test_gluon_and_torchvision_variants_are_these_classes():
    """timm keeps them as tags of weights: the architecture is the same function's."""
    tags = {
        tag for name in ("resnet50", "resnet50c", "resnet50d", "resnet50s", "resnext50_32x4d") for tag in timm.list_pretrained(f"{name}.*")
    }
    assert any(".gluon_" in tag for tag in tags) and any(".tv_" in tag for tag in tags)


@pytest.mark.parametrize(
    ("name", "kwargs", "left", "reason"),
    [
        ("seresnet18", {}, r".*\.se\.fc\d", "no batch norm follows it"),
        ("ecaresnet26t", {}, r".*\.se\.conv", "it is Conv1d, not an nn.Conv2d with a weight of its own"),
        ("resnet18", {"drop_path_rate": 0.5}, None, None),
        ("resnet18", {"drop_block_rate": 0.5}, None, None),
        ("resnetblur50", {}, None, None),
        ("resnet50", {"act_layer": torch.nn.SiLU}, None, None),
        ("resnet50_gn", {}, r".*", None),
        ("resnetv2_50d_gn", {}, r".*", None),
    ],
)
def test_around_another_step_the_rows_are_fused(name, kwargs, left, reason, images):
    """Attention, stochastic depth, anti-aliasing, another activation: what stands before and behind is fused all the same."""
    plain = make(name, **kwargs).double()
    fused = fused_copy(plain)
    for conv, words in unfused(fused).items():
        assert left and re.fullmatch(left, conv) and reason in (None, words), (conv, words)
    assert left is None or unfused(fused)
    torch.manual_seed(3)
    if "drop" not in str(kwargs):  # which draws
        assert_same_step(plain, fused, images)
    plain.eval(), fused.eval(), plain.zero_grad(), fused.zero_grad()
    if left != ".*":
        assert_same_step(plain, fused, images)


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", ["resnet50", "resnet50d", "resnetv2_50d"])
def test_output_stride(name, output_stride, images):
    plain = make(name, output_stride=output_stride).double()
    fused = fused_copy(plain)
    assert why_not(fused) == {}
    assert_same_step(plain, fused, images)


def test_grad_checkpointing_gives_the_same_gradients(images):
    plain = make("resnet50d").double()
    fused = fused_copy(plain)
    fused.set_grad_checkpointing(True)
    plain.eval(), fused.eval()  # timm's own checkpointing tells statistics twice in training
    assert_same_step(plain, fused, images)


def test_grad_checkpointing_runs_forward_again_and_tells_statistics_once(images, monkeypatch):
    """In training as without it. timm's own blocks tell them in both forwards."""
    plain, calls = make("resnet26d").double(), []
    eager = BACKENDS["eager"]
    monkeypatch.setattr(eager, "convolve", lambda *args, _original=eager.convolve: calls.append(1) or _original(*args))
    fused = fused_copy(plain)
    assert_same_step(plain, fused, images)
    without = len(calls)
    plain.zero_grad()
    fused = fused_copy(plain)
    fused.set_grad_checkpointing(True)
    assert why_not(fused) == {}
    assert_same_step(plain, fused, images)
    assert len(calls) - without == 2 * (without - 3) + 2  # the blocks twice, and once what is a sequence of the deep stem


@pytest.mark.parametrize("first", ["fuse", "freeze"])
@pytest.mark.parametrize("name", ["resnet26d", "resnetv2_50d"])
def test_frozen_norms(name, first, images):
    """freeze_batch_norm_2d: torchvision's frozen norm, or timm's with its activation. Training leaves their statistics alone."""
    plain = make(name).double()
    frozen = timm.layers.freeze_batch_norm_2d(copy.deepcopy(plain))
    fused = fused_copy(frozen) if first == "freeze" else timm.layers.freeze_batch_norm_2d(fused_copy(plain))
    assert {type(m).__name__ for m in fused.modules() if hasattr(m, "running_mean")} == {
        "FrozenBatchNormAct2d" if "v2" in name else "FrozenBatchNorm2d"
    }
    assert why_not(fused) == {} and len(fused_rows(fused)) == len(fused_rows(fused_copy(plain)))
    assert_same_step(frozen, fused, images)


def test_norms_that_are_shared(images):
    """timm's convert_sync_batchnorm: nn.SyncBatchNorm is fused, the norm that holds its activation is not."""
    fused = timm.layers.convert_sync_batchnorm(fused_copy(make("resnet26d").double()))
    assert why_not(fused) == {} and "SyncBatchNorm" in {type(m).__name__ for m in fused.modules()}
    shared = timm.layers.convert_sync_batchnorm(fused_copy(make("resnetv2_50").double()))
    assert fused_rows(shared) == [] and set(why_not(shared).values()) == {"norm1 is SyncBatchNormAct, not a BatchNormAct2d with an nn.ReLU"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "kwargs"), [("resnet26d", {}), ("resnet18", {"block_args": {"attn_layer": "se"}}), ("resnetblur50", {}), ("resnetv2_50d", {})]
)
def test_autocast_with_blocks_that_fall_back(name, kwargs, dtype, images):
    """Dtypes are those of PyTorch's modules; the gradients' error against float64 is at most twice theirs."""
    plain = make(name, **kwargs).double()
    calm(plain)
    truth = gradients(copy.deepcopy(plain), images, torch.float64, "off")
    plain.float()
    errors = {}
    for backend in ("off", "eager"):
        found = gradients(fused_copy(plain), images.float(), dtype, backend)
        errors[backend] = (found - truth).norm() / truth.norm()
    assert errors["eager"] <= 2 * errors["off"] < 0.3


def gradients(model, x, dtype, backend):
    """Of all parameters, in a row, by a step under autocast; they and the running statistics keep their dtype."""
    before = {name: t.dtype for name, t in model.state_dict().items()}
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float64), fused_resnet.backend(backend):
        out = model(x)
    assert out.dtype == dtype
    torch.nn.functional.cross_entropy(out if dtype == torch.float64 else out.float(), torch.arange(len(x))).backward()
    assert {name: t.dtype for name, t in model.state_dict().items()} == before
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


def test_in_chans_and_stem_pool(images):
    plain = make("resnet50d", in_chans=1, replace_stem_pool=True).double()
    fused = fused_copy(plain)
    assert why_not(fused) == {}
    assert_same_step(plain, fused, images[:, :1])
