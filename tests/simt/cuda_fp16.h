// CUDA's half, as bits, with the conversions that csrc/ uses. IEEE 754 binary16.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half half) {
  const uint32_t sign = (half.bits & 0x8000u) << 16, exponent = half.bits >> 10 & 0x1f, mantissa = half.bits & 0x3ff;
  uint32_t bits;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // zero and subnormal numbers
    std::memcpy(&bits, &magnitude, sizeof bits);
  } else {
    bits = (exponent == 0x1f ? 0xff : exponent + 112) << 23 | mantissa << 13;
  }
  bits |= sign;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounds to nearest even.
inline __half __float2half_rn(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {0x7fff};                                         // NaN
  if (bits >= 0x47800000) return {static_cast<uint16_t>(sign | 0x7c00)};          // 2^16 and more
  if (bits < 0x38800000) {                                                        // below 2^-14: the last place of 0.5 is 2^-24
    const float shifted = std::fabs(value) + 0.5f;
    std::memcpy(&bits, &shifted, sizeof bits);
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000))};
  }
  bits += 0xc8000fff + (bits >> 13 & 1);  // the other bias, and half of the last place
  return {static_cast<uint16_t>(sign | bits >> 13)};
}
