"""Which sequences of modules are worth another class: those that hold a block, or a layer that may be fused."""

from torch import nn

from ..nn import Block
from ..nn.chain import conv_norm_act_length, flatten, is_sequence
from ..nn.folded import conv_act_length
from .known import is_norm_layer


def holds_layer(sequence: nn.Sequential) -> bool:
    """Whether a sequence holds a convolution, a norm and a ReLU in a row that the operators can stand for now, or a folded one."""
    queue = flatten(sequence)
    return any(conv_norm_act_length(queue, i) or conv_act_length(queue, i) for i in range(len(queue)))


def may_hold_layer(sequence: nn.Sequential) -> bool:
    """Whether it holds modules of these kinds: hooks come and go."""
    queue = flatten(sequence)
    relus = [m for m in queue if isinstance(m, nn.ReLU) or (is_norm_layer(m) and isinstance(getattr(m, "act", None), nn.ReLU))]
    return bool(relus) and any(isinstance(m, nn.Conv2d) for m in queue) and any(is_norm_layer(m) for m in queue)


def worth_fusing(module: nn.Module) -> bool:
    """Whether the operators may have anything to do in a module of a known class."""
    if not is_sequence(module):
        return True
    return may_hold_layer(module) or any(isinstance(member, Block) for member in flatten(module))
