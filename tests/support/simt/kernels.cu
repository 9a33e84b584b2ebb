// Kernels with known results, for tests/instruments/test_simt.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace {

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_bytes, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_bytes;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// y[row] = the row's sum. The partial sums of a block meet in shared memory; its first warp alone shuffles between two barriers.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads) sum_rows_kernel(const T* x, T* y, int columns) {
  __shared__ T partial[kThreads / 32];
  T sum = 0;
  for (int i = threadIdx.x; i < columns; i += kThreads) sum += __ldg(x + static_cast<size_t>(blockIdx.x) * columns + i);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    T total = threadIdx.x < kThreads / 32 ? partial[threadIdx.x] : T(0);
    total = warp_sum(total);
    if (threadIdx.x == 0) __stcs(y + blockIdx.x, total);
  }
  __syncthreads();
}

// y = the sum of x, added by the block that draws the last ticket, in the order of the blocks. `drawn` is 0 before and after.
__global__ void __launch_bounds__(128) sum_by_ticket_kernel(const float* x, float* partial, unsigned* drawn, float* y) {
  __shared__ float s_warps[4];
  __shared__ bool s_is_last;
  const float sum = warp_sum(x[blockIdx.x * 128 + threadIdx.x]);
  if (threadIdx.x % 32 == 0) s_warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = s_warps[0] + s_warps[1] + s_warps[2] + s_warps[3];
    __threadfence();
    s_is_last = atomicInc(drawn, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!s_is_last) return;
  __threadfence();  // by each of those who read
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (unsigned block = 0; block < gridDim.x; ++block) total += __ldcg(partial + block);
    *y = total;
  }
}

// Inclusive sums of a block's values.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) scan_kernel(const int* x, int* y) {
  extern __shared__ int s_warps[];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = x[blockIdx.x * kThreads + threadIdx.x];
  for (int offset = 1; offset < 32; offset *= 2) {
    const int below = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= static_cast<unsigned>(offset)) sum += below;
  }
  if (lane == 31) s_warps[warp] = sum;
  __syncthreads();
  for (unsigned w = 0; w < warp; ++w) sum += s_warps[w];
  y[blockIdx.x * kThreads + threadIdx.x] = sum;
}

// Lanes of one warp take two ways, by thirds, and each group of lanes meets under its own mask, not equally often.
__global__ void two_masks_kernel(int* y) {
  const unsigned lane = threadIdx.x, thirds = 0x49249249u;
  int value = static_cast<int>(lane);
  if (thirds >> lane & 1) {
    for (int i = 0; i < 3; ++i) value += __shfl_sync(thirds, value, 30);
  } else {
    value = __popc(__ballot_sync(~thirds, lane % 2));
    value += 100 * __any_sync(~thirds, lane == 31) + 1000 * __all_sync(~thirds, lane % 3 != 0);
  }
  __syncwarp();
  y[lane] = value;
}

// y[i] = what the thread gets; x is its 64-bit value. `how` as in the declaration order of the shuffles.
__global__ void shuffle_kernel(int how, int operand, int width, const long long* x, long long* y) {
  const long long value = x[threadIdx.x];
  long long result = 0;
  if (how == 0) result = __shfl_sync(0xffffffffu, value, operand, width);
  if (how == 1) result = __shfl_up_sync(0xffffffffu, value, operand, width);
  if (how == 2) result = __shfl_down_sync(0xffffffffu, value, operand, width);
  if (how == 3) result = __shfl_xor_sync(0xffffffffu, value, operand, width);
  y[threadIdx.x] = result;
}

__global__ void predicates_kernel(int* y) {
  const int t = static_cast<int>(threadIdx.x);
  const int count = __syncthreads_count(t % 5 == 0), any = __syncthreads_or(t == 99), none = __syncthreads_or(t == 100);
  const int all = __syncthreads_and(t < 100), some = __syncthreads_and(t < 99);
  if (t == 42) y[0] = count, y[1] = any, y[2] = none, y[3] = all, y[4] = some;
}

// The global number of the thread, at the place of its coordinates.
__global__ void coordinates_kernel(unsigned* y) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned index = block * blockDim.x * blockDim.y * blockDim.z + thread;
  y[index] = index + (warpSize - 32);
}

struct Totals {
  unsigned added, incremented, swapped;
  int greatest, least;
  unsigned long long wide;
  float real;
};
__global__ void atomics_kernel(Totals* totals) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(&totals->added, 3u);
  atomicInc(&totals->incremented, 99u);
  atomicMax(&totals->greatest, i * 7 % 1000);
  atomicMin(&totals->least, -(i * 7 % 1000));
  atomicAdd(&totals->wide, 1ull << 33);
  atomicAdd(&totals->real, 0.5f);
  for (unsigned seen = atomicCAS(&totals->swapped, 0u, 0u), old = ~seen; old != seen;) {
    old = seen;
    seen = atomicCAS(&totals->swapped, old, old + 2);
  }
}

__global__ void bits_kernel(const unsigned* x, unsigned* y) {
  const unsigned a = x[3 * threadIdx.x], b = x[3 * threadIdx.x + 1], selector = x[3 * threadIdx.x + 2];
  uint4 result = make_uint4(__popc(a), __ffs(static_cast<int>(a)), __clz(static_cast<int>(a)), __byte_perm(a, b, selector));
  reinterpret_cast<uint4*>(y)[threadIdx.x] = result;
}

