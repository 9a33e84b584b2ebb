"""The scripts of examples/ and the recipes of docs/drop-in.md run: two steps of each."""

import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch

import fused_resnet

ROOT = Path(__file__).resolve().parents[1]


def load(name: str):
    """A script of examples/, as a module."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize(("name", "model"), [("train_loop", "resnet20"), ("train_torchvision", "resnet18"), ("train_timm", "test_resnet")])
def test_two_steps(name, model, backend, torchvision_models):
    """By the operators the losses are those of PyTorch's modules."""
    arguments = ["--model", model, "--steps", "2", "--batch", "4", "--image", "64", "--classes", "5"]
    with fused_resnet.backend("off"):
        expected = load(name).main(arguments)
    with fused_resnet.backend(backend):
        losses = load(name).main(arguments)
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    assert losses == pytest.approx(expected, rel=1e-3)


def recipes() -> dict[str, str]:
    """heading -> code of the recipes in docs/drop-in.md."""
    text = (ROOT / "docs" / "drop-in.md").read_text(encoding="utf-8").partition("## Recipes")[2].partition("\n## ")[0]
    return dict(re.findall(r"^### (.+?)\n.*?```python\n(.*?)```", text, re.MULTILINE | re.DOTALL))


RUN = ["A plain loop", "A detection backbone", "A segmentation network", "Features by name", "A network of your own"]


def test_every_recipe_is_run_or_says_that_it_is_not():
    assert set(recipes()) == {*RUN, "DistributedDataParallel", "Lightning"}


@pytest.mark.parametrize("heading", RUN)
def test_recipe(heading, torchvision_models):
    torch.manual_seed(0)
    names = {"images": torch.randn(4, 3, 64, 64), "labels": torch.randint(10, (4,))}
    with fused_resnet.backend("eager"):
        exec(compile(recipes()[heading], heading, "exec"), names)


def test_lightning_recipe_is_a_module_of_its_own_shape():
    """Lightning is not at hand; its recipe is at least Python that constructs what it says, on a stand-in."""
    code = recipes()["Lightning"]
    compile(code, "Lightning", "exec")
    assert "fused_resnet.fuse(" in code
