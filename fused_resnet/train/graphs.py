"""CUDA graphs of a network's forward and backward."""

import torch
from torch import Tensor, nn

from .precision import autocast


def graphed(model: nn.Module, images: Tensor, precision: str) -> nn.Module:
    """`model`, whose training on images of this shape and dtype is replayed as CUDA graphs: forward and backward of it, not the loss and
    not the optimizer. An evaluation runs as before.

    Capturing runs a few steps: running statistics are put back.
    """
    kept = [buffer.clone() for buffer in model.buffers()]
    model.train()
    # A weight that autocast converted once would be missing in the graph's other half.
    with autocast(images.device, precision, cache=False):
        model = torch.cuda.make_graphed_callables(model, (images,))
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), kept, strict=True):
            buffer.copy_(value)
    for parameter in model.parameters():
        parameter.grad = None
    return model
