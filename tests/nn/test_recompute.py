"""`fused_resnet.recompute`: the same bits, less memory, and what happens to it in each training mode."""

import copy
import pickle
import warnings

import pytest
import torch
from support.checkout import ROOT
from support.recomputed import WAYS, held, images, loss_of
from support.small import SIZE, network
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import fused_resnet
from fused_resnet import roofline
from fused_resnet.backends import BACKENDS
from fused_resnet.bench import traffic
from fused_resnet.bench.steps import BlockStep, Subject, TrainingStep
from fused_resnet.cli import main
from fused_resnet.models import BasicBlock, Bottleneck, ConvBNAct2d, PreActBlock, plain20
from fused_resnet.nn import Stage, recompute


def results(model, x, backend):
    """Every gradient, that of the input too, and every buffer after one step."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    loss_of(model, x, backend).backward()
    return [x.grad, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]


def same_bits(model, x, backend, steps=1):
    """Whether steps with recomputation give what as many without give. `model` is left as it was."""
    plain, again = copy.deepcopy(model), fused_resnet.recompute(copy.deepcopy(model))
    pairs = [(a, b) for _ in range(steps) for a, b in zip(results(plain, x, backend), results(again, x, backend), strict=True)]
    return all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in pairs)


@pytest.fixture
def made(monkeypatch):
    """The shapes of what was made again."""
    found = []
    original = recompute._as_in_forward

    def watched(make, read):
        tensor = original(make, read)
        found.append(tuple(tensor.shape))
        return tensor

    monkeypatch.setattr(recompute, "_as_in_forward", watched)
    return found


# ---- the same bits ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("backend, dtype", WAYS)
def test_bits_are_those_without_it(backend, dtype, made):
    """Bottlenecks and a basic block, a stride, groups, projections, blocks that begin with an activation and with a pending one."""
    assert same_bits(network(dtype=dtype), images(dtype), backend, steps=2 if backend == "eager" else 1)
    assert made


def test_bits_of_float16_under_autocast(made, on_device):
    """Weights are cast for forward; what is made again reads the cast that was saved."""
    model, x = Stage(Bottleneck(16, 4), Bottleneck(16, 4)), images(torch.float32, (2, 16, 4, 4))
    with torch.autocast(on_device.type, torch.float16):
        assert same_bits(model, x, "triton")
    assert len(made) == 4


FAULTS = {
    "the norm's bias is left out": ("activation", lambda self, raw: (raw * self.norm[2][:, None, None]).relu()),
    "the activation is not rectified": ("activation", lambda self, raw: raw * self.norm[2][:, None, None] + self.norm[3][:, None, None]),
    "y is that of no activation": ("output", lambda self, read: self.convolution(recompute.Source(torch.zeros_like(read)))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, monkeypatch):
    name, faulty = FAULTS[fault]
    monkeypatch.setattr(recompute._Maker, name, faulty)
    assert not same_bits(network(), images(), "eager")


def test_the_forwards_kernels_and_tiles_make_it_again():
    """The block boundary's convolution is tiled for its residual, and is then of an activation that exists: in the same tiles.

    Recorded in the order in which they run; statistics are asked for in the forward alone.
    """
    seen = []
    original = traffic._of_launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traffic, "_of_launch", lambda launch: seen.append(launch) or original(launch))
        traffic.training_step(lambda: fused_resnet.recompute(fused_resnet.models.resnet50()), (8, 3, 224, 224), torch.bfloat16, "triton")
    fprops = [launch for launch in seen if "fprop" in launch.kernel.__name__]
    forward = [launch for launch in fprops if launch.arguments["mean_ptr"] is not None]
    again = [launch for launch in fprops if launch.arguments["mean_ptr"] is None]
    assert len(forward) == 53 and len(again) == 32

    def how(launch):
        blocks = [launch.arguments[f"BLOCK_{axis}"] for axis in "MNK"]
        return [launch.arguments["weight_ptr"].data_ptr(), *blocks, launch.warps, launch.stages, launch.arguments["WHOLE_STEPS"]]

    known = [how(launch) for launch in forward]
    assert all(how(launch) in known for launch in again)
    boundary = {launch.arguments["weight_ptr"].data_ptr() for launch in forward if launch.arguments["residual_ptr"] is not None}
    assert sum(launch.arguments["weight_ptr"].data_ptr() in boundary for launch in again) == 15
    assert all(launch.arguments["scale_ptr"] is None for launch in again if launch.arguments["weight_ptr"].data_ptr() in boundary)


# ---- memory -------------------------------------------------------------------------------------------------------------


# ---- networks and blocks ------------------------------------------------------------------------------------------------


def preact_stage():
    return Stage(PreActBlock(8, 8), PreActBlock(8, 16, 2))


@pytest.mark.parametrize(
    "make", [lambda: plain20(num_classes=5), preact_stage, lambda: Stage(ConvBNAct2d(8, 8), BasicBlock(8, 8), Bottleneck(8, 2)), lambda: Bottleneck(8, 2)],
    ids=["plain20", "pre-activation", "behind a layer", "one block"],
)  # fmt: skip
@pytest.mark.parametrize("backend, dtype", WAYS[:2])
def test_other_networks_and_single_blocks(make, backend, dtype, made, on_device):
    model = make().to(dtype)
    x = images(dtype, (4, 3, 12, 12) if hasattr(model, "fc") else (4, 8, 6, 6))
    again = fused_resnet.recompute(copy.deepcopy(model))
    assert held(again, x, backend)[0] < held(model, x, backend)[0]
    assert same_bits(model, x, backend)
    assert made


def test_torchvisions_network_once_fused(torchvision_models, made):
    model = fused_resnet.fuse(torchvision_models.resnet18(num_classes=5).double())
    assert fused_resnet.recompute(model) is model
    blocks = [row for row in fused_resnet.report(model).rows if row.kind == "BasicBlock"]
    with fused_resnet.backend("eager"):
        fused = fused_resnet.report(model)
    assert len(blocks) == 8 and not any(row.recompute for row in blocks), "on a CPU PyTorch's modules run"
    assert [row.recompute for row in fused.rows if row.kind == "BasicBlock"] == [True] * 8
    assert "recomputes" in str(fused) and "recomputes" not in str(fused_resnet.report(fused_resnet.recompute(copy.deepcopy(model), False)))
    x = images(size=(2, 3, 32, 32))
    assert same_bits(fused_resnet.recompute(copy.deepcopy(model), False), x, "eager")
    assert len(made) == 2 * 8, "y1 and the activation behind it, of eight blocks"
    assert not any("recompute" in vars(m) for m in fused_resnet.unfuse(model).modules())


def test_timms_network_once_fused(made):
    timm = pytest.importorskip("timm")
    model = fused_resnet.fuse(timm.create_model("resnet26d", num_classes=5).double())
    assert same_bits(model, images(size=(2, 3, 32, 32)), "eager")
    assert made


def test_only_this_instance():
    model = network()
    other = copy.deepcopy(model)
    assert fused_resnet.recompute(model.layer1[0]) is model.layer1[0]
    assert [b.recompute for stage in model.stages() for b in stage] == [True, False, False, False]
    fused_resnet.recompute(fused_resnet.recompute(model), enabled=False)
    assert not any(b.recompute for m in (model, other) for stage in m.stages() for b in stage)


def test_arguments_that_can_not_be_used_are_named(torchvision_models):
    with pytest.raises(TypeError, match="^model: expected a torch.nn.Module; got int"):
        fused_resnet.recompute(3)
    with pytest.raises(TypeError, match="^enabled: expected True or False; got 'yes'"):
        fused_resnet.recompute(network(), "yes")
    for model in (nn.Linear(2, 2), ConvBNAct2d(3, 3), torchvision_models.resnet18()):
        with pytest.warns(UserWarning, match=f"{type(model).__name__} has no fused block of two convolutions or more"):
            fused_resnet.recompute(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fused_resnet.recompute(model, enabled=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_keep_the_switch(how, tmp_path):
    model = fused_resnet.recompute(network())
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "x.pt")
        other = torch.load(tmp_path / "x.pt", weights_only=False)
    assert all(b.recompute for stage in other.stages() for b in stage)
    assert model.state_dict().keys() == network().state_dict().keys()


# ---- training modes -----------------------------------------------------------------------------------------------------


def test_without_gradients_it_costs_nothing(monkeypatch, made):
    model, x = fused_resnet.recompute(network()), images()
    expected = copy.deepcopy(fused_resnet.recompute(copy.deepcopy(model), False))
    monkeypatch.setattr(recompute, "Recomputation", None)  # not even made
    for training in (True, False):
        with torch.no_grad(), fused_resnet.backend("eager"):
            assert torch.equal(model.train(training)(x), expected.train(training)(x))
    assert made == []


def test_norms_in_eval_mode(made):
    assert same_bits(network().eval(), images(), "eager")
    assert made


@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
def test_a_compiler_keeps_what_it_likes(engine, made):
    """One graph, nothing of ours in it, the same gradients."""
    torch._dynamo.reset()
    plain, x = network(), images()
    again, counter = fused_resnet.recompute(copy.deepcopy(plain)), CompileCounterWithBackend(engine)
    compiled = torch.compile(again, fullgraph=True, backend=counter)
    loss_of(compiled, x, "eager").backward()
    loss_of(plain, x, "eager").backward()
    assert counter.frame_count == 1 and made == []
    for p, q in zip(again.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()


@pytest.mark.parametrize("what", ["blocks", "stages", "network"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(what, reentrant, made):
    """The bits of checkpoints without it. Without reentry PyTorch's hooks are around, which see all that they saw."""

    class Checkpointed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            model = self.model
            if what == "network":
                return checkpoint(model, x, use_reentrant=reentrant)
            x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
            for stage in model.stages():
                for part in stage if what == "blocks" else [stage]:
                    x = checkpoint(part, x, use_reentrant=reentrant)
            return model.fc(model.avgpool(x).flatten(1))

    model, x = Checkpointed(network()), images()
    again = fused_resnet.recompute(copy.deepcopy(model))
    with fused_resnet.backend("eager"):  # around the backward as well
        assert held(again, x)[0] == held(model, x)[0], "a checkpoint holds what it held"
        assert same_bits(model, x, "eager")
    assert bool(made) == reentrant


