#!/usr/bin/env bash
# Guess: training batch norm of float32 on a CPU accumulates in double, as PyTorch's CPU reductions are known to, whatever the layout;
#     channels_last costs or saves time, not digits.
# Fact: that is so for contiguous tensors. In channels_last the sums are float32: of 8192 values a channel with mean 100 and deviation 1
#     the output's error is some 40 times that of the contiguous layout, the running variance's some 30 times.
# Matters: the CPU is taken as the oracle for GPU kernels, and channels_last is what fast networks run in: an oracle in that layout is no
#     better than the kernel under test. Compare with float64, or with contiguous tensors.
set -euo pipefail
source "$(dirname "$0")/fresh.bash"
fresh env torch==2.13.0 numpy==2.4.6

cat >"$folder/program.py" <<'PYTHON'
import copy

import torch
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
print("torch", torch.__version__)
x = (torch.randn(8, 16, 32, 32, dtype=torch.float64) + 100).float()
template = nn.BatchNorm2d(16, momentum=1.0)
oracle = copy.deepcopy(template).double()
truth = oracle(x.double())
errors = {}
for layout in (torch.contiguous_format, torch.channels_last):
    norm = copy.deepcopy(template)
    y = norm(x.to(memory_format=layout))
    output = (y.double() - truth).abs().max().item()
    variance = ((norm.running_var.double() - oracle.running_var) / oracle.running_var).abs().max().item()
    errors[layout] = output, variance
    print(f"  {layout!s:24} largest error of the output {output:.1e}, of the running variance, relative, {variance:.1e}")
for contiguous, channels_last in zip(*errors.values(), strict=True):
    assert channels_last > 8 * contiguous, "the layouts are as exact as each other"
PYTHON
"$folder/env/bin/python" -W ignore "$folder/program.py"
