"""`report`: which blocks and convolutions of a network run fused, by which implementation, and why the others do not."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from ..backends import resolve, why_off
from ..nn import Block, ResidualNetwork, Stage
from ..nn.chain import conv_norm_act_length, flatten, is_sequence
from ..nn.folded import conv_act_length
from ..nn.modules import compute_dtype, observed
from .kinds import why_not_conv
from .known import LayerGetter, TimmResNet, TorchvisionResNet, is_norm_layer, knowledge_of
from .recompute import has_inside
from .sequences import holds_layer, holds_stem, may_hold_layer, stem_length
from .structure import Structured, is_block, is_leaf, plans_of
from .swap import Fused
from .trace import original_of, trace

#: What is said of everything where the backend in force is PyTorch.
OFF = "the backend in force leaves tensors of this device and dtype to PyTorch's own modules"
NOT_CALLED = "fuse(model) was not called on it"
BYPASSED = "another forward was put in place of its class's"
_CONVS = nn.modules.conv._ConvNd
_NETWORKS = (ResidualNetwork, TorchvisionResNet, TimmResNet, LayerGetter)


class Row(NamedTuple):
    """A line of the report."""

    name: str  #: of the module, as in named_modules(); "" is the model itself
    kind: str  #: its class, as before `fuse`
    fused: bool
    implementation: str  #: the backend that runs it; "off" stands for PyTorch's own modules
    reason: str  #: why it is not fused; "" where it is
    recompute: bool = False  #: whether `recompute` is on, and what runs the block heeds it


class Convolution(NamedTuple):
    """A convolution of the network."""

    name: str  #: as in named_modules()
    fused: bool
    reason: str  #: why it is not fused; "" where it is


class Report(NamedTuple):
    """What `report` finds. Printed, it is a table of modules, the convolutions that are not fused, and a count of those that are."""

    rows: tuple[Row, ...]
    convolutions: tuple[Convolution, ...] = ()

    def __str__(self) -> str:
        left = Counter(c.reason for c in self.convolutions if not c.fused)
        off = next((reason for reason in left if reason.startswith(OFF)), None)
        if off and left.total() == len(self.convolutions):
            return f"0 of {len(self.convolutions)} convolutions fused: {off}"
        lines = self._table() if self.rows else []
        for reason in left:
            names = [c.name or "(model)" for c in self.convolutions if c.reason == reason]
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            lines.append(f"not fused: {shown}: {reason}")
        return "\n".join([*lines, f"{sum(c.fused for c in self.convolutions)} of {len(self.convolutions)} convolutions fused"])

    def _table(self) -> list[str]:
        cells = [("module", "class", "fused", "by", "why not", "recomputes")]
        for row in self.rows:
            fused, again = ("yes" if yes else "no" for yes in (row.fused, row.recompute))
            cells.append((row.name or "(model)", row.kind, fused, row.implementation, row.reason, again))
        if not any(row.recompute for row in self.rows):
            cells = [cell[:-1] for cell in cells]
        widths = [max(len(str(cell[i])) for cell in cells) for i in range(len(cells[0]))]
        return ["  ".join(str(c).ljust(w) for c, w in zip(cell, widths, strict=True)).rstrip() for cell in cells]


def report(model: nn.Module) -> Report:
    """A row for each residual block, each module that runs by its structure, each stem, and what looks like one and is not known; and
    each convolution, with the reason where it is not fused.

    It is about this moment: hooks, training mode and the backend in force count, and where parameters lie and their dtype
    (autocast's, inside it). Raises TypeError where `model` is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    rows, spoken_for = [], set()
    for name, module in model.named_modules():
        reason = None if module in spoken_for else _verdict(module)
        if reason is None:
            continue
        if reason == BYPASSED:
            pass  # its members may be fused all the same
        elif is_block(module) or knows(module):
            spoken_for.update(module.modules())
        elif isinstance(module, Structured):
            traced, plan = plans_of(module).current()
            spoken_for.update({c.module for c in traced.conditions}.difference(() if plan is None else (*plan.calls, *plan.blocks)))
        elif is_sequence(module):
            spoken_for.update(m for m in module.modules() if is_sequence(m))
        implementation = "off" if reason else _implementation(module)
        if implementation == "off" and not reason:
            reason = _why_off(module)
        again = not reason and has_inside(module) and module.recompute
        rows.append(Row(name, _original(module).__name__, not reason, implementation, reason, again))
    return Report(tuple(rows), tuple(_convolutions(model)))


def _convolutions(model: nn.Module) -> list[Convolution]:
    """All convolutions of a network, in its order."""
    found = dict(_judged(model))
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, _CONVS):
            reason = found.get(module, "nothing that is fused calls it")
            if not reason and _implementation(module) == "off":
                reason = _why_off(module)
            rows.append(Convolution(name, not reason, reason))
    return rows


