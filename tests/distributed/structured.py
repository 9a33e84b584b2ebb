"""Networks that `fuse` knows by their structure: under DistributedDataParallel, sharded by FSDP2, and with shared norms."""

import copy

import torch
import torch.distributed as dist
from common import fused_resnet, labels, local_average, mine, processes, reference_step, summed_loss, worst
from support.structures import OfLayers, PreUnit, Unit, Whole, conv
from support.swapped import shake, unfused
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fused_resnet.backends import BACKENDS

SIZE = (4, 3, 32, 24)


def make(*blocks: nn.Module) -> nn.Module:
    model = Whole(Unit(8, 12, 2), OfLayers(12, 12), *blocks, channels=12)
    model.stem.conv3 = conv(4, 8)  # a bias before a norm has no gradient but rounding
    return shake(model).double()


def step(model: nn.Module, x: torch.Tensor, convolutions: int, count: int | None = None) -> None:
    """A step of this process's half, in which the operators run so many convolutions with their norms."""
    calls, eager = [], BACKENDS["eager"]
    eager.convolve = lambda *args, original=eager.convolve: calls.append(len(args[1])) or original(*args)
    try:
        with fused_resnet.backend("eager"):
            summed_loss(model(mine(x)), mine(labels(x)), count or len(mine(x))).backward()
    finally:
        del eager.convolve
    assert sum(calls) == convolutions, calls


def gradients_are_averaged_without_a_warning() -> None:
    """Two steps with each option that people set. A warning about strides is an error here."""
    for options in ({"gradient_as_bucket_view": True}, {"static_graph": True}, {"find_unused_parameters": True}):
        one = make(PreUnit(12, 12))
        ours = DistributedDataParallel(fused_resnet.fuse(copy.deepcopy(one)), broadcast_buffers=False, **options)
        assert unfused(ours.module) == {}
        for _ in range(2):
            x = torch.randn(SIZE, dtype=torch.float64)
            ours.zero_grad(set_to_none=not options.get("gradient_as_bucket_view"))
            expected = local_average(one, x)
            step(ours, x, 12)
            for kind in ("gradients", "buffers"):
                assert worst(ours.module, expected, kind) < 1e-8, (options, kind)
            one.load_state_dict(expected.state_dict())


def is_sharded() -> None:
    """By block and as a whole."""
    one, x = make(PreUnit(12, 12)), torch.randn(SIZE, dtype=torch.float64)
    expected = local_average(one, x)
    for what in ("blocks", "network"):
        ours, mesh = fused_resnet.fuse(copy.deepcopy(one)), init_device_mesh("cpu", (2,))
        for block in ours.blocks if what == "blocks" else []:
            fully_shard(block, mesh=mesh)
        fully_shard(ours, mesh=mesh)
        step(ours, x, 12)
        for (name, p), q in zip(ours.named_parameters(), expected.parameters(), strict=True):
            assert (p.grad.full_tensor() - q.grad).norm() < 1e-8 * q.grad.norm(), (what, name)
        assert worst(ours, expected, "buffers") < 1e-8, what


def shares_its_norms() -> None:
    """Converted after `fuse`, and before it; against one process with the whole batch. No norm stands alone, which PyTorch's module would run."""
    one, x = make(), torch.randn(SIZE, dtype=torch.float64)
    shared = nn.SyncBatchNorm.convert_sync_batchnorm
    for convert in (lambda m: shared(fused_resnet.fuse(m)), lambda m: fused_resnet.fuse(shared(m))):
        theirs, ours = copy.deepcopy(one), convert(copy.deepcopy(one))
        reference_step(theirs, x, labels(x))
        step(ours, x, 10, len(x))
        for p in ours.parameters():
            dist.all_reduce(p.grad)
        for kind in ("gradients", "buffers"):
            assert worst(ours, theirs, kind) < 1e-8, (kind, worst(ours, theirs, kind))


with processes():
    gradients_are_averaged_without_a_warning()
    is_sharded()
    shares_its_norms()
