"""The rule that a test which launches Triton's kernels takes the device: what keeps it, and that a test which breaks it fails."""

import os
import re
import subprocess
import sys

import pytest
import torch
from support.chains import DEVICE
from support.checkout import ROOT, TESTS
from support.devices import takes_the_device

PLANTED = """
import pytest, torch
from fused_resnet.kernels.norm_add_act import norm_add_act
from fused_resnet.values import Source

def launch(device):
    x = torch.zeros(1, 8, 2, 2, device=device).contiguous(memory_format=torch.channels_last)
    norm_add_act(Source(x, scale=torch.zeros(8, device=device), bias=torch.zeros(8, device=device)), True, False)

def test_on_the_device(device):
    launch(device)

def test_on_the_cpu():
    launch(torch.device("cpu"))

@pytest.mark.cpu
def test_on_the_cpu_where_there_is_no_gpu():
    launch(torch.device("cpu"))

def test_that_launches_nothing():
    pass
"""


def by_constant():
    return torch.zeros(1, device=DEVICE)


def by_function():
    return [by_constant() for _ in range(2)]


class Class:
    def by_method(self):
        return by_function()


def by_class():
    return Class().by_method()


def by_name():
    return torch.zeros(1, device="cpu")


@pytest.mark.parametrize("function, takes", [(by_constant, True), (by_function, True), (by_class, True), (by_name, False)])
def test_what_takes_the_device(function, takes):
    module = sys.modules[__name__]
    assert takes_the_device(function, [], module) == takes
    assert takes_the_device(function, ["tmp_path", "device"], module) and takes_the_device(function, ["on_device"], module)


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels refuse a CPU's tensors themselves")
def test_a_test_that_would_fail_on_a_gpu_fails(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "test_planted.py").write_text(PLANTED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])}
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), "-p", "conftest", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *options, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert "4 passed, 1 error" in done.stdout, done.stdout + done.stderr
    assert re.search(r"^ERROR test_planted.py::test_on_the_cpu - Failed: Triton's kernels", done.stdout, re.MULTILINE)
