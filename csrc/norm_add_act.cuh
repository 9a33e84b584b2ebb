// act = relu(norm(x) + residual) and its packed mask, in one trip over memory.
//
// Formula     z   = fmaf(x, scale[c], bias[c]) + r
//             r   = 0 | residual | fmaf(residual, residual_scale[c], residual_bias[c])
//             act = z <= 0 ? 0 : z   (z itself without relu; a NaN stays a NaN)
//             bit = !(z <= 0)
// Shapes      x, residual, act: T [pixels, channels], that is NHWC with pixels = N * H * W.
//             scale, bias, residual_scale, residual_bias: float [channels].
//             mask: uint8 [pixels, groups], groups = ceil(channels / 8); channel c is bit c % 8 of byte c / 8; unused bits are 0.
// Bytes       pixels * channels * sizeof(T) * (2, or 3 with a residual), and pixels * groups with a mask. The vectors are read
//             once per thread, from the caches.
// Precision   fp32 arithmetic, one rounding (to nearest even) to T. Equals `Reference.norm_add_act`.
// Determinism every output element is computed by one thread from one element of each input: equal bits on every run and grid.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace fused_resnet {

// What is added to norm(x).
enum class Residual { kNone, kMaterialised, kRaw };

// A thread works on groups of eight consecutive channels of a pixel: one byte of the mask, and 16 bytes of a 16-bit type.
constexpr int kGroup = 8;
constexpr int kThreads = 256;
// 80 registers a thread, which is what two affine maps and the loads in flight need without a spill. With four 16-byte loads in
// flight in each thread that is 48 KiB a multiprocessor.
constexpr int kBlocksPerMultiprocessor = 3;

// Blocks to launch: enough to fill the device and no more than there is work for, such that the threads of the grid are a
// multiple of the groups of a pixel, which the kernel relies on.
inline int64_t norm_add_act_blocks(int64_t pixels, int64_t channels, int multiprocessors) {
  const int64_t groups = (channels + kGroup - 1) / kGroup;
  const int64_t wanted = std::min<int64_t>((pixels * groups + kThreads - 1) / kThreads,
                                           static_cast<int64_t>(multiprocessors) * kBlocksPerMultiprocessor);
  const int64_t unit = groups / std::gcd<int64_t>(groups, kThreads);
  return (wanted + unit - 1) / unit * unit;
}

template <typename T>
struct NormAddActArguments {
  const T* x;
  const float* scale;
  const float* bias;
  const T* residual;            // nullptr for kNone
  const float* residual_scale;  // nullptr but for kRaw
  const float* residual_bias;   // nullptr but for kRaw
  T* act;
  uint8_t* mask;  // nullptr without a mask
  int64_t pixels;
  int channels;
};

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T narrow(float value);
template <>
__device__ __forceinline__ float narrow(float value) { return value; }
template <>
__device__ __forceinline__ __half narrow(float value) { return __float2half_rn(value); }
template <>
__device__ __forceinline__ __nv_bfloat16 narrow(float value) { return __float2bfloat16_rn(value); }

// kWidth consecutive elements, moved by one instruction.
template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T)) Vector {
  T lane[kWidth];
};

// kWidth: elements per load, 16 / sizeof(T) or 1. It divides `channels`, and pointers are aligned to it.
// The threads of the grid are a multiple of the groups of a pixel (`norm_add_act_blocks`). A thread then meets the same channels
// in every step, and keeps their coefficients in registers.
template <typename T, int kWidth, Residual kResidual, bool kRelu, bool kMask>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    norm_add_act_kernel(const NormAddActArguments<T> arguments) {
  using V = Vector<T, kWidth>;
  constexpr bool kAdds = kResidual != Residual::kNone;
  constexpr int kVectors = kGroup / kWidth;
  // Four loads in flight per thread, however they are shared out; a group is not split.
  constexpr int kInFlight = 4 / (kVectors * (kAdds ? 2 : 1));
  constexpr int kSteps = kInFlight > 1 ? kInFlight : 1;

  const int channels = arguments.channels;
  const int groups = (channels + kGroup - 1) / kGroup;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t total = arguments.pixels * groups;
  if (thread >= total) return;
  const int channel = static_cast<int>(thread % groups) * kGroup;
  const int valid = channels - channel < kGroup ? channels - channel : kGroup;
  const int64_t step = threads / groups * channels;
  int64_t offset = thread / groups * channels + channel;
  int64_t byte = thread;  // of the mask
  int left = static_cast<int>((total - thread + threads - 1) / threads);  // memory ends long before this overflows

  // Channels beyond the last get coefficients that give z = 0, and with it a mask bit of 0.
  float scale[kGroup], bias[kGroup], residual_scale[kGroup], residual_bias[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    scale[i] = i < valid ? arguments.scale[channel + i] : 0.0f;
    bias[i] = i < valid ? arguments.bias[channel + i] : 0.0f;
    if constexpr (kResidual == Residual::kRaw) {
      residual_scale[i] = i < valid ? arguments.residual_scale[channel + i] : 0.0f;
      residual_bias[i] = i < valid ? arguments.residual_bias[channel + i] : 0.0f;
    }
  }

  const auto advance = [&](auto steps_constant) {
    constexpr int kNow = decltype(steps_constant)::value;
    V x[kNow][kVectors];
    [[maybe_unused]] V residual[kNow][kVectors];
#pragma unroll
    for (int s = 0; s < kNow; ++s) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (kWidth == kGroup || v * kWidth < valid) {
          x[s][v] = *reinterpret_cast<const V*>(arguments.x + offset + s * step + v * kWidth);
          if constexpr (kAdds) {
            residual[s][v] = *reinterpret_cast<const V*>(arguments.residual + offset + s * step + v * kWidth);
          }
        } else {
          x[s][v] = V{};
          if constexpr (kAdds) residual[s][v] = V{};
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kNow; ++s) {
      [[maybe_unused]] unsigned bits = 0;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        V act;
#pragma unroll
        for (int lane = 0; lane < kWidth; ++lane) {
          const int i = v * kWidth + lane;
          float z = fmaf(widen(x[s][v].lane[lane]), scale[i], bias[i]);
          if constexpr (kResidual == Residual::kMaterialised) z += widen(residual[s][v].lane[lane]);
          if constexpr (kResidual == Residual::kRaw) {
            z += fmaf(widen(residual[s][v].lane[lane]), residual_scale[i], residual_bias[i]);
          }
          const bool stopped = z <= 0.0f;  // false for NaN
          if constexpr (kMask) bits |= static_cast<unsigned>(!stopped) << i;
          act.lane[lane] = narrow<T>(kRelu && stopped ? 0.0f : z);
        }
        if (kWidth == kGroup || v * kWidth < valid) {
          *reinterpret_cast<V*>(arguments.act + offset + s * step + v * kWidth) = act;
        }
      }
      if constexpr (kMask) {
        // The same place; without partial groups it costs no registers of its own.
        const int64_t at = kWidth == kGroup ? (offset + s * step) / kGroup : byte + s * threads;
        arguments.mask[at] = static_cast<uint8_t>(bits);
      }
    }
    offset += kNow * step;
    byte += kNow * threads;
    left -= kNow;
  };
  while (left >= kSteps) advance(std::integral_constant<int, kSteps>{});
#pragma unroll 1
  while (left > 0) advance(std::integral_constant<int, 1>{});
}

}  // namespace fused_resnet
