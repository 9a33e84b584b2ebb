// 3x3 convolutions with a padding of 1 and the passes around them, a few images at a time, while these lie in a cache.
//
// Formula     as pointwise.h, with windows of 3x3 pixels: y[p] = Σ act[p + tap] · weight[tap]ᵀ; dx the same of dy with the taps turned;
//             dweight[tap] = Σ dy[p]ᵀ · act[p + tap].
// Layout      images are copied into lines with a border of zeros, so that a tap is one distance for all pixels: 32 pixels in a row,
//             borders among them, are the rows of a product, and nothing is gathered. What the borders' rows give is dropped.
// Shapes      rows are pixels: act, x, dx [rows, C]; y, dz, dy [rows, K]; weight [K, 9, C]. C and K multiples of kBlockSide, or both
//             kNarrowChannels.
// Bytes       as pointwise.h: what the copies add stays in the cache.
// Precision   as pointwise.h.
// Determinism as pointwise.h.
#pragma once

#include "pointwise.h"

namespace fused_resnet {
namespace FUSED_RESNET_ISA {

constexpr int64_t kTaps = kWindow * kWindow;
constexpr int64_t kBand = 1024;  // positions of which dweight is summed at once: packed, they fill half of a cache

// Images with their borders. A line is followed by one pixel of zeros, which also begins the next, an image by one line of zeros, and
// one goes before the first. A position is a pixel's place among all these, counted from the first pixel.
struct Padded {
  int64_t height, width, channels;

  FUSED_RESNET_INLINE Padded(const Images& images, int64_t channels) : height(images.height), width(images.width), channels(channels) {}

  FUSED_RESNET_INLINE int64_t pitch() const { return width + 1; }
  FUSED_RESNET_INLINE int64_t border() const { return pitch() + 1; }
  FUSED_RESNET_INLINE int64_t positions(int64_t images) const { return images * (height + 1) * pitch(); }
  // Of the first pixel of a line; lines are counted through all images.
  FUSED_RESNET_INLINE int64_t position(int64_t line) const { return (line / height * (height + 1) + line % height) * pitch(); }
  // The borders at both ends, and what a last block of rows reads beyond.
  FUSED_RESNET_INLINE int64_t values(int64_t images) const { return (positions(images) + 2 * border() + kNarrowRows) * channels; }
  FUSED_RESNET_INLINE BFloat16* line(BFloat16* padded, int64_t line) const { return padded + (border() + position(line)) * channels; }
};

FUSED_RESNET_INLINE void copy_lines(const Padded& shape, const BFloat16* from, int64_t lines, BFloat16* padded) {
  for (int64_t line = 0; line < lines; ++line, from += shape.width * shape.channels) {
    __builtin_memcpy(shape.line(padded, line), from, shape.width * shape.channels * sizeof(BFloat16));
  }
}

// out [count, columns]: the convolution of `padded` at the pixels from `pixel` on, which begins a line.
template <int kRows, int kColumns>
FUSED_RESNET_INLINE void window_product(const Padded& shape, const BFloat16* padded, int64_t pixel, int64_t count, const BFloat16* packed,
                                        int64_t columns, BFloat16* out) {
  alignas(64) BFloat16 block[kRows * kColumns];
  const int64_t pitch = shape.pitch(), start = shape.position(pixel / shape.width), first_line = pixel / shape.width % shape.height;
  for (int64_t column = 0; column < columns; column += kColumns) {
    // A window begins one line and one pixel before its position: at the same index of the padded images.
    const BFloat16* window = padded + start * shape.channels;
    const BFloat16* right = packed + column * kTaps * shape.channels;
    BFloat16* to = out + column;
    for (int64_t left = count, line = first_line, at = 0; left > 0; window += kRows * shape.channels) {
      if constexpr (kColumns == kNarrowChannels) {
        narrow_window_block(window, pitch * shape.channels, right, block);
      } else {
        window_block(window, shape.channels, pitch * shape.channels, right, block);
      }
      for (int row = 0; row < kRows; ++row) {
        if (at < shape.width && line < shape.height && left > 0) {
          __builtin_memcpy(to, block + row * kColumns, kColumns * sizeof(BFloat16));
          to += columns;
          --left;
        }
        if (++at == pitch) {
          at = 0;
          line = line == shape.height ? 0 : line + 1;
        }
      }
    }
  }
}

FUSED_RESNET_INLINE void window_product(const Padded& shape, const BFloat16* padded, int64_t pixel, int64_t count, const BFloat16* packed,
                                        int64_t columns, BFloat16* out) {
  if (columns == kNarrowChannels) return window_product<kNarrowRows, kNarrowChannels>(shape, padded, pixel, count, packed, columns, out);
  window_product<kBlockSide, kBlockSide>(shape, padded, pixel, count, packed, columns, out);
}

// The images, rows and parts of a unit.
struct Unit {
  int64_t images, first_row, last_row, first_part, last_part;

