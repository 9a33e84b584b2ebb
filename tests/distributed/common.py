"""What the scripts under torchrun share: two processes on gloo, each with its half of one batch."""

import contextlib
import copy
import gc
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
STRIDES = "Grad strides do not match bucket view strides"
warnings.filterwarnings("error", message=STRIDES)  # what DistributedDataParallel says of a gradient that it has to copy

import fused_resnet  # noqa: E402

WORLD = 2


@contextlib.contextmanager
def processes() -> Iterator[int]:
    """The rank, within a process group; the same seed on both."""
    dist.init_process_group("gloo")
    torch.manual_seed(int(sys.argv[1]))
    yield dist.get_rank()
    leave()


def leave() -> None:
    """The end of a process group."""
    dist.barrier()  # none leaves while another still talks
    dist.destroy_process_group()
    gc.collect()  # DistributedDataParallel's cycles keep gloo's threads, which have to end before the interpreter does (pytorch#179291)


def mine(t: Tensor, first: int | None = None) -> Tensor:
    """This process's part of a batch: `first` images are the first one's, by default half."""
    first = len(t) // 2 if first is None else first
    return t[:first] if dist.get_rank() == 0 else t[first:]


def labels(x: Tensor) -> Tensor:
    return torch.arange(len(x)) % 5


def summed_loss(out: Tensor, target: Tensor, count: int) -> Tensor:
    """Cross-entropy of a part, so that the parts' sum is the mean over `count` images."""
    return F.cross_entropy(out, target, reduction="sum") / count


def reference_step(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Loss of a whole batch in one process by PyTorch's modules; gradients are left in `model`."""
    with fused_resnet.backend("off"):
        loss = summed_loss(model(x), target, len(x))
    loss.backward()
    return loss.detach()


def local_average(model: nn.Module, x: Tensor) -> nn.Module:
    """Gradients of both halves by PyTorch's modules, each with its own statistics, averaged; buffers of this process's half."""
    part = copy.deepcopy(model)
    reference_step(part, mine(x), mine(labels(x)))
    for p in part.parameters():
        dist.all_reduce(p.grad)
        p.grad /= 2
    return part


def worst(ours: nn.Module, theirs: nn.Module, kind: str) -> float:
    """The largest relative difference of "gradients", "parameters" or "buffers"."""
    if kind == "buffers":
        pairs = zip(ours.buffers(), theirs.buffers(), strict=True)
    else:
        pairs = (
            (p.grad, q.grad) if kind == "gradients" else (p.detach(), q.detach())
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)
        )
    return max(((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item() for a, b in pairs)
