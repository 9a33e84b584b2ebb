// dweight of a convolution, of the whole dy: where its sums do not fit into a cache beside the images (see pointwise.h and window.h).
//
// Formula     dweight[tap] = Σ dy[p]ᵀ · act[p + tap], over all pixels p.
// Work        a thread takes some outputs, and goes through all pixels, band by band: it packs a band of dy and of act once, row by row.
// Layout      as window.h: a tap is a distance along depth.
// Precision   products are summed in fp32, rounded once.
// Determinism a sum runs over the pixels from first to last, whoever makes it.
#pragma once

#include "window.h"

namespace fused_resnet {
namespace FUSED_RESNET_ISA {

// Positions of a band: packed, 32 outputs of it stay in the first cache, and a share in the second. A 3x3 convolution packs its borders, too,
// and so takes longer ones.
FUSED_RESNET_INLINE int64_t band_of(const WeightGradient& given) { return given.taps > 1 ? 512 : 256; }

// What a thread works in: outputs and inputs of its share. `size` is in bytes.
struct WeightGradientScratch {
  BFloat16 *dy, *act, *left, *even, *odd;
  int64_t size;

  FUSED_RESNET_INLINE WeightGradientScratch(const WeightGradient& given, void* scratch) {
    const bool windows = given.taps > 1;
    const Padded shape(given.images, given.inputs), shape_of_dy(given.images, given.outputs);
    const int64_t band = band_of(given), rows = band + (windows ? 2 * shape.border() + kDepth : 0), right = rows / kDepth * kDepth * given.inputs;
    Arena arena(scratch);
    dy = arena.take(windows ? shape_of_dy.values(given.images.per_unit) : 0);
    act = arena.take(windows ? shape.values(given.images.per_unit) : 0);
    left = arena.take(band * given.outputs);
    even = arena.take(right);
    odd = arena.take(windows ? right : 0);
    size = arena.size();
  }
};

inline int64_t weight_gradient_scratch(const WeightGradient& given) { return WeightGradientScratch(given, nullptr).size; }

// The share of a thread: outputs and inputs in blocks of kBlockSide. Units go through the column groups of one block of outputs, then of
// the next; a share of more than one block of outputs packs all inputs.
struct WeightShare {
  int64_t first, last, groups, columns;  // units; the groups, and the blocks of one

  FUSED_RESNET_INLINE WeightShare(const WeightGradient& given, int64_t first, int64_t last)
      : first(first), last(last), groups(given.column_groups), columns(given.inputs / kBlockSide / given.column_groups) {}
  FUSED_RESNET_INLINE int64_t first_output() const { return first / groups; }
  FUSED_RESNET_INLINE int64_t last_output() const { return (last - 1) / groups + 1; }
  FUSED_RESNET_INLINE bool one_output() const { return last_output() - first_output() == 1; }
  // The blocks of inputs of a block of outputs.
  FUSED_RESNET_INLINE int64_t first_column(int64_t output) const { return output == first_output() ? first % groups * columns : 0; }
  FUSED_RESNET_INLINE int64_t last_column(int64_t output) const {
    return (output + 1 == last_output() ? (last - 1) % groups + 1 : groups) * columns;
  }
  FUSED_RESNET_INLINE int64_t first_packed() const { return one_output() ? first_column(first_output()) : 0; }
  FUSED_RESNET_INLINE int64_t last_packed() const { return one_output() ? last_column(first_output()) : groups * columns; }
};

// The sums of a share (+)= those of a band: `count` pixels at dy, their windows from act on.
FUSED_RESNET_INLINE void add_band(const WeightGradient& given, const WeightShare& share, const WeightGradientScratch& space,
                                  const BFloat16* dy, const BFloat16* act, int64_t count, bool first) {
  const bool windows = given.taps > 1;
  const Padded shape(given.images, given.inputs);
  const int64_t inputs = given.inputs, across = inputs / kTileSide, steps = (count + kDepth - 1) / kDepth;
  const int64_t rows = steps * kDepth + (windows ? (2 * shape.border() + kDepth - 1) / kDepth * kDepth : 0), between = rows * kTileSide;
  const int64_t first_block = 2 * share.first_packed(), last_block = 2 * share.last_packed();
  pack(act, windows ? rows : count, inputs, 1, first_block, last_block, space.even);
  if (windows) pack(act + inputs, rows, inputs, 1, first_block, last_block, space.odd);
  const int64_t first_output = share.first_output(), last_output = share.last_output();
  pack_left(dy + first_output * kBlockSide, count, (last_output - first_output) * kBlockSide, given.outputs, space.left);
  for (int64_t output = first_output; output < last_output; ++output) {
    const BFloat16* left = space.left + (output - first_output) * 2 * steps * kTileValues;
    for (int64_t column = share.first_column(output); column < share.last_column(output); ++column) {
      for (int64_t tap = 0; tap < given.taps; ++tap) {
        const int64_t distance = tap / kWindow * shape.pitch() + tap % kWindow;
        const BFloat16* right = (distance % 2 ? space.odd : space.even) + distance / 2 * kDepth + 2 * column * between;
        float* sums = given.sums + ((tap * given.outputs / kTileSide + 2 * output) * across + 2 * column) * kTileSums;
        add_block(left, right, between, steps, sums, across * kTileSums, first);
      }
    }
  }
}

inline void weight_gradient(const WeightGradient& given, int64_t first_unit, int64_t last_unit, void* scratch) {
  [[maybe_unused]] const Tiles tiles;
  const WeightGradientScratch space(given, scratch);
  const WeightShare share(given, first_unit, last_unit);
  const auto *dy = static_cast<const BFloat16*>(given.dy), *act = static_cast<const BFloat16*>(given.act);
  const int64_t outputs = given.outputs, inputs = given.inputs, band = band_of(given);
  if (given.taps == 1) {
    for (int64_t row = 0; row < given.rows; row += band) {
      const int64_t count = row + band < given.rows ? band : given.rows - row;
      add_band(given, share, space, dy + row * outputs, act + row * inputs, count, row == 0);
    }
    return;
  }
  const Images& images = given.images;
  const Padded shape(images, inputs), shape_of_dy(images, outputs);
  __builtin_memset(space.dy, 0, shape_of_dy.values(images.per_unit) * sizeof(BFloat16));
  __builtin_memset(space.act, 0, shape.values(images.per_unit) * sizeof(BFloat16));
  for (int64_t image = 0; image < images.count; image += images.per_unit) {
    const int64_t count = image + images.per_unit < images.count ? images.per_unit : images.count - image;
    const int64_t pixel = image * images.height * images.width, positions = shape.positions(count);
    copy_lines(shape_of_dy, dy + pixel * outputs, count * images.height, space.dy);
    copy_lines(shape, act + pixel * inputs, count * images.height, space.act);
    for (int64_t begin = 0; begin < positions; begin += band) {
      add_band(given, share, space, space.dy + (shape.border() + begin) * outputs, space.act + begin * inputs,
               begin + band < positions ? band : positions - begin, image + begin == 0);
    }
  }
}

}  // namespace FUSED_RESNET_ISA
}  // namespace fused_resnet
