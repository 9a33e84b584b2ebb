// Products of matrices by vectors: sums of a few rows and columns stay in registers while depth runs.
//
// Left        as it lies, [rows, depth]; or packed as the right one is: then a line of a tile is one word of depth of 16 rows.
// Precision   products are summed in fp32.
// Determinism a sum runs over depth from first to last, whatever else there is; sums that are added to others begin at zero.
#pragma once

#include "packed.h"

namespace fused_resnet {
namespace FUSED_RESNET_ISA {

// Vectors of a line of a tile, and what fits into the registers: column tiles, rows, and rows of a single column tile.
constexpr int kVectors = kTileSide / kLanes;
constexpr int kSumTiles = kLanes == 16 ? 2 : 1;
constexpr int kUnrolled = 4;  // words: steps of pointers to rows of left cost as much as loads
constexpr int kSumRows = kLanes / 2, kTallRows = kLanes == 16 ? 16 : kSumRows, kNarrowSumRows = kLanes == 16 ? 8 : kLanes / 4;

// Whether products of T are by vectors; or by tiles.h.
template <typename T>
constexpr bool kByVectors = true;

// A state of the machine that products of T need, for as long as it lives: none.
template <typename T>
class Tiles {
 public:
  FUSED_RESNET_INLINE explicit Tiles(bool = false) {}
};

// A vector of words.
template <typename T>
struct Words;

template <>
struct Words<float> {
  Floats values;

  FUSED_RESNET_INLINE static Words of(Floats words) { return {words}; }
};
FUSED_RESNET_INLINE Floats add_product(Words<float> a, Words<float> b, Floats sum) { return fma(a.values, b.values, sum); }

template <>
struct Words<BFloat16> {
#if defined(__AVX512BF16__)
  __m512bh pairs;

  FUSED_RESNET_INLINE static Words of(Floats words) {
    Words result;
    __builtin_memcpy(&result.pairs, &words, sizeof words);
    return result;
  }
#else
  Floats first, second;

  FUSED_RESNET_INLINE static Words of(Floats words) { return {first_of_pairs(words), second_of_pairs(words)}; }
#endif
};
FUSED_RESNET_INLINE Floats add_product(Words<BFloat16> a, Words<BFloat16> b, Floats sum) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sum, a.pairs, b.pairs);
#else
  return fma(a.second, b.second, fma(a.first, b.first, sum));
#endif
}

template <typename T>
FUSED_RESNET_INLINE Words<T> load_words(const T* from) {
  Floats words;
  __builtin_memcpy(&words, from, sizeof words);
  return Words<T>::of(words);
}
// A word, in all lanes.
template <typename T>
FUSED_RESNET_INLINE Words<T> spread_word(const T* from) {
  float word;
  __builtin_memcpy(&word, from, sizeof word);
  return Words<T>::of(broadcast(word));
}

// Sums of `kRows` rows and `kTiles` column tiles, in registers.
template <typename T, int kRows, int kTiles>
struct Sums {
  // The column tiles of the right factor.
  struct Columns {
    const T* tiles[kTiles];

    FUSED_RESNET_INLINE Columns(const T* first, int64_t between) {
      for (int i = 0; i < kTiles; ++i) tiles[i] = first + i * between;
    }
    FUSED_RESNET_INLINE explicit Columns(const T* const (&given)[kTiles]) {
      for (int i = 0; i < kTiles; ++i) tiles[i] = given[i];
    }
  };

  Floats at[kRows][kTiles * kVectors];

