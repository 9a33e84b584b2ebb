#!/usr/bin/env bash
# Guess: with nvcc's -fmad=true, x * scale + bias becomes one fused multiply-add, rounded once, in every floating type and on every
#     architecture; the same source gives the same bits on an A100 and an H100.
# Fact: float and __half are contracted everywhere, __nv_bfloat16 is not on sm_80: cuda_bf16.h writes the product there as an fma with -0
#     and the sum as an fma with 1, and the compiler fuses neither, so there are two roundings; from sm_90 on there is one. Triton
#     contracts bfloat16 on sm_80, too: the two languages differ there and agree on sm_90.
# Matters: a norm's affine map in bfloat16 rounds differently by GPU and by language, and the sign of its result, ReLU's mask, with it.
#     Convert to float first, and say fmaf.
# Needs a host compiler for nvcc (g++ or clang++).
set -euo pipefail
source "$(dirname "$0")/fresh.bash"
fresh env --no-deps nvidia-cuda-nvcc==13.5.37 nvidia-nvvm==13.5.37 nvidia-cuda-crt==13.5.37 nvidia-cuda-runtime==13.5.37 \
    nvidia-cuda-cccl==13.3.5.0.6 nvidia-cuda-nvdisasm==13.5.37 triton==3.9.0

cat >"$folder/affine.cu" <<'CUDA'
#include <cuda_bf16.h>
#include <cuda_fp16.h>

template <typename T>
__device__ void affine(const T* x, const T* scale, const T* bias, T* z) {
  z[threadIdx.x] = x[threadIdx.x] * scale[threadIdx.x] + bias[threadIdx.x];
}
#define KERNEL(name, T) \
  extern "C" __global__ void name(const T* x, const T* scale, const T* bias, T* z) { affine(x, scale, bias, z); }
KERNEL(of_float, float)
KERNEL(of_half, __half)
KERNEL(of_bfloat16, __nv_bfloat16)
CUDA
cat >"$folder/program.py" <<'PYTHON'
import os
import re
import subprocess
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def affine_kernel(x_ptr, scale_ptr, bias_ptr, z_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(z_ptr + at, tl.load(x_ptr + at) * tl.load(scale_ptr + at) + tl.load(bias_ptr + at))


def by_triton(dtype, capability):
    """Roundings of Triton's kernel."""
    signature = {name: f"*{dtype}" for name in ("x_ptr", "scale_ptr", "bias_ptr", "z_ptr")} | {"N": "constexpr"}
    source = ASTSource(affine_kernel, signature, {(4,): 128})
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True}).asm["ptx"]
    return len(re.findall(r"\b(?:fma|mul|add)\.rn\.b?f(?:16|32)\b", ptx))


def by_nvcc(capability):
    """Roundings of nvcc's kernels, by type: arithmetic of machine code, less what makes a constant."""
    tools = Path(sys.prefix, "lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages/nvidia/cu13/bin")
    os.environ["PATH"] = f"{tools}:{os.environ['PATH']}"
    cubin, source = folder / "affine.cubin", folder / "affine.cu"
    subprocess.run([tools / "nvcc", f"-arch=sm_{capability}", "-fmad=true", "-cubin", "-o", cubin, source], check=True)
    code = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    found = {}
    for line in code.splitlines():
        if section := re.match(r"\.text\.of_(\w+):", line):
            found[kernel := section[1]] = 0
        elif re.search(r"\b[FH](?:FMA|MUL|ADD)2?\b", line) and "-RZ, RZ," not in line:
            found[kernel] += 1
    return found


folder = Path(sys.argv[1])
print("nvcc 13.5.37, triton", triton.__version__)
print("  roundings of x * scale + bias")
for capability in (80, 90, 100):
    nvcc, of_triton = by_nvcc(capability), by_triton("bf16", capability)
    print(f"  sm_{capability}: nvcc {nvcc}; Triton bfloat16 {of_triton}")
    assert nvcc == {"float": 1, "half": 1, "bfloat16": 2 if capability == 80 else 1}, "nvcc contracts in another way"
    assert of_triton == 1, "Triton contracts in another way"
PYTHON
"$folder/env/bin/python" -W ignore "$folder/program.py" "$folder"
