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

constexpr int kDepth = 32;                        // bfloat16 values in a row of a tile
constexpr int kTileValues = kTileSide * kDepth;   // of bfloat16
constexpr int kTileSums = kTileSide * kTileSide;  // of fp32; two by two tiles are summed at once
constexpr int kWindow = 3;                        // height and width of the windows of `window_block`
constexpr int kNarrowRows = 4 * kTileSide;        // rows of a block of kNarrowChannels

// Memory to work in, shared out piece by piece, each of whole tiles.
class Arena {
 public:
  FUSED_RESNET_INLINE explicit Arena(void* memory) : first_(static_cast<BFloat16*>(memory)), next_(first_) {}
  FUSED_RESNET_INLINE BFloat16* take(int64_t values) {
    BFloat16* taken = next_;
    next_ += (values + kTileValues - 1) / kTileValues * kTileValues;
    return taken;
  }
  // What was taken, in bytes.
  FUSED_RESNET_INLINE int64_t size() const { return (next_ - first_) * static_cast<int64_t>(sizeof(BFloat16)); }

 private:
  BFloat16 *first_, *next_;
};

#if defined(__AMX_BF16__)

// The tiles' shapes, for as long as it lives: whole tiles, in all of the registers. `narrow`: 5 and 7 have half the depth.
class Tiles {
 public:
  explicit Tiles(bool narrow = false) {
    alignas(64) uint8_t shapes[64] = {1};  // the palette
    for (int tile = 0; tile < 8; ++tile) {
      shapes[16 + 2 * tile] = kDepth * sizeof(BFloat16);  // bytes of a row
      shapes[48 + tile] = kTileSide;
    }
    if (narrow) {
      shapes[16 + 2 * 5] /= 2;
      shapes[48 + 7] /= 2;
    }
    _tile_loadconfig(shapes);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Two rows of 32 values as pairs, value by value: of the first 16 columns, and of the others. nullptr: zeros.
struct Pairs {
  __m512i first, second;

  FUSED_RESNET_INLINE Pairs(const BFloat16* even, const BFloat16* odd) {
    const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2,
                                           33, 1, 32, 0);
    const __m512i upper = even ? _mm512_loadu_si512(even) : _mm512_setzero_si512(), lower = odd ? _mm512_loadu_si512(odd) : _mm512_setzero_si512();
    first = _mm512_permutex2var_epi16(upper, order, lower);
    second = _mm512_permutex2var_epi16(upper, _mm512_add_epi16(order, _mm512_set1_epi16(kTileSide)), lower);
  }
};

// The same of 16 columns.
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

// [depth, columns] -> packed, of the column blocks [first, last), each of `count` matrices of that depth, of which this is one. Rows of
// depth lie `stride` values apart. Depth is filled up with zeros.
FUSED_RESNET_INLINE void pack(const BFloat16* from, int64_t depth, int64_t stride, int64_t count, int64_t first, int64_t last, BFloat16* packed) {
  const int64_t steps = (depth + kDepth - 1) / kDepth;
  const auto row_of = [&](int64_t row, int64_t block) FUSED_RESNET_LAMBDA {
    return row < depth ? from + row * stride + block * kTileSide : nullptr;
  };
  for (int64_t step = 0; step < steps; ++step) {
    int64_t block = first;
    for (; block + 1 < last; block += 2) {
      BFloat16 *to = packed + (block * count * steps + step) * kTileValues, *other = to + count * steps * kTileValues;
      for (int64_t i = 0; i < kTileSide; ++i) {
        const Pairs made(row_of(step * kDepth + 2 * i, block), row_of(step * kDepth + 2 * i + 1, block));
        _mm512_storeu_si512(to + i * kDepth, made.first);
        _mm512_storeu_si512(other + i * kDepth, made.second);
      }
    }
    if (block == last) continue;
    BFloat16* to = packed + (block * count * steps + step) * kTileValues;
    for (int64_t i = 0; i < kTileSide; ++i) {
      _mm512_storeu_si512(to + i * kDepth, pairs(row_of(step * kDepth + 2 * i, block), row_of(step * kDepth + 2 * i + 1, block)));
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

// [depth, rows] -> the left factor [rows, depth] in tiles: of 16 rows by 32 of depth, those of a row block one after another. What has the
// same depth lies `stride` values apart. Depth is filled up with zeros.
FUSED_RESNET_INLINE void pack_left(const BFloat16* from, int64_t depth, int64_t rows, int64_t stride, BFloat16* packed) {
  const int64_t steps = (depth + kDepth - 1) / kDepth;
  const auto row_of = [&](int64_t row, int64_t block) FUSED_RESNET_LAMBDA {
    return row < depth ? from + row * stride + block * kTileSide : nullptr;
  };
  const auto write = [&](__m512i(&words)[kTileSide], int64_t block, int64_t step) FUSED_RESNET_LAMBDA {
    transpose(words);
    BFloat16* to = packed + (block * steps + step) * kTileValues;
    for (int i = 0; i < kTileSide; ++i) _mm512_storeu_si512(to + i * kDepth, words[i]);
  };
  for (int64_t step = 0; step < steps; ++step) {
    int64_t block = 0;
    for (; block + 1 < rows / kTileSide; block += 2) {
      __m512i words[kTileSide], others[kTileSide];
      for (int i = 0; i < kTileSide; ++i) {
        const Pairs made(row_of(step * kDepth + 2 * i, block), row_of(step * kDepth + 2 * i + 1, block));
        words[i] = made.first;
        others[i] = made.second;
      }
      write(words, block, step);
      write(others, block + 1, step);
    }
    if (block == rows / kTileSide) continue;
    __m512i words[kTileSide];
    for (int i = 0; i < kTileSide; ++i) words[i] = pairs(row_of(step * kDepth + 2 * i, block), row_of(step * kDepth + 2 * i + 1, block));
    write(words, block, step);
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

// block [32, 32] = the windows' rows · packed right, of 32 windows one pixel apart. A window is kWindow lines of kWindow pixels, `line`
// values apart; `right` holds a step of depth after the other, line by line.
FUSED_RESNET_INLINE void window_block(const BFloat16* window, int64_t channels, int64_t line, const BFloat16* right, BFloat16* block) {
  const int64_t steps = kWindow * channels / kDepth;
  const BFloat16* other = right + kWindow * steps * kTileValues;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int i = 0; i < kWindow; ++i, window += line, right += steps * kTileValues, other += steps * kTileValues) {
    add_product({window, window + kTileSide * channels, channels, kDepth}, right, other, steps);
  }
  store_sums(block, kBlockSide, kBlockSide);
}

// The same for kNarrowChannels channels on both sides: block [64, 16], by `Tiles(true)`. A line of a window is one and a half steps of depth.
FUSED_RESNET_INLINE void narrow_window_block(const BFloat16* window, int64_t line, const BFloat16* right, BFloat16* block) {
  constexpr int64_t kRow = kNarrowChannels * sizeof(BFloat16), kNext = kTileSide * kNarrowChannels;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int i = 0; i < kWindow; ++i, window += line, right += kWindow * kNarrowChannels * kTileSide) {
    _tile_loadd(6, right, 64);
    _tile_loadd(7, right + kTileValues, 64);
    _tile_loadd(4, window, kRow);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, window + kDepth, kRow);
    _tile_dpbf16ps(0, 5, 7);
    _tile_loadd(4, window + kNext, kRow);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(5, window + kNext + kDepth, kRow);
    _tile_dpbf16ps(1, 5, 7);
    _tile_loadd(4, window + 2 * kNext, kRow);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(5, window + 2 * kNext + kDepth, kRow);
    _tile_dpbf16ps(2, 5, 7);
    _tile_loadd(4, window + 3 * kNext, kRow);
    _tile_dpbf16ps(3, 4, 6);
    _tile_loadd(5, window + 3 * kNext + kDepth, kRow);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float sums[kNarrowRows * kTileSide];
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kTileSums, 64);
  _tile_stored(2, sums + 2 * kTileSums, 64);
  _tile_stored(3, sums + 3 * kTileSums, 64);
  for (int i = 0; i < kNarrowRows * kTileSide; i += kBlockSide) {
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_load_ps(sums + i + kTileSide), _mm512_load_ps(sums + i));
    __builtin_memcpy(block + i, &both, sizeof both);
  }
}

// Two by two tiles of sums (+)= left · right, both in tiles along `steps` of depth; right's second column block lies `between` values
// after the first, the second row of sums `below` sums after the first. `first`: sums are not read.
FUSED_RESNET_INLINE void add_block(const BFloat16* left, const BFloat16* right, int64_t between, int64_t steps, float* sums, int64_t below,
                                   bool first) {
  float* lower = sums + below;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + kTileSums, 64);
    _tile_loadd(2, lower, 64);
    _tile_loadd(3, lower + kTileSums, 64);
  }
  add_product({left, left + steps * kTileValues, kDepth, kTileValues}, right, right + between, steps);
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kTileSums, 64);
  _tile_stored(2, lower, 64);
  _tile_stored(3, lower + kTileSums, 64);
}

