"""Libraries that take a model from outside, on a fused network beside its plain twin: attributions, adapters, pruning, trainers, files."""

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from support.swapped import assert_same_step, fused_copy, fused_rows, shake
from torch import nn

import fused_resnet

#: In make test-all alone: make_venv.py --all-tests installs what they ask for.
pytestmark = pytest.mark.full


@pytest.fixture
def twins(torchvision_models) -> tuple[nn.Module, nn.Module]:
    """A residual network in float64 and its fused twin, in evaluation mode."""
    resnet = torchvision_models.resnet
    plain = shake(resnet.ResNet(resnet.BasicBlock, [2, 1, 1, 1], num_classes=5)).double().eval()
    return plain, fused_copy(plain)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, dtype=torch.float64)


@pytest.fixture(autouse=True)
def operators_run() -> Iterator[None]:
    """A network in float64 would run its own modules by itself, which shows nothing."""
    with fused_resnet.backend("eager"):
        yield


def assert_same_parameters(plain: nn.Module, fused: nn.Module) -> None:
    """After the same training: equal to float64's rounding, by key."""
    expected, found = plain.state_dict(), fused.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def batches(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images and classes."""
    draw = torch.Generator().manual_seed(5)
    return [(torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=draw), torch.randint(5, (4,), generator=draw)) for _ in range(count)]


@pytest.mark.parametrize("method", ["IntegratedGradients", "Saliency", "InputXGradient", "Occlusion", "GuidedBackprop", "Deconvolution"])
def test_captum_attributes_to_pixels(method, twins, images):
    attr = pytest.importorskip("captum.attr")
    options = dict(Occlusion=dict(sliding_window_shapes=(3, 16, 16), strides=(3, 16, 16)), IntegratedGradients=dict(n_steps=4))
    found = [getattr(attr, method)(model).attribute(images, target=2, **options.get(method, {})) for model in twins]
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-9)
    assert found[0].abs().max() > 0


@pytest.mark.parametrize("method", ["LayerGradCam", "LayerActivation", "LayerIntegratedGradients"])
@pytest.mark.parametrize("layer", ["layer1.0", "layer4", "conv1"])
def test_captum_attributes_to_layers(method, layer, twins, images):
    attr = pytest.importorskip("captum.attr")
    target = {} if method == "LayerActivation" else {"target": 2}
    found = [getattr(attr, method)(model, model.get_submodule(layer)).attribute(images, **target) for model in twins]
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-9)
    assert found[0].abs().max() > 0


@pytest.mark.parametrize("method", ["GradCAM", "GradCAMPlusPlus", "EigenCAM", "LayerCAM"])
def test_grad_cam(method, twins, images):
    cams = pytest.importorskip("pytorch_grad_cam")
    targets = [cams.utils.model_targets.ClassifierOutputTarget(c) for c in (0, 1, 2, 3)]
    found = []
    for model in twins:
        with getattr(cams, method)(model=model, target_layers=[model.layer2[-1]]) as cam:
            found.append(torch.from_numpy(cam(input_tensor=images, targets=targets)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert found[0].max() > 0


@pytest.mark.parametrize(("target", "rows"), [("fc", 6), (r".*conv2", 1), (r"layer[12].*conv[12]", 3)])
def test_peft_trains_adapters(target, rows, twins, images):
    """Of the classifier, whose blocks stay fused; of convolutions, which are then no convolutions alone. Merged, all are fused again."""
    peft = pytest.importorskip("peft")
    found = []
    for model in twins:
        torch.manual_seed(3)
        model = peft.get_peft_model(model.train(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=target, init_lora_weights=False))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for x, y in batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        found.append(model)
    assert_same_parameters(*found)
    assert len(fused_rows(found[1])) == rows
    merged = [model.merge_and_unload() for model in found]
    assert len(fused_rows(merged[1])) == 6
    merged[0].zero_grad(), merged[1].zero_grad()
    assert_same_step(*merged, images)


def test_accelerate_trains_and_resumes(twins, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    found = []
    for name, model in zip(("plain", "fused"), twins, strict=True):
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01, momentum=0.9)
        loader = torch.utils.data.DataLoader(batches(4), batch_size=None)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for step, (x, y) in enumerate(loader):
            if step == 2:  # what is loaded is what was saved, over weights that were lost
                accelerator.save_state(tmp_path / name)
                with torch.no_grad():
                    model.fc.weight.zero_()
                accelerator.load_state(tmp_path / name)
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        found.append(accelerator.unwrap_model(model))
    assert_same_parameters(*found)
    assert len(fused_rows(found[1])) == 6


def test_ignite_trains_and_evaluates(twins):
    engine, metrics = pytest.importorskip("ignite.engine"), pytest.importorskip("ignite.metrics")
    losses = []
    for model in twins:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        engine.create_supervised_trainer(model, optimizer, nn.CrossEntropyLoss()).run(batches(), max_epochs=2)
        evaluator = engine.create_supervised_evaluator(model, {"loss": metrics.Loss(nn.CrossEntropyLoss())})
        losses.append(evaluator.run(batches()).metrics["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert_same_parameters(*twins)


def test_skorch_fits_clones_and_pickles(twins):
    skorch, base = pytest.importorskip("skorch"), pytest.importorskip("sklearn.base")
    x, y = (torch.cat(parts).numpy() for parts in zip(*batches(), strict=True))
    found = []
    for model in twins:
        options = dict(max_epochs=2, lr=0.01, batch_size=4, train_split=None, verbose=0, iterator_train__shuffle=False)
        net = base.clone(skorch.NeuralNetClassifier(model, criterion=nn.CrossEntropyLoss, **options)).fit(x, y)
        again = pickle.loads(pickle.dumps(net))
        assert (again.predict_proba(x) == net.predict_proba(x)).all()
        found.append(net)
    assert found[1].predict_proba(x) == pytest.approx(found[0].predict_proba(x), rel=1e-7)
    assert_same_parameters(*(net.module_ for net in found))
    assert len(fused_rows(found[1].module_)) == 6


def test_metric_learning(twins):
    losses, miners = pytest.importorskip("pytorch_metric_learning.losses"), pytest.importorskip("pytorch_metric_learning.miners")
    for model in twins:
        optimizer, miner = torch.optim.SGD(model.train().parameters(), lr=0.01), miners.MultiSimilarityMiner()
        for x, _ in batches():
            y, embeddings = torch.tensor([0, 0, 1, 1]), model(x)
            optimizer.zero_grad()
            losses.TripletMarginLoss()(embeddings, y, miner(embeddings, y)).backward()
            optimizer.step()
    assert_same_parameters(*twins)


def test_torch_pruning_takes_channels(twins, images):
    """Whole channels, by a graph of what depends on what; the thinner blocks stay fused."""
    pruning = pytest.importorskip("torch_pruning")
    for model in twins:
        importance = pruning.importance.MagnitudeImportance(p=2)
        pruner = pruning.pruner.MagnitudePruner(model, images, importance, pruning_ratio=0.5, ignored_layers=[model.fc])
        pruner.step()
    plain, fused = twins
    assert plain.layer4[0].conv1.out_channels == fused.layer4[0].conv1.out_channels == 256
    assert len(fused_rows(fused)) == 6
    assert_same_step(plain.train(), fused.train(), images)


@pytest.mark.parametrize("structured", [False, True])
def test_prune_of_torch(structured, twins, images):
    """Weights under masks, computed by a hook before each forward, and the same made permanent."""
    from torch.nn.utils import prune

    for model in twins:
        for block in (model.layer1[0], model.layer3[0]):
            if structured:
                prune.ln_structured(block.conv1, "weight", amount=0.5, n=2, dim=0)
            else:
                prune.l1_unstructured(block.conv2, "weight", amount=0.5)
    plain, fused = (model.train() for model in twins)
    assert_same_step(plain, fused, images)
    for model in twins:
        for module in (model.layer1[0], model.layer3[0]):
            prune.remove(module.conv1 if structured else module.conv2, "weight")
        model.zero_grad()
    assert len(fused_rows(fused)) == 6
    assert_same_step(plain, fused, images)


@pytest.mark.parametrize("parametrization", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrizations(parametrization, twins, images):
    from torch.nn.utils import parametrizations, parametrize

    for model in twins:
        for convolution in (model.layer1[0].conv1, model.layer4[0].conv2):
            torch.manual_seed(4)
            getattr(parametrizations, parametrization)(convolution)
    plain, fused = (model.train() for model in twins)
    assert_same_step(plain, fused, images)
    for model in twins:
        for convolution in (model.layer1[0].conv1, model.layer4[0].conv2):
            parametrize.remove_parametrizations(convolution, "weight")
        model.zero_grad()
    assert len(fused_rows(fused)) == 6
    assert_same_step(plain, fused, images)


def test_safetensors(twins, images, tmp_path):
    """A plain network's file into a fused one, and back, strictly."""
    files = pytest.importorskip("safetensors.torch")
    plain, fused = twins
    for source, target in ((plain, fused), (fused, plain)):
        files.save_model(source, str(tmp_path / "weights.safetensors"))
        other = copy.deepcopy(target)
        shake(other)
        assert files.load_model(other, str(tmp_path / "weights.safetensors"), strict=True) == (set(), [])
        torch.testing.assert_close(other(images), plain(images), rtol=1e-9, atol=1e-9)
