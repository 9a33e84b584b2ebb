"""What processes that share a batch norm tell each other: forward its moments, backward its sums. One message each.

`group` is the name of a process group, as PyTorch registers it: a string, which an operator's schema and a compiler's graph can hold.
"""

import torch
from torch import Tensor


def gather_moments(count: int, mean: Tensor, m2: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """This process's (count, mean [C], M2 [C]) -> those of all, by rank: counts int64 [W], means [W, C], M2s [W, C]."""
    process_group, channels = _resolve(group), mean.numel()
    # The count travels as its bits, since a float32 holds no number above 2^24 exactly.
    bits = torch.full((1,), count, dtype=torch.int64, device=mean.device).view(mean.dtype)
    own = torch.cat([mean, m2, bits])
    all_of_them = own.new_empty(process_group.size() * own.numel())
    distributed = torch.distributed
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor  # its name until PyTorch 2.13
    gather(all_of_them, own, group=process_group)
    means, m2s, counts = (t.contiguous() for t in all_of_them.view(-1, own.numel()).split([channels, channels, bits.numel()], 1))
    return counts.view(torch.int64).flatten(), means, m2s


def share_sums(count: int, s1: Tensor, s2: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """(s1, s2) summed over all processes, times this one's share of the rows: over `count` they are the global means.

    So batch norm's backward, which divides by its own count, is the same for a norm that is shared and one that is not.
    """
    channels = s1.numel()
    own = torch.cat([s1, s2, s1.new_full((1,), count)])
    torch.distributed.all_reduce(own, group=_resolve(group))
    s1, s2 = (own[:-1] * (count / own[-1])).split(channels)
    return s1, s2


def _resolve(group: str) -> "torch.distributed.ProcessGroup":
    return torch.distributed.distributed_c10d._resolve_process_group(group)