def test_other_hooks_on_saved_tensors_see_what_they_saw(made):
    with save_on_cpu():
        assert same_bits(network(), images(), "eager")
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert same_bits(network(), images(), "eager")
    assert made == []


def test_a_graph_that_is_kept_goes_backward_again(made):
    model, x = fused_resnet.recompute(network()), images()
    loss = loss_of(model, x, "eager")
    found = []
    for keep in (True, True, False):
        model.zero_grad()
        loss.backward(retain_graph=keep)
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    assert len(made) == 3 * 14
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_backward_of_a_part_and_then_of_the_whole():
    """The gradients of one convolution alone, whose block's first nodes never run, and then all."""
    plain, x = network(), images()
    again = fused_resnet.recompute(copy.deepcopy(plain))
    found = []
    for model in (plain, again):
        loss = loss_of(model, x, "eager")
        parts = [torch.autograd.grad(loss, m.weight, retain_graph=True)[0] for m in (model.layer1[1].conv3, model.layer1[1].conv2)]
        loss.backward()
        found.append([*parts, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_double_backward_is_refused():
    model = fused_resnet.recompute(network())
    x = images().requires_grad_()
    with fused_resnet.backend("eager"):
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r'double backward is not supported.*backend\("off"\)'):
        g.square().sum().backward()


def test_what_was_changed_in_place_is_an_error():
    """As autograd says it of a tensor that no hook has been asked about: a weight, and the activation that is read again."""
    for change in (lambda model, x: model.layer1[1].conv2.weight.mul_(2), lambda model, x: model.layer1[1].bn1.weight.mul_(2)):
        model, x = fused_resnet.recompute(network()), images()
        loss = loss_of(model, x, "eager")
        with torch.no_grad():
            change(model, x)
        with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
            loss.backward()
    block = fused_resnet.recompute(Bottleneck(8, 2).double())
    x = images(size=(4, 8, 6, 6)).to(memory_format=torch.channels_last)
    loss = loss_of(block, x, "eager")
    x.add_(1)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ["eager", "passes_triton", "triton"])
