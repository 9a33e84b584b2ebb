"""What a step does: schedules, LARS, accumulation, clipping, mixtures, the moving average, zero γ."""

import warnings
from dataclasses import replace

import pytest
import torch
from support.trainings import CONFIG, CPU, one_thread, resumed, same_states, small, tiny_data, trainer, undrawn, without_times
from torch import nn
from torch.optim import lr_scheduler

from fused_resnet.models import PreActBlock, get_model
from fused_resnet.train import SettingError, TrainConfig, Trainer, run
from fused_resnet.train.augment import BatchAugmentation
from fused_resnet.train.optimizer import learning_rate, make_optimizer, zero_gammas

pytestmark = pytest.mark.usefixtures(one_thread.__name__, undrawn.__name__)

# ---- schedules and optimizers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "scheduler"),
    [
        (dict(warmup_epochs=0), lambda o: lr_scheduler.CosineAnnealingLR(o, 40)),
        (dict(schedule="step", warmup_epochs=0, milestones=(3, 4.5), gamma=0.3), lambda o: lr_scheduler.MultiStepLR(o, [15, 22], 0.3)),
        (dict(schedule="one-cycle", warmup_epochs=2), lambda o: lr_scheduler.OneCycleLR(o, 0.4, 40, pct_start=0.25, cycle_momentum=False)),
    ],
    ids=["cosine", "step", "one-cycle"],
)
def test_schedules_are_pytorchs(config, scheduler):
    config = TrainConfig(epochs=8, lr=0.4, **config)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    theirs, expected = scheduler(optimizer), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no optimizer steps here
        for _ in range(40):
            expected.append(optimizer.param_groups[0]["lr"])
            theirs.step() if len(expected) < 40 else None
    assert [learning_rate(config, step, 5) for step in range(40)] == pytest.approx(expected, abs=1e-12)


def test_steps_of_the_rate_warm_up_too():
    config = TrainConfig(epochs=4, lr=0.4, schedule="step", warmup_epochs=1, milestones=(2,))
    assert [learning_rate(config, step, 4) for step in (0, 1, 3, 4, 7, 8)] == pytest.approx([0.1, 0.2, 0.4, 0.4, 0.4, 0.04])


def test_lars_adapts_weights_alone():
    """You et al. 2017: the step of a weight is lr·0.001·|w| / (|g| + decay·|w|) along g + decay·w. Norms, without decay, take SGD's."""
    pytest.importorskip("timm")
    model = small().model
    config = TrainConfig(optimizer="lars", lr=0.5, momentum=0.0, weight_decay=0.01, decay_norms=False)
    optimizer = make_optimizer(model, config, CPU)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(4, 1, 12, 12)).square().sum().backward()
    optimizer.step()
    for p, w in zip(model.parameters(), before, strict=True):
        g, ratio = p.grad, 1.0
        if p.dim() > 1:
            ratio = 0.001 * w.norm() / (g.norm() + 0.01 * w.norm() + 1e-8)
            g = g + 0.01 * w
        torch.testing.assert_close(p.detach(), w - 0.5 * ratio * g, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("change", [dict(optimizer="lars"), dict(nesterov=True), dict(ema=0.8, ema_every=3), dict(mixup=0.4, cutmix=1.0, erasing=0.5), dict(accumulate=2, clip_norm=0.5, precision="fp16"), dict(schedule="one-cycle")], ids=lambda change: next(iter(change)))  # fmt: skip
def test_a_run_goes_on_within_an_epoch_with_the_same_bits(tmp_path, change):
    if change.get("optimizer") == "lars":
        pytest.importorskip("timm")
    config = replace(CONFIG, warmup_epochs=0.5, **change)
    straight = small(config)
    history = straight.run_epoch(progress=False), straight.run_epoch(progress=False)

    def leave(step, steps):
        if step == 3:
            raise KeyboardInterrupt

    parts = small(config)
    parts.run_epoch(progress=False)
    with pytest.raises(KeyboardInterrupt):
        parts.run_epoch(False, leave)
    state = parts.state()
    taken_up = small(config)
    torch.rand(7)
    taken_up.load_state(state)
    taken_up.run_epoch(progress=False)
    assert without_times(taken_up.history) == without_times(history)
    a, b = straight.state(), taken_up.state()
    assert all(same_states(a[key], b[key]) for key in ("model", "ema", "optimizer", "scaler", "rng"))


# ---- parts of a batch, clipping --------------------------------------------------------------------------------------


def gradients(trained: Trainer, images, labels) -> list[torch.Tensor]:
    """Those that the optimizer saw."""
    seen = []
    trained.optimizer.register_step_pre_hook(lambda *args: seen.extend(p.grad.clone() for p in trained.model.parameters()))
    trained.step(images, labels, 0.1)
    return seen


def plain(config: TrainConfig) -> Trainer:
    """Without norms and dropout: a batch is then the mean of its images."""
    torch.manual_seed(0)
    return Trainer(nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 4)), tiny_data(), config, CPU)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_parts_make_the_batch(precision):
    images, labels = next(plain(CONFIG).train_loader.batches(0))
    whole, parts = (plain(replace(CONFIG, accumulate=n, precision=precision)) for n in (1, 4))
    assert whole.step(images, labels, 0.0)[0].item() == pytest.approx(parts.step(images, labels, 0.0)[0].item(), rel=1e-3)
    scale = 1 if precision == "fp32" else whole.scaler.get_scale()
    for a, b in zip(gradients(whole, images, labels), gradients(parts, images, labels), strict=True):
        torch.testing.assert_close(
            a / scale, b / scale, rtol=1e-5 if precision == "fp32" else 0.02, atol=1e-7 if precision == "fp32" else 1e-4
        )
    assert torch.equal(whole.step(images, labels, 0.0)[1].argmax(1), parts.step(images, labels, 0.0)[1].argmax(1)), "in their order"


