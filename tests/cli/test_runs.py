"""`fused-resnet train` and `fused-resnet demo`: real processes for what they do, `main` in this process for what they refuse."""

import json
import resource
import types
from pathlib import Path

import pytest
import torch
from support.commands import SMALL, TINY, command, refused

from fused_resnet import backends, models
from fused_resnet.cli import arguments, demo, main
from fused_resnet.cli.comparison import compare_losses
from fused_resnet.train import BEST, CHECKPOINT, CURVES, METRICS, SUMMARY, Trainer
from fused_resnet.train import folder as run_folder


@pytest.fixture(scope="module")
def half_done(tmp_path_factory):
    """A folder in which a real process trained the first of two epochs."""
    folder = tmp_path_factory.mktemp("half")
    done = command("train", *SMALL, "--stop-after", 1, "--device", "cpu", "--out", folder)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 epochs are done" in done.stdout
    return folder


def test_resumed_process_ends_with_the_same_bits(tmp_path, half_done):
    straight = command("train", *SMALL, "--device", "cpu", "--out", tmp_path / "straight")
    assert straight.returncode == 0, straight.stderr
    parts = tmp_path / "parts"
    parts.mkdir()
    for name in (CHECKPOINT, METRICS):
        (parts / name).write_bytes((half_done / name).read_bytes())
    resumed = command("train", "--resume", parts, "--device", "cpu", "--no-progress")
    assert resumed.returncode == 0, resumed.stderr
    a, b = (torch.load(folder / CHECKPOINT, weights_only=True) for folder in (tmp_path / "straight", parts))
    assert a["epoch"] == b["epoch"] == 2
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    for i, state in a["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], b["optimizer"]["state"][i]["momentum_buffer"])
    records = [json.loads(line) for line in (parts / METRICS).read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2]
    assert sorted(path.name for path in parts.iterdir()) == sorted((BEST, CHECKPOINT, METRICS, SUMMARY, CURVES))
    assert (parts / CURVES).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_folder_with_a_run_is_not_written_over(capsys, half_done):
    before = (half_done / CHECKPOINT).read_bytes()
    line = refused(capsys, "train", *SMALL, "--out", half_done, "--device", "cpu")
    assert f"argument --out: expected a folder without a run; {half_done} has a {CHECKPOINT}" in line
    assert (half_done / CHECKPOINT).read_bytes() == before


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("--lr", "0.2"), "argument --lr: expected 0.1, with which the run was started; got 0.2"),
        (("--no-norm-decay",), "argument --norm-decay: expected True, with which the run was started; got False"),
        (("--epochs", "1"), "argument --epochs: expected at least 2, with which the run was started; got 1"),
        (("--model", "resnet32"), "argument --model: expected resnet20"),
    ],
)
def test_a_resumed_run_keeps_its_settings(capsys, half_done, args, expected):
    assert expected in refused(capsys, "train", "--resume", half_done, *args)


def test_what_a_run_was_started_with_is_kept_and_a_file_can_be_resumed(capsys, tmp_path):
    """The backend among it; more epochs; another folder."""
    first, other = tmp_path / "first", tmp_path / "other"
    assert main(["train", *TINY, "--backend", "eager", "--recompute", "--stop-after", "1", "--out", str(first)]) == 0
    assert f"go on with: fused-resnet train --resume {first}" in capsys.readouterr().out
    assert (
        main(["train", "--resume", str(first / CHECKPOINT), "--out", str(other), "--device", "cpu", "--epochs", "3", "--stop-after", "2"])
        == 0
    )
    assert "backend eager" in capsys.readouterr().out
    assert main(["train", "--resume", str(other), "--device", "cpu", "--backend", "off", "--no-recompute"]) == 0
    out = capsys.readouterr().out
    assert "backend off" in out and "3 of 3 epochs are done" in out and "go on with" not in out
    assert [len((folder / METRICS).read_text().splitlines()) for folder in (first, other)] == [1, 3]
    config = torch.load(other / CHECKPOINT, weights_only=True)["config"]
    assert (config["backend"], config["recompute"], config["epochs"]) == ("off", False, 3)
    line = refused(capsys, "train", "--resume", first, "--out", other)
    assert f"argument --out: {other}: expected a folder without a run" in line and "it has 3 epochs of a run" in line


def test_an_interrupted_run_says_how_it_goes_on(capsys, monkeypatch, tmp_path):
    def interrupted(self, progress, pause, real=Trainer.train_epoch):
        if self.epoch == last:
            raise KeyboardInterrupt
        return real(self, progress, pause)

    monkeypatch.setattr(Trainer, "train_epoch", interrupted)
    for last, expected in (
        (1, f"interrupted; go on with: fused-resnet train --resume '{tmp_path}/a b'"),
        (0, "interrupted; nothing was saved"),
    ):
        assert main(["train", *TINY, "--out", str(tmp_path / ("a b" if last else "c"))]) == 130
        assert capsys.readouterr().err == f"fused-resnet train: error: {expected}\n"