  FUSED_RESNET_INLINE Unit(const Images& all, const Parts& parts, int64_t unit) {
    const int64_t first = unit * all.per_unit, pixels = all.height * all.width;
    images = first + all.per_unit < all.count ? all.per_unit : all.count - first;
    first_row = first * pixels;
    last_row = first_row + images * pixels;
    first_part = first_row / parts.rows_per_part;
    last_part = (last_row + parts.rows_per_part - 1) / parts.rows_per_part;
  }
};

template <Residual kResidual>
void window_forward(const ConvForward& given, int64_t first_unit, int64_t last_unit, void* scratch) {
  const NormAddAct& norm = given.norm;
  const Moments& moments_of_y = given.moments;
  const int64_t inputs = norm.extent.channels, outputs = moments_of_y.extent.channels, height = given.images.height;
  [[maybe_unused]] const Tiles tiles(inputs == kNarrowChannels);
  const Padded shape(given.images, inputs);
  const auto* act = static_cast<const BFloat16*>(given.pending ? norm.act : norm.x);
  auto *y = static_cast<BFloat16*>(given.y), *padded = static_cast<BFloat16*>(scratch);
  __builtin_memset(padded, 0, shape.values(given.images.per_unit) * sizeof(BFloat16));
  for (int64_t i = first_unit; i < last_unit; ++i) {
    const Unit unit(given.images, moments_of_y.parts, i);
    if (given.pending) {
      if constexpr (kResidual == Residual::kNone) {
        norm_add_act<BFloat16, kResidual, true, false>(norm, unit.first_row, unit.last_row);
      } else {
        norm_add_act<BFloat16, kResidual, true, true>(norm, unit.first_row, unit.last_row);
      }
    }
    copy_lines(shape, act + unit.first_row * inputs, unit.images * height, padded);  // a last unit's rest is of others: dropped
    for (int64_t part = unit.first_part; part < unit.last_part; ++part) {
      const PartRows rows(moments_of_y.parts, part, norm.extent.rows);
      window_product(shape, padded, rows.first - unit.first_row, rows.last - rows.first, static_cast<const BFloat16*>(given.packed), outputs,
                     y + rows.first * outputs);
      if (moments_of_y.mean) moments<BFloat16>(moments_of_y, part, part + 1);
    }
  }
}

inline int64_t window_forward_scratch(const ConvForward& given) {
  return Padded(given.images, given.norm.extent.channels).values(given.images.per_unit) * static_cast<int64_t>(sizeof(BFloat16));
}

// What a unit of backward works in; `size` is in bytes.
struct WindowScratch {
  BFloat16 *dy, *act, *dx, *left, *even, *odd;
  int64_t size;

  FUSED_RESNET_INLINE WindowScratch(const ConvBackward& given, void* scratch) {
    const int64_t inputs = given.reduce.extent.channels, outputs = given.apply.extent.channels, images = given.images.per_unit;
    const Padded shape(given.images, inputs);
    Arena arena(scratch);
    dy = arena.take(Padded(given.images, outputs).values(images));
    act = arena.take(given.sums ? shape.values(images) : 0);
    dx = arena.take(given.pending ? given.reduce.parts.rows_per_part * inputs : 0);
    left = arena.take(given.sums ? kBand * outputs : 0);
    even = arena.take(given.sums ? right_rows(shape) * inputs : 0);
    odd = arena.take(given.sums ? right_rows(shape) * inputs : 0);
    size = arena.size();
  }

