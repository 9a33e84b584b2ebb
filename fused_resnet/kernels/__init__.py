"""The Triton kernels: one trip over memory each. Imports Triton, so only backends and tools that need it import this.

An activation [N, C, H, W] in channels_last is a matrix here, [rows, channels] with rows = N·H·W, rows contiguous. Shared by all
kernels:

- z = fma(x, scale, bias) in float32, and one rounding where a result is stored. ReLU keeps NaN.
- A kernel that reduces writes one partial result per program and channel; a second, small kernel merges them in a fixed order. No
  atomics: the same input gives the same bits.
- Offsets of activations are 64 bits wide, since N·H·W·C passes 2³¹ at large batches.
- Masked loads that feed a sum say `other=0.0`.

| module | kernels |
|---|---|
| `elements` | ReLU, its mask and the packing of it: device functions that the kernels share |
| `tiling` | how much of the matrix a program takes: pure functions of the shape and the number of multiprocessors |
| `batch_stats` | mean and variance, and the affine map of the norm |
| `square_sums` | the same from Σ y and Σ y², which cuDNN's graphs hand out |
| `norm_add_act` | norm + residual + ReLU |
| `norm_backward` | the backward reduction (dz, s1, s2), and batch norm's backward |
| `fprop` | convolution with norm + residual + ReLU on load and the statistics of its output |
| `implicit_gemm` | tiles, pixels, taps: device functions that the convolutions share |
| `max_pool`, `avg_pool` | norm + ReLU + max pool; norm + residual + ReLU + global average pool; both ways |
| `launch` | the one place where a kernel is launched |
| `networks` | the launches of a network's convolutions, recorded |
| `inspect` | compiles all of them without a GPU and prints registers, spills, shared memory |
"""