def _judged(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(convolution, why it is not fused, or "") for each convolution in a module."""
    if isinstance(module, _CONVS):
        yield module, NOT_CALLED
    elif _is_bypassed(module):
        for child in module.children():
            yield from ((m, BYPASSED if m is child else reason) for m, reason in _judged(child))
    elif is_block(module):
        yield from _of_block(module)
    elif isinstance(module, Structured):
        yield from _of_structure(module)
    elif isinstance(module, _NETWORKS) or (is_sequence(module) and isinstance(module, Fused | Stage)):
        yield from _of_row(flatten(module.children()))
    else:
        why = _why_not_known(module) if any(isinstance(m, _CONVS) for m in module.children()) else ""
        for child in module.children():
            yield from ((m, why if m is child and why else reason) for m, reason in _judged(child))


def _of_block(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    reason = block.why_not() or ""
    yield from ((m, reason) for m in block.modules() if isinstance(m, _CONVS))
    if not reason and isinstance(block, Block) and block.projection() is None and block.downsample is not None:
        yield from _judged(block.downsample)  # called as it is


def _of_structure(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    traced, plan = plans_of(module).current()
    if plan is None:
        for child in module.children():
            yield from ((m, f"{_original(module).__name__}: {traced.why}" if m is child else why) for m, why in _judged(child))
        return
    for called in plan.calls:
        if not isinstance(called, _CONVS):
            yield from _judged(called)
    for block in plan.blocks:
        yield from _of_block(block)
    yield from plan.refused.items()  # some of which other calls of the same module fuse
    yield from ((pair.conv, "") for pair in plan.pairs)
    yield from ((conv, "") for conv in plan.alone)
    for conv in plan.affine:
        if not conv.training and not any(p.requires_grad for p in conv.parameters()):
            yield conv, ""


def _of_row(queue: list[nn.Module]) -> Iterator[tuple[nn.Module, str]]:
    for position, module in enumerate(queue):
        if isinstance(module, _CONVS):
            fused = conv_norm_act_length(queue, position) or conv_act_length(queue, position)
            watched = any(observed(m) for m in queue[position : position + 3])
            yield module, "" if fused else "it, its norm or its ReLU has a hook" if watched else _why_alone(module)
        else:
            yield from _judged(module)


def _verdict(module: nn.Module) -> str | None:
    """Why a module is not fused; "" where it is fused. None leaves the module out of the report."""
    fused = isinstance(module, Fused)
    if _is_bypassed(module) and (fused or is_block(module) or isinstance(module, _NETWORKS)):
        return BYPASSED
    if is_block(module):
        return module.why_not() or ""
    if isinstance(module, _NETWORKS):
        return _stem_verdict(module)
    if isinstance(module, Structured):
        traced, plan = plans_of(module).current()
        if plan is None:
            return traced.why
        return "" if plan.fuses else None
    if is_sequence(module):
        holds = holds_layer(module)
        if not holds and not may_hold_layer(module):
            return None
        if holds:
            return "" if fused else NOT_CALLED
        watched = any(observed(m) for m in flatten(module))
        return "a member has a hook" if watched else "no nn.Conv2d without bias, nn.BatchNorm2d and nn.ReLU follow each other"
    if knows(module):
        return NOT_CALLED
    children = list(module.children())
    if any(isinstance(m, nn.Conv2d) for m in children) and any(is_norm_layer(m) for m in children):
        return _why_not_known(module)
    return None


def _is_bypassed(module: nn.Module) -> bool:
    """Whether this one module has another forward, which is no wrapper that calls its class's."""
    forward = vars(module).get("forward")
    found = forward is not None
    while forward is not None:
        forward = getattr(forward, "__func__", forward)
        if forward is type(module).forward:
            return False
        forward = getattr(forward, "__wrapped__", None)
    return found


def _why_not_known(module: nn.Module) -> str:
    """Why a module that holds convolutions has no class of ours."""
    name = type(module).__name__
    if isinstance(module, torch.fx.GraphModule):
        return "torch.fx has traced it, and runs its convolutions one by one: call fuse before"
    if type(module).__module__.startswith("torch.nn."):
        return NOT_CALLED
    why = trace(module, is_leaf).why
    return f"{name} is no block that is known, and its forward can't be followed: {why}" if why else NOT_CALLED


def knows(module: nn.Module) -> bool:
    """Whether `fuse` would give the module another class."""
    return not isinstance(module, Fused) and not is_sequence(module) and knowledge_of(type(module)) is not None


def _stem_verdict(network: nn.Module) -> str | None:
    """Why the stem of a network is not fused; "" where it is fused. None for a network without a stem."""
    if not holds_stem(network):
        return None
    if stem_length(network):
        return ""
    watched = any(observed(m) for m in flatten(network.children())[:3])
    return "the stem has a hook" if watched else "the stem is no nn.Conv2d without bias, nn.BatchNorm2d and nn.ReLU"


def _implementation(module: nn.Module) -> str:
    weight = next(module.parameters(), None)
    if weight is None:
        return "off"
    return resolve(weight.device, compute_dtype(weight))


def _why_off(module: nn.Module) -> str:
    weight = next(module.parameters(), None)
    return OFF if weight is None else f"{OFF}: {why_off(weight.device, compute_dtype(weight))}"


def _why_alone(conv: nn.Module) -> str:
    return why_not_conv(conv) or "no batch norm and ReLU follow it"


def _original(module: nn.Module) -> type[nn.Module]:
    return original_of(type(module))
