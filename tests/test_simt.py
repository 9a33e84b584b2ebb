"""The SIMT shim: kernels of CUDA C++ run on a CPU, with the results of a GPU, and what is wrong with them is reported."""

import ctypes
import textwrap

import numpy as np
import pytest
from simt import compile as simt

pytestmark = pytest.mark.skipif(simt.missing() is not None, reason=str(simt.missing()))

SUMS = """
#include <cuda_runtime.h>
template <int kThreads>
__global__ void __launch_bounds__(kThreads) sums_kernel(const float* x, float* y, int columns) {
  __shared__ float partial[kThreads / 32];
  float sum = 0.0f;
  for (int i = threadIdx.x; i < columns; i += kThreads) sum += x[blockIdx.x * columns + i];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {  // one warp alone shuffles before the next barrier
    float total = threadIdx.x < kThreads / 32 ? partial[threadIdx.x] : 0.0f;
    for (int offset = 16; offset > 0; offset /= 2) total += __shfl_down_sync(0xffffffffu, total, offset);
    if (threadIdx.x == 0) y[blockIdx.x] = total;
  }
  __syncthreads();
}
extern "C" int sums(const float* x, float* y, int rows, int columns, int threads) {
  cudaLaunchConfig_t config = {};
  config.gridDim = rows;
  config.blockDim = threads;
  return cudaLaunchKernelEx(&config, sums_kernel<256>, x, y, columns);
}
"""


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    source = tmp_path_factory.mktemp("simt") / "sums.cu"
    source.write_text(textwrap.dedent(SUMS))
    return simt.load(simt.library([source]))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_rows_are_summed(sums, order):
    x = np.random.default_rng(order).integers(-99, 99, (8, 1000)).astype(np.float32)
    y = np.full(8, np.nan, np.float32)
    sums.simt_set_seed(order)
    assert sums.sums(pointer(x), pointer(y), 8, 1000, 256) == 0
    assert (y == x.sum(1)).all()


def test_more_threads_than_the_bound_are_refused(sums):
    assert sums.sums(None, None, 8, 1000, 288) == 701
