"""The optional package `nvidia-cudnn-frontend` and the cuDNN library that PyTorch brings."""

import importlib
import importlib.metadata
import threading
from functools import cache
from types import ModuleType
from typing import Any

import torch

PACKAGE = "nvidia-cudnn-frontend"
#: The first in which a graph can be built, and read as text, without a GPU.
OLDEST_PACKAGE = (1, 27)
#: The first whose runtime fusion puts the sums of batch norm's backward behind dgrad, as NVIDIA's samples say.
OLDEST_LIBRARY = (9, 8)

_of_thread = threading.local()


def frontend() -> ModuleType:
    """The package. Raises ImportError where it is missing."""
    return importlib.import_module("cudnn")


def _words(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


@cache
def why_not_package() -> str | None:
    """Why graphs can't be built here; None where they can."""
    try:
        version = importlib.metadata.version(PACKAGE)
        frontend()
    except importlib.metadata.PackageNotFoundError:
        return f"{PACKAGE} is not installed (pip install 'fused_resnet[cudnn]')"
    except (ImportError, OSError) as error:
        return f"{PACKAGE} does not load: {error}"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_PACKAGE:
        return f"{PACKAGE} is {version}; {_words(OLDEST_PACKAGE)} is the least"
    return None


def library_version() -> tuple[int, int, int] | None:
    """The version of the cuDNN that the package found; None where it found none."""
    try:
        number = frontend().backend_version()
    except RuntimeError:  # a symbol of a library that is not there
        return None
    return number // 10000, number // 100 % 100, number % 100


@cache
def why_not() -> str | None:
    """Why no graph can run on this machine; None where cuDNN may be asked for each."""
    if reason := why_not_package():
        return reason
    version = library_version()
    if version is None:
        return f"{PACKAGE} finds no cuDNN library; a PyTorch built for CUDA brings one"
    if version < OLDEST_LIBRARY:
        return f"cuDNN is {_words(version)}; {_words(OLDEST_LIBRARY)} is the least"
    return None


def handle(device: torch.device) -> Any:
    """This thread's cuDNN handle for a GPU, set to its current stream. Autograd runs backward in threads of its own."""
    handles = _of_thread.__dict__.setdefault("handles", {})
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in handles:
        with torch.cuda.device(index):
            handles[index] = frontend().create_handle()
    frontend().set_stream(handle=handles[index], stream=torch.cuda.current_stream(index).cuda_stream)
    return handles[index]
