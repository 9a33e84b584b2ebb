"""What the processes of a training step send each other: bytes, counted, and the time that a link needs for them.

The rules of counting. Collectives are rings (Patarasuk & Yuan 2009): of B bytes, an all-reduce among n processes has each send 2·(n−1)/n·B,
a reduce-scatter (n−1)/n·B, and an all-gather, of B bytes put together, (n−1)/n·B. Latency is not counted. `fused-resnet roofline --gpus N`
prints it. Plain Python, no GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

#: Of one process, each way: a port of 400 Gbit/s for each GPU, as NVIDIA's DGX H100 and H200 have.
LINK_BYTES_PER_S = 50e9


@dataclass(frozen=True)
class Sent:
    """What a process sends in a step for one purpose."""

    what: str
    messages: int | None  #: collectives; None where it depends on how a user divides the network
    bytes: float

    def seconds(self, bytes_per_s: float) -> float:
        """The time of a link that has nothing else to do, without latency."""
        return self.bytes / bytes_per_s


def sent(parameters: int, norms: Sequence[int], processes: int) -> dict[str, Sent]:
    """By name, what a process sends in a step of a network of so many parameters, and of norms with so many channels each.

    Parameters and their gradients are float32; 16 bits are bfloat16 or float16. Raises ValueError for fewer than 2 processes.
    """
    if processes < 2:
        raise ValueError(f"processes: expected at least 2, got {processes}")
    part = (processes - 1) / processes
    gathered = sum(4 * (2 * channels + 2) for channels in norms)  # mean, M2, and the count's eight bytes, of each process
    reduced = sum(4 * (2 * channels + 1) for channels in norms)  # s1, s2, the count
    buckets = _buckets(4 * parameters)
    return {
        "ddp": Sent("DistributedDataParallel: an all-reduce of gradients", buckets, 2 * part * 4 * parameters),
        "ddp, 16 bits": Sent("the same by its hook bf16_compress_hook or fp16_compress_hook", buckets, 2 * part * 2 * parameters),
        "fsdp2": Sent(
            "fully_shard, 16-bit parameters, float32 gradients: all-gathers forward and backward, a reduce-scatter",
            None,
            part * (2 + 2 + 4) * parameters,
        ),
        "+sync-bn": Sent(
            "shared norms, besides: an all-gather of moments forward, an all-reduce of sums backward, for each",
            2 * len(norms),
            part * (processes * gathered + 2 * reduced),
        ),
    }


def _buckets(size: int) -> int:
    """Of DistributedDataParallel's gradients: the first of 1 MiB, so that it leaves soon, the others of 25."""
    first, others = 2**20, 25 * 2**20
    return 1 + max(0, -(-(size - first) // others))
