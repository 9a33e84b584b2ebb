"""Machines that others use, too: threads that sleep at barriers, and a word where others are at work."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.checkout import ROOT

from fused_resnet import processors


@pytest.mark.parametrize(
    ("argv", "started", "passive"),
    [
        (["/usr/bin/fused-resnet", "train"], ["python", "/usr/bin/fused-resnet", "train"], True),
        (["/usr/bin/fused-resnet", "bench", "train"], ["python", "/usr/bin/fused-resnet", "bench", "train"], True),
        (["/usr/bin/fused-resnet", "info"], ["python", "/usr/bin/fused-resnet", "info"], False),
        (["/usr/bin/fused-resnet"], ["python", "/usr/bin/fused-resnet"], False),
        (["-m", "demo"], ["python", "-m", "fused_resnet", "demo"], True),
        (["-m", "train", "--epochs", "1"], ["python", "-um", "fused_resnet", "train", "--epochs", "1"], True),
        (["-m", "train"], ["python", "-m", "mine", "train"], False),
        (["-m", "fused_resnet"], ["python", "-m", "pytest", "fused_resnet"], False),
        (["train.py", "train"], ["python", "train.py", "train"], False),
        (["-c", "train"], ["python", "-c", "import fused_resnet", "train"], False),
        ([""], ["python"], False),
    ],
)
def test_the_commands_wait_passively_and_nobody_else(monkeypatch, argv, started, passive):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", started)
    loaded = sys.modules.copy()
    monkeypatch.delitem(sys.modules, "torch")
    for name in processors.WAITING:
        monkeypatch.delenv(name, raising=False)
    for name in processors.PATIENCE:
        monkeypatch.setenv(name, "")  # so that it is forgotten after the test
        monkeypatch.delenv(name)

    def said():
        return {name: value for name, value in os.environ.items() if name in processors.WAITING}

    processors.wait_passively()
    assert said() == ({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"} if passive else {})
    for name in processors.WAITING:
        for ours in processors.PATIENCE:
            monkeypatch.delenv(ours, raising=False)
        monkeypatch.setenv(name, "active")
        processors.wait_passively()
        assert said() == {name: "active"}, "the user's own wins"
        monkeypatch.delenv(name)
    monkeypatch.setitem(sys.modules, "torch", loaded["torch"])
    processors.wait_passively()
    assert not said(), "it would come too late"


def test_it_is_said_before_pytorch_is_loaded():
    """By the package itself, which loads PyTorch: afterwards nothing is said any more."""
    code = (
        "import os, sys; sys.argv = ['-m', 'train']; sys.orig_argv = ['python', '-m', 'fused_resnet', 'train']; "
        "import fused_resnet; print(os.environ['OMP_WAIT_POLICY'], os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    )
    clean = {name: value for name, value in os.environ.items() if name not in processors.WAITING}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=clean, check=False)
    assert done.stdout == "passive 10000 True\n", done.stderr


def spin() -> None:
    while True:
        pass


def test_a_busy_machine_is_said(monkeypatch):
    others = [multiprocessing.get_context("fork").Process(target=spin, daemon=True) for _ in os.sched_getaffinity(0)]
    for process in others:
        process.start()
    time.sleep(0.05)
    try:
        words = processors.busy()
    finally:
        for process in others:
            process.kill()
    assert words.startswith("This machine is busy: others use ")


@pytest.mark.parametrize(("idle", "words"), [(100, None), (95, None), (30, "others use {0:.1f} of its {1} processors")])
def test_a_quiet_machine_is_not(monkeypatch, idle, words):
    count, ticks = len(os.sched_getaffinity(0)), iter([(0, 0), (idle, 100)])
    monkeypatch.setattr(processors, "_ticks", lambda: next(ticks))
    monkeypatch.setattr(processors, "SECONDS", 0)
    found = processors.busy()
    assert found is None if words is None else words.format(0.7 * count, count) in found


def test_a_system_that_does_not_tell(monkeypatch):
    monkeypatch.setattr(processors, "SECONDS", 0)
    monkeypatch.setattr(processors, "Path", lambda name: Path("/absent"))
    assert processors.busy() is None
