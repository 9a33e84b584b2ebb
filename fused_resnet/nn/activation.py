"""Activations on their way through a network: made when somebody asks, normalised by whoever reads them."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import Pending


class BatchStatistics(NamedTuple):
    """What one forward tells the running statistics of a norm that tracks them."""

    norm: nn.BatchNorm2d | nn.SyncBatchNorm
    mean: Tensor  #: [C]
    var: Tensor  #: [C]
    correction: float  #: by which var is multiplied to be unbiased


class Activation(NamedTuple):
    """relu(norm(x) + residual), not yet made; or, where x is a tensor, an activation that exists. A module that the operators know
    nothing of may have put anything else in its place.

    `statistics` are those that no norm has been told of. They are written once, at the end, so that a network of fifty norms
    does it in a few launches.
    """

    x: Tensor | Pending
    residual: Tensor | Pending | None = None
    statistics: tuple[BatchStatistics, ...] = ()

    def finish(self) -> Tensor:
        """The activation as a tensor [N, C, H, W] in channels_last; its statistics are written."""
        update_running_statistics(self.statistics)
        return ops.norm_add_act(self.x, self.residual) if isinstance(self.x, Pending) else self.x


@torch.no_grad()
def update_running_statistics(statistics: tuple[BatchStatistics, ...]) -> None:
    """Write the batch statistics of one forward into the running statistics of their norms, as nn.BatchNorm2d does.

    running = (1 − momentum)·running + momentum·batch, with the unbiased variance; a momentum of None is a running average.
    A forward that runs within a backward is a checkpoint's second one, whose batch the norms have been told of: it writes nothing.
    """
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        return
    groups = defaultdict(list)
    for s in statistics:
        buffers = s.norm._buffers
        if buffers["running_mean"] is not None:
            groups[s.norm.momentum].append((s, buffers))
    for momentum, members in groups.items():
        torch._foreach_add_([buffers["num_batches_tracked"] for _, buffers in members], 1)
        if momentum is not None:
            running = [(buffers["running_mean"], buffers["running_var"]) for _, buffers in members]
            blend(running, [s[1:] for s, _ in members], momentum)
            continue
        for (_, mean, var, correction), buffers in members:
            # The weight stays where it is: a GPU need not wait, nor a graph break.
            for running, value in ((buffers["running_mean"], mean), (buffers["running_var"], var * correction)):
                running.lerp_(value.to(running.dtype), buffers["num_batches_tracked"].to(running.dtype).reciprocal())


def moments(out: Pending, shared: bool = False) -> tuple[Tensor, Tensor, float]:
    """(mean, variance, what makes it unbiased) of the batch that `out` is, or is this process's share of."""
    if shared:
        return out.mean, out.var, 1.0
    count = out.y.numel() // out.y.shape[1]
    return out.mean, out.var, count / (count - 1)


@torch.no_grad()
def blend(running: Sequence[tuple[Tensor, Tensor]], batches: Sequence[tuple[Tensor, Tensor, float]], weight: float) -> None:
    """running = (1 − weight)·running + weight·batch in place, of pairs (mean, variance). A batch's are `moments`."""
    means, variances, corrections = zip(*batches, strict=True)
    values = [*means, *torch._foreach_mul(variances, corrections)]
    running_means, running_variances = zip(*running, strict=True)
    targets = running_means + running_variances
    torch._foreach_lerp_(targets, [v if v.dtype == t.dtype else v.to(t.dtype) for v, t in zip(values, targets, strict=True)], weight)