def test_a_backward_under_autocast_makes_what_the_forward_made(backend, on_device):
    """float32 forward; autocast is on, and another backend in force, when backward runs."""
    plain, x = network(dtype=torch.float32), images(torch.float32)
    again, found = fused_resnet.recompute(copy.deepcopy(plain)), []
    for model in (plain, again):
        loss = loss_of(model, x, backend)
        with torch.autocast(on_device.type, torch.bfloat16), fused_resnet.backend("off"):
            loss.backward()
        found.append([p.grad for p in model.parameters()])
    equal = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert equal


def test_the_autocast_test_sees_a_cast(monkeypatch, on_device):
    monkeypatch.setattr(recompute, "_as_in_forward", lambda make, read: make(read))
    with pytest.raises((AssertionError, RuntimeError)):
        test_a_backward_under_autocast_makes_what_the_forward_made("eager", on_device)


def test_a_hook_on_an_inner_module_leaves_its_block_to_pytorch(made):
    """The other blocks make theirs again."""
    plain, seen = network(), []
    plain.layer1[1].bn2.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    assert same_bits(plain, images(), "eager")
    assert len(seen) == 2 and (4, 8, 5, 5) in made
    with fused_resnet.backend("eager"):
        rows = {row.name: row.recompute for row in fused_resnet.report(fused_resnet.recompute(plain)).rows}
    assert not rows["layer1.1"] and rows["layer1.0"]


def test_statistics_are_taken_once(monkeypatch):
    counts = []
    original = BACKENDS["eager"].batch_stats
    monkeypatch.setattr(BACKENDS["eager"], "batch_stats", lambda *args: counts.append(1) or original(*args))
    results(fused_resnet.recompute(network()), images(), "eager")
    assert len(counts) == sum(isinstance(m, nn.BatchNorm2d) for m in network().modules())


