"""SyncBatchNorm within the operators against one process with the whole batch: outputs, loss, gradients, running statistics."""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import fused_resnet, labels, mine, processes, reference_step, summed_loss, worst
from support.small import SIZE, network
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fused_resnet import ops, reference, values
from fused_resnet.models import BasicBlock


def shared(model: nn.Module, **options) -> nn.Module:
    """In DistributedDataParallel, which takes SyncBatchNorm on GPUs alone: so it is converted behind its back."""
    model = DistributedDataParallel(copy.deepcopy(model), **options)
    nn.SyncBatchNorm.convert_sync_batchnorm(model.module)
    return model


def step(model: nn.Module, x: torch.Tensor, backend: str, first: int | None = None) -> torch.Tensor:
    """The loss of both processes; DistributedDataParallel averages what it should add, so each loss is doubled."""
    part, target = mine(x, first), mine(labels(x), first)
    with fused_resnet.backend(backend):
        loss = summed_loss(model(part), target, len(x))
    (2 * loss).backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total


def same_as_one_process() -> None:
    """Two steps, with halves, with unequal parts, and with a process that has none, in float64."""
    for first in (None, 1, 0):
        for norm in (nn.BatchNorm2d, lambda c: nn.BatchNorm2d(c, momentum=None, affine=False)):
            one = network(norm)
            ours = shared(one, gradient_as_bucket_view=True)
            for _ in range(2):
                x = torch.randn(SIZE, dtype=torch.float64)
                for model in (one, ours):
                    model.zero_grad()
                expected, found = reference_step(one, x, labels(x)), step(ours, x, "eager", first)
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
                for kind in ("gradients", "buffers"):
                    assert worst(ours.module, one, kind) < 1e-8, (kind, worst(ours.module, one, kind))


def kernels_share_too() -> None:
    """The Triton convolutions finish statistics of tiles, the passes those of a tensor; float32."""
    one = nn.Sequential(BasicBlock(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    with torch.no_grad():
        for module in one.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias[0::2], module.bias[1::2] = 4.0, -4.0  # as chains.calm: no sign hangs on a last bit
    truth = copy.deepcopy(one).double()
    x = torch.randn(6, 8, 4, 5)
    expected = reference_step(truth, x.double(), labels(x))
    for backend, first in (("passes_triton", 2), ("triton", 2), ("triton", 0)):
        ours = shared(one)
        found = step(ours, x, backend, first)
        assert abs(found - expected) < 1e-5 * expected
        for kind, bound in (("gradients", 1e-3), ("buffers", 1e-5)):
            assert worst(ours.module, truth, kind) < bound, (backend, kind, worst(ours.module, truth, kind))


def one_value_each() -> None:
    """A process may have one value a channel, as long as together they have two."""
    weight = torch.randn(3, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 2, 1, 1, dtype=torch.float64)
    name = dist.group.WORLD.group_name
    conv = ops.Conv(weight, ops.Norm(None, None, None, None, True, 1e-5, name), ops.ConvGeometry([1, 1], [0, 0], [1, 1], 1))
    out = ops.norm_add_act(ops.conv_stats(mine(x).contiguous(memory_format=torch.channels_last), conv), relu=False)
    torch.testing.assert_close(out, mine(F.batch_norm(F.conv2d(x, weight), None, None, training=True)))


def a_group_of_one_and_eval_mode_keep_to_themselves() -> None:
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    x = torch.randn(SIZE, dtype=torch.float64)
    for training in (True, False):
        local = network().train(training)
        ours = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(local), alone if training else None)
        expected = reference_step(local, mine(x), mine(labels(x)))
        with fused_resnet.backend("eager"):
            found = summed_loss(ours(mine(x)), mine(labels(x)), len(mine(x)))
        found.backward()
        torch.testing.assert_close(found.detach(), expected)
        assert worst(ours, local, "gradients") < 1e-8
        assert worst(ours, local, "buffers") < 1e-10


def compiled_in_one_graph() -> None:
    one = network()
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(one))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(SIZE, dtype=torch.float64)
    reference_step(one, x, labels(x))
    with fused_resnet.backend("eager"):
        summed_loss(compiled(mine(x)), mine(labels(x)), len(x)).backward()
    for p in ours.parameters():
        dist.all_reduce(p.grad)
    assert worst(ours, one, "gradients") < 1e-8
    assert worst(ours, one, "buffers") < 1e-8


def planted_faults_are_seen() -> None:
    """Without the exchange forward, or backward, a step differs from one process's by far."""
    x = torch.randn(SIZE, dtype=torch.float64)
    one = network()
    reference_step(one, x, labels(x))
    for module, name, fault in (
        (values, "share_sums", lambda count, s1, s2, group: (s1, s2)),
        (reference, "gather_moments", lambda count, mean, m2, group: (torch.tensor([count]), mean[None], m2[None])),
    ):
        right = getattr(module, name)
        setattr(module, name, fault)
        ours = shared(one)
        step(ours, x, "eager")
        setattr(module, name, right)
        assert worst(ours.module, one, "gradients") > 1e-3, name


if __name__ == "__main__":
    with processes():
        same_as_one_process()
        kernels_share_too()
        one_value_each()
        a_group_of_one_and_eval_mode_keep_to_themselves()
        planted_faults_are_seen()
        compiled_in_one_graph()
