"""The kernels of kernels.cu and faults.cu, loaded and called."""

import ctypes
import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
from support.checkout import TESTS
from support.simt import compile as simt

#: A library of the others loads into this process.
IN_PROCESS = ("plain", "ubsan", "race")


@functools.cache
def library(name: str, flavour: str) -> ctypes.CDLL:
    return simt.load(simt.library([Path(__file__).with_name(f"{name}.cu")], flavour))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def call(kernels: ctypes.CDLL, name: str, *arguments):
    """Calls a launcher that must succeed; arrays are passed by address."""
    status = getattr(kernels, name)(*(pointer(a) if isinstance(a, np.ndarray) else a for a in arguments))
    assert (status, kernels.simt_last_message().decode()) == (0, "")


def run_in(flavour: str, program: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs Python code in a process that can load a library of the flavour. It imports what tests do."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=simt.environment(flavour) | {"PYTHONPATH": str(TESTS)}, capture_output=True, text=True)