  FUSED_RESNET_INLINE Sums() {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int i = 0; i < kTiles * kVectors; ++i) at[row][i] = broadcast(0.0f);
    }
  }

  // += left · right, along `words` of depth, a multiple of kUnrolled; left as it lies, rows `stride` values apart.
  FUSED_RESNET_INLINE void add(const T* left, int64_t stride, Columns right, int64_t words) {
    for (int64_t word = 0; word < words; word += kUnrolled, left += kUnrolled * kWord<T>) {
#pragma GCC unroll 4
      for (int i = 0; i < kUnrolled; ++i) add_word(left + i * kWord<T>, stride, right, i);
      step(right, kUnrolled);
    }
  }

  // The same of a packed left.
  FUSED_RESNET_INLINE void add_packed(const T* left, Columns right, int64_t words) {
    for (int64_t word = 0; word < words; ++word, left += kDepth<T>) {
      add_word(left, kWord<T>, right, 0);
      step(right, 1);
    }
  }

  FUSED_RESNET_INLINE static void step(Columns& right, int words) {
#pragma GCC unroll 4
    for (const T*& tile : right.tiles) tile += words * kDepth<T>;
  }

  FUSED_RESNET_INLINE void add_word(const T* left, int64_t row_step, const Columns& right, int word) {
    Words<T> columns[kTiles * kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kTiles * kVectors; ++i)
      columns[i] = load_words(right.tiles[i / kVectors] + word * kDepth<T> + i % kVectors * kLanes * kWord<T>);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const Words<T> one = spread_word(left + row * row_step);
#pragma GCC unroll 4
      for (int i = 0; i < kTiles * kVectors; ++i) at[row][i] = add_product(one, columns[i], at[row][i]);
    }
  }

  // Rounded, the first `rows` of them; they lie `stride` values apart.
  FUSED_RESNET_INLINE void store_to(T* to, int64_t stride, int64_t rows) const {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      if (row >= rows) return;
#pragma GCC unroll 4
      for (int i = 0; i < kTiles * kVectors; ++i) store(to + row * stride + i * kLanes, rounded(T{}, at[row][i]));
    }
  }

  // To rows of tiles of sums, or added to them.
  FUSED_RESNET_INLINE void add_to(float* sums, bool first) const {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int i = 0; i < kTiles * kVectors; ++i) {
        float* to = sums + i / kVectors * kTileSums + row * kTileSide + i % kVectors * kLanes;
        store(to, first ? at[row][i] : load(to) + at[row][i]);
      }
    }
  }
};

// [depth, rows] -> the left factor, packed. What has the same depth lies `stride` values apart.
template <typename T>
FUSED_RESNET_INLINE void pack_left(const T* from, int64_t depth, int64_t rows, int64_t stride, T* packed) {
  pack(from, depth, stride, 1, 0, rows / kTileSide, packed);
}

// out [rows, columns] = left [rows, depth] · packed right. `spare` holds kBlockSide * depth values, for a last block of fewer rows.
template <typename T>
FUSED_RESNET_INLINE void multiply(const T* left, int64_t rows, int64_t depth, const T* right, int64_t columns, T* out, T* spare) {
  const int64_t whole = rows / kSumRows * kSumRows, rest = rows - whole;
  if (rest) __builtin_memcpy(spare, left + whole * depth, rest * depth * sizeof(T));
  if (rest) __builtin_memset(spare + rest * depth, 0, (kSumRows - rest) * depth * sizeof(T));
  for (int64_t column = 0; column < columns; column += kSumTiles * kTileSide) {
    for (int64_t row = 0; row < rows; row += kSumRows) {
      Sums<T, kSumRows, kSumTiles> sums;
      sums.add(row < whole ? left + row * depth : spare, depth, {right + column * depth, kTileSide * depth}, depth / kWord<T>);
      sums.store_to(out + row * columns + column, columns, row < whole ? kSumRows : rest);
    }
  }
}

// out [kRows, kTiles * 16] = the windows' rows · packed right, of windows one pixel apart; rows of out lie `stride` values apart. A window
// is kWindow lines of kWindow pixels, `line` values apart; `right` holds a line after the other.
template <int kRows, int kTiles, typename T>
FUSED_RESNET_INLINE void window_rows(const T* window, int64_t channels, int64_t line, const T* right, T* out, int64_t stride) {
  const int64_t depth = kWindow * channels;
  Sums<T, kRows, kTiles> sums;
  for (int i = 0; i < kWindow; ++i, window += line, right += kTileSide * depth) {
    sums.add(window, channels, {right, kTileSide * kWindow * depth}, depth / kWord<T>);
  }
  sums.store_to(out, stride, kRows);
}

