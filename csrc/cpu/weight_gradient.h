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

// Positions of a band: packed, 32 outputs of it stay in the first cache, and a share in the second. A 3x3 convolution packs its borders,
// too, and so takes longer ones.
template <typename T>
FUSED_RESNET_INLINE int64_t band_of(const WeightGradient& given) {
  return (given.taps > 1 ? 1024 : 512) / static_cast<int64_t>(sizeof(T));
}

// What a thread works in: outputs and inputs of its share. `size` is in bytes.
template <typename T>
struct WeightGradientScratch {
  T *dy, *act, *left, *even, *odd;
  int64_t size;

  FUSED_RESNET_INLINE WeightGradientScratch(const WeightGradient& given, void* scratch) {
    const bool windows = given.taps > 1;
    const Padded shape(given.images, given.inputs), shape_of_dy(given.images, given.outputs);
    const int64_t band = windows ? band_positions<T>(shape, band_of<T>(given)) : band_of<T>(given);
    const int64_t rows = band + (windows ? 2 * shape.border() + kDepth<T> : 0), right = rows / kDepth<T> * kDepth<T> * given.inputs;
    Arena<T> arena(scratch);
    dy = arena.take(windows ? shape_of_dy.values(given.images.per_unit) : 0);
    act = arena.take(windows ? shape.values(given.images.per_unit) : 0);
    left = arena.take(band * given.outputs);
    even = arena.take(right);
    odd = arena.take(windows && kWord<T> > 1 ? right : 0);
    size = arena.size();
  }
};

template <typename T>
int64_t weight_gradient_scratch(const WeightGradient& given) {
  return WeightGradientScratch<T>(given, nullptr).size;
}

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

// The sums of a share (+)= those of a band, whose dy and activation begin at `dy` and `act`; by tiles of `count` positions.
template <typename T>
FUSED_RESNET_INLINE void add_band(const WeightGradient& given, const WeightShare& share, const WeightGradientScratch<T>& space,
                                  const Padded& shape, const Band<T>& band, const T* dy, const T* act, int64_t count, bool first) {
  const bool windows = given.taps > 1;
  const int64_t inputs = given.inputs, across = inputs / kTileSide, steps = band.steps();
  const int64_t depth = windows ? band.reach(shape) : steps * kDepth<T>, between = depth * kTileSide;
  const int64_t first_block = 2 * share.first_packed(), last_block = 2 * share.last_packed();
  pack(act, windows ? depth : count, inputs, 1, first_block, last_block, space.even);
  if (windows && kWord<T> > 1) pack(act + inputs, depth, inputs, 1, first_block, last_block, space.odd);
  const int64_t first_output = share.first_output(), last_output = share.last_output(), rows = (last_output - first_output) * kBlockSide;
  if (windows) {
    pack_band(shape, band, dy + first_output * kBlockSide, count, rows, given.outputs, space.left);
  } else {
    pack_left(dy + first_output * kBlockSide, count, rows, given.outputs, space.left);
  }
  for (int64_t output = first_output; output < last_output; ++output) {
    const T* left = space.left + (output - first_output) * 2 * steps * kTileValues<T>;
    for (int64_t column = share.first_column(output); column < share.last_column(output); ++column) {
      for (int64_t tap = 0; tap < given.taps; ++tap) {
        float* sums = given.sums + ((tap * given.outputs / kTileSide + 2 * output) * across + 2 * column) * kTileSums;
        add_band_block(band, left, space.even + 2 * column * between, space.odd + 2 * column * between,
                       tap / kWindow * shape.pitch() + tap % kWindow, between, sums, across * kTileSums, first);
      }
    }
  }
}

template <typename T>
void weight_gradient(const WeightGradient& given, int64_t first_unit, int64_t last_unit, void* scratch) {
  [[maybe_unused]] const Tiles<T> tiles;
  const WeightGradientScratch<T> space(given, scratch);
  const WeightShare share(given, first_unit, last_unit);
  const auto *dy = static_cast<const T*>(given.dy), *act = static_cast<const T*>(given.act);
  const int64_t outputs = given.outputs, inputs = given.inputs, most = band_of<T>(given);
  const Images& images = given.images;
  const Padded shape(images, inputs), shape_of_dy(images, outputs);
  if (given.taps == 1) {
    for (int64_t row = 0; row < given.rows; row += most) {
      const int64_t count = row + most < given.rows ? most : given.rows - row;
      const Band<T> band(count);
      add_band(given, share, space, shape, band, dy + row * outputs, act + row * inputs, count, row == 0);
    }
    return;
  }
  __builtin_memset(space.dy, 0, shape_of_dy.values(images.per_unit) * sizeof(T));
  __builtin_memset(space.act, 0, shape.values(images.per_unit) * sizeof(T));
  for (int64_t image = 0; image < images.count; image += images.per_unit) {
    const int64_t count = image + images.per_unit < images.count ? images.per_unit : images.count - image;
    const int64_t pixel = image * images.height * images.width;
    copy_lines(shape_of_dy, dy + pixel * outputs, count * images.height, space.dy);
    copy_lines(shape, act + pixel * inputs, count * images.height, space.act);
    bool first = image == 0;
    over_bands<T>(shape, count, most, [&](const Band<T>& band, int64_t position, int64_t positions) FUSED_RESNET_LAMBDA {
      add_band(given, share, space, shape, band, space.dy + (shape.border() + position) * outputs, space.act + position * inputs, positions,
               first);
      first = false;
    });
  }
}

}  // namespace FUSED_RESNET_ISA
}  // namespace fused_resnet
