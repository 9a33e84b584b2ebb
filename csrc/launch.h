// From tensors to kernels: pointers, run-time values as template arguments, and the launch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <type_traits>
#include <utility>

#include "device.h"
#include "elements.cuh"
#include "tensors.h"

namespace fused_resnet {

inline void check_cuda(cudaError_t status, const Arguments& arguments, const char* what) {
  if (status != cudaSuccess) arguments.fail(what, ": ", cudaGetErrorName(status), ": ", cudaGetErrorString(status));
}

// Launches `blocks` blocks of kThreads threads on the current stream of x's device, which a DeviceGuard has made current.
template <typename Kernel>
void launch(const Arguments& arguments, void (*kernel)(Kernel), int64_t blocks, const Tensor& x, const Kernel& kernel_arguments) {
  if (blocks > INT32_MAX) arguments.fail("x: expected a tensor for which 2^31 blocks are enough, got shape ", shape_of(x));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = current_stream(x);
  check_cuda(cudaLaunchKernelEx(&config, kernel, kernel_arguments), arguments, "launch");
}

inline int multiprocessors_of(const Arguments& arguments, const Tensor& x) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, ordinal_of(x)), arguments, "the number of multiprocessors");
  return count;
}

// Blocks for a kernel that uses Walk: enough to fill the device with `blocks_per_multiprocessor` and no more than there is work for,
// such that the threads of the grid are a multiple of the groups of a row.
inline int64_t elementwise_blocks(int64_t rows, int channels, int multiprocessors, int blocks_per_multiprocessor) {
  const int64_t groups = groups_of(channels);
  const int64_t wanted =
      std::min<int64_t>(ceil_div(rows * groups, kThreads), static_cast<int64_t>(multiprocessors) * blocks_per_multiprocessor);
  const int64_t unit = groups / std::gcd<int64_t>(groups, kThreads);
  return ceil_div(wanted, unit) * unit;
}

// ---- pointers ---------------------------------------------------------------------------------------------------------

template <typename... Pointers>
bool aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// ---- run-time values as template arguments -------------------------------------------------------------------------------

template <typename Body>
void with_bool(bool value, Body&& body) {
  if (value) {
    body(std::true_type{});
  } else {
    body(std::false_type{});
  }
}

// Calls body with a null pointer to the element type of x.
template <typename Body>
void with_element(const Tensor& x, Body&& body) {
  switch (x.scalar_type()) {
    case ScalarType::Half: body(static_cast<__half*>(nullptr)); break;
    case ScalarType::BFloat16: body(static_cast<__nv_bfloat16*>(nullptr)); break;
    default: body(static_cast<float*>(nullptr));
  }
}

// Calls body with the elements of a load: 16 bytes, where channels and all pointers suit them, or one element.
template <typename T, typename Body>
void with_width(int channels, bool pointers_aligned, Body&& body) {
  constexpr int kWide = 16 / sizeof(T);
  if (channels % kWide == 0 && pointers_aligned) {
    body(std::integral_constant<int, kWide>{});
  } else {
    body(std::integral_constant<int, 1>{});
  }
}

template <typename Body>
void with_residual(bool materialised, bool raw, Body&& body) {
  if (raw) {
    body(std::integral_constant<Residual, Residual::kRaw>{});
  } else if (materialised) {
    body(std::integral_constant<Residual, Residual::kMaterialised>{});
  } else {
    body(std::integral_constant<Residual, Residual::kNone>{});
  }
}

}  // namespace fused_resnet