// The same for one left tile of rows and kWindow right factors of one column block; their sums follow one another.
FUSED_RESNET_INLINE void add_narrow_outer(const BFloat16* left, const BFloat16* const (&right)[kWindow], int64_t steps, float* sums,
                                          bool first) {
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
  } else {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + kTileSums, 64);
    _tile_loadd(2, sums + 2 * kTileSums, 64);
  }
  for (int64_t i = 0; i < steps * kTileValues; i += kTileValues) {
    _tile_loadd(3, left + i, 64);
    _tile_loadd(4, right[0] + i, 64);
    _tile_dpbf16ps(0, 3, 4);
    _tile_loadd(5, right[1] + i, 64);
    _tile_dpbf16ps(1, 3, 5);
    _tile_loadd(6, right[2] + i, 64);
    _tile_dpbf16ps(2, 3, 6);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kTileSums, 64);
  _tile_stored(2, sums + 2 * kTileSums, 64);
}

#else

struct Tiles {
  explicit Tiles(bool = false) {}
};

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

inline void pack(const BFloat16* from, int64_t depth, int64_t stride, int64_t count, int64_t first, int64_t last, BFloat16* packed) {
  const int64_t steps = (depth + kDepth - 1) / kDepth;
  for (int64_t row = 0; row < steps * kDepth; ++row) {
    for (int64_t column = first * kTileSide; column < last * kTileSide; ++column) {
      packed[right_at(row, column, count * steps)] = row < depth ? from[row * stride + column] : BFloat16{0};
    }
  }
}

