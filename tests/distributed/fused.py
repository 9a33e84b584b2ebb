"""A network of torchvision that `fuse` has changed: sharded by FSDP2, and with shared norms."""

import copy

import torch
import torch.distributed as dist
from common import fused_resnet, labels, local_average, mine, processes, reference_step, summed_loss, worst
from conftest import TORCHVISION
from support.swapped import fused_rows, shake
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchvision.models.resnet import Bottleneck, ResNet

from fused_resnet.backends import BACKENDS

assert TORCHVISION  # imported before torchvision: its binary library need not load
SIZE = (4, 3, 48, 40)


def make() -> nn.Module:
    return shake(ResNet(Bottleneck, [2, 1, 1, 1], num_classes=5)).double()


def is_sharded() -> None:
    """By block and as a whole: a sharded module gets a class over the one that `fuse` gave it."""
    one, x = make(), torch.randn(SIZE, dtype=torch.float64)
    expected = local_average(one, x)
    for what in ("blocks", "network"):
        ours, mesh = fused_resnet.fuse(copy.deepcopy(one)), init_device_mesh("cpu", (2,))
        rows = fused_rows(ours)
        for block in [m for m in ours.modules() if isinstance(m, Bottleneck)] if what == "blocks" else []:
            fully_shard(block, mesh=mesh)
        fully_shard(ours, mesh=mesh)
        assert fused_rows(ours) == rows and len(rows) == 6
        calls, eager = [], BACKENDS["eager"]
        eager.convolve = lambda *args, calls=calls, original=eager.convolve: calls.append(1) or original(*args)
        with fused_resnet.backend("eager"):
            summed_loss(ours(mine(x)), mine(labels(x)), len(mine(x))).backward()
        del eager.convolve
        assert len(calls) == 16  # 20 convolutions, of which four projections share their block's first
        for (name, p), q in zip(ours.named_parameters(), expected.parameters(), strict=True):
            assert (p.grad.full_tensor() - q.grad).norm() < 1e-8 * q.grad.norm(), (what, name)


def shares_its_norms() -> None:
    """Converted after `fuse`, and before it; against one process with the whole batch."""
    one, x = make(), torch.randn(SIZE, dtype=torch.float64)
    shared = nn.SyncBatchNorm.convert_sync_batchnorm
    for convert in (lambda m: shared(fused_resnet.fuse(m)), lambda m: fused_resnet.fuse(shared(m))):
        theirs, ours = copy.deepcopy(one), convert(copy.deepcopy(one))
        reference_step(theirs, x, labels(x))
        with fused_resnet.backend("eager"):
            summed_loss(ours(mine(x)), mine(labels(x)), len(x)).backward()
        for p in ours.parameters():
            dist.all_reduce(p.grad)
        for kind in ("gradients", "buffers"):
            assert worst(ours, theirs, kind) < 1e-8, (kind, worst(ours, theirs, kind))


with processes():
    is_sharded()
    shares_its_norms()
