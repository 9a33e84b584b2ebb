"""Two processes on gloo, by torchrun, against one process with the whole batch. Each script in tests/distributed/ holds its own checks."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import CUDA
from support.checkout import ROOT
from support.trainings import same_states, without_times

from fused_resnet import data
from fused_resnet.cli import main

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no distributed package")


def environment(**more: str) -> dict[str, str]:
    """Of processes that find this checkout, each with one thread."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def torchrun(*command: str, processes: int = 2, **more: str) -> str:
    """What the processes printed; the test fails with it where one of them did."""
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *command],
        env=environment(**more),
        capture_output=True, text=True, timeout=500, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-10000:]
    return result.stdout


@pytest.mark.parametrize(
    "script", ["ddp", "sync_bn", pytest.param("recompute", marks=pytest.mark.full), pytest.param("fsdp", marks=pytest.mark.slow)]
)
def test_two_processes_train_as_one(script, seed):
    torchrun(str(ROOT / "tests" / "distributed" / f"{script}.py"), str(seed))


@pytest.mark.parametrize("script", ["structured", *(pytest.param(s, marks=pytest.mark.full) for s in ("recipe", "fused", "fsdp1"))])
def test_networks_of_other_libraries(script, torchvision_models, seed):
    """The recipe of docs/drop-in.md; what FSDP2 and convert_sync_batchnorm make of a fused network; FSDP1; networks that are known by their
    structure. On CPUs."""
    torchrun(str(ROOT / "tests" / "distributed" / f"{script}.py"), str(seed), CUDA_VISIBLE_DEVICES="")


