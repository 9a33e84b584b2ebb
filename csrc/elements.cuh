// What all kernels share: elements and groups of channels, masks, the preactivation, and how a thread walks over a matrix.
//
// Arithmetic is fp32. The compiler fuses no multiply and add by itself (-fmad=false): where one rounding is meant, fmaf says so, and
// a kernel gives the same bits on every compiler.
// FLOPs are counted so: a fused multiply-add two; an addition, multiplication, division or comparison one; a conversion none.
#pragma once

#include <cmath>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "layout.h"

namespace fused_resnet {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// ---- elements ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T narrow(float value);
template <>
__device__ __forceinline__ float narrow(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half narrow(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow(float value) {
  return __float2bfloat16_rn(value);
}

// kWidth consecutive elements, moved by one instruction.
template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T)) Vector {
  T lane[kWidth];
};

// Eight consecutive channels of a row, as they lie in memory. kWidth, the elements of a load, divides `channels`, and pointers are
// aligned to it. `valid` is how many of the eight there are; the others load as 0 and are not stored.
template <typename T, int kWidth>
struct Group {
  static constexpr int kVectors = kGroup / kWidth;
  Vector<T, kWidth> vector[kVectors];

  static __device__ __forceinline__ bool reaches(int v, int valid) { return kWidth == kGroup || v * kWidth < valid; }

  static __device__ __forceinline__ Group load(const T* from, int valid) {
    Group group;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      group.vector[v] = reaches(v, valid) ? reinterpret_cast<const Vector<T, kWidth>*>(from)[v] : Vector<T, kWidth>{};
    }
    return group;
  }

  __device__ __forceinline__ void store(T* to, int valid) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (reaches(v, valid)) reinterpret_cast<Vector<T, kWidth>*>(to)[v] = vector[v];
    }
  }

  __device__ __forceinline__ float get(int i) const { return widen(vector[i / kWidth].lane[i % kWidth]); }
  __device__ __forceinline__ void set(int i, float value) { vector[i / kWidth].lane[i % kWidth] = narrow<T>(value); }
};

// A per-channel vector's values for a group. Channels past the last, and all of them where there is no vector, get `otherwise`.
struct Coefficients {
  float at[kGroup];

  static __device__ __forceinline__ Coefficients load(const float* vector, int channel, int valid, float otherwise = 0.0f) {
    Coefficients values;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) values.at[i] = vector && i < valid ? vector[channel + i] : otherwise;
    return values;
  }

  __device__ __forceinline__ float operator[](int i) const { return at[i]; }
};

// ---- norm + residual + ReLU --------------------------------------------------------------------------------------------

// Where ReLU stops a gradient. False for NaN, which therefore stays NaN, as in PyTorch.
__device__ __forceinline__ bool stops(float z) { return z <= 0.0f; }

__device__ __forceinline__ float relu(float z) { return stops(z) ? 0.0f : z; }

// z = fmaf(x, scale, bias) + residual for a group of channels. The vectors of a thread's channels stay in registers; channels past
// the last have coefficients that give z = 0, and with it a mask bit of 0.
template <Residual kResidual>
struct Preactivation {
  Coefficients scale, bias, residual_scale, residual_bias;

  __device__ __forceinline__ Preactivation(const float* scale_of, const float* bias_of, const float* residual_scale_of,
                                           const float* residual_bias_of, int channel, int valid)
      : scale(Coefficients::load(scale_of, channel, valid)), bias(Coefficients::load(bias_of, channel, valid)) {
    if constexpr (kResidual == Residual::kRaw) {
      residual_scale = Coefficients::load(residual_scale_of, channel, valid);
      residual_bias = Coefficients::load(residual_bias_of, channel, valid);
    }
  }

  // Of channel i of the group. `residual` is not read where there is none.
  __device__ __forceinline__ float operator()(int i, float x, float residual) const {
    float z = fmaf(x, scale[i], bias[i]);
    if constexpr (kResidual == Residual::kMaterialised) z += residual;
    if constexpr (kResidual == Residual::kRaw) z += fmaf(residual, residual_scale[i], residual_bias[i]);
    return z;
  }
};

// ---- walking over a matrix ---------------------------------------------------------------------------------------------

// The groups of a thread in an elementwise kernel: from its first, in steps of the grid. The threads of the grid are a multiple of
// the groups of a row (`elementwise_blocks`), so a thread meets the same channels in every step.
struct Walk {
  int channel, valid;
  int64_t offset, step;  // in elements
  int64_t byte, stride;  // of a packed mask
  int left;              // steps; memory ends long before this overflows

  __device__ __forceinline__ Walk(int64_t rows, int channels) {
    const int groups = groups_of(channels);
    stride = static_cast<int64_t>(gridDim.x) * kThreads;
    byte = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    channel = static_cast<int>(byte % groups) * kGroup;
    valid = channels - channel < kGroup ? channels - channel : kGroup;
    step = stride / groups * channels;
    offset = byte / groups * channels + channel;
    const int64_t total = rows * groups;
    left = byte < total ? static_cast<int>((total - byte + stride - 1) / stride) : 0;
  }

  // Calls `body` with how many of the next steps it is to take, as a constant: kSteps of them as long as there are as many, so that
  // their loads are in flight together, and then one by one.
  template <int kSteps, typename Body>
  __device__ __forceinline__ void go(Body&& body) {
    while (left >= kSteps) advance<kSteps>(body);
#pragma unroll 1
    while (left > 0) advance<1>(body);
  }

 private:
  template <int kNow, typename Body>
  __device__ __forceinline__ void advance(Body&& body) {
    body(std::integral_constant<int, kNow>{});
    offset += kNow * step;
    byte += kNow * stride;
    left -= kNow;
  }
};

// How many steps to have in flight, for kLoads loads of 16 bytes a thread in all; a group is not split.
template <typename T, int kWidth>
constexpr int steps_in_flight(int operands, int loads = 4) {
  const int steps = loads / (kGroup / kWidth * operands);
  return steps > 1 ? steps : 1;
}

// n / divisor and n % divisor for 0 <= n < 2^31 by a multiplication. Granlund & Montgomery 1994, "Division by Invariant Integers
// using Multiplication", figure 4.1.
struct Divisor {
  unsigned divisor, multiplier, shift;

  explicit Divisor(int64_t value) : divisor(static_cast<unsigned>(value)), shift(0) {
    while ((1ull << shift) < divisor) ++shift;
    multiplier = static_cast<unsigned>(((1ull << 32) * ((1ull << shift) - divisor)) / divisor + 1);
  }

  __device__ __forceinline__ unsigned quotient(unsigned n) const {
    const auto high = static_cast<unsigned>((static_cast<uint64_t>(n) * multiplier) >> 32);
    return (high + n) >> shift;
  }
  __device__ __forceinline__ unsigned remainder(unsigned n, unsigned quotient) const { return n - quotient * divisor; }
};

}  // namespace fused_resnet
