// Stands in for CUDA's header of this name where kernels are compiled for the host: the part of CUDA C++ that csrc/ may use. What
// is missing here is missing on purpose, so that its use does not compile. docs/simt.md says what is modelled.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "simt_engine.h"

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
// The bound stands before the kernel's first instruction, as that many one-byte no-ops; the engine counts them at a launch.
#define SIMT_BOUND(threads, ...) __attribute__((patchable_function_entry((threads), (threads))))
#define __launch_bounds__(...) SIMT_BOUND(__VA_ARGS__, 0)
// Every shared variable of a module lies in its thread-local segment, where the engine finds and poisons all of them. The threads
// of a block are fibers of one host thread, so they share it.
#define __shared__ thread_local

// ---- types -----------------------------------------------------------------------------------------------------------

#define SIMT_VECTOR_2(name, type, bytes) \
  struct alignas(bytes) name {           \
    type x, y;                           \
  };                                     \
  inline name make_##name(type x, type y) { return {x, y}; }
#define SIMT_VECTOR_4(name, type, bytes) \
  struct alignas(bytes) name {           \
    type x, y, z, w;                     \
  };                                     \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }
SIMT_VECTOR_2(float2, float, 8)
SIMT_VECTOR_2(int2, int, 8)
SIMT_VECTOR_2(uint2, unsigned, 8)
SIMT_VECTOR_4(float4, float, 16)
SIMT_VECTOR_4(int4, int, 16)
SIMT_VECTOR_4(uint4, unsigned, 16)
#undef SIMT_VECTOR_2
#undef SIMT_VECTOR_4

struct uint3 {
  unsigned x, y, z;
};
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

// Constant as a thread of a kernel sees them; the engine sets them whenever it turns to another thread.
extern const uint3 threadIdx, blockIdx;
extern const dim3 blockDim, gridDim;
extern const int warpSize;

// ---- meeting points --------------------------------------------------------------------------------------------------

__forceinline__ void __syncthreads() { simt::meet_block(simt::Kind::kSyncthreads, false); }
__forceinline__ int __syncthreads_count(int predicate) { return simt::meet_block(simt::Kind::kSyncthreadsCount, predicate != 0); }
__forceinline__ int __syncthreads_or(int predicate) { return simt::meet_block(simt::Kind::kSyncthreadsOr, predicate != 0) != 0; }
__forceinline__ int __syncthreads_and(int predicate) { return simt::meet_block(simt::Kind::kSyncthreadsAnd, predicate == 0) == 0; }
__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu) { simt::meet_warp(simt::Kind::kSyncwarp, mask, 0, 0, 32); }
__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(simt::meet_warp(simt::Kind::kBallot, mask, predicate != 0, 0, 32));
}
__forceinline__ int __any_sync(unsigned mask, int predicate) { return simt::meet_warp(simt::Kind::kAny, mask, predicate != 0, 0, 32) != 0; }
__forceinline__ int __all_sync(unsigned mask, int predicate) { return simt::meet_warp(simt::Kind::kAll, mask, predicate == 0, 0, 32) == 0; }

