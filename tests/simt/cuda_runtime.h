// The dialect of CUDA C++ that csrc/ uses, for a host compiler: found in place of CUDA's own header, it lets the same sources run on
// a CPU. What is not here does not compile. How it runs: simt.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// Thread-local variables of one module lie in one segment, which the launch poisons before each block.
#define __shared__ thread_local

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

// What a kernel declares as its `extern __shared__` array: there is one, and it has this name.
constexpr size_t kMostDynamicSharedMemory = 48 << 10;
extern __shared__ unsigned char dynamic_shared_memory[kMostDynamicSharedMemory];

// ---- collectives ---------------------------------------------------------------------------------------------------------

inline void __syncthreads() { simt::barrier(); }
inline void __syncwarp(unsigned mask = ~0u) { simt::collective(simt::Kind::kSyncWarp, mask, 0, 0); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int apart) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = simt::collective(simt::Kind::kShuffleXor, mask, bits, apart);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// ---- launching -----------------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

// Runs to the end before it returns.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 ||
      grid.z > 65535 || config->dynamicSmemBytes > kMostDynamicSharedMemory) {
    return cudaErrorInvalidConfiguration;
  }
  gridDim = grid;
  blockDim = block;
  simt::dynamic_bytes = config->dynamicSmemBytes;
  const bool done = simt::launch(reinterpret_cast<void*>(kernel), [&] { kernel(arguments...); });
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}
