"""`fused_resnet.recompute` under DistributedDataParallel, with norms that processes share, and under FSDP2: the same bits, no message more."""

import copy

import torch
from common import fused_resnet, labels, mine, processes, summed_loss
from fsdp import sharded
from support.small import SIZE, network
from sync_bn import shared
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fused_resnet import reference, values
from fused_resnet.nn import recompute


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    with fused_resnet.backend("eager"):
        loss = summed_loss(model(mine(x)), mine(labels(x)), len(x))
    loss.backward()
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]


def counted(name: str, module, found: list[str]):
    """Writes each call down. Returns what undoes it."""
    original = getattr(module, name)
    setattr(module, name, lambda *args: found.append(name) or original(*args))
    return lambda: setattr(module, name, original)


def the_same_bits_and_messages() -> None:
    wraps = {
        "ddp": lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True),
        "static graph": lambda model: DistributedDataParallel(model, static_graph=True),
        "shared norms": shared,
        "sharded blocks": lambda model: sharded(model, "blocks"),
        "sharded network": lambda model: sharded(model, "network"),
    }
    for what, wrap in wraps.items():
        one, x, found = network(), torch.randn(SIZE, dtype=torch.float64), []
        for model in (copy.deepcopy(one), fused_resnet.recompute(copy.deepcopy(one))):
            calls: list[str] = []
            undo = [counted(name, module, calls) for name, module in
                    (("gather_moments", reference), ("share_sums", values), ("_as_in_forward", recompute))]  # fmt: skip
            found.append((gradients(wrap(model), x), calls))
            for restore in undo:
                restore()
        (plain, messages), (again, calls) = found
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True)), what
        assert messages == [call for call in calls if call != "_as_in_forward"] and bool(messages) == (what == "shared norms"), what
        assert calls.count("_as_in_forward") == 14, what


if __name__ == "__main__":
    with processes():
        the_same_bits_and_messages()