def test_a_batch_of_one_image_with_maps_of_one_pixel(capsys, tmp_path):
    size = ("--image-size", "32", "--batch-size", "1", "--limit-train", "1", "--limit-eval", "1", "--device", "cpu")
    line = refused(capsys, "train", "--model", "resnet18", "--data", "synthetic", *size, "--out", tmp_path / "run")
    assert "argument --batch-size: expected at least 2" in line and "a norm of resnet18 would see one value a channel" in line


def test_a_precision_that_a_cpu_has_no_instructions_for_is_said(monkeypatch):
    cpu = torch.device("cpu")
    assert arguments.slow_precision(cpu, "fp32") is None
    for name in ("fp16", "bf16"):
        for supported in (True, False):
            fake = types.SimpleNamespace(**{f"_is_mkldnn_{name}_supported": lambda supported=supported: supported})
            monkeypatch.setattr(torch.ops, "mkldnn", fake)
            assert (arguments.slow_precision(cpu, name) is None) == supported


def test_a_truncated_checkpoint_is_named(tmp_path, capsys, half_done):
    (tmp_path / CHECKPOINT).write_bytes((half_done / CHECKPOINT).read_bytes()[:-100])
    line = refused(capsys, "train", "--resume", tmp_path)
    assert f"argument --resume: {tmp_path / CHECKPOINT}: truncated, or not a checkpoint" in line


def test_a_checkpoint_of_another_network_is_named(tmp_path, capsys, half_done):
    state = torch.load(half_done / CHECKPOINT, weights_only=True)
    state["config"]["model"] = "resnet32"
    torch.save(state, tmp_path / CHECKPOINT)
    line = refused(capsys, "train", "--resume", tmp_path)
    assert "argument --resume: the checkpoint does not fit resnet32: model: missing in its state_dict: layer1.3.bn1.bias and " in line


def test_a_truncated_data_file_is_named(tmp_path):
    """In a real process: no traceback, one line."""
    data_file = tmp_path / "train-images-idx3-ubyte.gz"
    data_file.write_bytes(b"\x1f\x8b\x08\0\0")
    failed = command("train", "--data", "fashion-mnist", cwd=tmp_path, env={"FUSED_RESNET_DATA": str(tmp_path)})
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert f"argument --data: {data_file}: truncated" in failed.stderr


@pytest.mark.parametrize("name", ["train", "demo"])
def test_a_file_as_the_folder_is_refused(tmp_path, capsys, name):
    file = tmp_path / "file"
    file.write_text("mine")
    assert "argument --out: expected a folder" in refused(capsys, name, "--device", "cpu", "--out", file)
    assert file.read_text() == "mine"


def test_a_full_disk_ends_a_run_with_one_line(tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "replace_file", full)
    size = ("--epochs", "1", "--batch-size", "2", "--limit-train", "2", "--limit-eval", "2", "--device", "cpu")
    line = refused(capsys, "train", *size, "--out", tmp_path)
    assert f"argument --out: {tmp_path}: it can't be written: [Errno 28] No space left on device" in line


def test_a_disk_that_is_full_later_keeps_the_checkpoint_and_names_the_folder(tmp_path, capsys):
    """By the kernel: files may not be longer than the first checkpoint's half."""
    assert main(["train", *TINY, "--stop-after", "1", "--out", str(tmp_path)]) == 0
    before = (tmp_path / CHECKPOINT).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        line = refused(capsys, "train", "--resume", tmp_path, "--device", "cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"argument --resume: {tmp_path / CHECKPOINT}: the checkpoint could not be written: " in line
    assert "the one that was there is kept" in line and (tmp_path / CHECKPOINT).read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("backend", ["eager", "off"])
def test_train_uses_the_backend_that_it_is_told(capsys, monkeypatch, tmp_path, backend):
    asked = []
    network = models.CifarResNet
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda self, x: asked.append(backends.resolve(x.device, x.dtype)) or forward(self, x))
    size = ("--epochs", "1", "--batch-size", "2", "--limit-train", "2", "--limit-eval", "2")
    assert main(["train", *size, "--device", "cpu", "--backend", backend, "--out", str(tmp_path)]) == 0
    assert set(asked) == {backend}
    assert f"backend {backend}" in capsys.readouterr().out


def test_synthetic_images_train_an_imagenet_network(capsys, tmp_path):
    size = ("--epochs", "1", "--batch-size", "2", "--limit-train", "2", "--limit-eval", "2", "--image-size", "32")
    args = ["train", "--model", "resnet18", "--data", "synthetic", *size, "--device", "cpu", "--out", str(tmp_path)]
    assert main(args) == 0
    assert "resnet18 on synthetic: 2 training and 2 evaluation images" in capsys.readouterr().out