def test_each_part_has_statistics_of_its_own():
    trained = small(replace(CONFIG, accumulate=2))
    images, labels = next(trained.train_loader.batches(0))
    trained.step(images, labels, 0.0)
    conv, norm = trained.model[0], trained.model[1]
    mean = torch.zeros(8)
    for part in images.chunk(2):
        mean = 0.9 * mean + 0.1 * conv(part).mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, mean.detach())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_are_clipped_together(precision):
    images, labels = next(plain(CONFIG).train_loader.batches(0))
    free, bound, loose = (
        gradients(plain(replace(CONFIG, precision=precision, clip_norm=clip)), images, labels) for clip in (None, 0.01, 1e6)
    )
    norm = lambda gs: torch.cat([g.flatten() for g in gs]).norm()  # noqa: E731
    assert norm(bound).item() == pytest.approx(0.01, rel=1e-3)
    for a, b in zip(bound, loose, strict=True):
        torch.testing.assert_close(a / norm(bound), b / norm(loose), rtol=1e-3, atol=1e-6)
    if precision == "fp32":
        assert same_states(free, loose)


# ---- mixtures --------------------------------------------------------------------------------------------------------


def batch(count: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.arange(1.0, count + 1)[:, None, None, None].expand(count, 3, 8, 8)
    return images.contiguous(memory_format=torch.channels_last), torch.arange(count) % 4


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_targets_are_the_shares_of_a_mixture(kind):
    pytest.importorskip("torchvision")
    images, labels = batch()
    mixed, targets = BatchAugmentation(TrainConfig(**{kind: 1.0}), 4)(images, labels, epoch=2, batch=5)
    assert mixed.is_contiguous(memory_format=torch.channels_last) and mixed.shape == images.shape and not torch.equal(mixed, images)
    own = targets.gather(1, labels[:, None])[:, 0]
    share = own[0].item()
    assert 0 < share < 1 and torch.allclose(targets.sum(1), torch.ones(16)) and torch.allclose(own, own[:1])
    expected = share * images.mean((1, 2, 3)) + (1 - share) * images.roll(1, 0).mean((1, 2, 3))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), expected)


def test_an_image_is_erased_for_itself():
    pytest.importorskip("torchvision")
    images, labels = batch(400)
    erased, same = BatchAugmentation(TrainConfig(erasing=0.25), 4)(images, labels, 0, 0)
    touched = (erased == 0).flatten(1).any(1)
    assert same is labels and 60 < touched.sum() < 140 and torch.equal(erased[~touched], images[~touched])
    assert len({tuple(image.eq(0).flatten().nonzero().flatten().tolist()) for image in erased[touched]}) > 20


def test_mixtures_depend_on_seed_epoch_batch_and_process_alone():
    pytest.importorskip("torchvision")
    images, labels = batch()
    config = TrainConfig(mixup=0.2, cutmix=1.0, erasing=0.3)
    state = torch.get_rng_state()
    first = BatchAugmentation(config, 4)(images, labels, 1, 2)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    assert same_states(first, BatchAugmentation(config, 4)(images, labels, 1, 2))
    others = [BatchAugmentation(config, 4, 1)(images, labels, 1, 2), BatchAugmentation(replace(config, seed=1), 4)(images, labels, 1, 2)]
    others += [BatchAugmentation(config, 4)(images, labels, *place) for place in ((2, 1), (1, 3), (0, 2))]
    assert not any(same_states(first, other) for other in others)
    assert BatchAugmentation(CONFIG, 4)(images, labels, 0, 0)[0] is images


def test_training_accuracy_of_a_mixture_is_that_of_its_larger_part():
    trained = plain(replace(CONFIG, epochs=1))
    trained.augment = lambda images, labels, epoch, batch: (
        images,
        0.6 * nn.functional.one_hot((labels + 1) % 4, 4) + 0.4 * nn.functional.one_hot(labels, 4),
    )
    for layer in trained.model[1], trained.model[3]:
        nn.init.zeros_(layer.weight)
    trained.model[3].bias.data = torch.tensor([1.0, 0, 0, 0])
    trained.step = lambda images, targets, lr, step=trained.step: step(images, targets, 0.0)
    assert trained.train_epoch(progress=False)["train_accuracy"] == 0.25


