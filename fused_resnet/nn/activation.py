"""Activations on their way through a network: made when somebody asks, normalised by whoever reads them."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .. import ops
from ..ops import Pending


class BatchStatistics(NamedTuple):
    """What one forward tells the running statistics of a norm that tracks them."""

    norm: nn.BatchNorm2d | nn.SyncBatchNorm
    mean: Tensor | None  #: [C]; None of an empty batch, which is counted, and tells nothing else
    var: Tensor | None  #: [C]
    size: int  #: of how many values a channel `var` is the biased variance; 0 where it is unbiased


class Activation(NamedTuple):
    """relu(norm(x) + residual), not yet made; or, where x is a tensor, an activation that exists. A module that the operators know
    nothing of may have put anything else in its place.

    `statistics` are those that no norm has been told of. They are written once, at the end, so that a network of fifty norms
    does it in a few launches. `owned`: whether x is a tensor that nobody else has seen, which may be overwritten.
    """

    x: Tensor | Pending
    residual: Tensor | Pending | None = None
    statistics: tuple[BatchStatistics, ...] = ()
    owned: bool = False

    def finish(self) -> Tensor:
        """The activation as a tensor [N, C, H, W] in channels_last; its statistics are written."""
        update_running_statistics(self.statistics)
        return ops.norm_add_act(self.x, self.residual) if isinstance(self.x, Pending) else self.x


def update_running_statistics(statistics: Sequence[BatchStatistics]) -> None:
    """Write the batch statistics of one forward, in order, into the running statistics of their norms, as nn.BatchNorm2d does.

    A norm that several convolutions share is told of them one after the other.
    """
    told, groups = {}, defaultdict(list)
    for norm, batch_mean, batch_var, size in statistics:
        buffers = norm._buffers  # found sooner than by nn.Module's own search
        try:
            mean, var, count = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        except KeyError:
            mean, var, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
        momentum = norm.momentum
        if mean is None or (momentum is None and count is None):  # PyTorch then leaves them alone, too
            continue
        told[norm] = before = told.get(norm, -1) + 1
        groups[before, momentum, batch_mean is None].append((count, mean, var, batch_mean, batch_var, size))
    for (_, momentum, empty), members in groups.items():
        counts, *rest = zip(*members, strict=True)
        counts = [count for count in counts if count is not None]
        ops.update_running_statistics(counts, *([()] * len(rest) if empty else rest), momentum)
