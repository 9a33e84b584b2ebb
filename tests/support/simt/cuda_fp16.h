// Stands in for CUDA's header of this name: see cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

namespace simt {
template <> struct is_loadable<__half> : std::true_type {};
template <> struct is_loadable<__half2> : std::true_type {};
}  // namespace simt

inline float __half2float(__half value) {
  const unsigned sign = (value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | magnitude << 13);  // infinity or NaN
  // Its bits are those of a float whose exponent is too small by 127 - 15; subnormals come out right as well.
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f));
}

// To nearest, ties to even. Every NaN becomes 0x7fff, as on a GPU.
inline __half __float2half_rn(float value) {
  const unsigned bits = __float_as_uint(value), magnitude = bits & 0x7fffffffu;
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {  // below 2^-14: in units of 2^-24, which the adder rounds to when 0.5 is added
    return {static_cast<uint16_t>(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u))};
  }
  const unsigned rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return {static_cast<uint16_t>(sign | (rounded >> 13) - ((127u - 15u) << 10))};
}

inline float2 __half22float2(__half2 value) { return {__half2float(value.x), __half2float(value.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