  // Of the right factor of a band: its positions, and those that its windows reach.
  FUSED_RESNET_INLINE static int64_t right_rows(const Padded& shape) { return (kBand + 2 * shape.border() + kDepth - 1) / kDepth * kDepth; }
};

// sums of dweight (+)= dyᵀ · act of a unit. A tap is a distance along depth. Depth goes by pairs, so the right factor is packed twice: the
// pairs that begin at even positions, and at odd ones.
FUSED_RESNET_INLINE void add_window_outer(const Padded& shape, const WindowScratch& space, int64_t images, int64_t outputs, float* sums,
                                          bool first) {
  const int64_t inputs = shape.channels, positions = shape.positions(images);
  for (int64_t begin = 0; begin < positions; begin += kBand) {
    const int64_t count = begin + kBand < positions ? kBand : positions - begin, steps = (count + kDepth - 1) / kDepth;
    const int64_t depth = (steps * kDepth + 2 * shape.border() + kDepth - 1) / kDepth * kDepth, between = depth * kTileSide;
    pack_left(space.dy + (shape.border() + begin) * outputs, count, outputs, outputs, space.left);
    pack(space.act + begin * inputs, depth, inputs, 1, 0, inputs / kTileSide, space.even);
    pack(space.act + (begin + 1) * inputs, depth, inputs, 1, 0, inputs / kTileSide, space.odd);
    for (int64_t line = 0; line < kWindow; ++line) {
      const BFloat16* right[kWindow];
      for (int64_t i = 0; i < kWindow; ++i) {
        const int64_t distance = line * shape.pitch() + i;
        right[i] = (distance % 2 ? space.odd : space.even) + distance / 2 * kDepth;
      }
      float* to = sums + line * kWindow * outputs * inputs;
      if (inputs == kNarrowChannels) {
        add_narrow_outer(space.left, right, steps, to, first);
      } else {
        for (int64_t i = 0; i < kWindow; ++i) {
          add_outer(space.left, outputs, right[i], inputs, between, steps, to + i * outputs * inputs, first);
        }
      }
    }
    first = false;
  }
}

inline void window_backward(const ConvBackward& given, int64_t first_group, int64_t last_group, void* scratch) {
  const WindowScratch space(given, scratch);
  const int64_t inputs = given.reduce.extent.channels, outputs = given.apply.extent.channels;
  const Images& images = given.images;
  const Padded shape(images, inputs), shape_of_dy(images, outputs);
  const int64_t units = (images.count + images.per_unit - 1) / images.per_unit;
  const auto* act = static_cast<const BFloat16*>(given.act);
  const auto clear = [&] {
    __builtin_memset(space.dy, 0, shape_of_dy.values(images.per_unit) * sizeof(BFloat16));
    if (given.sums) __builtin_memset(space.act, 0, shape.values(images.per_unit) * sizeof(BFloat16));
  };
  clear();
  for (int64_t group = first_group; group < last_group; ++group) {
    const int64_t first_unit = group * given.units_per_group, end = first_unit + given.units_per_group;
    for (int64_t i = first_unit; i < (end < units ? end : units); ++i) {
      const Unit unit(images, given.reduce.parts, i);
      const int64_t lines = unit.images * images.height;
      if (unit.images < images.per_unit) clear();  // of the images of another unit
      BackwardApply apply = given.apply;
      if (apply.dy) {
        backward_apply<BFloat16>(apply, unit.first_row, unit.last_row);
        copy_lines(shape_of_dy, static_cast<const BFloat16*>(apply.dy) + unit.first_row * outputs, lines, space.dy);
      } else {
        for (int64_t line = 0, row = unit.first_row; line < lines; ++line, row += images.width) {
          apply.dy = shape_of_dy.line(space.dy, line) - row * outputs;
          backward_apply<BFloat16>(apply, row, row + images.width);
        }
      }
      if (given.packed) {
        [[maybe_unused]] const Tiles tiles(inputs == kNarrowChannels);
        for (int64_t part = unit.first_part; part < unit.last_part; ++part) {
          const PartRows rows(given.reduce.parts, part, given.reduce.extent.rows);
          BFloat16* dx = given.pending ? space.dx : static_cast<BFloat16*>(given.reduce.dz) + rows.first * inputs;
          window_product(shape_of_dy, space.dy, rows.first - unit.first_row, rows.last - rows.first,
                         static_cast<const BFloat16*>(given.packed), inputs, dx);
          finish_gradient(given, part, rows, dx);
        }
      }
      if (given.sums) {
        [[maybe_unused]] const Tiles tiles;
        copy_lines(shape, act + unit.first_row * inputs, lines, space.act);
        add_window_outer(shape, space, unit.images, outputs, given.sums + group * kTaps * outputs * inputs, i == first_unit);
      }
    }
  }
}

inline int64_t window_backward_scratch(const ConvBackward& given) { return WindowScratch(given, nullptr).size; }

}  // namespace FUSED_RESNET_ISA
}  // namespace fused_resnet
