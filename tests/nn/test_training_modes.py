"""What people do with a network while it trains, on the operators, against PyTorch's own modules in float64."""

import copy
import pickle

import pytest
import torch
from support.small import SIZE, assert_same, assert_same_state, network, nodes, step
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fused_resnet
from fused_resnet.backends import BACKENDS
from fused_resnet.ops import running


@pytest.fixture
def calls(monkeypatch):
    """How often the operators' convolutions ran, forward and backward."""
    found = {"convolve": 0, "convolve_backward": 0}
    for name in found:

        def counted(*args, _name=name, _original=getattr(BACKENDS["eager"], name)):
            found[_name] += 1
            return _original(*args)

        monkeypatch.setattr(BACKENDS["eager"], name, counted)
    return found


NORMS = {
    "as usual": lambda c: nn.BatchNorm2d(c),
    "momentum None": lambda c: nn.BatchNorm2d(c, momentum=None),
    "momentum 0": lambda c: nn.BatchNorm2d(c, momentum=0.0),
    "no running statistics": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "not affine": lambda c: nn.BatchNorm2d(c, affine=False),
    "neither": lambda c: nn.BatchNorm2d(c, affine=False, track_running_stats=False),
    "another eps": lambda c: nn.BatchNorm2d(c, eps=0.3),
    "synchronised, without processes": lambda c: nn.SyncBatchNorm(c),
}


@pytest.mark.parametrize("mode", ["train", "eval", "norms in eval"])
@pytest.mark.parametrize("norm", NORMS)
def test_batch_norms(norm, mode, calls):
    """In training, in eval mode with gradients, and in training with the norms in eval mode (a frozen backbone)."""
    ours = network(NORMS[norm])
    ours.train(mode != "eval")
    if mode == "norms in eval":
        for module in ours.modules():
            module.train(not isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm))
    assert_same(ours, copy.deepcopy(ours))
    assert calls == {"convolve": 2 * nodes(ours), "convolve_backward": 2 * nodes(ours)}


def test_norms_of_many_kinds_in_one_network():
    """Each norm keeps its own eps, momentum and mode."""
    kinds = iter(list(NORMS.values()) * 3)
    ours = network(lambda c: next(kinds)(c))
    ours.layer2[0].bn2.eval(), ours.layer1.eval()
    assert_same(ours, copy.deepcopy(ours))


def test_frozen_batch_norm_of_torchvision(torchvision_models, calls):
    from torchvision.ops import FrozenBatchNorm2d

    ours = network(FrozenBatchNorm2d)
    assert_same(ours, copy.deepcopy(ours))
    assert calls["convolve"] == 2 * nodes(ours)


@pytest.mark.parametrize("kept", ["conv", "gamma", "beta", "norms", "late", "input only"])
def test_partly_frozen(kept, monkeypatch):
    """requires_grad of some parameters alone. What is frozen gets no gradient, and all before it costs no backward."""
    ours = network()
    for name, p in ours.named_parameters():
        conv = p.dim() == 4
        p.requires_grad_({
            "conv": conv, "gamma": p.dim() == 1 and name.endswith("weight"), "beta": name.endswith("bias"),
            "norms": p.dim() == 1, "late": name.startswith(("layer3", "fc")), "input only": False,
        }[kept])  # fmt: skip
    plain = copy.deepcopy(ours)
    if kept != "late":
        assert_same(ours, plain)
        return
    widths = []
    original = BACKENDS["eager"].convolve_backward
    monkeypatch.setattr(BACKENDS["eager"], "convolve_backward", lambda *a: widths.append(a[-1]) or original(*a))
    for model, backend in ((ours, "eager"), (plain, "off")):
        step(model, torch.ones(SIZE, dtype=torch.float64), backend)
    assert_same_state(ours, plain)
    assert widths == [True, False]  # layer3's two; the first needs no gradient of its input


HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda m, args, out: seen.append((*args, out))),
    "forward pre": lambda m, seen: m.register_forward_pre_hook(lambda m, args: seen.append(args)),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda m, g, out: seen.append([t for t in (*g, *out) if t is not None])),
    "backward pre": lambda m, seen: m.register_full_backward_pre_hook(lambda m, out: seen.append(out)),
    "another forward": lambda m, seen: setattr(m, "forward", lambda t, f=m.forward: seen.append([t]) or f(t)),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_any_module(kind):
    """A hook on any module is called with tensors, as often as in PyTorch, and changes no result."""
    template = network()
    x = torch.randn(SIZE, dtype=torch.float64)
    # In PyTorch an output that a backward hook watches must not be written by the in-place ReLU behind it.
    for module in template.modules():
        if isinstance(module, nn.ReLU) and kind.startswith("backward"):
            module.inplace = False
    blocks = ("layer1", "layer1.0", "layer2.0")
    for path in (
        *blocks,
        "conv1",
        "bn1",
        "relu",
        "maxpool",
        "avgpool",
        "layer1.1.conv2",
        "layer1.1.bn3",
        "layer2.0.downsample",
        "layer1.0.downsample.1",
    ):
        if kind.startswith("backward") and path in ("layer1.1.bn3", "layer1.0.downsample.1", "layer2.0.downsample"):
            continue  # nor by the addition behind it
        seen = {}
        models_ = {"eager": copy.deepcopy(template), "off": copy.deepcopy(template)}
        for backend, model in models_.items():
            seen[backend] = []
            HOOKS[kind](model.get_submodule(path), seen[backend])
            step(model, x.clone().requires_grad_(), backend)
        assert len(seen["eager"]) == len(seen["off"]) > 0, path
        for ours, theirs in zip(seen["eager"], seen["off"], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=path)
        assert_same_state(*models_.values())


