// Vectors of fp32 for the instruction set that the file is compiled for, and what is loaded into them and stored from them.
//
// kernels.cpp is compiled once for each instruction set, in a namespace of its own (FUSED_RESNET_ISA). Nothing here comes from the
// standard library: the linker may keep any copy of a shared inline function, and that of a newer instruction set would not run on
// an older machine.
// Arithmetic is the same on all of them, bit by bit: a multiplication and an addition are one rounding where `fma` says so and two
// elsewhere (-ffp-contract=off).
#pragma once

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FUSED_RESNET_INLINE inline __attribute__((always_inline))

namespace fused_resnet {
namespace FUSED_RESNET_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

constexpr int kLanes = 16;
using Floats = __m512;
using Flags = __mmask16;  // one for each lane

FUSED_RESNET_INLINE Floats broadcast(float value) { return _mm512_set1_ps(value); }
FUSED_RESNET_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
FUSED_RESNET_INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }
FUSED_RESNET_INLINE Floats load(const BFloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
FUSED_RESNET_INLINE Floats load(const Half* from) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
FUSED_RESNET_INLINE Floats load(const uint8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
FUSED_RESNET_INLINE void store(float* to, Floats values) { _mm512_storeu_ps(to, values); }
FUSED_RESNET_INLINE Floats rounded(BFloat16, Floats values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  sum = _mm512_mask_mov_epi32(sum, _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  return _mm512_castsi512_ps(_mm512_and_si512(sum, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
FUSED_RESNET_INLINE Floats rounded(Half, Floats values) {
  return _mm512_cvtph_ps(_mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
FUSED_RESNET_INLINE void store(BFloat16* to, Floats values) {
  const __m512i words = _mm512_srli_epi32(_mm512_castps_si512(values), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(words));
}
FUSED_RESNET_INLINE void store(Half* to, Floats values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
FUSED_RESNET_INLINE void store(uint8_t* to, Floats values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(values)));
}
// Of words that are pairs of bfloat16.
FUSED_RESNET_INLINE Floats first_of_pairs(Floats words) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(words), 16)); }
FUSED_RESNET_INLINE Floats second_of_pairs(Floats words) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(words), _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
FUSED_RESNET_INLINE Flags is_above(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
FUSED_RESNET_INLINE Flags is_equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
FUSED_RESNET_INLINE Flags is_nan(Floats a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
FUSED_RESNET_INLINE Flags passes_gradient(Floats z) { return _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_NLE_UQ); }
FUSED_RESNET_INLINE Flags either(Flags a, Flags b) { return static_cast<Flags>(a | b); }
FUSED_RESNET_INLINE Flags both(Flags a, Flags b) { return static_cast<Flags>(a & b); }
FUSED_RESNET_INLINE Floats select(Flags which, Floats yes, Floats no) { return _mm512_mask_mov_ps(no, which, yes); }
FUSED_RESNET_INLINE Floats keep(Flags which, Floats values) { return _mm512_maskz_mov_ps(which, values); }
FUSED_RESNET_INLINE unsigned bits_of(Flags flags) { return flags; }
FUSED_RESNET_INLINE Flags flags_of(unsigned bits) { return static_cast<Flags>(bits); }

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

constexpr int kLanes = 8;
using Floats = __m256;
using Flags = __m256;  // all bits of a lane, or none

FUSED_RESNET_INLINE Floats broadcast(float value) { return _mm256_set1_ps(value); }
FUSED_RESNET_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
FUSED_RESNET_INLINE Floats load(const float* from) { return _mm256_loadu_ps(from); }
FUSED_RESNET_INLINE Floats load(const BFloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
FUSED_RESNET_INLINE Floats load(const Half* from) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
FUSED_RESNET_INLINE Floats load(const uint8_t* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
FUSED_RESNET_INLINE void store(float* to, Floats values) { _mm256_storeu_ps(to, values); }
FUSED_RESNET_INLINE __m128i low_halves(__m256i words) {  // of eight words below 2^16
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
FUSED_RESNET_INLINE Floats rounded(BFloat16, Floats values) {
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  sum = _mm256_blendv_epi8(sum, _mm256_set1_epi32(0x7fc00000), nan);
  return _mm256_castsi256_ps(_mm256_and_si256(sum, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
FUSED_RESNET_INLINE Floats rounded(Half, Floats values) {
  return _mm256_cvtph_ps(_mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
FUSED_RESNET_INLINE void store(BFloat16* to, Floats values) {
  const __m256i words = _mm256_srli_epi32(_mm256_castps_si256(values), 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), low_halves(words));
}
FUSED_RESNET_INLINE void store(Half* to, Floats values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
FUSED_RESNET_INLINE void store(uint8_t* to, Floats values) {
  const __m128i halves = low_halves(_mm256_cvttps_epi32(values));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(halves, halves));
}
FUSED_RESNET_INLINE Floats first_of_pairs(Floats words) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(words), 16)); }
FUSED_RESNET_INLINE Floats second_of_pairs(Floats words) {
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(words), _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
FUSED_RESNET_INLINE Flags is_above(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
FUSED_RESNET_INLINE Flags is_equal(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
FUSED_RESNET_INLINE Flags is_nan(Floats a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
FUSED_RESNET_INLINE Flags passes_gradient(Floats z) { return _mm256_cmp_ps(z, _mm256_setzero_ps(), _CMP_NLE_UQ); }
FUSED_RESNET_INLINE Flags either(Flags a, Flags b) { return _mm256_or_ps(a, b); }
FUSED_RESNET_INLINE Flags both(Flags a, Flags b) { return _mm256_and_ps(a, b); }
FUSED_RESNET_INLINE Floats select(Flags which, Floats yes, Floats no) { return _mm256_blendv_ps(no, yes, which); }
FUSED_RESNET_INLINE Floats keep(Flags which, Floats values) { return _mm256_and_ps(which, values); }
FUSED_RESNET_INLINE unsigned bits_of(Flags flags) { return static_cast<unsigned>(_mm256_movemask_ps(flags)); }
FUSED_RESNET_INLINE Flags flags_of(unsigned bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane));
}

#else  // four lanes, which the compiler puts into what vectors there are: SSE2, NEON

constexpr int kLanes = 4;
using Floats = float __attribute__((vector_size(16)));
using Flags = int32_t __attribute__((vector_size(16)));  // all bits of a lane, or none

#if defined(__aarch64__)
FUSED_RESNET_INLINE float widen(Half value) {
  __fp16 half;
  __builtin_memcpy(&half, &value, sizeof half);
  return half;
}
FUSED_RESNET_INLINE Half narrow_half(float value) {
  const __fp16 half = static_cast<__fp16>(value);
  Half result;
  __builtin_memcpy(&result, &half, sizeof half);
  return result;
}
#else  // in software: calls, or they would fill the caches
FUSED_RESNET_INLINE float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
FUSED_RESNET_INLINE uint32_t word_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}
__attribute__((noinline)) inline float widen(Half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinity and NaN
  if (rest < 0x400u) return float_of(sign | word_of(static_cast<float>(rest) * 0x1p-24f));  // subnormal: a multiple of 2^-24
  return float_of(sign | ((rest << 13) + (112u << 23)));
}
// To nearest even.
__attribute__((noinline)) inline Half narrow_half(float value) {
  const uint32_t bits = word_of(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u | (rest >> 13 & 0x3ffu);  // NaN
  } else if (rest >= 0x477ff000u) {
    half = 0x7c00u;  // rounds to infinity
  } else if (rest < 0x38800000u) {
    // Subnormal. An addition to 0.5, whose last bit is 2^-24, rounds as asked for.
    half = word_of(float_of(rest) + 0.5f) - 0x3f000000u;
  } else {
    half = (rest - (112u << 23) + 0xfffu + (rest >> 13 & 1u)) >> 13;
  }
  return Half{static_cast<uint16_t>(sign | half)};
}
#endif

FUSED_RESNET_INLINE Floats broadcast(float value) { return Floats{value, value, value, value}; }
FUSED_RESNET_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return Floats{__builtin_fmaf(a[0], b[0], c[0]), __builtin_fmaf(a[1], b[1], c[1]), __builtin_fmaf(a[2], b[2], c[2]),
                __builtin_fmaf(a[3], b[3], c[3])};
}
FUSED_RESNET_INLINE Floats load(const float* from) {
  Floats values;
  __builtin_memcpy(&values, from, sizeof values);
  return values;
}
FUSED_RESNET_INLINE Floats load(const BFloat16* from) {
  const Flags bits{from[0].bits, from[1].bits, from[2].bits, from[3].bits};
  return reinterpret_cast<Floats>(bits << 16);
}
FUSED_RESNET_INLINE Floats load(const Half* from) { return Floats{widen(from[0]), widen(from[1]), widen(from[2]), widen(from[3])}; }
FUSED_RESNET_INLINE Floats load(const uint8_t* from) {
  return Floats{static_cast<float>(from[0]), static_cast<float>(from[1]), static_cast<float>(from[2]), static_cast<float>(from[3])};
}
FUSED_RESNET_INLINE void store(float* to, Floats values) { __builtin_memcpy(to, &values, sizeof values); }
FUSED_RESNET_INLINE Floats rounded(BFloat16, Floats values) {
  using Words = uint32_t __attribute__((vector_size(16)));
  const Words bits = reinterpret_cast<Words>(values), ordered = reinterpret_cast<Words>(values == values);
  const Words sum = (bits + (bits >> 16 & 1u) + 0x7fffu) & 0xffff0000u;
  return reinterpret_cast<Floats>((sum & ordered) | (~ordered & 0x7fc00000u));
}
FUSED_RESNET_INLINE Floats rounded(Half, Floats values) {
  return Floats{widen(narrow_half(values[0])), widen(narrow_half(values[1])), widen(narrow_half(values[2])), widen(narrow_half(values[3]))};
}
FUSED_RESNET_INLINE void store(BFloat16* to, Floats values) {
  const Flags bits = reinterpret_cast<Flags>(values);
  for (int i = 0; i < kLanes; ++i) to[i].bits = static_cast<uint16_t>(static_cast<uint32_t>(bits[i]) >> 16);
}
FUSED_RESNET_INLINE void store(Half* to, Floats values) {
  for (int i = 0; i < kLanes; ++i) to[i] = narrow_half(values[i]);
}
FUSED_RESNET_INLINE void store(uint8_t* to, Floats values) {
  for (int i = 0; i < kLanes; ++i) to[i] = static_cast<uint8_t>(values[i]);
}
FUSED_RESNET_INLINE Floats first_of_pairs(Floats words) { return reinterpret_cast<Floats>(reinterpret_cast<Flags>(words) << 16); }
FUSED_RESNET_INLINE Floats second_of_pairs(Floats words) {
  return reinterpret_cast<Floats>(reinterpret_cast<Flags>(words) & static_cast<int32_t>(0xffff0000));
}
FUSED_RESNET_INLINE Flags is_above(Floats a, Floats b) { return a > b; }
FUSED_RESNET_INLINE Flags is_equal(Floats a, Floats b) { return a == b; }
FUSED_RESNET_INLINE Flags is_nan(Floats a) { return ~(a == a); }
FUSED_RESNET_INLINE Flags passes_gradient(Floats z) { return ~(z <= Floats{}); }
FUSED_RESNET_INLINE Flags either(Flags a, Flags b) { return a | b; }
FUSED_RESNET_INLINE Flags both(Flags a, Flags b) { return a & b; }
FUSED_RESNET_INLINE Floats select(Flags which, Floats yes, Floats no) {
  return reinterpret_cast<Floats>((reinterpret_cast<Flags>(yes) & which) | (reinterpret_cast<Flags>(no) & ~which));
}
FUSED_RESNET_INLINE Floats keep(Flags which, Floats values) { return reinterpret_cast<Floats>(reinterpret_cast<Flags>(values) & which); }
FUSED_RESNET_INLINE unsigned bits_of(Flags flags) { return (flags[0] & 1u) | (flags[1] & 2u) | (flags[2] & 4u) | (flags[3] & 8u); }
FUSED_RESNET_INLINE Flags flags_of(unsigned bits) {
  const Flags lane{1, 2, 4, 8};
  return ((Flags{} + static_cast<int32_t>(bits)) & lane) == lane;
}

#endif

FUSED_RESNET_INLINE Floats rounded(float, Floats values) { return values; }

// ReLU keeps NaN, as PyTorch's does.
FUSED_RESNET_INLINE Floats relu(Floats z) { return keep(passes_gradient(z), z); }

// ---- blocks: consecutive channels of a row --------------------------------------------------------------------------------

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// How many of a block's channels there are: all, or the first few, where a row ends. The others load as 0 and are not stored.
struct Whole {};
struct Cut {
  int channels;
};

template <int kVectors>
struct Block {
  static constexpr int kChannels = kVectors * kLanes;
  Floats at[kVectors];
};

template <int kVectors, typename T>
FUSED_RESNET_INLINE Block<kVectors> load_block(const T* from, Whole) {
  Block<kVectors> block;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) block.at[v] = load(from + v * kLanes);
  return block;
}

template <int kVectors, typename T>
FUSED_RESNET_INLINE Block<kVectors> load_block(const T* from, Cut cut) {
  T whole[Block<kVectors>::kChannels] = {};
  __builtin_memcpy(whole, from, cut.channels * sizeof(T));
  return load_block<kVectors>(whole, Whole{});
}

// Values as they are after T's rounding, to nearest even. `store` is for those that were rounded, or it cuts bits off.
template <typename T, int kVectors>
FUSED_RESNET_INLINE Block<kVectors> round_block(Block<kVectors> block) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) block.at[v] = rounded(T{}, block.at[v]);
  return block;
}

template <int kVectors, typename T>
FUSED_RESNET_INLINE void store_block(T* to, const Block<kVectors>& block, Whole) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store(to + v * kLanes, block.at[v]);
}

template <int kVectors, typename T>
FUSED_RESNET_INLINE void store_block(T* to, const Block<kVectors>& block, Cut cut) {
  T whole[Block<kVectors>::kChannels];
  store_block(whole, block, Whole{});
  __builtin_memcpy(to, whole, cut.channels * sizeof(T));
}

// A packed mask: bit i of a block, from the lowest, is channel i's.
template <int kVectors>
FUSED_RESNET_INLINE void store_mask(uint8_t* to, unsigned bits, Whole) {
  constexpr int kBytes = Block<kVectors>::kChannels / 8;
  __builtin_memcpy(to, &bits, kBytes);  // the lowest byte first, on every machine that this is compiled for
}
template <int kVectors>
FUSED_RESNET_INLINE void store_mask(uint8_t* to, unsigned bits, Cut cut) {
  bits &= (1u << cut.channels) - 1u;
  __builtin_memcpy(to, &bits, (cut.channels + 7) / 8);
}
template <int kVectors>
FUSED_RESNET_INLINE unsigned load_mask(const uint8_t* from, Whole) {
  unsigned bits = 0;
  __builtin_memcpy(&bits, from, Block<kVectors>::kChannels / 8);
  return bits;
}
template <int kVectors>
FUSED_RESNET_INLINE unsigned load_mask(const uint8_t* from, Cut cut) {
  unsigned bits = 0;
  __builtin_memcpy(&bits, from, (cut.channels + 7) / 8);
  return bits;
}

// Whole bytes of a mask in every block. Two sizes: wide ones keep several sums in flight, and the narrow ones take what is left.
constexpr int kNarrow = kLanes < 8 ? 8 / kLanes : 1;  // vectors
constexpr int kWide = 2;

// Calls body(Constant<vectors>, channel, how many) for the blocks of a row.
template <typename Body>
FUSED_RESNET_INLINE void over_channels(int channels, Body&& body) {
  int channel = 0;
  if constexpr (kWide > kNarrow) {
    for (; channel + kWide * kLanes <= channels; channel += kWide * kLanes) body(Constant<kWide>{}, channel, Whole{});
  }
  for (; channel + kNarrow * kLanes <= channels; channel += kNarrow * kLanes) body(Constant<kNarrow>{}, channel, Whole{});
  if (channel < channels) body(Constant<kNarrow>{}, channel, Cut{channels - channel});
}

}  // namespace FUSED_RESNET_ISA
}  // namespace fused_resnet
