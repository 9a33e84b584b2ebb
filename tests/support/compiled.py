"""What the tests of compiled Triton kernels share. A test file that imports it is skipped where Triton is missing."""

import os
import re
import subprocess
import sys

import pytest

from fused_resnet import versions
from support.checkout import ROOT

pytest.importorskip("triton")
#: What the compiler makes of a kernel is known of the releases that were tried.
tested_triton = pytest.mark.skipif(versions.untested_triton() is not None, reason=versions.untested_triton() or "")

#: PTX's maximum that turns NaN into the other operand.
LOSES_NAN = re.compile(r"\bmax(\.ftz)?\.(f16|bf16|f16x2|bf16x2|f32)\b")


def run(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout
