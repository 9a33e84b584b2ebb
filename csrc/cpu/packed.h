// The factors of a product, packed as its kernels read them (products.h, tiles.h).
//
// Word        32 bits: a float, or two bfloat16 values that follow each other along depth, as instructions for bfloat16 take them.
// Right       [depth, columns] -> tiles of 16 columns by 16 words of depth, 1 KiB each, those of a column block one after another. A line
//             of a tile is one word of depth of all its columns.
// Left        as it lies, [rows, depth]; or packed, where the kernels say how.
// Sizes       columns are a multiple of 16; what is left of depth is filled up with zeros.
#pragma once

#include "walk.h"

namespace fused_resnet {
namespace FUSED_RESNET_ISA {

constexpr int kTileSums = kTileSide * kTileSide;  // of fp32
constexpr int kWindow = 3;                        // height and width of the windows of 3x3 convolutions
constexpr int kNarrowRows = 4 * kTileSide;        // of a block of kNarrowChannels

template <typename T>
constexpr int kWord = 4 / sizeof(T);  // values of a word
template <typename T>
constexpr int kDepth = kTileSide * kWord<T>;  // of a tile, in values: those of a line, too
template <typename T>
constexpr int kTileValues = kTileSide * kDepth<T>;

// Memory to work in, shared out piece by piece, each of whole tiles.
template <typename T>
class Arena {
 public:
  FUSED_RESNET_INLINE explicit Arena(void* memory) : first_(static_cast<T*>(memory)), next_(first_) {}
  FUSED_RESNET_INLINE T* take(int64_t values) {
    T* taken = next_;
    next_ += (values + kTileValues<T> - 1) / kTileValues<T> * kTileValues<T>;
    return taken;
  }
  // What was taken, in bytes.
  FUSED_RESNET_INLINE int64_t size() const { return (next_ - first_) * static_cast<int64_t>(sizeof(T)); }

 private:
  T *first_, *next_;
};

// ---- a line of a tile: its words

// The rows of depth of a line, from a column on; nullptr: zeros.
template <typename T>
struct Rows {
  const T* at[kWord<T>];

  template <typename RowOf>
  FUSED_RESNET_INLINE Rows(RowOf&& row_of, int64_t first, int64_t column) {
    for (int i = 0; i < kWord<T>; ++i) {
      const T* row = row_of(first + i);
      at[i] = row ? row + column : nullptr;
    }
  }
};

FUSED_RESNET_INLINE void write_words(float* to, const Rows<float>& rows) {
  if (rows.at[0]) return static_cast<void>(__builtin_memcpy(to, rows.at[0], kTileSide * sizeof(float)));
  __builtin_memset(to, 0, kTileSide * sizeof(float));
}

// Of two column blocks that follow each other.
FUSED_RESNET_INLINE void write_two_words(float* to, float* other, const Rows<float>& rows) {
  Rows<float> next = rows;
  if (next.at[0]) next.at[0] += kTileSide;
  write_words(to, rows);
  write_words(other, next);
}

#if defined(__AVX512BW__)

FUSED_RESNET_INLINE __m512i words_of(const Rows<BFloat16>& rows) {
  const auto widened = [](const BFloat16* row) FUSED_RESNET_LAMBDA {
    return row ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row))) : _mm512_setzero_si512();
  };
  return _mm512_or_si512(widened(rows.at[0]), _mm512_slli_epi32(widened(rows.at[1]), 16));
}
FUSED_RESNET_INLINE void write_words(BFloat16* to, const Rows<BFloat16>& rows) { _mm512_storeu_si512(to, words_of(rows)); }

// Two rows of 32 values as words: of the first 16 columns, and of the others. nullptr: zeros.
struct Pairs {
  __m512i first, second;

  FUSED_RESNET_INLINE Pairs(const BFloat16* even, const BFloat16* odd) {
    const __m512i order = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i upper = even ? _mm512_loadu_si512(even) : _mm512_setzero_si512(),
                  lower = odd ? _mm512_loadu_si512(odd) : _mm512_setzero_si512();
    first = _mm512_permutex2var_epi16(upper, order, lower);
    second = _mm512_permutex2var_epi16(upper, _mm512_add_epi16(order, _mm512_set1_epi16(kTileSide)), lower);
  }
};

// Whole lines of a cache are read.
FUSED_RESNET_INLINE void write_two_words(BFloat16* to, BFloat16* other, const Rows<BFloat16>& rows) {
  const Pairs made(rows.at[0], rows.at[1]);
  _mm512_storeu_si512(to, made.first);
  _mm512_storeu_si512(other, made.second);
}