// block [32, 32], of 32 windows.
template <typename T>
FUSED_RESNET_INLINE void window_block(const T* window, int64_t channels, int64_t line, const T* right, T* block) {
  for (int column = 0; column < kBlockSide;
       column += kSumTiles * kTileSide, right += kSumTiles * kTileSide * kWindow * kWindow * channels) {
    for (int row = 0; row < kBlockSide; row += kSumRows) {
      window_rows<kSumRows, kSumTiles>(window + row * channels, channels, line, right, block + row * kBlockSide + column, kBlockSide);
    }
  }
}

// block [kNarrowRows, kNarrowChannels], of windows of kNarrowChannels channels.
template <typename T>
FUSED_RESNET_INLINE void narrow_window_block(const T* window, int64_t line, const T* right, T* block) {
  for (int row = 0; row < kNarrowRows; row += kTallRows) {
    window_rows<kTallRows, 1>(window + row * kNarrowChannels, kNarrowChannels, line, right, block + row * kNarrowChannels, kNarrowChannels);
  }
}

// Two by two tiles of sums (+)= left · right, both packed, `steps` tiles of depth; right's second column block lies `between` values after
// the first, the second row of sums `below` sums after the first. `first`: sums are not read. Depth goes in `runs` of so many words, of
// which right_of(run) is the right factor's; the left factor's follow one another.
template <typename T, typename RightOf>
FUSED_RESNET_INLINE void add_block(const T* left, RightOf&& right_of, int64_t between, int64_t steps, int64_t runs, int64_t words,
                                   float* sums, int64_t below, bool first) {
  for (int tile = 0; tile < 2; ++tile, left += steps * kTileValues<T>, sums += below) {
    for (int column = 0; column < 2; column += kSumTiles) {
      for (int row = 0; row < kTileSide; row += kSumRows) {
        Sums<T, kSumRows, kSumTiles> made;
        for (int64_t run = 0; run < runs; ++run) {
          made.add_packed(left + run * words * kDepth<T> + row * kWord<T>, {right_of(run) + column * between, between}, words);
        }
        made.add_to(sums + column * kTileSums + row * kTileSide, first);
      }
    }
  }
}
template <typename T>
FUSED_RESNET_INLINE void add_block(const T* left, const T* right, int64_t between, int64_t steps, float* sums, int64_t below, bool first) {
  add_block(left, [=](int64_t) FUSED_RESNET_LAMBDA { return right; }, between, steps, 1, steps * kTileSide, sums, below, first);
}

// The same for one left tile of rows and kWindow right factors of one column block, right_of(run, which); their sums follow one another.
template <typename T, typename RightOf>
FUSED_RESNET_INLINE void add_narrow_outer(const T* left, RightOf&& right_of, int64_t runs, int64_t words, float* sums, bool first) {
  for (int row = 0; row < kTileSide; row += kNarrowSumRows) {
    Sums<T, kNarrowSumRows, kWindow> made;
    for (int64_t run = 0; run < runs; ++run) {
      const T* const right[kWindow] = {right_of(run, 0), right_of(run, 1), right_of(run, 2)};
      made.add_packed(left + run * words * kDepth<T> + row * kWord<T>, typename Sums<T, kNarrowSumRows, kWindow>::Columns(right), words);
    }
    made.add_to(sums + row * kTileSide, first);
  }
}

// sums [rows, columns] in tiles (+)= left · right, block by block.
template <typename T>
FUSED_RESNET_INLINE void add_outer(const T* left, int64_t rows, const T* right, int64_t columns, int64_t between, int64_t steps,
                                   float* sums, bool first) {
  const int64_t across = columns / kTileSide;
  for (int64_t row = 0; row < rows / kTileSide; row += 2) {
    for (int64_t column = 0; column < across; column += 2) {
      add_block(left + row * steps * kTileValues<T>, right + column * between, between, steps, sums + (row * across + column) * kTileSums,
                across * kTileSums, first);
    }
  }
}

}  // namespace FUSED_RESNET_ISA
}  // namespace fused_resnet
