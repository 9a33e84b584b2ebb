"""DistributedDataParallel around the operators: gradients, no warning about strides, gradients that leave block by block."""

import copy
import warnings

import torch
import torch.distributed as dist
from common import STRIDES, fused_resnet, labels, local_average, mine, processes, summed_loss, worst
from support.small import SIZE, network
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fused_resnet import reference
from fused_resnet.backends import BACKENDS


def step(model: nn.Module, x: torch.Tensor) -> None:
    with fused_resnet.backend("eager"):
        summed_loss(model(mine(x)), mine(labels(x)), len(mine(x))).backward()


def gradients_are_averaged_without_a_warning() -> None:
    """With each option that people set; weights in both layouts. The warning is an error here."""
    for layout in (torch.contiguous_format, torch.channels_last):
        for options in (
            {"gradient_as_bucket_view": True}, {"static_graph": True}, {"static_graph": True, "gradient_as_bucket_view": True},
            {"find_unused_parameters": True}, {"broadcast_buffers": False, "bucket_cap_mb": 1},
        ):  # fmt: skip
            one = network().to(memory_format=layout)
            ours = DistributedDataParallel(copy.deepcopy(one), **options)
            for _ in range(2):
                x = torch.randn(SIZE, dtype=torch.float64)
                ours.zero_grad(set_to_none=not options.get("gradient_as_bucket_view"))
                expected = local_average(one, x)
                step(ours, x)
                assert worst(ours.module, expected, "gradients") < 1e-8, options
                one.load_state_dict(expected.state_dict())
                for p in ours.parameters():
                    assert p.grad.stride() == p.stride(), options
                if not options.get("broadcast_buffers", True) or dist.get_rank() == 0:
                    assert worst(ours.module, expected, "buffers") < 1e-8
                else:  # the first process's buffers hold, from the next forward on
                    one.load_state_dict(ours.module.state_dict())


def accumulated_gradients_leave_once() -> None:
    """`no_sync` for all but the last of several batches."""
    one = network()
    ours = DistributedDataParallel(copy.deepcopy(one), gradient_as_bucket_view=True, broadcast_buffers=False)
    batches = [torch.randn(SIZE, dtype=torch.float64) for _ in range(2)]
    expected = [local_average(one, x) for x in batches]  # statistics do not change gradients in training
    with ours.no_sync():
        step(ours, batches[0])
    step(ours, batches[1])
    for p, q, r in zip(ours.parameters(), *(e.parameters() for e in expected), strict=True):
        torch.testing.assert_close(p.grad, q.grad + r.grad, rtol=1e-8, atol=1e-10)


def events_of_backward(model: nn.Module) -> list[str]:
    """In order: the backward of each convolution node, and each bucket that leaves. Small buckets, after they were rebuilt."""
    events = []
    eager = BACKENDS["eager"]
    original = eager.convolve_backward
    eager.convolve_backward = lambda *args: events.append("node") or original(*args)

    def hook(state, bucket):
        events.append("bucket")
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])

    ours = DistributedDataParallel(model, bucket_cap_mb=0.004, gradient_as_bucket_view=True)
    ours.register_comm_hook(None, hook)
    for _ in range(2):
        events.clear()
        step(ours, torch.randn(SIZE, dtype=torch.float64))
    del eager.convolve_backward
    return events


def gradients_leave_block_by_block() -> None:
    events = events_of_backward(network())
    last_node = len(events) - 1 - events[::-1].index("node")
    before = events[:last_node].count("bucket")
    assert events.count("bucket") >= 5
    assert before >= events.count("bucket") - 2, events  # the stem's own may come after it
    assert events.index("bucket") < events.index("node") + 4, events


def planted_faults_are_seen() -> None:
    """Gradients of other strides make DistributedDataParallel warn; a network as one node lets go of all gradients at its end."""
    right, warned = reference.like_weight, False
    reference.like_weight = lambda dw, weight: torch.empty(dw.shape, dtype=dw.dtype).copy_(dw)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(DistributedDataParallel(network().to(memory_format=torch.channels_last)), torch.randn(SIZE, dtype=torch.float64))
        warned = any(STRIDES in str(w.message) for w in caught)
    finally:
        reference.like_weight = right
    assert warned

    class AtOnce(nn.Module):
        """Gradients reach the parameters when all of them are there: by a reentrant checkpoint of nothing but autograd.grad."""

        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            parameters = dict(self.inner.named_parameters())
            names, values = list(parameters), list(parameters.values())

            class Whole(torch.autograd.Function):
                @staticmethod
                def forward(ctx, *tensors):
                    with torch.enable_grad():
                        ctx.leaves = [t.detach().requires_grad_() for t in tensors]
                        ctx.out = torch.func.functional_call(self.inner, dict(zip(names, ctx.leaves, strict=True)), (x,))
                    return ctx.out.detach()

                @staticmethod
                def backward(ctx, g):
                    return torch.autograd.grad(ctx.out, ctx.leaves, g)

            return Whole.apply(*values)

    events = events_of_backward(AtOnce())
    assert events.index("bucket") > len(events) - 1 - events[::-1].index("node")


with processes():
    planted_faults_are_seen()
    gradients_are_averaged_without_a_warning()
    accumulated_gradients_leave_once()
    gradients_leave_block_by_block()