__global__ void arithmetic_kernel(const float* x, float* y) {
  const float a = x[3 * threadIdx.x], b = x[3 * threadIdx.x + 1], c = x[3 * threadIdx.x + 2];
  const float results[] = {
      rsqrtf(a),       __frsqrt_rn(a), __frcp_rn(a),  __fsqrt_rn(a),      __fdiv_rn(a, b), __fmul_rn(a, b),
      __fadd_rn(a, b), a * b + c,      fmaf(a, b, c), __fmaf_rn(a, b, c), min(a, b),       max(a, __int_as_float(0x7fc00000))};
  for (int i = 0; i < 12; ++i) y[12 * threadIdx.x + i] = results[i];
}

// What a block leaves in shared memory is not there for the next.
__global__ void leftovers_kernel(float* y) {
  __shared__ float s;
  extern __shared__ float s_dynamic[];
  if (threadIdx.x == 0) {
    y[2 * blockIdx.x] = s;
    y[2 * blockIdx.x + 1] = s_dynamic[5];
    s = s_dynamic[5] = 1.0f;
  }
}

__global__ void much_shared_kernel(unsigned* y, int words) {
  extern __shared__ unsigned s_words[];
  for (int i = threadIdx.x; i < words; i += blockDim.x) s_words[i] = i;
  __syncthreads();
  unsigned sum = 0;
  for (int i = threadIdx.x; i < words; i += blockDim.x) sum += s_words[words - 1 - i];
  atomicAdd(y, sum);
}

constexpr int kBound = 512;
template <typename T>
__global__ void __launch_bounds__(kBound, 2) bounded_kernel() {}

}  // namespace

extern "C" {

int sum_rows(const float* x, float* y, int rows, int columns, int threads) {
  if (threads == 32) return launch(sum_rows_kernel<float, 32>, rows, threads, 0, x, y, columns);
  if (threads == 96) return launch(sum_rows_kernel<float, 96>, rows, threads, 0, x, y, columns);
  return launch(sum_rows_kernel<float, 1024>, rows, threads, 0, x, y, columns);
}
int sum_rows_double(const double* x, double* y, int rows, int columns) {
  return launch(sum_rows_kernel<double, 256>, rows, 256, 0, x, y, columns);
}
int sum_by_ticket(const float* x, float* partial, unsigned* drawn, float* y, int blocks) {
  return launch(sum_by_ticket_kernel, blocks, 128, 0, x, partial, drawn, y);
}
int scan(const int* x, int* y, int blocks) { return launch(scan_kernel<160>, blocks, 160, 5 * sizeof(int), x, y); }
int two_masks(int* y) { return launch(two_masks_kernel, 1, 32, 0, y); }
int shuffle(int how, int operand, int width, const long long* x, long long* y) {
  return launch(shuffle_kernel, 1, 32, 0, how, operand, width, x, y);
}
int predicates(int* y) { return launch(predicates_kernel, 1, 100, 0, y); }
int coordinates(unsigned* y) { return launch(coordinates_kernel, dim3(3, 4, 5), dim3(6, 7, 2), 0, y); }
int atomics(Totals* totals) { return launch(atomics_kernel, 5, 60, 0, totals); }
int bits(const unsigned* x, unsigned* y) { return launch(bits_kernel, 1, 64, 0, x, y); }
int arithmetic(const float* x, float* y) { return launch(arithmetic_kernel, 1, 64, 0, x, y); }
int leftovers(float* y, int blocks) { return launch(leftovers_kernel, blocks, 32, 24, y); }
int much_shared(unsigned* y, int words, int allowed) {
  if (allowed && cudaFuncSetAttribute(much_shared_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed)) return -1;
  return launch(much_shared_kernel, 2, 64, words * sizeof(unsigned), y, words);
}
int configured(unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz) {
  return launch(bounded_kernel<float>, dim3(gx, gy, gz), dim3(bx, by, bz), 0);
}
int last_error(int clear) { return clear ? cudaGetLastError() : cudaPeekAtLastError(); }
int multiprocessors() {
  int count = -1;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess ? count : -1;
}

// On the host: conversions are plain functions.
void half_to_float(const uint16_t* bits, float* y, int n) {
  for (int i = 0; i < n; ++i) y[i] = __half22float2({__half{bits[i]}, __half{0}}).x;
}
void float_to_half(const float* x, uint16_t* y, int n) {
  for (int i = 0; i < n; ++i) y[i] = __floats2half2_rn(0.0f, x[i]).y.bits;
}
void bfloat16_to_float(const uint16_t* bits, float* y, int n) {
  for (int i = 0; i < n; ++i) y[i] = __bfloat1622float2({__nv_bfloat16{bits[i]}, __nv_bfloat16{0}}).x;
}
void float_to_bfloat16(const float* x, uint16_t* y, int n) {
  for (int i = 0; i < n; ++i) y[i] = __floats2bfloat162_rn(0.0f, x[i]).y.bits;
}

}  // extern "C"
