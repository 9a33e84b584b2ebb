"""The package nvidia-cudnn-frontend and the cuDNN library: what is said where one is missing, old or broken."""

import importlib.metadata
import importlib.util

import pytest
import torch
from support.chains import DEVICE

import fused_resnet
from fused_resnet import backends, ops
from fused_resnet.backends import BACKENDS
from fused_resnet.cudnn import library
from fused_resnet.values import Conv, ConvGeometry, Norm

NO_CUDA = pytest.mark.skipif(DEVICE.type == "cuda", reason="says what happens where no GPU is")


@pytest.fixture
def forgotten():
    """What the package's presence was found to be is asked again, and forgotten afterwards."""

    def forget():
        library.why_not_package.cache_clear()
        library.why_not.cache_clear()
        backends._remembered.cache_clear()

    forget()
    yield
    forget()


def _absent(name):
    raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(
    "version, words",
    [
        (_absent, "nvidia-cudnn-frontend is not installed (pip install 'fused_resnet[cudnn]')"),
        (lambda name: "1.18.0", "nvidia-cudnn-frontend is 1.18.0; 1.27 is the least"),
    ],
)
def test_a_missing_or_an_old_package_is_a_sentence(version, words, forgotten, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert library.why_not() == words


def test_a_package_that_does_not_load_says_why(forgotten, monkeypatch):
    def broken():
        raise ImportError("libstdc++.so.6: version too old")

    monkeypatch.setattr(library, "frontend", broken)
    assert library.why_not() == "nvidia-cudnn-frontend does not load: libstdc++.so.6: version too old"


def test_an_old_library_is_a_sentence(forgotten, monkeypatch):
    monkeypatch.setattr(library, "library_version", lambda: (9, 7, 1))
    assert library.why_not() == "cuDNN is 9.7.1; 9.8 is the least"
    library.why_not.cache_clear()
    monkeypatch.setattr(library, "library_version", lambda: None)
    assert "finds no cuDNN library" in library.why_not()


@NO_CUDA
def test_the_backend_says_why_it_does_not_run_on_a_cpu():
    words = "cuDNN runs on CUDA GPUs, not on 'cpu'"
    assert BACKENDS["cudnn"].why_not(torch.device("cpu"), torch.float16) == words
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    conv = Conv(torch.randn(8, 8, 1, 1), Norm(None, None, None, None, True, 1e-5), ConvGeometry([1, 1], [0, 0], [1, 1], 1))
    with fused_resnet.backend("cudnn"), pytest.raises(RuntimeError, match=f"backend 'cudnn' was asked for and can't run here: {words}"):
        ops.conv_stats(x, conv)


def test_the_package_is_imported_only_when_it_is_asked_for():
    import subprocess
    import sys

    script = "import sys, fused_resnet; assert 'cudnn' not in sys.modules; print('ok')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ok", done.stderr
