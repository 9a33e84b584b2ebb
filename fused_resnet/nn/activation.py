"""Activations on their way through a network: made when somebody asks, normalised by whoever reads them."""

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import Pending


class BatchStatistics(NamedTuple):
    """What one forward tells a norm's running statistics."""

    norm: nn.BatchNorm2d
    mean: Tensor  #: [C]
    var: Tensor  #: [C], biased
    count: int  #: N·H·W


class Activation(NamedTuple):
    """relu(norm(x) + residual), not yet made; or, where x is a tensor, an activation that exists.

    `statistics` are those that no norm has been told of. They are written once, at the end, so that a network of fifty norms
    does it in a few launches.
    """

    x: Tensor | Pending
    residual: Tensor | Pending | None = None
    statistics: tuple[BatchStatistics, ...] = ()

    def finish(self) -> Tensor:
        """The activation as a tensor [N, C, H, W] in channels_last; its statistics are written."""
        update_running_statistics(self.statistics)
        return self.x if isinstance(self.x, Tensor) else ops.norm_add_act(self.x, self.residual)


@torch.no_grad()
def update_running_statistics(statistics: tuple[BatchStatistics, ...]) -> None:
    """Write the batch statistics of one forward into the running statistics of their norms, as nn.BatchNorm2d does.

    running = (1 − momentum)·running + momentum·batch, with the unbiased variance; a momentum of None is a running average.
    """
    groups = defaultdict(list)
    for s in statistics:
        if s.norm.track_running_stats and s.norm.running_mean is not None:
            groups[s.norm.momentum].append(s)
    for momentum, members in groups.items():
        torch._foreach_add_([s.norm.num_batches_tracked for s in members], 1)
        for s in members if momentum is None else ():
            _lerp([s], 1.0 / float(s.norm.num_batches_tracked))
        if momentum is not None:
            _lerp(members, momentum)


def _lerp(members: list[BatchStatistics], weight: float) -> None:
    unbiased = torch._foreach_mul([s.var for s in members], [s.count / (s.count - 1) for s in members])
    running = [s.norm.running_mean for s in members] + [s.norm.running_var for s in members]
    batch = [*(s.mean for s in members), *unbiased]
    torch._foreach_lerp_(running, [b.to(r.dtype) for b, r in zip(batch, running, strict=True)], weight)
