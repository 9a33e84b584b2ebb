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
    """Whether a sequence holds modules of these kinds, even where a hook keeps them from being fused for now."""
    queue = flatten(sequence)
    relus = [m for m in queue if isinstance(m, nn.ReLU) or (is_norm_layer(m) and isinstance(getattr(m, "act", None), nn.ReLU))]
    return bool(relus) and any(isinstance(m, nn.Conv2d) for m in queue) and any(is_norm_layer(m) for m in queue)


def worth_fusing(module: nn.Module) -> bool:
    """Whether the operators may have anything to do in a module of a known class."""
    if not is_sequence(module):
        return True
    return may_hold_layer(module) or any(isinstance(member, Block) for member in flatten(module))


def all_known(sequence: nn.Sequential) -> bool:
    """Whether a sequence runs fused as a row. One convolution at its end may be left over: its norm may follow the sequence."""
    queue = flatten(sequence)
    rows = [conv_norm_act_length(queue, i) or conv_act_length(queue, i) for i in range(len(queue) - 1)]
    return all(length for length, module in zip(rows, queue, strict=False) if isinstance(module, nn.Conv2d))


def holds_stem(network: nn.Module) -> bool:
    """Whether a known network begins with a convolution, under the name that all of them use."""
    return "conv1" in network._modules


def stem_length(network: nn.Module) -> int:
    """How many modules at a network's beginning run fused as a row."""
    queue = flatten(network.children())
    return conv_norm_act_length(queue, 0) or conv_act_length(queue, 0)
