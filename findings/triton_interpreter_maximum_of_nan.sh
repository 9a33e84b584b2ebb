#!/usr/bin/env bash
# Guess: what Triton's interpreter makes of NaN is settled: either NumPy's way (NaN wins a maximum) or the GPU's (NaN loses); a test
#     written against it holds.
# Fact: it changed over within the year. Until 3.7 tl.maximum(NaN, 0) is NaN, and tl.max with indices of a window that holds NaN returns NaN
#     and its place. From 3.8 on the first is 0, as compiled code has it all along (max.f32), and the second is the largest number and
#     its place.
# Matters: a ReLU written tl.maximum(x, 0) and a max pool written tl.max pass a test for NaN in the interpreter of 3.7 and hide the NaN on the
#     GPU: the loss stays finite and the gradient scaler never sees the overflow. Only a newer interpreter shows it.
# Source: triton-lang/triton#10291 and #10697.
set -euo pipefail
source "$(dirname "$0")/fresh.bash"
fresh env torch==2.13.0 numpy==2.4.6
for version in 3.7.1 3.8.0; do
    fresh env --no-deps --upgrade --target "$folder/$version" "triton==$version"
done

cat >"$folder/program.py" <<'PYTHON'
import math
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def kernel(x_ptr, relu_ptr, value_ptr, place_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(relu_ptr + tl.arange(0, N), tl.maximum(x, 0.0))
    value, place = tl.max(x, axis=0, return_indices=True)
    tl.store(value_ptr, value)
    tl.store(place_ptr, place)


x = torch.tensor([1.0, math.nan, 2.0, 3.0])
relu, value, place = torch.empty(4), torch.empty(1), torch.empty(1, dtype=torch.int32)
kernel[(1,)](x, relu, value, place, 4)
print(f"triton {triton.__version__} interpreted, torch {torch.__version__}; of {x.tolist()}:")
print(f"  tl.maximum(x, 0) = {relu.tolist()}, tl.max(x, return_indices=True) = {value.item()}, {place.item()}")
kept = triton.__version__ == "3.7.1"
assert math.isnan(relu[1]) == kept, "tl.maximum treats NaN in another way"
assert (math.isnan(value) and place == 1) if kept else (value == 3 and place == 3), "tl.max treats NaN in another way"
PYTHON
for version in 3.7.1 3.8.0; do
    TRITON_INTERPRET=1 PYTHONPATH="$folder/$version" "$folder/env/bin/python" -W ignore "$folder/program.py"
done
