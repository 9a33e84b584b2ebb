"""FSDP2: `fully_shard` on blocks, stages and the network, against one process with the whole batch."""

import copy

import torch
from common import fused_resnet, labels, local_average, mine, processes, reference_step, summed_loss, worst
from support.small import SIZE, network
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fused_resnet.backends import BACKENDS


def sharded(model: nn.Module, what: str, **options) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    model = copy.deepcopy(model)
    for stage in model.stages():
        for block in stage if what == "blocks" else []:
            fully_shard(block, mesh=mesh, **options)
        if what == "stages":
            fully_shard(stage, mesh=mesh, **options)
    if what == "inner modules":
        fully_shard(model.layer1[1].conv2, mesh=mesh, **options)
        fully_shard(model.layer2[0].bn1, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def assert_same(ours: nn.Module, one: nn.Module, kind: str, bound: float) -> None:
    """Of whole tensors, put together from the shards."""
    for (name, p), q in zip(ours.named_parameters(), one.parameters(), strict=True):
        a, b = (p.grad, q.grad) if kind == "gradients" else (p, q)
        error = (a.full_tensor().double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)
        assert error < bound, (name, error)


def trains_as_one_process() -> None:
    """Two steps; norms share their statistics, so that whole-batch gradients are the truth."""
    for what in ("blocks", "stages", "network"):
        one = network()
        ours = sharded(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(one)), what)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (ours, one)]
        for _ in range(2):
            x = torch.randn(SIZE, dtype=torch.float64)
            for optimizer in optimizers:
                optimizer.zero_grad()
            reference_step(one, x, labels(x))
            calls, eager = [], BACKENDS["eager"]
            original = eager.convolve
            eager.convolve = lambda *args, calls=calls, original=original: calls.append(1) or original(*args)
            try:
                with fused_resnet.backend("eager"):
                    (2 * summed_loss(ours(mine(x)), mine(labels(x)), len(x))).backward()
            finally:
                del eager.convolve
            assert len(calls) == 12
            assert_same(ours, one, "gradients", 1e-8)
            for optimizer in optimizers:
                optimizer.step()
            assert_same(ours, one, "parameters", 1e-9)
        assert worst(ours, one, "buffers") < 1e-8


def inner_modules_fall_back_for_their_block() -> None:
    """A convolution or a norm that is sharded by itself has no parameters when its block's operators run."""
    one = network()
    ours = sharded(one, "inner modules")
    x = torch.randn(SIZE, dtype=torch.float64)
    with fused_resnet.backend("eager"):
        summed_loss(ours(mine(x)), mine(labels(x)), len(mine(x))).backward()
    assert_same(ours, local_average(one, x), "gradients", 1e-8)


def mixed_precision_and_resharding() -> None:
    """Parameters cast to bfloat16 for forward and backward; whole again for the optimizer."""
    one = network(dtype=torch.float32)
    for norm in one.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.bias.data[0::2], norm.bias.data[1::2] = 4.0, -4.0  # as chains.calm: no sign hangs on a last bit
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ours = sharded(one, "blocks", mp_policy=policy, reshard_after_forward=True)
    x = torch.randn(SIZE)
    with fused_resnet.backend("eager"):
        summed_loss(ours(mine(x)).float(), mine(labels(x)), len(mine(x))).backward()
    assert all(p.grad.full_tensor().isfinite().all() and p.grad.dtype == torch.float32 for p in ours.parameters())
    found = torch.cat([p.grad.full_tensor().flatten() for p in ours.parameters()])
    expected = torch.cat([p.grad.flatten() for p in local_average(one, x).parameters()])
    assert (found - expected).norm() < 0.1 * expected.norm()  # bfloat16's noise, where some gradients cancel to nothing else
    assert all(b.dtype != torch.bfloat16 for b in ours.buffers())


if __name__ == "__main__":
    with processes():
        trains_as_one_process()
        inner_modules_fall_back_for_their_block()
        mixed_precision_and_resharding()
