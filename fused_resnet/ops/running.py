"""Running statistics, told of the batches that a forward has seen. The one operator that writes into its arguments.

It is one, so that a compiled graph asks, each time it runs, whether it runs within a backward: that is a checkpoint's second forward,
whose batch the norms have been told of.
"""

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from .library import LIBRARY, NAMESPACE, is_watched, overload

_NAME = "update_running_statistics"
_dtype = attrgetter("dtype")


def update_running_statistics(
    counts: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    batch_means: Sequence[Tensor],
    batch_variances: Sequence[Tensor],
    sizes: Sequence[int],
    momentum: float | None,
) -> None:
    """counts += 1; running = (1 − momentum)·running + momentum·batch; in place, of norms that are all different.

    `means`, `variances` and those of the batches are [C] each. `sizes` are of how many values a channel each batch's biased variance is; 0
    where it is unbiased already. A `momentum` of None is a running average, by 1/count: the first of `counts` are then the means' own.
    The sum is taken in the wider of the two dtypes and rounded once. Nothing is written within a backward.
    """
    arguments = counts, means, variances, batch_means, batch_variances, sizes, momentum
    first = next(iter((*batch_means, *counts)), None)
    if first is None:
        return
    if is_watched(first):
        overload(_NAME)(*arguments)
    else:
        _update(*arguments)


@torch.no_grad()
def _update(counts, means, variances, batch_means, batch_variances, sizes, momentum):
    if torch._C._current_graph_task_id() != -1:
        return
    if counts:
        torch._foreach_add_(counts, 1)
    if not means:
        return
    running = wide = [*means, *variances]
    batches = [*batch_means, *torch._foreach_mul(batch_variances, [n / (n - 1) if n else 1.0 for n in sizes])]
    if list(map(_dtype, running)) != list(map(_dtype, batches)):
        dtypes = [torch.promote_types(t.dtype, b.dtype) for t, b in zip(running, batches, strict=True)]
        wide = [t.to(dtype) for t, dtype in zip(running, dtypes, strict=True)]
        batches = [b.to(dtype) for b, dtype in zip(batches, dtypes, strict=True)]
    if momentum is not None:
        torch._foreach_lerp_(wide, batches, momentum)
    else:
        counts = counts[: len(means)]
        for t, b, count in zip(wide, batches, [*counts, *counts], strict=True):  # the weight stays where it is: a GPU need not wait
            t.lerp_(b, count.to(t.dtype).reciprocal())
    if wide is not running:
        torch._foreach_copy_(running, wide)


def _fake(*_) -> None:
    pass


LIBRARY.define(
    f"{_NAME}(Tensor(a!)[] counts, Tensor(b!)[] means, Tensor(c!)[] variances, Tensor[] batch_means, Tensor[] batch_variances,"
    " SymInt[] sizes, float? momentum) -> ()"
)
LIBRARY.impl(_NAME, _update, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::{_NAME}", _fake, lib=LIBRARY)
