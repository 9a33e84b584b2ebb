"""The launches of a network's convolutions, in training and in inference, recorded on meta tensors: nothing runs, no GPU is needed."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..policy import pays_to_apply_norm
from ..problem import ConvProblem
from ..roofline import Network
from ..tuning import Configuration, Task
from ..values import ConvGeometry, ConvOutput, Source
from . import dgrad, fprop, wgrad
from .launch import Launch, packed_mask, recording


def tasks(network: Network, dtype: str) -> Iterator[Task]:
    """What the kernels do in a training step of a network, as `backends.convolutions` asks for it, each as often as it occurs."""

    def forward_and_dw(conv: ConvProblem, source: str) -> Iterator[Task]:
        yield Task("fprop", conv, dtype, source)
        yield Task("wgrad", conv, dtype, source if source == "norm" else "act")

    yield from forward_and_dw(network.stem.conv, "act")
    source = "act"  # the first block reads the pool's output
    for block in network.blocks:
        first, *inner = (layer.conv for layer in block.branch)
        # Overlapping windows would make a block's input again and again, so a pass does.
        yield from forward_and_dw(first, source if first.pointwise else "act")
        backward = Task("dgrad", first, dtype, source)
        if block.projection:
            projection = block.projection.conv
            yield from forward_and_dw(projection, "act")
            backward = replace(backward, compact=projection.stride[0], compact_k=projection.k)
            yield backward.of_projection()
        elif source != "act":  # the shortcut's gradient; of an activation that no operator made, autograd adds it
            backward = replace(backward, dact=True)
        yield backward
        for conv in inner:
            yield from forward_and_dw(conv, "norm")
            yield Task("dgrad", conv, dtype, "norm")
        source = "norm_add_raw" if block.projection else "norm_add"


def record(task: Task, configuration: Configuration, allow_tf32: bool = True, statistics: bool = True) -> Launch:
    """The convolution of a task, of tensors in the layouts that a network has; fprop without `statistics` where it is made again."""
    conv, dtype = task.conv, getattr(torch, task.dtype)
    geometry = ConvGeometry(list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
    weight, source = _nhwc(dtype, conv.k, conv.c, conv.r, conv.s), _source(task, dtype)
    pointwise, residual = conv.pointwise, task.source.startswith("norm_add")
    with recording() as launches:
        if task.kind == "fprop":
            writes = residual and pointwise
            fprop.fprop(source, weight, geometry, writes, writes, configuration, allow_tf32, statistics)
        elif task.kind == "wgrad":
            wgrad.wgrad(source, _nhwc(dtype, conv.n, conv.k, conv.p, conv.q), weight, geometry, configuration, allow_tf32)
        else:
            y, vector = _nhwc(dtype, conv.n, conv.k, conv.p, conv.q), torch.empty(conv.k, device="meta")
            output = ConvOutput(y, vector, vector, y, vector, vector, weight, vector, True, geometry, True)
            applies = pays_to_apply_norm(conv)
            compact = [-(-extent // task.compact) for extent in (conv.h, conv.w)] if task.compact else None
            dgrad.dgrad(
                output, source, packed_mask(source.x) if residual else None, source.x if task.dact else None,
                _nhwc(dtype, conv.n, conv.c, *compact) if compact else None, task.compact,
                apply_norm=applies, write_dy=applies, configuration=configuration, allow_tf32=allow_tf32,
            )  # fmt: skip
    return launches[0]


class Epilogue(NamedTuple):
    """What a folded convolution does to its output, beside a bias."""

    residual: bool
    relu: bool

    def __str__(self) -> str:
        return "with bias" + ", residual" * self.residual + ", ReLU" * self.relu


def inference(network: Network, dtype: str) -> Iterator[tuple[Task, Epilogue]]:
    """The convolutions of a folded network: the task that each is tiled as, and its epilogue."""
    yield Task("fprop", network.stem.conv, dtype, "act"), Epilogue(False, True)
    for block in network.blocks:
        for layer in block.layers:
            yield Task("fprop", layer.conv, dtype, "act"), Epilogue(layer is block.branch[-1], layer is not block.projection)


def record_inference(task: Task, epilogue: Epilogue, configuration: Configuration, allow_tf32: bool = True) -> Launch:
    """As `record`, of a folded network's convolution."""
    conv, dtype = task.conv, getattr(torch, task.dtype)
    geometry = ConvGeometry(list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
    residual = _nhwc(dtype, conv.n, conv.k, conv.p, conv.q) if epilogue.residual else None
    with recording() as launches:
        fprop.fprop_affine_act(
            _source(task, dtype).x, _nhwc(dtype, conv.k, conv.c, conv.r, conv.s), geometry, None, torch.empty(conv.k, device="meta"),
            residual, epilogue.relu, configuration=configuration, allow_tf32=allow_tf32,
        )  # fmt: skip
    return launches[0]


def _nhwc(dtype: torch.dtype, *extents: int) -> Tensor:
    """A channels_last tensor without memory."""
    return torch.empty(extents, dtype=dtype, device="meta", memory_format=torch.channels_last)


def _source(task: Task, dtype: torch.dtype) -> Source:
    """The input of a task's convolution. Its backward is told of a raw residual only."""
    conv = task.conv
    x, norm, absent = _nhwc(dtype, conv.n, conv.c, conv.h, conv.w), [torch.empty(conv.c, device="meta")] * 4, [None] * 4
    if task.source == "act":
        return Source(x)
    if task.source == "norm_add_raw":
        return Source(x, *norm, x, *norm)
    return Source(x, *norm, x if task.source == "norm_add" and task.kind == "fprop" else None, *absent)
