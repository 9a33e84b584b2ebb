#!/usr/bin/env bash
# Guess: a matrix kernel takes about the same registers in each Triton release of a year, a few more or fewer; tiles tuned with one
#     release fit the next.
# Fact: on sm_80 the same float32 (TF32) GEMM takes a third to a half more registers in 3.9 than in 3.6: 116 instead of 80 for a tile of
#     64x64 and 4 warps, so that a multiprocessor has registers for four such programs instead of six. On sm_90 the same kernels, same
#     tiles, differ by no more than a few. It is Triton's own code that changed, not the assembler: the PTX of 3.6 assembled by the
#     ptxas of 3.9 takes what it took.
# Matters: tables of tuned tiles belong to a Triton release and an architecture, not to a kernel. A table kept over an upgrade is
#     right on the H100 and may halve the occupancy on the A100.
set -euo pipefail
source "$(dirname "$0")/fresh.bash"
fresh old triton==3.6.0
fresh new triton==3.9.0

cat >"$folder/program.py" <<'PYTHON'
import json
import re
import subprocess
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def gemm_kernel(a_ptr, b_ptr, out_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + m[:, None] * K + (first + k)[None, :])
        b = tl.load(b_ptr + (first + k)[:, None] * N + n[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(out_ptr + m[:, None] * N + n[None, :], acc.to(tl.float16))


#: Warps, tile, stages.
TILES = [(4, 64, 64, 32, 2), (4, 128, 64, 32, 3), (8, 128, 128, 64, 3)]
folder, name = Path(sys.argv[1]), sys.argv[2]
tools = Path(triton.__file__).parent / "backends/nvidia/bin"


def registers(ptx, capability):
    """As this release's ptxas says."""
    (folder / "kernel.ptx").write_text(ptx)
    # 3.9 assembles for sm_90 with the newer of the two that it brings, whatever its name.
    newer = triton.__version__ != "3.6.0" and capability >= 90
    command = [tools / ("ptxas-blackwell" if newer else "ptxas"), "-v", f"--gpu-name=sm_{capability}{'a' * (capability >= 90)}"]
    command += [folder / "kernel.ptx", "-o", folder / "kernel.cubin"]
    return int(re.search(r"Used (\d+) registers", subprocess.run(command, capture_output=True, text=True, check=True).stderr)[1])


signature = {"a_ptr": "*fp32", "b_ptr": "*fp32", "out_ptr": "*fp16", "M": "i32", "N": "i32", "K": "i32"}
signature |= dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_K"), "constexpr")
attributes = {(i,): [["tt.divisibility", 16]] for i in range(6)}
found, ptxs = {}, {}
for capability in (80, 90):
    for warps, m, n, k, stages in TILES:
        source = ASTSource(gemm_kernel, signature, {(6,): m, (7,): n, (8,): k}, attributes)
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        key = f"sm_{capability}, {warps} warps, tile {m}x{n}x{k}"
        ptxs[key] = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
        found[key] = registers(ptxs[key], capability)
print(f"triton {triton.__version__}, {subprocess.run([tools / 'ptxas', '--version'], capture_output=True, text=True).stdout.split()[-1]}")
for key, count in found.items():
    print(f"  {key:32} {count:4} registers")
if name == "old":
    (folder / "old.json").write_text(json.dumps([found, ptxs]))
else:
    before, old_ptxs = json.loads((folder / "old.json").read_text())
    for key, count in found.items():
        if key.startswith("sm_80"):
            again = registers(old_ptxs[key], 80)
            print(f"  {key:32} {again:4} registers where 3.6's PTX is assembled by this ptxas")
            assert count >= 1.25 * before[key], "no more registers than in 3.6"
            assert again <= 1.05 * before[key], "ptxas makes the difference"
        else:
            assert abs(count - before[key]) <= 8, "sm_90 takes other registers, too"
PYTHON
"$folder/old/bin/python" "$folder/program.py" "$folder" old
"$folder/new/bin/python" -W ignore "$folder/program.py" "$folder" new
