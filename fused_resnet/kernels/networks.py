"""The launches of a network's convolutions as the rules of thumb tile them, recorded on meta tensors: nothing runs, no GPU is needed."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..problem import ConvProblem
from ..reference import ConvGeometry, Source
from ..roofline import Network
from ..tuning import heuristic_fprop
from . import fprop
from .launch import Launch, recording

#: What a convolution may read: an activation, or a raw output with its norm, alone or with either kind of residual.
SOURCES = ("materialised", "norm", "residual", "raw residual")


def nhwc(*extents: int, dtype: torch.dtype) -> Tensor:
    """A channels_last tensor without memory."""
    return torch.empty(extents, dtype=dtype, device="meta", memory_format=torch.channels_last)


def source(kind: str, problem: ConvProblem, dtype: torch.dtype) -> Source:
    """The input of a convolution, of one of the kinds in `SOURCES`."""
    x = nhwc(problem.n, problem.c, problem.h, problem.w, dtype=dtype)
    norm = [torch.empty(problem.c, device="meta")] * 4
    if kind == "materialised":
        return Source(x)
    if kind == "norm":
        return Source(x, *norm)
    return Source(x, *norm, x, *(norm if kind == "raw residual" else [None] * 4))


def sources(network: Network) -> Iterator[tuple[ConvProblem, str]]:
    """Each convolution of a network, with the kind of its source in training."""
    yield network.stem.conv, "materialised"
    projected = None  # whether the block before ends in a raw residual; the first block reads the pool's output
    for block in network.blocks:
        first, *inner = (layer.conv for layer in block.branch)
        if projected is None or not fprop.reads_each_value_once(first):
            yield first, "materialised"
        else:
            yield first, "raw residual" if projected else "residual"
        for conv in inner:
            yield conv, "norm"
        if block.projection:
            yield block.projection.conv, "materialised"
        projected = block.projection is not None


def record_fprop(problem: ConvProblem, kind: str, dtype: torch.dtype, architecture: int, allow_tf32: bool = True) -> Launch:
    """The forward convolution of `problem` for sm_`architecture`; where there is a residual, it writes act and mask if it can."""
    given = source(kind, problem, dtype)
    writes = given.residual is not None and fprop.reads_each_value_once(problem)
    geometry = ConvGeometry(list(problem.stride), list(problem.padding), list(problem.dilation), problem.groups)
    tiles = heuristic_fprop.configuration(problem, dtype.itemsize, divmod(architecture, 10), given.pending)
    with recording() as launches:
        fprop.fprop(given, nhwc(problem.k, problem.c, problem.r, problem.s, dtype=dtype), geometry, writes, writes, tiles, allow_tf32)
    (launch,) = launches
    return launch
