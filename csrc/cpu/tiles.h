// Products of bfloat16 matrices by AMX: tiles of 16 rows of 32 values, sums in fp32. Without AMX the same in plain loops: what it gives is
// right on every machine, and fast on none.
//
// A product's left factor is read as it lies, [rows, depth]; the right one is packed, depth by depth in pairs, as the instruction asks:
// a packed matrix is tiles of 16 columns by 32 of depth, 1 KiB each, those of a column block one after another.
// Sizes       columns and depth are multiples of kDepth; rows are any number.
// Determinism a sum runs over depth from first to last, whatever else there is.
#pragma once

#include "walk.h"

namespace fused_resnet {
namespace FUSED_RESNET_ISA {

constexpr int kTileSide = 16;                        // rows of a tile, and columns of fp32
constexpr int kDepth = 32;                           // bfloat16 values in a row of a tile
constexpr int kTileValues = kTileSide * kDepth;      // of bfloat16
constexpr int kTileSums = kTileSide * kTileSide;     // of fp32
constexpr int kBlockSide = 2 * kTileSide;            // two by two tiles are summed at once

#if defined(__AMX_BF16__)

// The tiles' shapes, for as long as it lives: whole tiles, in all of the registers.
class Tiles {
 public:
  Tiles() {
    alignas(64) uint8_t shapes[64] = {1};  // the palette
    for (int tile = 0; tile < 8; ++tile) {
      shapes[16 + 2 * tile] = kDepth * sizeof(BFloat16);  // bytes of a row
      shapes[48 + tile] = kTileSide;
    }
    _tile_loadconfig(shapes);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Two rows of 16 values as pairs, value by value.
FUSED_RESNET_INLINE __m512i pairs(const BFloat16* even, const BFloat16* odd) {
  const auto widened = [](const BFloat16* row) FUSED_RESNET_LAMBDA {
    return row ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row))) : _mm512_setzero_si512();
  };
  return _mm512_or_si512(widened(even), _mm512_slli_epi32(widened(odd), 16));
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
    const __m512i low = _mm512_shuffle_i32x4(doubles[j], doubles[4 + j], 0x88), high = _mm512_shuffle_i32x4(doubles[8 + j], doubles[12 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(doubles[j], doubles[4 + j], 0xdd), odd_high = _mm512_shuffle_i32x4(doubles[8 + j], doubles[12 + j], 0xdd);
    rows[j] = _mm512_shuffle_i32x4(low, high, 0x88);
    rows[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(low, high, 0xdd);
    rows[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
}

// [depth, columns] -> packed, of the column blocks [first, last). Depth is filled up with zeros.
FUSED_RESNET_INLINE void pack(const BFloat16* from, int64_t depth, int64_t columns, int64_t first, int64_t last, BFloat16* packed) {
  const int64_t steps = (depth + kDepth - 1) / kDepth;
  for (int64_t block = first; block < last; ++block) {
    BFloat16* to = packed + block * steps * kTileValues;
    for (int64_t row = 0; row < steps * kDepth; row += 2, to += kDepth) {
      const BFloat16* even = from + row * columns + block * kTileSide;
      _mm512_storeu_si512(to, pairs(row < depth ? even : nullptr, row + 1 < depth ? even + columns : nullptr));
    }
  }
}

// [columns, depth] -> packed, of the column blocks [first, last).
FUSED_RESNET_INLINE void pack_transposed(const BFloat16* from, int64_t depth, int64_t first, int64_t last, BFloat16* packed) {
  for (int64_t block = first; block < last; ++block) {
    for (int64_t step = 0; step < depth; step += kDepth) {
      __m512i words[kTileSide];
      for (int i = 0; i < kTileSide; ++i) words[i] = _mm512_loadu_si512(from + (block * kTileSide + i) * depth + step);
      transpose(words);
      BFloat16* to = packed + (block * depth + step) * kTileSide;
      for (int i = 0; i < kTileSide; ++i) _mm512_storeu_si512(to + i * kDepth, words[i]);
    }
  }
}

// [depth, rows] -> the left factor [rows, depth] in tiles: of 16 rows by 32 of depth, those of a row block one after another. Depth is
// filled up with zeros.
FUSED_RESNET_INLINE void pack_left(const BFloat16* from, int64_t depth, int64_t rows, BFloat16* packed) {
  for (int64_t block = 0; block < rows; block += kTileSide) {
    for (int64_t step = 0; step < depth; step += kDepth, packed += kTileValues) {
      __m512i words[kTileSide];
      for (int i = 0; i < kTileSide; ++i) {
        const int64_t row = step + 2 * i;
        const BFloat16* even = from + row * rows + block;
        words[i] = pairs(row < depth ? even : nullptr, row + 1 < depth ? even + rows : nullptr);
      }
      transpose(words);
      for (int i = 0; i < kTileSide; ++i) _mm512_storeu_si512(packed + i * kDepth, words[i]);
    }
  }
}

// The left factor of a block: two tiles of rows, `stride` values apart from row to row and `step` from tile to tile along depth.
struct Left {
  const BFloat16 *upper, *lower;
  int64_t stride, step;
};

// Adds left · right to the sums in tiles 0 to 3. `right`, `other`: the packed column blocks.
FUSED_RESNET_INLINE void add_product(const Left& left, const BFloat16* right, const BFloat16* other, int64_t steps) {
  const BFloat16 *upper = left.upper, *lower = left.lower;
  const int64_t stride = left.stride * static_cast<int64_t>(sizeof(BFloat16));
  for (int64_t i = 0; i < steps; ++i, upper += left.step, lower += left.step, right += kTileValues, other += kTileValues) {
    _tile_loadd(4, upper, stride);
    _tile_loadd(6, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, other, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, lower, stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Sums of a block as bfloat16: `rows` rows, to `to`. AMX takes subnormal numbers for zero, and so may their conversion.
FUSED_RESNET_INLINE void store_sums(BFloat16* to, int64_t stride, int64_t rows) {
  alignas(64) float sums[4][kTileSums];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  for (int64_t row = 0; row < rows; ++row, to += stride) {
    const float* from = sums[row / kTileSide * 2] + row % kTileSide * kTileSide;
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_load_ps(from + kTileSums), _mm512_load_ps(from));
    __builtin_memcpy(to, &both, sizeof both);
  }
}

// out [rows, columns] = left [rows, depth] · packed right. `spare` holds kBlockSide * depth values, for a last block of fewer rows.
FUSED_RESNET_INLINE void multiply(const BFloat16* left, int64_t rows, int64_t depth, const BFloat16* right, int64_t columns, BFloat16* out,
                                  BFloat16* spare) {
  const int64_t whole = rows / kBlockSide * kBlockSide, rest = rows - whole, steps = depth / kDepth;
  if (rest) __builtin_memcpy(spare, left + whole * depth, rest * depth * sizeof(BFloat16));
  if (rest) __builtin_memset(spare + rest * depth, 0, (kBlockSide - rest) * depth * sizeof(BFloat16));
  for (int64_t column = 0; column < columns; column += kBlockSide) {
    const BFloat16 *panel = right + column * depth, *other = panel + kTileSide * depth;
    for (int64_t row = 0; row < rows; row += kBlockSide) {
      const BFloat16* from = row < whole ? left + row * depth : spare;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      add_product({from, from + kTileSide * depth, depth, kDepth}, panel, other, steps);
      store_sums(out + row * columns + column, columns, row < whole ? kBlockSide : rest);
    }
  }
}

// sums [rows, columns] in tiles (+)= left · right, both in tiles along `steps` of depth. `first`: sums are not read.
FUSED_RESNET_INLINE void add_outer(const BFloat16* left, int64_t rows, const BFloat16* right, int64_t columns, int64_t steps, float* sums,
                                   bool first) {
  const int64_t across = columns / kTileSide, along = steps * kTileValues;
  for (int64_t row = 0; row < rows / kTileSide; row += 2) {
    for (int64_t column = 0; column < across; column += 2) {
      float *upper = sums + (row * across + column) * kTileSums, *lower = upper + across * kTileSums;
      if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      } else {
        _tile_loadd(0, upper, 64);
        _tile_loadd(1, upper + kTileSums, 64);
        _tile_loadd(2, lower, 64);
        _tile_loadd(3, lower + kTileSums, 64);
      }
      add_product({left + row * along, left + (row + 1) * along, kDepth, kTileValues}, right + column * along, right + (column + 1) * along, steps);
      _tile_stored(0, upper, 64);
      _tile_stored(1, upper + kTileSums, 64);
      _tile_stored(2, lower, 64);
      _tile_stored(3, lower + kTileSums, 64);
    }
  }
}

#else

class Tiles {};

FUSED_RESNET_INLINE float value_of(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof result);
  return result;
}

// Of a packed right factor [depth, columns], filled up to whole `steps` of depth, or of a left one [rows, depth]: where a value lies.
FUSED_RESNET_INLINE int64_t right_at(int64_t row, int64_t column, int64_t steps) {
  return (column / kTileSide * steps + row / kDepth) * kTileValues + row % kDepth / 2 * kDepth + column % kTileSide * 2 + row % 2;
}
FUSED_RESNET_INLINE int64_t left_at(int64_t row, int64_t column, int64_t steps) {
  return (row / kTileSide * steps + column / kDepth) * kTileValues + row % kTileSide * kDepth + column % kDepth;
}

inline void pack(const BFloat16* from, int64_t depth, int64_t columns, int64_t first, int64_t last, BFloat16* packed) {
  const int64_t steps = (depth + kDepth - 1) / kDepth;
  for (int64_t row = 0; row < steps * kDepth; ++row) {
    for (int64_t column = first * kTileSide; column < last * kTileSide; ++column) {
      packed[right_at(row, column, steps)] = row < depth ? from[row * columns + column] : BFloat16{0};
    }
  }
}

inline void pack_transposed(const BFloat16* from, int64_t depth, int64_t first, int64_t last, BFloat16* packed) {
  for (int64_t column = first * kTileSide; column < last * kTileSide; ++column) {
    for (int64_t row = 0; row < depth; ++row) packed[right_at(row, column, depth / kDepth)] = from[column * depth + row];
  }
}

inline void pack_left(const BFloat16* from, int64_t depth, int64_t rows, BFloat16* packed) {
  const int64_t steps = (depth + kDepth - 1) / kDepth;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < steps * kDepth; ++column) {
      packed[left_at(row, column, steps)] = column < depth ? from[column * rows + row] : BFloat16{0};
    }
  }
}

inline void multiply(const BFloat16* left, int64_t rows, int64_t depth, const BFloat16* right, int64_t columns, BFloat16* out, BFloat16*) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; column += kLanes) {
      float sums[kLanes] = {};
      for (int64_t k = 0; k < depth; ++k) {
        const float value = value_of(left[row * depth + k]);
        for (int i = 0; i < kLanes; ++i) sums[i] += value * value_of(right[right_at(k, column + i, depth / kDepth)]);
      }
      store(out + row * columns + column, rounded(BFloat16{}, load(sums)));
    }
  }
}

inline void add_outer(const BFloat16* left, int64_t rows, const BFloat16* right, int64_t columns, int64_t steps, float* sums, bool first) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t at = (row / kTileSide * (columns / kTileSide) + column / kTileSide) * kTileSums + row % kTileSide * kTileSide;
      float& sum = sums[at + column % kTileSide];
      if (first) sum = 0.0f;
      for (int64_t k = 0; k < steps * kDepth; ++k) sum += value_of(left[left_at(row, k, steps)]) * value_of(right[right_at(k, column, steps)]);
    }
  }
}

#endif

}  // namespace FUSED_RESNET_ISA
}  // namespace fused_resnet
