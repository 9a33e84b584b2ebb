"""Recipes: what they say, what overrides them, and that each trains."""

import json

import pytest
import torch
from support.checkout import ROOT
from support.commands import refused
from support.trainings import one_thread, undrawn

from fused_resnet.cli import main
from fused_resnet.train import CHECKPOINT, METRICS, TrainConfig, load_recipe, recipes
from fused_resnet.train.optimizer import learning_rate

pytestmark = pytest.mark.usefixtures(one_thread.__name__, undrawn.__name__)
STEPS = ("--epochs", "1", "--batch-size", "4", "--limit-train", "8", "--limit-eval", "4", "--device", "cpu", "--no-progress")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of images of two colours."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("pictures")
    for name, pixel in (("blue", (10, 20, 200)), ("red", (200, 20, 10))):
        (folder / name).mkdir()
        for i in range(10):
            image.new("RGB", (40 + i, 44), pixel).save(folder / name / f"{i}.png")
    return f"imagefolder:{folder}"


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_does_two_steps(tmp_path, pictures, name):
    """By the command, with its own settings but for the sizes."""
    recipe = load_recipe(name)
    size = (
        ("--data", "fashion-mnist-mini")
        if "data" in recipe
        else ("--data", pictures, "--image-size", "32", "--workers", "0", "--model", "resnet18")
    )
    if "train_size" in recipe:
        size += ("--train-size", "24", "--shorter-side", "36")
    if "ema_every" in recipe:
        size += ("--ema-every", "1")
    assert main(["train", "--recipe", name, *STEPS, *size, "--warmup-epochs", "0", "--out", str(tmp_path)]) == 0
    (record,) = (json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines())
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert record["step"] == 2
    changed = {option.removeprefix("--").replace("-", "_") for option in (*STEPS, *size) if option.startswith("--")} | {"warmup_epochs"}
    assert {
        key: value for key, value in recipe.items() if state["config"][key] != (tuple(value) if key == "milestones" else value)
    }.keys() <= changed
    assert bool(state["ema"]) == ("ema" in recipe)


def test_recipes_are_in_the_documents():
    page = ROOT / "docs" / "training.md"
    if not page.exists():
        pytest.skip("a source distribution holds no documents")
    assert len(recipes()) == 4 and all(f"| `{name}` |" in page.read_text(encoding="utf-8") for name in recipes())


def test_the_papers_schedule():
    """A tenth of the rate after 32,000 and 48,000 of 64,000 steps of 128 of 50,000 images."""
    config, steps = TrainConfig(**load_recipe("he2015-cifar10")), 50_000 // 128
    rates = [learning_rate(config, step, steps) for step in (0, 31_000, 33_000, 47_000, 49_000, 63_000)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert config.epochs * steps == pytest.approx(64_000, rel=0.001)


def test_torchvisions_moving_average():
    """Its formula: references/classification/train.py."""
    recipe = load_recipe("torchvision-v2")
    adjust = recipe["batch_size"] * recipe["ema_every"] / recipe["epochs"]
    assert recipe["ema"] == pytest.approx(1 - (1 - 0.99998) * adjust, abs=1e-6)


def written(tmp_path, text):
    (tmp_path / "mine.toml").write_text(text)
    return str(tmp_path / "mine.toml")


def test_options_override_a_file(tmp_path):
    mine = written(tmp_path, "lr = 1\nschedule = 'step'\nmilestones = [1, 2.5]\ndecay_norms = false\nseed = 7\n")
    out = tmp_path / "run"
    args = ["train", "--recipe", mine, *STEPS, "--lr", "0.02", "--seed", "9", "--norm-decay", "--warmup-epochs", "0", "--out", str(out)]
    assert main(args) == 0
    config = torch.load(out / CHECKPOINT, weights_only=True)["config"]
    assert (config["lr"], config["seed"], config["decay_norms"], config["milestones"]) == (0.02, 9, True, (1, 2.5))
    assert main([*args[:-1], str(tmp_path / "other"), "--schedule", "cosine"]) == 0, "milestones go with their schedule"
    assert torch.load(tmp_path / "other" / CHECKPOINT, weights_only=True)["config"]["milestones"] == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("label_smothing = 0.1", "mine.toml: unknown key 'label_smothing'; did you mean label_smoothing?"),
        ("x = 1", "mine.toml: unknown key 'x'; expected one of model, data, epochs"),
        ("lr = ", "mine.toml: expected a file of TOML ("),
        ("lr = 'high'", "argument --lr: expected a number; got 'high'"),
        ("milestones = [1, 'x']", "argument --milestones: expected numbers of epochs, above 0; got [1, 'x']"),
        ("milestones = [1]", "argument --milestones: expected numbers of epochs with the schedule step, and with no other; got [1]"),
        ("schedule = 'steps'", "argument --schedule: expected one of cosine, step, one-cycle; got 'steps'"),
        ("repeats = 2", "argument --repeats: expected none, since only imagefolder:PATH is decoded while it trains"),
    ],
)
def test_a_recipe_that_can_not_be_used_is_named(capsys, tmp_path, text, expected):
    assert expected in refused(capsys, "train", "--recipe", written(tmp_path, text), "--out", tmp_path / "run")


def test_a_recipe_that_is_not_there_is_named(capsys, tmp_path):
    line = refused(capsys, "train", "--recipe", "he2015-cifar100")
    assert f"argument --recipe: expected one of {', '.join(recipes())}, or a file NAME.toml; got 'he2015-cifar100'" in line
    assert line.endswith("did you mean he2015-cifar10?\n")
    assert "absent.toml: expected a file of TOML (" in refused(capsys, "train", "--recipe", tmp_path / "absent.toml")
    assert "argument --recipe: expected none beside --resume" in refused(
        capsys, "train", "--recipe", "he2015-cifar10", "--resume", tmp_path
    )


# ---- what computes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "backend", "compiled"),
    [
        (("--impl", "eager"), "off", False), (("--impl", "compile"), "off", True), (("--impl", "fused", "--backend", "eager"), "eager", False),
        (("--impl", "fused", "--backend", "eager", "--compile"), "eager", True),
    ],
)  # fmt: skip
def test_what_computes_can_be_named(monkeypatch, tmp_path, args, backend, compiled):
    made = []
    monkeypatch.setattr(torch, "compile", lambda model, mode: made.append(mode) or model)
    assert main(["train", *STEPS, *args, "--out", str(tmp_path)]) == 0
    assert made == ([None] if compiled else [])
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["config"]["backend"] == backend


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("--impl", "eager", "--compile"), "--impl: expected compile beside --compile; got eager"),
        (("--impl", "compile", "--backend", "eager"), "--impl: expected no --backend beside compile"),
        (
            ("--impl", "fused", "--backend", "off"),
            "--impl: expected no --backend beside fused, or one of this package's operators; got off",
        ),
        (("--impl", "fuse"), "--impl: expected one of eager, compile, fused; got 'fuse'; did you mean fused?"),
        (("--cuda-graph",), "--cuda-graph: expected one process with a GPU; got 1 with cpu"),
        (("--accumulate", "3"), "--batch-size: expected a multiple of the 1 processes and of the 3 parts that are accumulated; got 4"),
    ],
)
def test_what_can_not_compute_is_named(capsys, tmp_path, args, expected):
    assert f"argument {expected}" in refused(capsys, "train", *STEPS, *args, "--out", tmp_path)


def test_fused_is_refused_where_nothing_fused_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "off")
    assert "argument --impl: no operators of this package run on this cpu" in refused(
        capsys, "train", *STEPS, "--impl", "fused", "--out", tmp_path
    )