namespace simt {
template <typename T>
__forceinline__ T shuffle(Kind kind, unsigned mask, T value, unsigned operand, int width) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable<T>::value, "a shuffle moves up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet_warp(kind, mask, bits, operand, width);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace simt

#define SIMT_SHUFFLES(T)                                                                             \
  __forceinline__ T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {                  \
    return simt::shuffle(simt::Kind::kShuffle, mask, value, static_cast<unsigned>(lane), width);     \
  }                                                                                                  \
  __forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {         \
    return simt::shuffle(simt::Kind::kShuffleUp, mask, value, delta, width);                         \
  }                                                                                                  \
  __forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {       \
    return simt::shuffle(simt::Kind::kShuffleDown, mask, value, delta, width);                       \
  }                                                                                                  \
  __forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {             \
    return simt::shuffle(simt::Kind::kShuffleXor, mask, value, static_cast<unsigned>(lanes), width); \
  }
SIMT_SHUFFLES(int)
SIMT_SHUFFLES(unsigned)
SIMT_SHUFFLES(long)
SIMT_SHUFFLES(unsigned long)
SIMT_SHUFFLES(long long)
SIMT_SHUFFLES(unsigned long long)
SIMT_SHUFFLES(float)
SIMT_SHUFFLES(double)
#undef SIMT_SHUFFLES

// ---- memory ----------------------------------------------------------------------------------------------------------

inline void __threadfence() { simt::fence(); }

namespace simt {
template <typename T>
struct is_loadable : std::is_arithmetic<T> {};
template <> struct is_loadable<float2> : std::true_type {};
template <> struct is_loadable<float4> : std::true_type {};
template <> struct is_loadable<int2> : std::true_type {};
template <> struct is_loadable<int4> : std::true_type {};
template <> struct is_loadable<uint2> : std::true_type {};
template <> struct is_loadable<uint4> : std::true_type {};
}  // namespace simt

// Caching hints change no value.
#define SIMT_LOAD(name)                                                           \
  template <typename T>                                                           \
  __forceinline__ T name(const T* address) {                                      \
    static_assert(simt::is_loadable<T>::value, #name " does not take this type"); \
    return *address;                                                              \
  }
#define SIMT_STORE(name)                                                          \
  template <typename T>                                                           \
  __forceinline__ void name(T* address, T value) {                                \
    static_assert(simt::is_loadable<T>::value, #name " does not take this type"); \
    *address = value;                                                             \
  }
SIMT_LOAD(__ldg)
SIMT_LOAD(__ldcs)
SIMT_LOAD(__ldcg)
SIMT_LOAD(__ldlu)
SIMT_STORE(__stcs)
SIMT_STORE(__stcg)
#undef SIMT_LOAD
#undef SIMT_STORE

namespace simt {
// new = change(old), in one step. Relaxed, as CUDA's are: only a fence orders what is around it.
template <typename T, typename Change>
__forceinline__ T atomic_change(T* address, Change change) {
  T old, changed;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    changed = change(old);
  } while (!__atomic_compare_exchange(address, &old, &changed, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
}  // namespace simt

#define SIMT_ATOMICS(T)                                                                                               \
  __forceinline__ T atomicAdd(T* address, T value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }   \
  __forceinline__ T atomicExch(T* address, T value) { return __atomic_exchange_n(address, value, __ATOMIC_RELAXED); } \
  __forceinline__ T atomicMax(T* address, T value) {                                                                  \
    return simt::atomic_change(address, [=](T old) { return old < value ? value : old; });                            \
  }                                                                                                                   \
  __forceinline__ T atomicMin(T* address, T value) {                                                                  \
    return simt::atomic_change(address, [=](T old) { return value < old ? value : old; });                            \
  }                                                                                                                   \
  __forceinline__ T atomicCAS(T* address, T expected, T value) {                                                      \
    __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);                \
    return expected;                                                                                                  \
  }
SIMT_ATOMICS(int)
SIMT_ATOMICS(unsigned)
SIMT_ATOMICS(unsigned long long)
#undef SIMT_ATOMICS
__forceinline__ unsigned atomicInc(unsigned* address, unsigned bound) {
  return simt::atomic_change(address, [=](unsigned old) { return old >= bound ? 0u : old + 1; });
}
__forceinline__ float atomicAdd(float* address, float value) {
  return simt::atomic_change(address, [=](float old) { return old + value; });
}

// ---- arithmetic ------------------------------------------------------------------------------------------------------

// Whoever compiles this forbids contraction (-ffp-contract=off): what is fused says so.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
// Through double: within the two units in the last place that CUDA allows rsqrtf, and right but for ties after two roundings.
inline float __frsqrt_rn(float a) { return static_cast<float>(1.0 / sqrt(static_cast<double>(a))); }
inline float rsqrtf(float a) { return __frsqrt_rn(a); }

inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(static_cast<unsigned>(a)); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
inline unsigned __float_as_uint(float a) {
  unsigned bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float a;
  std::memcpy(&a, &bits, sizeof a);
  return a;
}
inline int __float_as_int(float a) { return static_cast<int>(__float_as_uint(a)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }

#define SIMT_MIN_MAX(T)                            \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }  // of a number and a NaN, the number
inline float max(float a, float b) { return fmaxf(a, b); }

// ---- runtime ---------------------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchFailure = 719,
};
typedef struct CUstream_st* cudaStream_t;  // of no meaning here: a launch has ended when it returns

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    case cudaErrorLaunchOutOfResources: return "cudaErrorLaunchOutOfResources";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
  }
  return "unrecognized error code";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure: return simt::last_message();  // more than CUDA can say
    case cudaErrorLaunchOutOfResources: return "too many resources requested for launch";
  }
  return "unrecognized error code";
}
inline cudaError_t cudaGetLastError() { return static_cast<cudaError_t>(simt::last_error(true)); }
inline cudaError_t cudaPeekAtLastError() { return static_cast<cudaError_t>(simt::last_error(false)); }

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return static_cast<cudaError_t>(simt::device_attribute(value, attribute, device));
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  return static_cast<cudaError_t>(simt::allow_dynamic_bytes(reinterpret_cast<const void*>(kernel), bytes));
}

// Registers bound the true figure, and there are none here.
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}

struct cudaLaunchAttribute;  // none is modelled
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace simt {
template <typename Body>
__attribute__((no_sanitize("thread"))) void run_thread(void* closure) {
  (*static_cast<Body*>(closure))();
}

template <typename... Parameters>
cudaError_t launch_kernel(const cudaLaunchConfig_t& config, void (*kernel)(Parameters...), Parameters... values) {
  if (config.numAttrs != 0) return static_cast<cudaError_t>(fail(cudaErrorInvalidValue));
  auto body = [&]() __attribute__((no_sanitize("thread"))) { kernel(values...); };
  const Argument arguments[] = {{&values, sizeof values}..., {}};
  return static_cast<cudaError_t>(launch(
      {reinterpret_cast<const void*>(kernel),
       {config.gridDim.x, config.gridDim.y, config.gridDim.z},
       {config.blockDim.x, config.blockDim.y, config.blockDim.z},
       config.dynamicSmemBytes,
       &run_thread<decltype(body)>,
       &body,
       arguments,
       sizeof...(Parameters)}));
}
}  // namespace simt

// Runs the kernel to its end. Arguments are converted to the kernel's parameters, as CUDA's own template does.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  return simt::launch_kernel<Parameters...>(*config, kernel, std::forward<Arguments>(arguments)...);
}
