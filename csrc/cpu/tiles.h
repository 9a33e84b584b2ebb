// Products of bfloat16 matrices by AMX: tiles of 16 rows of 32 values, sums in fp32. They stand before those of products.h.
//
// Left        as it lies; or packed, as tiles of 16 rows by 32 of depth, those of a row block one after another.
// Determinism a sum runs over depth from first to last, whatever else there is.
#pragma once

#include "products.h"

#if defined(__AMX_BF16__)

namespace fused_resnet {
namespace FUSED_RESNET_ISA {

constexpr int kTileDepth = kDepth<BFloat16>, kTileLength = kTileValues<BFloat16>;

template <>
constexpr bool kByVectors<BFloat16> = false;

// The tiles' shapes, for as long as it lives: whole tiles, in all of the registers. `narrow`: 5 and 7 have half the depth.
template <>
class Tiles<BFloat16> {
 public:
  explicit Tiles(bool narrow = false) {
    alignas(64) uint8_t shapes[64] = {1};  // the palette
    for (int tile = 0; tile < 8; ++tile) {
      shapes[16 + 2 * tile] = kTileDepth * sizeof(BFloat16);  // bytes of a row
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

// [depth, rows] -> the left factor, packed. Rows of depth lie `stride` values apart.
FUSED_RESNET_INLINE void pack_left(const BFloat16* from, int64_t depth, int64_t rows, int64_t stride, BFloat16* packed) {
  const auto row_of = [=](int64_t row) FUSED_RESNET_LAMBDA { return row < depth ? from + row * stride : nullptr; };
  const int64_t steps = (depth + kTileDepth - 1) / kTileDepth;
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t block = 0; block < rows / kTileSide; block += 2) {
      __m512i words[kTileSide], others[kTileSide];
      const bool two = block + 1 < rows / kTileSide;
      for (int i = 0; i < kTileSide; ++i) {
        const Rows<BFloat16> pair(row_of, step * kTileDepth + 2 * i, block * kTileSide);
        if (two) {
          const Pairs made(pair.at[0], pair.at[1]);
          words[i] = made.first;
          others[i] = made.second;
        } else {
          words[i] = words_of(pair);
        }
      }
      write_transposed(words, packed + (block * steps + step) * kTileLength);
      if (two) write_transposed(others, packed + ((block + 1) * steps + step) * kTileLength);
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
  for (int64_t i = 0; i < steps; ++i, upper += left.step, lower += left.step, right += kTileLength, other += kTileLength) {
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
  const int64_t whole = rows / kBlockSide * kBlockSide, rest = rows - whole, steps = depth / kTileDepth;
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
      add_product({from, from + kTileSide * depth, depth, kTileDepth}, panel, other, steps);
      store_sums(out + row * columns + column, columns, row < whole ? kBlockSide : rest);
    }
  }
}

// block [32, 32] = the windows' rows · packed right, of 32 windows one pixel apart. A window is kWindow lines of kWindow pixels, `line`
// values apart; `right` holds a step of depth after the other, line by line.
FUSED_RESNET_INLINE void window_block(const BFloat16* window, int64_t channels, int64_t line, const BFloat16* right, BFloat16* block) {
  const int64_t steps = kWindow * channels / kTileDepth;
  const BFloat16* other = right + kWindow * steps * kTileLength;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int i = 0; i < kWindow; ++i, window += line, right += steps * kTileLength, other += steps * kTileLength) {
    add_product({window, window + kTileSide * channels, channels, kTileDepth}, right, other, steps);
  }
  store_sums(block, kBlockSide, kBlockSide);
}

// The same for kNarrowChannels channels on both sides: block [64, 16], by `Tiles(true)`. A line of a window is one and a half steps of
// depth.
FUSED_RESNET_INLINE void narrow_window_block(const BFloat16* window, int64_t line, const BFloat16* right, BFloat16* block) {
  constexpr int64_t kRow = kNarrowChannels * sizeof(BFloat16), kNext = kTileSide * kNarrowChannels;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int i = 0; i < kWindow; ++i, window += line, right += kWindow * kNarrowChannels * kTileSide) {
    _tile_loadd(6, right, 64);
    _tile_loadd(7, right + kTileLength, 64);
    _tile_loadd(4, window, kRow);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, window + kTileDepth, kRow);
    _tile_dpbf16ps(0, 5, 7);
    _tile_loadd(4, window + kNext, kRow);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(5, window + kNext + kTileDepth, kRow);
    _tile_dpbf16ps(1, 5, 7);
    _tile_loadd(4, window + 2 * kNext, kRow);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(5, window + 2 * kNext + kTileDepth, kRow);
    _tile_dpbf16ps(2, 5, 7);
    _tile_loadd(4, window + 3 * kNext, kRow);
    _tile_dpbf16ps(3, 4, 6);
    _tile_loadd(5, window + 3 * kNext + kTileDepth, kRow);
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
  add_product({left, left + steps * kTileLength, kTileDepth, kTileLength}, right, right + between, steps);
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
  for (int64_t i = 0; i < steps * kTileLength; i += kTileLength) {
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

}  // namespace FUSED_RESNET_ISA
}  // namespace fused_resnet

#endif
