"""Published peak rates of NVIDIA GPUs: dense matrix products on tensor cores, and bandwidth of device memory.

A peak is a promise of the clock and of the width, not a measurement: real products and copies reach some 50 to 90% of it. Where
the GPU is at hand, measure its ceilings instead (`fused-resnet roofline --device measured`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What the maker says of a GPU. Rates are 10^12 FLOP/s without sparsity, accumulated in float32."""

    title: str
    tflops_16: float  #: bfloat16 and float16
    tflops_tf32: float  #: float32 operands cut to TF32, as cuDNN's convolutions do by default
    tbytes: float  #: 10^12 bytes/s
    source: str

    def flops_per_s(self, itemsize: int) -> float:
        """The rate for elements of 2 or 4 bytes."""
        return 1e12 * (self.tflops_16 if itemsize == 2 else self.tflops_tf32)

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth."""
        return 1e12 * self.tbytes


#: Where a data sheet gives a rate with sparsity, half of it stands here.
DEVICES = {
    "a100-40gb": Device("A100 SXM 40 GB", 312, 156, 1.555, "NVIDIA A100 Tensor Core GPU data sheet"),
    "a100": Device("A100 SXM 80 GB", 312, 156, 2.039, "NVIDIA A100 Tensor Core GPU data sheet"),
    "h100": Device("H100 SXM", 989.4, 494.7, 3.35, "NVIDIA H100 Tensor Core GPU data sheet"),
    "h100-pcie": Device("H100 PCIe", 756, 378, 2.0, "NVIDIA H100 Tensor Core GPU data sheet"),
    "h200": Device("H200 SXM", 989.4, 494.7, 4.8, "NVIDIA H200 Tensor Core GPU data sheet"),
    "a10": Device("A10", 125, 62.5, 0.6, "NVIDIA A10 Tensor Core GPU data sheet"),
    "l4": Device("L4", 121, 60, 0.3, "NVIDIA L4 Tensor Core GPU data sheet"),
    "l40s": Device("L40S", 362.05, 183, 0.864, "NVIDIA L40S data sheet"),
}
