"""The shape of one program of an implicit-GEMM kernel."""

from dataclasses import asdict, dataclass
from typing import Literal

#: A task is done by a graph of cuDNN, which has no tiles of ours to choose.
CUDNN = "cudnn"


@dataclass(frozen=True)
class Configuration:
    """M, N and K are the kernel's own GEMM axes, as its docstring names them. Raises ValueError for what no kernel can run."""

    block_m: int  #: of the accumulator, per program; a power of two of at least 16, as all blocks
    block_n: int
    block_k: int  #: of a step of the main loop
    warps: int
    stages: int  #: of the main loop's software pipeline
    splits: int = 1  #: of the K axis, into partial results that a second kernel adds up in a fixed order

    def __post_init__(self):
        for name, value in asdict(self).items():
            least = 16 if name.startswith("block") else 1
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected a whole number of at least {least}; got {value!r}")
            if name not in ("stages", "splits") and value & (value - 1):
                raise ValueError(f"{name}: expected a power of two; got {value}")

    def __str__(self) -> str:
        split = f", {self.splits} splits" if self.splits > 1 else ""
        return f"{self.block_m}x{self.block_n}x{self.block_k}, {self.warps} warps, {self.stages} stages{split}"


#: What a task may be done by, beside the passes and the framework's convolution: a Triton kernel with these tiles, or cuDNN.
Choice = Configuration | Literal["cudnn"]
