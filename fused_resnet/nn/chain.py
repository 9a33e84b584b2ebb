"""Modules in a row: where they are convolution, norm, ReLU, pool or block, the activations between them stay pending."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import Pending
from .activation import Activation
from .block import Block, advance_together, enter
from .folded import conv_act_length, row_forward
from .modules import (
    batch_statistics,
    compute_dtype,
    conv_and_norm,
    is_conv,
    is_global_avg_pool,
    is_max_pool,
    is_norm,
    is_norm_act,
    is_relu,
    is_row,
    observed,
    runs_fused,
    takes,
)
from .prepared import Prepared, prepared


class Stage(nn.Sequential):
    """nn.Sequential that leaves activations pending within; its own output is a tensor."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (nn.Sequential's word)
        """What the modules make of `input`, one after the other."""
        if not runs_fused(input):
            return super().forward(input)
        return run(self, Activation(input)).finish()


def run(modules: Iterable[nn.Module], a: Activation) -> Activation:
    """The modules, one after the other, on `a`. A module that the operators can't stand for is called with a tensor."""
    queue = flatten(modules)
    position = 0
    while position < len(queue):
        if blocks := joined(queue, position, a):
            a = advance_together(blocks, a, queue[position].shortcut)
            position += len(blocks)
            continue
        length = conv_norm_act_length(queue, position)
        if length and (isinstance(a.x, Pending) or takes(queue[position], a.x)):
            a = _conv_norm_act(a, *queue[position : position + 2])
            position += length
        elif length := conv_act_length(queue, position):
            a = Activation(row_forward(queue[position : position + length], a.finish()))
            position += length
        else:
            a = advance(queue[position], a)
            position += 1
    return a


def joined(queue: list[nn.Module], position: int, a: Activation) -> list[Prepared]:
    """The blocks from `position` on that are one node of autograd, which costs the host less than one each: those of a stage.

    A projection begins a new one, so that backward lets go of what a stage kept before it comes to the stage before. Where processes share
    the gradients, each block stays a node of its own: its gradients then travel while those of the block before it are computed.
    """
    first, found = queue[position], []
    distributed = torch.distributed
    if not isinstance(first, Block) or torch.compiler.is_compiling() or (distributed.is_available() and distributed.is_initialized()):
        return found
    for block in queue[position:]:
        if not isinstance(block, Block) or block.recompute or block.shortcut is not first.shortcut or observed(block):
            break
        known = prepared(block)
        if known is None or not known.is_whole or (found and known.projection is not None):
            break
        found.append(known)
    return found if found and (isinstance(a.x, Pending) or takes(found[0].pairs[0].conv, a.x)) else []


def flatten(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules, and in place of a sequence that nobody watches its members."""
    queue = []
    for module in modules:
        if is_sequence(module) and not observed(module):
            queue += flatten(module)
        else:
            queue.append(module)
    return queue


def is_sequence(module: nn.Module) -> bool:
    """Whether a module does nothing but call its members one after the other."""
    if isinstance(module, Stage):
        return True
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and is_row(module)


def conv_norm_act_length(queue: list[nn.Module], position: int) -> int:
    """How many of the modules from `position` on are a convolution, its norm and a ReLU; 0 where they are something else."""
    if position + 1 >= len(queue) or not is_conv(queue[position]):
        return 0
    norm = queue[position + 1]
    if is_norm_act(norm):
        return 2
    return 3 if position + 2 < len(queue) and is_norm(norm) and is_relu(queue[position + 2]) else 0


def _conv_norm_act(a: Activation, conv: nn.Conv2d, norm: nn.Module) -> Activation:
    if isinstance(a.x, Tensor):
        x = enter(a.x, compute_dtype(a.x)).x
        out = ops.conv_stats(x, conv_and_norm(conv, norm, x))
    elif a.residual is None:
        out = ops.norm_act_conv(a.x, conv_and_norm(conv, norm, a.x.y))
    else:
        out, _ = ops.norm_add_act_conv(a.x, a.residual, conv_and_norm(conv, norm, a.x.y))
    return Activation(out, None, a.statistics + batch_statistics(norm, out))


def advance(module: nn.Module, a: Activation) -> Activation:
    """Run `module` on `a`; where it wants to see a tensor, or somebody else does, the activation is made."""
    if isinstance(module, Block) and not observed(module):
        return module.advance(a)
    if isinstance(a.x, Pending):
        if a.residual is None and is_max_pool(module):
            pooled = ops.norm_act_max_pool(a.x, module.kernel_size, module.stride, module.padding)
            return Activation(pooled, None, a.statistics)
        if is_global_avg_pool(module):
            return Activation(ops.norm_add_act_avg_pool(a.x, a.residual), None, a.statistics)
    return Activation(module(a.finish()))