TRAIN = (
    "--model", "resnet20", "--data", "fashion-mnist-mini", "--epochs", "2", "--batch-size", "8", "--limit-train", "8", "--limit-eval", "9",
    "--warmup-epochs", "0", "--lr", "0.001", "--device", "cpu", "--seed", "3", "--no-progress",
)  # fmt: skip


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_train_with_shared_norms_is_one_process(tmp_path):
    """`torchrun -m fused_resnet train --sync-bn`, stopped and resumed, has the losses of one process with the same batches."""
    together, alone = tmp_path / "together", tmp_path / "alone"
    command = ("-m", "fused_resnet", "train")
    out = torchrun(*command, *TRAIN, "--sync-bn", "--backend", "eager", "--out", str(together), "--stop-after", "1")
    assert "cpu and 1 more, fp32, backend eager" in out and out.count("1 of 2 epochs are done") == 1
    torchrun(*command, "--resume", str(together), "--backend", "eager", "--device", "cpu", "--no-progress")
    assert main(["train", *TRAIN, "--backend", "eager", "--out", str(alone)]) == 0
    ours, expected = metrics(together), metrics(alone)
    assert [r["epoch"] for r in ours] == [1, 2]
    for a, b in zip(ours, expected, strict=True):
        for key in ("step", "lr", "train_accuracy", "eval_accuracy"):
            assert a[key] == b[key], key
        for key in ("train_loss", "eval_loss"):
            assert abs(a[key] - b[key]) < 1e-4, key
    states = [torch.load(folder / "checkpoint.pt", weights_only=True)["model"] for folder in (together, alone)]
    for (name, a), b in zip(states[0].items(), states[1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_what_processes_can_not_do_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("fused_resnet.cli.train.launched", lambda: True)
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "off")
    assert main(["train", *TRAIN, "--sync-bn", "--out", str(tmp_path / "x")]) == 2
    assert "argument --sync-bn: PyTorch's own modules synchronise on GPUs alone; expected --backend eager" in capsys.readouterr().err
    monkeypatch.setattr("fused_resnet.train.trainer.world", lambda: 3)
    assert main(["train", *TRAIN, "--out", str(tmp_path / "x")]) == 2
    assert "argument --batch-size: expected a multiple of the 3 processes; got 8" in capsys.readouterr().err


def test_parts_of_batches_make_the_batches():
    """The parts of two processes are the halves of one process's batches, augmented alike; evaluation leaves no image out."""
    images = data.load("fashion-mnist-mini", limit_train=24, limit_eval=9)
    whole = list(data.Loader(images, images.train, 8, torch.device("cpu"), True, 5).batches(1))
    parts = [list(data.Loader(images, images.train, 8, torch.device("cpu"), True, 5, (i, 2)).batches(1)) for i in range(2)]
    for (x, y), *halves in zip(whole, *parts, strict=True):
        assert torch.equal(x, torch.cat([h[0] for h in halves])) and torch.equal(y, torch.cat([h[1] for h in halves]))
    counts = [
        sum(len(y) for _, y in data.Loader(images, images.eval, 8, torch.device("cpu"), False, part=(i, 2)).batches(0)) for i in range(2)
    ]
    assert counts == [5, 4]
    with pytest.raises(ValueError, match="batch_size: expected at least 1, a multiple of the 3 processes; got 8"):
        data.Loader(images, images.train, 8, torch.device("cpu"), True, part=(0, 3))


def test_the_example_trains():
    out = torchrun(
        "examples/train_ddp.py", "--model", "resnet20", "--steps", "2", "--batch-size", "4", "--image-size", "16", "--sync-bn" if CUDA else "--lr=0.01",
        FUSED_RESNET_BACKEND="auto" if CUDA else "eager", processes=torch.cuda.device_count() if CUDA else 2,
    )  # fmt: skip
    loss = float(re.fullmatch(r"step 2: loss ([0-9.]+)", out.strip()).group(1))
    assert 0 < loss < 10


def position(folder: Path) -> tuple[int, int]:
    """(epochs, steps of the next one) of a run's checkpoint; (0, 0) where there is none."""
    if not (folder / "checkpoint.pt").exists():
        return 0, 0
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return state["epoch"], state["partial"]["batch"]


@pytest.mark.slow
def test_a_killed_worker_and_a_stopped_run_go_on_with_the_same_bits(tmp_path):
    """kill -9 of the worker that writes, within an epoch, which torchrun starts again; then SIGTERM to torchrun. One line does it all."""
    size = (*TRAIN, "--limit-train", "320", "--backend", "off", "--checkpoint-minutes", "0")  # 40 steps an epoch
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    torchrun("-m", "fused_resnet", "train", *size, "--out", str(straight))
    again = ("--max-restarts=1", "-m", "fused_resnet", "train", *size, "--auto-resume", "--out", str(parts))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *again]
    agent = subprocess.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL)

    def reached(place: tuple[int, int]) -> None:
        ends = time.monotonic() + 120
        while position(parts) < place:
            assert time.monotonic() < ends and agent.poll() is None
            time.sleep(0.02)

    reached((0, 8))
    killed = int((parts / "lock").read_text())
    os.kill(killed, signal.SIGKILL)
    reached((1, 0))
    assert int((parts / "lock").read_text()) != killed
    agent.terminate()
    assert agent.wait(120) != 0
    epoch, step = position(parts)
    assert (1, 0) <= (epoch, step) < (2, 0) and step % 8 == 0
    torchrun(*again)
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (straight, parts))
    assert same_states(a["model"], b["model"]) and same_states(a["optimizer"], b["optimizer"])
    assert without_times(metrics(straight)) == without_times(metrics(parts)) and len(metrics(parts)) == 2


@pytest.mark.full
def test_two_machines_train_as_two_processes_of_one(tmp_path):
    """Each with a torchrun of its own, which meet at an address: here both on this machine."""
    size = ("-m", "fused_resnet", "train", *TRAIN, "--limit-train", "64", "--backend", "off")
    torchrun(*size, "--out", str(tmp_path / "one"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=run")
    command = [sys.executable, "-m", "torch.distributed.run", *meet, *size, "--out", str(tmp_path / "two")]
    agents = [
        subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    told = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], told
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("one", "two"))
    assert same_states(a["model"], b["model"]) and same_states(a["optimizer"], b["optimizer"])
