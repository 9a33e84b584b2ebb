#!/usr/bin/env bash
# Guess: TRITON_PTXAS_PATH names the assembler of A100 and H100 kernels, TRITON_PTXAS_BLACKWELL_PATH that of what comes after, as the names
#     say; and `ptxas` in Triton's wheel is what assembles for an H100.
# Fact: until 3.8 that is so. In 3.9 kernels for sm_90 are assembled by ptxas-blackwell, a whole CUDA version newer (13.4 beside 12.9):
#     an H100's kernel ignores TRITON_PTXAS_PATH, without a word, and the PTX it is made of can no longer be read by the wheel's ptxas.
# Matters: whoever pins an assembler for an H100 by that variable, to keep code or to work around a miscompilation, has it pinned no more
#     after the upgrade. Registers and spills looked up with the wheel's `ptxas -v` are another assembler's, or an error.
set -euo pipefail
source "$(dirname "$0")/fresh.bash"
fresh old triton==3.8.0
fresh new triton==3.9.0

cat >"$folder/program.py" <<'PYTHON'
import os
import stat
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# The wheel's own ptxas, by way of a program that notes each kernel it is given.
folder, log = Path(sys.argv[1]), Path(sys.argv[1], "assembled")
ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
wrapper = folder / "ptxas"
wrapper.write_text(f'#!/bin/sh\ncase "$*" in *--gpu-name=*) echo "$*" >>"{log}";; esac\nexec "{ptxas}" "$@"\n')
wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
os.environ["TRITON_PTXAS_PATH"] = str(wrapper)


@triton.jit
def add_kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, tl.load(x_ptr + at) + 1)


def assembled_by_it(capability):
    log.write_text("")
    source = ASTSource(add_kernel, {"x_ptr": "*fp32", "y_ptr": "*fp32", "N": "constexpr"}, {(2,): 128})
    triton.compile(source, target=GPUTarget("cuda", capability, 32))
    return f"--gpu-name=sm_{capability}" in log.read_text()


found = {f"sm_{capability}": assembled_by_it(capability) for capability in (80, 90, 100)}
print(f"triton {triton.__version__}: assembled by TRITON_PTXAS_PATH: {found}")
assert found == {"sm_80": True, "sm_90": triton.__version__ == "3.8.0", "sm_100": False}, "another assembler is asked"
PYTHON
for release in old new; do
    "$folder/$release/bin/python" -W ignore "$folder/program.py" "$folder"
done
