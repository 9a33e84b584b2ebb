"""The recipe of docs/drop-in.md for DistributedDataParallel, as it stands there, against PyTorch's modules in one process."""

import os
import sys

import torch
from common import fused_resnet, labels, leave, local_average, worst
from conftest import TORCHVISION
from support.recipes import run_recipe
from torchvision.models import resnet18

from fused_resnet.backends import BACKENDS

assert TORCHVISION  # imported before torchvision: its binary library need not load
torch.set_default_dtype(torch.float64)
torch.manual_seed(int(sys.argv[1]))
x = torch.randn(4, 3, 64, 64)
torch.manual_seed(1)
one = resnet18()
calls, eager = [], BACKENDS["eager"]
eager.convolve = lambda *args, _original=eager.convolve: calls.append(1) or _original(*args)
torch.manual_seed(1)
half = slice(2 * int(os.environ["RANK"]), 2 * int(os.environ["RANK"]) + 2)  # before the recipe there is no group to ask
with fused_resnet.backend("eager"):
    names = run_recipe("DistributedDataParallel", images=x[half], labels=labels(x)[half])
del eager.convolve
assert len(calls) == 17  # 20 convolutions, of which three projections share their block's first
expected = local_average(one, x)
for kind in ("gradients", "buffers"):
    assert worst(names["model"].module, expected, kind) < 1e-8, kind
leave()