// A matrix of 16 by 16 words, transposed in place.
FUSED_RESNET_INLINE void transpose(__m512i (&rows)[kTileSide]) {
  __m512i words[kTileSide], doubles[kTileSide];
#pragma GCC unroll 8
  for (int i = 0; i < kTileSide; i += 2) {
    words[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    words[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTileSide; i += 4) {
    doubles[i] = _mm512_unpacklo_epi64(words[i], words[i + 2]);
    doubles[i + 1] = _mm512_unpackhi_epi64(words[i], words[i + 2]);
    doubles[i + 2] = _mm512_unpacklo_epi64(words[i + 1], words[i + 3]);
    doubles[i + 3] = _mm512_unpackhi_epi64(words[i + 1], words[i + 3]);
  }
  // doubles[4 g + j]: of rows 4 g to 4 g + 3, the columns j, 4 + j, 8 + j, 12 + j, 128 bits each.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i low = _mm512_shuffle_i32x4(doubles[j], doubles[4 + j], 0x88),
                  high = _mm512_shuffle_i32x4(doubles[8 + j], doubles[12 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(doubles[j], doubles[4 + j], 0xdd),
                  odd_high = _mm512_shuffle_i32x4(doubles[8 + j], doubles[12 + j], 0xdd);
    rows[j] = _mm512_shuffle_i32x4(low, high, 0x88);
    rows[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(low, high, 0xdd);
    rows[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
}

FUSED_RESNET_INLINE void write_transposed(__m512i (&words)[kTileSide], void* to) {
  transpose(words);
  for (int i = 0; i < kTileSide; ++i) _mm512_storeu_si512(static_cast<char*>(to) + i * 64, words[i]);
}
FUSED_RESNET_INLINE void transpose_tile(const void* from, int64_t stride, void* to) {
  __m512i words[kTileSide];
  for (int i = 0; i < kTileSide; ++i) words[i] = _mm512_loadu_si512(static_cast<const char*>(from) + i * stride);
  write_transposed(words, to);
}

#else

FUSED_RESNET_INLINE void write_words(BFloat16* to, const Rows<BFloat16>& rows) {
  for (int i = 0; i < kTileSide; ++i) {
    to[2 * i] = rows.at[0] ? rows.at[0][i] : BFloat16{0};
    to[2 * i + 1] = rows.at[1] ? rows.at[1][i] : BFloat16{0};
  }
}

FUSED_RESNET_INLINE void write_two_words(BFloat16* to, BFloat16* other, const Rows<BFloat16>& rows) {
  Rows<BFloat16> next = rows;
  for (const BFloat16*& row : next.at) {
    if (row) row += kTileSide;
  }
  write_words(to, rows);
  write_words(other, next);
}

// A matrix of 16 by 16 words, transposed; its rows lie `stride` bytes apart.
FUSED_RESNET_INLINE void transpose_tile(const void* from, int64_t stride, void* to) {
  for (int i = 0; i < kTileSide; ++i) {
    for (int j = 0; j < kTileSide; ++j)
      __builtin_memcpy(static_cast<char*>(to) + j * 64 + i * 4, static_cast<const char*>(from) + i * stride + j * 4, 4);
  }
}

#endif

// ---- matrices

// [depth, columns] -> packed, of the column blocks [first, last), each of `count` matrices of that depth, of which this is one. row_of(row)
// is a row of depth, or nullptr for zeros; it is asked for rows beyond depth, too.
template <typename T, typename RowOf>
FUSED_RESNET_INLINE void pack_rows(RowOf&& row_of, int64_t depth, int64_t count, int64_t first, int64_t last, T* packed) {
  const int64_t steps = (depth + kDepth<T> - 1) / kDepth<T>;
  for (int64_t step = 0; step < steps; ++step) {
    int64_t block = first;
    for (; block + 1 < last; block += 2) {
      T *to = packed + (block * count * steps + step) * kTileValues<T>, *other = to + count * steps * kTileValues<T>;
      for (int64_t line = 0; line < kTileSide; ++line) {
        const Rows<T> rows(row_of, step * kDepth<T> + line * kWord<T>, block * kTileSide);
        write_two_words(to + line * kDepth<T>, other + line * kDepth<T>, rows);
      }
    }
    if (block == last) continue;
    T* to = packed + (block * count * steps + step) * kTileValues<T>;
    for (int64_t line = 0; line < kTileSide; ++line)
      write_words(to + line * kDepth<T>, Rows<T>(row_of, step * kDepth<T> + line * kWord<T>, block * kTileSide));
  }
}

// The same of rows that lie `stride` values apart.
template <typename T>
FUSED_RESNET_INLINE void pack(const T* from, int64_t depth, int64_t stride, int64_t count, int64_t first, int64_t last, T* packed) {
  const auto row_of = [=](int64_t row) FUSED_RESNET_LAMBDA { return row < depth ? from + row * stride : nullptr; };
  pack_rows(row_of, depth, count, first, last, packed);
}

// [columns, depth] -> packed, of the column blocks [first, last). Depth is a multiple of kDepth.
template <typename T>
FUSED_RESNET_INLINE void pack_transposed(const T* from, int64_t depth, int64_t first, int64_t last, T* packed) {
  for (int64_t block = first; block < last; ++block) {
    for (int64_t step = 0; step < depth; step += kDepth<T>) {
      transpose_tile(
          from + block * kTileSide * depth + step, depth * static_cast<int64_t>(sizeof(T)), packed + (block * depth + step) * kTileSide);
    }
  }
}

}  // namespace FUSED_RESNET_ISA
}  // namespace fused_resnet
