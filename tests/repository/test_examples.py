"""The scripts of examples/ run, two steps of each, and so does Lightning's recipe. tests/repository/test_docs.py runs the other recipes."""

import math
from pathlib import Path

import pytest
import torch
from support.checkout import script
from support.recipes import run_recipe
from support.swapped import fused_rows

import fused_resnet


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize(("name", "model"), [("train_loop", "resnet20"), ("train_torchvision", "resnet18"), ("train_timm", "test_resnet")])
def test_two_steps(name, model, backend, torchvision_models):
    """By the operators the losses are those of PyTorch's modules."""
    arguments = ["--model", model, "--steps", "2", "--batch", "4", "--image", "64", "--classes", "5"]
    with fused_resnet.backend("off"):
        expected = script(f"examples/{name}.py").main(arguments)
    with fused_resnet.backend(backend):
        losses = script(f"examples/{name}.py").main(arguments)
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    assert losses == pytest.approx(expected, rel=1e-3)


@pytest.fixture
def lightning(torchvision_models):
    return pytest.importorskip("pytorch_lightning")


def fit(lightning, backend: str, folder: Path, **options):
    """Two steps of the recipe's module by a Trainer, on random images: (module, trainer, losses)."""

    class Losses(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            losses.append(outputs["loss"].item())

    losses = []
    torch.manual_seed(0)
    batches = torch.utils.data.DataLoader([(torch.randn(3, 64, 64), i % 10) for i in range(8)], batch_size=4)
    module = run_recipe("Lightning")["Classifier"]()
    quiet = dict(logger=False, enable_progress_bar=False, enable_checkpointing=False, default_root_dir=folder)
    trainer = lightning.Trainer(max_steps=2, accelerator="cpu", devices=1, callbacks=[Losses()], **quiet, **options)
    with fused_resnet.backend(backend):
        trainer.fit(module, batches)
    assert len(losses) == 2 and trainer.global_step == 2
    return module, trainer, losses


def test_lightning(lightning, tmp_path):
    """The losses and the weights of PyTorch's modules; a checkpoint that is loaded is fused, and the same."""
    expected, _, losses = fit(lightning, "off", tmp_path, precision="64-true")
    module, trainer, ours = fit(lightning, "eager", tmp_path, precision="64-true")
    assert ours == pytest.approx(losses, rel=1e-9)
    assert isinstance(module.model, torch.nn.Module) and len(fused_rows(module.model)) == 9
    for (name, a), b in zip(module.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=name)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = type(module).load_from_checkpoint(tmp_path / "x.ckpt")
    assert len(fused_rows(loaded.model)) == 9
    for name, a in loaded.state_dict().items():
        assert torch.equal(a.double(), module.state_dict()[name].float().double()), name  # a new module is float32


def test_lightning_in_mixed_precision(lightning, tmp_path):
    _, _, exact = fit(lightning, "off", tmp_path)
    module, _, losses = fit(lightning, "eager", tmp_path, precision="bf16-mixed")
    assert losses[0] == pytest.approx(exact[0], rel=0.02) and losses[0] != exact[0]
    assert {p.dtype for p in module.parameters()} == {torch.float32}
