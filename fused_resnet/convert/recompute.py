"""`recompute`: blocks make the inside of their branches again in backward, or keep it."""

import warnings

from torch import nn

from ..nn import Block, PreActivation
from .swap import check


def recompute(model: nn.Module, enabled: bool = True) -> nn.Module:
    """Let the residual blocks of `model` make again in backward what they would keep between their convolutions, in place.

    Memory for time: of ResNet-50 28.1 MB an image stay for backward where the backend `triton` keeps 34.7 and `passes` 41.2, for two
    convolutions a block more (docs/training-modes.md). Gradients are the same, to the bit where the backend's convolution gives the same
    bits each time. Only this instance changes; `model`, which may be one block, is returned for convenience, and `enabled=False` undoes
    it. Call it after `fuse`, and before the forward whose backward it is about. It does nothing in what is compiled, exported, or run by
    PyTorch's own modules, and inside other hooks on saved tensors, as of a checkpoint without reentry.

    Warns where no block of `model` has a second convolution. Raises TypeError where `model` is no nn.Module, or is TorchScript's, or
    `enabled` is no bool.
    """
    check(model)
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled: expected True or False; got {enabled!r}")
    blocks = [module for module in model.modules() if isinstance(module, Block | PreActivation) and has_inside(module)]
    for block in blocks:
        block.recompute = enabled
    if enabled and not blocks:
        warnings.warn(
            f"fused_resnet.recompute: {type(model).__name__} has no fused block of two convolutions or more; nothing has changed "
            "(networks of other packages need fused_resnet.fuse first)",
            stacklevel=2,
        )
    return model


def has_inside(module: nn.Module) -> bool:
    """Whether a module is a block with something between its convolutions."""
    if isinstance(module, Block):
        return len(module.branch()) > 1
    return isinstance(module, PreActivation) and len(module.layers()) > 1