def test_hooks_of_parameters_and_tensors():
    ours, plain = network(), None
    plain, seen = copy.deepcopy(ours), []
    for model in (ours, plain):
        model.layer1[0].bn2.weight.register_hook(lambda g: g * 2)
        model.layer2[0].conv1.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    assert_same(ours, plain)
    assert len(seen) == 4


def test_double_backward_is_refused_by_a_network_and_right_without_operators():
    """Gradient penalties: an error that says what to do; that, and PyTorch's number."""
    model = network()
    x = torch.randn(SIZE, dtype=torch.float64, requires_grad=True)

    def penalty(backend):
        with fused_resnet.backend(backend):
            (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), model.conv1.weight)[0]

    with pytest.raises(RuntimeError, match=r'double backward is not supported.*backend\("off"\)'):
        penalty("eager")
    assert penalty("off").norm() > 0


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("what", ["blocks", "stages", "network", "sequential"])
def test_checkpointing_updates_statistics_once(what, reentrant):
    """The second forward, in backward, tells the norms nothing; with PyTorch's modules it would (pytorch#96136)."""

    def call(model, x):
        if what == "network":
            return checkpoint(model, x, use_reentrant=reentrant)
        x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        for stage in model.stages():
            if what == "sequential":
                x = checkpoint_sequential(stage, 1, x, use_reentrant=reentrant)
                continue
            for part in stage if what == "blocks" else [stage]:
                x = checkpoint(part, x, use_reentrant=reentrant)
        return model.fc(model.avgpool(x).flatten(1))

    ours = network()
    plain = copy.deepcopy(ours)
    for _ in range(2):
        x = torch.randn(SIZE, dtype=torch.float64)
        step(ours, x.clone().requires_grad_(), "eager", call)
        step(plain, x.clone().requires_grad_(), "off")
    assert_same_state(ours, plain)


def test_the_checkpoint_test_sees_a_second_update(monkeypatch):
    monkeypatch.setattr(running.torch._C, "_current_graph_task_id", lambda: -1)
    with pytest.raises(AssertionError):
        test_checkpointing_updates_statistics_once("blocks", False)


def test_saved_tensors_may_be_kept_elsewhere():
    """torch.autograd.graph's hooks see what the operators save: offloaded and brought back, it gives the same step."""
    kept = []

    def call(model, x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t.numpy().copy(), torch.from_numpy):
            return model(x)

    ours = network()
    plain = copy.deepcopy(ours)
    x = torch.randn(SIZE, dtype=torch.float64)
    step(ours, x.clone().requires_grad_(), "eager", lambda m, t: call(m, t))
    assert len(kept) > 4 * nodes(ours)
    step(plain, x.clone().requires_grad_(), "off")
    assert_same_state(ours, plain)


def test_a_graph_that_is_retained_gives_its_gradients_again():
    ours = network()
    with fused_resnet.backend("eager"):
        loss = ours(torch.randn(SIZE, dtype=torch.float64)).square().sum()
    loss.backward(retain_graph=True)
    first = [p.grad for p in ours.parameters()]
    ours.zero_grad()
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(ours.parameters(), first, strict=True))


def test_no_grad_forward_still_updates_statistics():
    ours = network()
    plain = copy.deepcopy(ours)
    x = torch.randn(SIZE, dtype=torch.float64)
    with torch.no_grad():
        plain(x)
        with fused_resnet.backend("eager"):
            ours(x)
    assert_same_state(ours, plain)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies_are_whole_and_apart(how, tmp_path):
    """After a step, with gradients and hooks; the copy trains as the network itself, and by itself."""
    ours = network()
    step(ours, torch.randn(SIZE, dtype=torch.float64), "eager")
    if how == "deepcopy":
        other = copy.deepcopy(ours)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(ours))
    else:
        torch.save(ours if how == "torch.save" else ours.state_dict(), tmp_path / "x.pt")
        loaded = torch.load(tmp_path / "x.pt", weights_only=how == "state_dict")
        other = loaded if how == "torch.save" else network()
        if how == "state_dict":
            other.load_state_dict(loaded)
    ours.zero_grad(), other.zero_grad()
    untouched = copy.deepcopy(ours)
    assert_same(other, copy.deepcopy(ours))
    assert_same_state(ours, untouched)


def test_state_dict_hooks_are_called():
    model, seen = network(), []
    model.layer1[0].register_state_dict_post_hook(lambda m, state, prefix, meta: seen.append(prefix))
    model.layer1[0].register_load_state_dict_pre_hook(lambda m, state, prefix, *rest: seen.append(prefix))
    model.load_state_dict(model.state_dict())
    assert seen == ["layer1.0.", "layer1.0."]


def test_averages_of_models():
    """EMA with buffers, and SWA with update_bn, which resets the running statistics and averages them anew."""
    ours = network()
    plain = copy.deepcopy(ours)
    batches = [torch.randn(SIZE, dtype=torch.float64) for _ in range(3)]
    averages = []
    for model, backend in ((ours, "eager"), (plain, "off")):
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        swa = AveragedModel(model)
        for x in batches:
            step(model, x.clone(), backend)
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.01 * p.grad
            ema.update_parameters(model), swa.update_parameters(model)
        with fused_resnet.backend(backend):
            update_bn(batches, swa)
            averages.append((ema, swa, ema.eval()(batches[0])))
    for a, b in zip(averages[0][:2], averages[1][:2], strict=True):
        for (name, t), u in zip(a.module.state_dict().items(), b.module.state_dict().values(), strict=True):
            torch.testing.assert_close(t, u, rtol=1e-9, atol=1e-9, msg=name)
    torch.testing.assert_close(averages[0][2], averages[1][2])