def test_demo_trains_compares_and_draws(tmp_path):
    folder = tmp_path / "demo"
    size = ("--epochs", 1, "--limit-train", 64, "--limit-eval", 32, "--device", "cpu", "--no-progress")
    done = command("demo", *size, "--out", folder)
    assert done.returncode == 0, done.stderr
    assert "PyTorch's own modules" in done.stdout
    taken = backends.resolve(torch.device("cpu"), torch.float32)
    assert f"fused_resnet, {'eager' if taken == 'off' else taken}" in done.stdout
    assert ("times that of PyTorch's own modules" in done.stdout) == (taken != "off")
    assert "They agree." in done.stdout
    assert max(map(len, done.stdout.split("time:")[0].splitlines())) <= 80
    picture = Path(done.stdout.split("picture: ")[1].strip())
    assert picture == (folder / CURVES).resolve()
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_demo_trains_fused_and_eager_in_turn(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "eager")
    monkeypatch.setattr(demo, "COMPARED_BATCH", 4)
    size = ["--epochs", "3", "--limit-train", "16", "--limit-eval", "8", "--device", "cpu", "--no-progress"]
    assert main(["demo", *size, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.split("time:")[0].splitlines())) <= 80
    records = {name: [json.loads(line) for line in (tmp_path / name / METRICS).read_text().splitlines()] for name in ("eager", "off")}
    assert [[r["epoch"] for r in found] for found in records.values()] == [[1, 2, 3]] * 2
    for ours, theirs in zip(*records.values(), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.05)
        ratio = ours["images_per_second"] / theirs["images_per_second"]
        line = next(line for line in out.splitlines() if line.startswith(f"{ours['epoch']}/3".rjust(7)))
        assert line.endswith(f"{ratio:7.2f}") and f"{theirs['train_loss']:.4f}" in line
    assert "times that of PyTorch's own modules\n(median of 2 epochs, " in out
    accuracies = [f"{100 * found[-1]['eval_accuracy']:.2f}%" for found in records.values()]
    tail = out.split("After the last epoch")[1]
    assert "fused_resnet, eager" in tail and all(accuracy in tail for accuracy in accuracies)
    assert not list(tmp_path.glob("*/lock"))


@pytest.mark.gpu
def test_demo_on_a_gpu_trains_and_times_both(tmp_path):
    size = ("--epochs", 1, "--limit-train", 128, "--limit-eval", 64, "--device", "cuda", "--no-progress")
    done = command("demo", *size, "--out", tmp_path / "demo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "They agree." in done.stdout
    assert "Milliseconds a training step" in done.stdout
    for name in ("passes", "off"):
        assert (tmp_path / "demo" / name / METRICS).exists()


def test_demo_fails_where_the_operators_do_not_agree(capsys, monkeypatch, tmp_path):
    right = backends.BACKENDS["eager"].norm_backward_apply

    def without_mean_correction(dz, y, mean, invstd, gamma, s1, s2):
        return right(dz, y, mean, invstd, gamma, torch.zeros_like(s1), s2)

    monkeypatch.setattr(backends.BACKENDS["eager"], "norm_backward_apply", without_mean_correction)
    monkeypatch.setattr(demo, "COMPARED_BATCH", 4)
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "off")
    size = ["--epochs", "1", "--limit-train", "16", "--limit-eval", "8", "--device", "cpu", "--no-progress"]
    assert main(["demo", *size, "--out", str(tmp_path)]) == 1
    assert "THEY DO NOT AGREE." in capsys.readouterr().out


def test_demo_does_not_write_over_a_run(capsys, half_done):
    assert "argument --out: expected a folder that is new or empty" in refused(capsys, "demo", "--out", half_done)


def test_a_nan_is_no_agreement():
    model = models.resnet20(in_channels=1)
    torch.nn.init.constant_(model.fc.bias, float("nan"))
    batch = (torch.randn(2, 1, 8, 8).to(memory_format=torch.channels_last), torch.tensor([0, 1]))
    assert not compare_losses(model, [batch], "eager", torch.float64).holds


def test_demo_settings_are_valid():
    assert demo.SETTINGS.model in models.list_models()


def test_one_line_begins_a_run_and_goes_on_with_it(capsys, tmp_path):
    """What a scheduler runs again."""
    line = ["train", *TINY, "--backend", "off", "--auto-resume", "--out", str(tmp_path)]
    assert main([*line, "--stop-after", "1"]) == 0 and "1 of 2 epochs are done" in capsys.readouterr().out
    assert main(line) == 0 and "2 of 2 epochs are done" in capsys.readouterr().out
    before = (tmp_path / CHECKPOINT).read_bytes()
    assert main(line) == 0 and "2 of 2 epochs are done" in capsys.readouterr().out, "nothing is left to do"
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert [json.loads(each)["epoch"] for each in (tmp_path / METRICS).read_text().splitlines()] == [1, 2]
    assert "argument --lr: expected 0.1, with which the run was started; got 0.2" in refused(capsys, *line, "--lr", "0.2")
    assert "argument --auto-resume: expected none beside --resume" in refused(capsys, "train", "--auto-resume", "--resume", tmp_path)
    (tmp_path / CHECKPOINT).write_bytes(before[:1000])
    assert f"argument --out: {tmp_path / CHECKPOINT}: truncated" in refused(capsys, *line)
