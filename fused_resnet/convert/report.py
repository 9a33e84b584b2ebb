"""`report`: which blocks of a network run fused, by which implementation, and why the others do not."""

from typing import NamedTuple

import torch
from torch import nn

from ..backends import resolve
from ..nn import Block, PreActivation, ResidualNetwork
from ..nn.chain import conv_norm_act_length, flatten, is_sequence
from ..nn.folded import conv_act_length
from ..nn.modules import compute_dtype, observed
from .known import LayerGetter, TimmResNet, TorchvisionResNet, is_norm_layer, knowledge_of
from .recompute import has_inside
from .sequences import holds_layer, may_hold_layer
from .swap import Fused

_NETWORKS = (ResidualNetwork, TorchvisionResNet, TimmResNet, LayerGetter)


class Row(NamedTuple):
    """A line of the report."""

    name: str  #: of the module, as in named_modules(); "" is the model itself
    kind: str  #: its class, as before `fuse`
    fused: bool
    implementation: str  #: the backend that runs it; "off" stands for PyTorch's own modules
    reason: str  #: why it is not fused; "" where it is
    recompute: bool = False  #: whether `recompute` is on, and what runs the block heeds it


class Report(NamedTuple):
    """What `report` finds; printed, a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        cells = [("module", "class", "fused", "by", "why not", "recomputes")]
        for row in self.rows:
            fused, again = ("yes" if yes else "no" for yes in (row.fused, row.recompute))
            cells.append((row.name or "(model)", row.kind, fused, row.implementation, row.reason, again))
        if not any(row.recompute for row in self.rows):
            cells = [cell[:-1] for cell in cells]
        widths = [max(len(str(cell[i])) for cell in cells) for i in range(len(cells[0]))]
        lines = ["  ".join(str(c).ljust(w) for c, w in zip(cell, widths, strict=True)).rstrip() for cell in cells]
        fused = sum(row.fused for row in self.rows)
        return "\n".join([*lines, f"{fused} of {len(self.rows)} fused"])


def report(model: nn.Module) -> Report:
    """A row for each residual block, each sequence that holds a whole layer, each stem, and what looks like one and is not known.

    It is about this moment: hooks, training mode and the backend in force count, and where parameters lie and their dtype
    (autocast's, inside it). Raises TypeError where `model` is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    rows, spoken_for = [], set()
    for name, module in model.named_modules():
        reason = None if module in spoken_for else _why_not(module)
        if reason is None:
            continue
        if isinstance(module, Block | PreActivation) or knows(module):
            spoken_for.update(module.modules())
        elif is_sequence(module):
            spoken_for.update(m for m in module.modules() if is_sequence(m))
        implementation = "off" if reason else _implementation(module)
        if implementation == "off" and not reason:
            reason = "the backend in force leaves tensors of this device and dtype to PyTorch"
        again = not reason and has_inside(module) and module.recompute
        rows.append(Row(name, _original(module).__name__, not reason, implementation, reason, again))
    return Report(tuple(rows))


def _why_not(module: nn.Module) -> str | None:
    """Why a module is not fused; "" where it is, None where it is none that the report speaks of."""
    fused = isinstance(module, Fused)
    if isinstance(module, Block | PreActivation):
        return module.why_not() or ""
    if isinstance(module, _NETWORKS):
        return _stem_reason(module)
    if is_sequence(module):
        holds = holds_layer(module)
        if not holds and not may_hold_layer(module):
            return None
        if holds:
            return "" if fused else "fuse(model) was not called on it"
        watched = any(observed(m) for m in flatten(module))
        return "a member has a hook" if watched else "no nn.Conv2d without bias, nn.BatchNorm2d and nn.ReLU follow each other"
    if knows(module):
        return "fuse(model) was not called on it"
    children = list(module.children())
    if any(isinstance(m, nn.Conv2d) for m in children) and any(is_norm_layer(m) for m in children):
        if isinstance(module, torch.fx.GraphModule):
            return "torch.fx has traced it, and runs its convolutions one by one: call fuse before"
        return f"{type(module).__name__} is no block that is known"
    return None


def knows(module: nn.Module) -> bool:
    """Whether `fuse` would give the module another class."""
    return not isinstance(module, Fused) and not is_sequence(module) and knowledge_of(type(module)) is not None


def _stem_reason(network: nn.Module) -> str | None:
    """What keeps the stem of a network from being fused; None for a network without one."""
    if "conv1" not in network._modules:
        return None
    queue = flatten(network.children())
    if conv_norm_act_length(queue, 0) or conv_act_length(queue, 0):
        return ""
    watched = any(observed(m) for m in queue[:3])
    return "the stem has a hook" if watched else "the stem is no nn.Conv2d without bias, nn.BatchNorm2d and nn.ReLU"


def _implementation(module: nn.Module) -> str:
    weight = next(module.parameters(), None)
    if weight is None:
        return "off"
    return resolve(weight.device, compute_dtype(weight))


def _original(module: nn.Module) -> type[nn.Module]:
    return module.original if isinstance(module, Fused) else type(module)
