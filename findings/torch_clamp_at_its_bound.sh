#!/usr/bin/env bash
# Guess: the gradient of x.clamp(min=0) at exactly 0 is 1, as it has been since 2018 and as clamp's own comments said: "it is helpful to get
#     gradient on min and max".
# Fact: until 2.13 it is 1, from 2.14 it is 0, without a warning. ReLU's has always been 0.
# Matters: values are *exactly* at the bound where a norm before the clamp starts with a scale of zero, where weights are quantised, where
#     pixels are clipped. Behind such a norm a clamp used as ReLU learned until 2.13; from 2.14 on the norm never gets a gradient.
# Source: pytorch/pytorch#195931 and #185927.
set -euo pipefail
source "$(dirname "$0")/fresh.bash"
fresh before torch==2.13.0 numpy==2.4.6
fresh after torch==2.14.1 numpy==2.4.6

cat >"$folder/program.py" <<'PYTHON'
import sys

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
expected = float(sys.argv[1])
x = torch.tensor([-1.0, 0.0, 1.0, 6.0], requires_grad=True)
ways = {"clamp(min=0)": lambda v: v.clamp(min=0), "clamp(0, 6)": lambda v: v.clamp(0, 6), "relu": F.relu, "relu6": F.relu6}
print("torch", torch.__version__, "at", x.tolist())
for name, way in ways.items():
    (gradient,) = torch.autograd.grad(way(x).sum(), x)
    print(f"  gradient of {name:13} {gradient.tolist()}")
    at_bound = expected if "clamp" in name else 0.0
    assert gradient[1] == at_bound and (gradient[3] == at_bound or name in ("clamp(min=0)", "relu")), "another gradient at the bound"

# A norm whose scale starts at zero, before an activation.
layer = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
nn.init.zeros_(layer[1].weight)
layer(torch.randn(2, 3, 8, 8)).clamp(min=0).mul(torch.randn(2, 4, 6, 6)).sum().backward()
moved = layer[1].weight.grad.abs().max().item() > 0
print(f"  a norm of scale 0 before clamp(min=0) gets a gradient: {moved}")
assert moved == (expected == 1)
PYTHON
"$folder/before/bin/python" "$folder/program.py" 1
"$folder/after/bin/python" "$folder/program.py" 0