# ---- the moving average ----------------------------------------------------------------------------------------------


def test_the_average_is_that_of_parameters_and_buffers():
    """decay·average + (1 − decay)·model every second step; in the warm-up, of 3 steps, the network itself."""
    config = replace(CONFIG, ema=0.8, ema_every=2, warmup_epochs=0.75)
    trained, step, expected, seen = small(config), 0, None, []

    def follow(*args):
        nonlocal step, expected
        step += 1
        if step % 2 == 0:
            now = {name: value.clone() for name, value in trained.model.state_dict().items()}
            # The first update behind the warm-up copies as well: there is no average before it but the network.
            expected = now if expected is None else {name: 0.8 * expected[name] + 0.2 * now[name] for name in now}
            seen.append(step)

    real = trained._average
    trained._average = lambda number: (real(number), follow())
    for _ in range(2):
        trained.run_epoch(progress=False)
    assert seen == [2, 4, 6, 8]
    found = trained.ema.module.state_dict()
    for name, value in expected.items():
        if found[name].is_floating_point():
            torch.testing.assert_close(found[name], value)
    assert not torch.allclose(found["0.weight"], trained.model[0].weight) and not torch.allclose(
        found["1.running_mean"], trained.model[1].running_mean
    )


def test_the_average_is_evaluated():
    trained = small(replace(CONFIG, ema=0.9, warmup_epochs=0))
    trained.train_epoch(progress=False)
    found, average = trained.evaluate()["eval_loss"], trained.ema.module
    trained.ema = None
    assert found != trained.evaluate()["eval_loss"]
    trained.model = average
    assert found == trained.evaluate()["eval_loss"]
    assert not any(p.requires_grad for p in trained.model.parameters())


def test_a_checkpoint_of_an_average_is_checked(tmp_path):
    run(small(replace(CONFIG, ema=0.9)), tmp_path, stop_after=1, progress=False)
    taken_up = resumed(tmp_path, small)
    assert same_states(taken_up.ema.state_dict(), torch.load(tmp_path / "checkpoint.pt", weights_only=True)["ema"])
    state = taken_up.state()
    state["ema"] = {**state["ema"], "module.0.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"ema: model: module\.0\.weight: expected float32"):
        small(replace(CONFIG, ema=0.9)).load_state(state)


# ---- zero γ ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "resnet50"])
def test_with_zero_gammas_a_block_begins_as_its_shortcut(name):
    model = get_model(name)
    zero_gammas(model)
    block = model.layer1[1].eval()
    x = torch.randn(2, block.conv1.in_channels, 4, 4).relu()
    torch.testing.assert_close(block(x), x)
    zeros = [key for key, p in model.named_parameters() if not p.any() and key.endswith("weight")]
    assert len(zeros) == {"resnet20": 9, "resnet18": 8, "resnet50": 16}[name]


def test_zero_gammas_of_other_libraries(torchvision_models):
    ours, theirs = get_model("resnet50"), torchvision_models.resnet50()
    zero_gammas(theirs)
    zero_gammas(ours)
    names = [[key for key, p in model.named_parameters() if key.endswith("weight") and not p.any()] for model in (ours, theirs)]
    assert names[0] == names[1]
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_resnet", zero_init_last=False)
    expected = timm.create_model("test_resnet", zero_init_last=True)
    zero_gammas(model)
    assert [not p.any() for p in model.parameters()] == [not p.any() for p in expected.parameters()]


def test_without_residual_blocks_zero_gammas_are_refused():
    for model in get_model("plain20"), nn.Sequential(PreActBlock(4, 4)), small().model:
        with pytest.raises(SettingError, match="zero_gamma: expected a network of residual blocks"):
            zero_gammas(model)
    assert not trainer(replace(CONFIG, zero_gamma=True)).model.layer1[0].bn2.weight.any()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_graphs_train_as_without(precision):
    trainings = []
    for graph in (False, True):
        torch.manual_seed(0)
        config = replace(CONFIG, cuda_graph=graph, precision=precision)
        trained = Trainer(get_model("resnet20", num_classes=4, in_channels=1), tiny_data(), config, torch.device("cuda"))
        for _ in range(2):
            trained.run_epoch(progress=False)
        trainings.append(trained)
    a, b = (trained.history for trained in trainings)
    assert [r["train_loss"] for r in a] == pytest.approx([r["train_loss"] for r in b], rel=1e-2)
    for name, value in trainings[0].model.state_dict().items():
        torch.testing.assert_close(value.double(), trainings[1].model.state_dict()[name].double(), rtol=0.05, atol=0.02)