inline void pack_transposed(const BFloat16* from, int64_t depth, int64_t first, int64_t last, BFloat16* packed) {
  for (int64_t column = first * kTileSide; column < last * kTileSide; ++column) {
    for (int64_t row = 0; row < depth; ++row) packed[right_at(row, column, depth / kDepth)] = from[column * depth + row];
  }
}

inline void pack_left(const BFloat16* from, int64_t depth, int64_t rows, int64_t stride, BFloat16* packed) {
  const int64_t steps = (depth + kDepth - 1) / kDepth;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < steps * kDepth; ++column) {
      packed[left_at(row, column, steps)] = column < depth ? from[column * stride + row] : BFloat16{0};
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

// block [rows, columns] = the windows' rows · right; a line of a window is `depth` values.
template <typename At>
FUSED_RESNET_INLINE void plain_window_block(const BFloat16* window, int64_t step, int64_t line, int64_t depth, int64_t rows, int64_t columns,
                                            BFloat16* block, At&& at) {
  for (int64_t row = 0; row < rows; ++row, window += step) {
    for (int64_t column = 0; column < columns; column += kLanes) {
      float sums[kLanes] = {};
      for (int64_t k = 0; k < kWindow * depth; ++k) {
        const float value = value_of(window[k / depth * line + k % depth]);
        for (int i = 0; i < kLanes; ++i) sums[i] += value * value_of(at(k, column + i));
      }
      store(block + row * columns + column, rounded(BFloat16{}, load(sums)));
    }
  }
}

inline void window_block(const BFloat16* window, int64_t channels, int64_t line, const BFloat16* right, BFloat16* block) {
  const int64_t depth = kWindow * channels;
  plain_window_block(window, channels, line, depth, kBlockSide, kBlockSide, block,
                     [&](int64_t k, int64_t column) { return right[right_at(k, column, kWindow * depth / kDepth)]; });
}

inline void narrow_window_block(const BFloat16* window, int64_t line, const BFloat16* right, BFloat16* block) {
  plain_window_block(window, kNarrowChannels, line, kWindow * kNarrowChannels, kNarrowRows, kNarrowChannels, block,
                     [&](int64_t k, int64_t column) { return right[k / 2 * kDepth + column * 2 + k % 2]; });
}

inline void add_tile(const BFloat16* left, const BFloat16* right, int64_t steps, float* sums, bool first) {
  for (int row = 0; row < kTileSide; ++row) {
    for (int column = 0; column < kTileSide; ++column) {
      float& sum = sums[row * kTileSide + column];
      if (first) sum = 0.0f;
      for (int64_t k = 0; k < steps * kDepth; ++k) sum += value_of(left[left_at(row, k, steps)]) * value_of(right[right_at(k, column, steps)]);
    }
  }
}

inline void add_block(const BFloat16* left, const BFloat16* right, int64_t between, int64_t steps, float* sums, int64_t below, bool first) {
  for (int i = 0; i < 4; ++i) {
    add_tile(left + i / 2 * steps * kTileValues, right + i % 2 * between, steps, sums + i / 2 * below + i % 2 * kTileSums, first);
  }
}

inline void add_narrow_outer(const BFloat16* left, const BFloat16* const (&right)[kWindow], int64_t steps, float* sums, bool first) {
  for (int i = 0; i < kWindow; ++i) add_tile(left, right[i], steps, sums + i * kTileSums, first);
}

#endif

// sums [rows, columns] in tiles (+)= left · right, block by block.
FUSED_RESNET_INLINE void add_outer(const BFloat16* left, int64_t rows, const BFloat16* right, int64_t columns, int64_t between,
                                   int64_t steps, float* sums, bool first) {
  const int64_t across = columns / kTileSide;
  for (int64_t row = 0; row < rows / kTileSide; row += 2) {
    for (int64_t column = 0; column < across; column += 2) {
      add_block(left + row * steps * kTileValues, right + column * between, between, steps, sums + (row * across + column) * kTileSums,
                across * kTileSums, first);
    }
  }
}

}  // namespace FUSED_RESNET_ISA
}  // namespace fused_resnet
