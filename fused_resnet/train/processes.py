"""A run on several processes that torchrun started: each has a device of its own, and its part of every batch.

Outside of torchrun there is one process, of rank 0.
"""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature

import torch
from torch import Tensor, distributed, nn

from .. import environment

#: The group in which processes talk without their GPUs; None: the default one.
_words: distributed.ProcessGroup | None = None


def launched() -> bool:
    """Whether torchrun started this process."""
    return distributed.is_available() and distributed.is_torchelastic_launched()


@contextmanager
def processes(device: torch.device) -> Iterator[torch.device]:
    """Join the other processes for the time of a `with` block, and get this one's device of that type. On a CPU, by gloo."""
    if not launched():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", environment.local_rank())
        torch.cuda.set_device(device)
    # DistributedDataParallel's cycles keep gloo's threads, which have to end before the interpreter does (pytorch#179291).
    atexit.register(gc.collect)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    global _words
    _words = distributed.new_group(backend="gloo") if device.type == "cuda" else None
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """This process's number; the first one writes files and talks."""
    return distributed.get_rank() if _joined() else 0


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if _joined() else 1


def parallel(model: nn.Module, device: torch.device, sync_bn: bool) -> nn.Module:
    """What a training step calls: the network itself, or where there are more processes, DistributedDataParallel around it.

    With `sync_bn` its batch norms become nn.SyncBatchNorm, in place, and the operators share their statistics. DistributedDataParallel
    takes those on GPUs alone, so they are put in behind its back, with the same parameters.
    """
    whole = model
    if world() > 1:
        ids = [device.index] if device.type == "cuda" else None
        # The buckets' memory is the gradients', which SGD reads: one copy fewer. In training nobody reads running statistics, so they are
        # not sent at each forward: `agree_on_buffers` sends them before an evaluation.
        kind = nn.parallel.DistributedDataParallel
        # PyTorch 2.13 has another name for it, and warns of the old one.
        sent = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in signature(kind).parameters)
        whole = kind(model, device_ids=ids, gradient_as_bucket_view=True, **{sent: False})
    if sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return whole


def total(*values: Tensor) -> None:
    """Add each scalar up over all processes, in place."""
    if world() > 1:
        for value in values:
            distributed.all_reduce(value)


def agreed(wish: int) -> int:
    """The largest wish of all processes. Nothing waits for a GPU."""
    if world() == 1:
        return wish
    value = torch.tensor(wish)
    distributed.all_reduce(value, distributed.ReduceOp.MAX, group=_words)
    return int(value)


def gathered(value: float) -> list[float]:
    """The value of each process, in their order."""
    if world() == 1:
        return [value]
    found = [torch.zeros((), dtype=torch.float64) for _ in range(world())]
    distributed.all_gather(found, torch.tensor(value, dtype=torch.float64), group=_words)
    return [each.item() for each in found]


def agree_on_buffers(model: nn.Module) -> None:
    """Give every process the first one's running statistics."""
    if world() > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)
