"""Which modules are worth another class: a block always, a sequence where it holds a block or a whole layer."""

from torch import nn

from ..nn import Block
from ..nn.chain import conv_norm_act_length, flatten, is_sequence


def holds_layer(sequence: nn.Sequential) -> bool:
    """Whether a sequence holds convolution, norm and ReLU in a row."""
    queue = flatten(sequence)
    return any(conv_norm_act_length(queue, i) for i in range(len(queue)))


def worth_fusing(module: nn.Module) -> bool:
    """Whether the operators have anything to do in a module of a known class."""
    if not is_sequence(module):
        return True
    return holds_layer(module) or any(isinstance(member, Block) for member in flatten(module))