# ---- what runs on top ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["passes", "triton"])
def test_the_designs_by_hand(name):
    """resnet18, whose blocks have one inner output, of the block's own shape; two images, 2 bytes."""
    net = roofline.resnet("resnet18", 2)
    plain, again = (roofline.DESIGNS[name + suffix] for suffix in ("", ", recompute"))
    inner = [block.branch[0].conv for block in net.blocks]
    values = 2 * 2 * (64 * 56**2 + 128 * 28**2 + 256 * 14**2 + 512 * 7**2)
    kinds = 2 if name == "passes" else 1
    assert roofline.saved_bytes(net, plain) - roofline.saved_bytes(net, again) == 2 * values * kinds
    steps = [roofline.training_step(net, design) for design in (plain, again)]
    assert roofline.total_flops(steps[1]) - roofline.total_flops(steps[0]) == sum(conv.flops for conv in inner)
    read = 2 * 2 * (64 * 56**2 * 2 + 64 * 56**2 + 128 * 28**2 + 128 * 28**2 + 256 * 14**2 + 256 * 14**2 + 512 * 7**2)
    weights = 2 * 9 * (2 * 64**2 + 64 * 128 + 128**2 + 128 * 256 + 256**2 + 256 * 512 + 512**2)
    expected = read + weights + 2 * values + (2 * 2 * values if name == "passes" else 0)
    assert roofline.total_bytes(steps[1]) - roofline.total_bytes(steps[0]) == expected
    assert len(steps[1]) - len(steps[0]) == 8 * kinds


def test_the_table_of_the_documents_is_what_is_counted():
    document = (ROOT / "docs" / "training-modes.md").read_text(encoding="utf-8")
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in document.splitlines() if line.count("|") == 7]
    found = {row[0].replace("`", ""): [*row[1:5], row[5].partition(":")[0]] for row in rows if row[4].isdecimal()}
    net, expected = roofline.resnet("resnet50", 256), {}
    for name in ("eager", "passes", "passes, recompute", "triton", "triton, recompute"):
        kernels = roofline.training_step(net, roofline.DESIGNS[name])
        saved, moved = (f"{b / 256 / 1e6:.1f}" for b in (roofline.saved_bytes(net, roofline.DESIGNS[name]), roofline.total_bytes(kernels)))
        flops = f"{roofline.total_flops(kernels) / 256 / 1e9:.1f} G"
        expected[name] = [saved, moved, flops, str(len(kernels)), f"{256 / roofline.floor_seconds(kernels, 8e14, 3e12):,.0f}"]
    assert found == expected


TRAIN = (
    "train",
    "--model",
    "resnet20",
    "--epochs",
    "1",
    "--batch-size",
    "8",
    "--limit-train",
    "16",
    "--limit-eval",
    "8",
    "--device",
    "cpu",
    "--no-progress",
)


def test_train_recomputes(tmp_path, made):
    """`--recompute`: the same weights; it may come and go when a run is resumed, and the others' backends have no use for it."""
    for folder, more in (("plain", ()), ("again", ("--recompute",))):
        assert main([*TRAIN, "--backend", "eager", "--out", str(tmp_path / folder), *more]) == 0
        assert bool(made) == (folder == "again")
    states = [torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True) for folder in ("plain", "again")]
    assert all(torch.equal(a, b) for a, b in zip(*(state["model"].values() for state in states), strict=True))
    assert states[1]["config"] == states[0]["config"] | {"recompute": True}
    assert main(["train", "--resume", str(tmp_path / "again"), "--backend", "eager", "--device", "cpu", "--no-progress"]) == 0


def test_train_without_the_operators_has_no_use_for_it(tmp_path, capsys):
    assert main([*TRAIN, "--backend", "off", "--out", str(tmp_path / "x"), "--recompute"]) == 2
    assert "argument --recompute: PyTorch's own modules keep what they need" in capsys.readouterr().err


@pytest.mark.parametrize("impl", ["ours:recompute", "ours:triton_recompute"])
def test_the_benchmarks_have_it(impl, device):
    subject = Subject("small", lambda: network(dtype=torch.float32), SIZE[1:])
    step = TrainingStep(subject, impl, torch.float32, 4, device)
    assert all(block.recompute for stage in step.module.stages() for block in stage)
    block = Subject("block", lambda: Bottleneck(8, 2), (8, 6, 6))
    assert BlockStep(block, impl, torch.float32, 2, device).module.recompute
    assert not TrainingStep(subject, "ours", torch.float32, 4, device).module.layer1[0].recompute


def test_inference_has_nothing_to_make_again(capsys):
    assert main(["bench", "inference", "--impl", "ours:recompute", "--device", "cpu", "--commit", "c0ffee"]) == 2
    assert "in the suite inference; got 'ours:recompute'" in capsys.readouterr().err
