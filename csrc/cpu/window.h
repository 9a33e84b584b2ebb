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
constexpr int kOddRows = 7;

// Positions of which dweight is summed at once: packed, they fill half of a cache.
template <typename T>
constexpr int64_t kBand = 2048 / sizeof(T);

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
  template <typename T>
  FUSED_RESNET_INLINE T* line(T* padded, int64_t line) const {
    return padded + (border() + position(line)) * channels;
  }
};

template <typename T>
FUSED_RESNET_INLINE void copy_lines(const Padded& shape, const T* from, int64_t lines, T* padded) {
  for (int64_t line = 0; line < lines; ++line, from += shape.width * shape.channels) {
    __builtin_memcpy(shape.line(padded, line), from, shape.width * shape.channels * sizeof(T));
  }
}

// out [count, columns]: the convolution of `padded` at the pixels from `pixel` on, which begins a line.
template <int kRows, int kColumns, typename T>
FUSED_RESNET_INLINE void window_product(const Padded& shape, const T* padded, int64_t pixel, int64_t count, const T* packed,
                                        int64_t columns, T* out) {
  alignas(64) T block[kRows * kColumns];
  const int64_t pitch = shape.pitch(), start = shape.position(pixel / shape.width), first_line = pixel / shape.width % shape.height;
  for (int64_t column = 0; column < columns; column += kColumns) {
    // A window begins one line and one pixel before its position: at the same index of the padded images.
    const T* window = padded + start * shape.channels;
    const T* right = packed + column * kTaps * shape.channels;
    T* to = out + column;
    for (int64_t left = count, line = first_line, at = 0; left > 0; window += kRows * shape.channels) {
      if constexpr (kColumns == kNarrowChannels) {
        narrow_window_block(window, pitch * shape.channels, right, block);
      } else {
        window_block(window, shape.channels, pitch * shape.channels, right, block);
      }
      for (int row = 0; row < kRows; ++row) {
        if (at < shape.width && line < shape.height && left > 0) {
          __builtin_memcpy(to, block + row * kColumns, kColumns * sizeof(T));
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

// The same by vectors, of lines that are whole groups of kRows pixels: no border has a part in it.
template <int kRows, int kTiles, typename T>
FUSED_RESNET_INLINE void line_product(const Padded& shape, const T* padded, int64_t pixel, int64_t count, const T* packed, int64_t columns,
                                      T* out) {
  const int64_t channels = shape.channels, first = pixel / shape.width, lines = count / shape.width;
  for (int64_t column = 0; column < columns; column += kTiles * kTileSide) {
    T* to = out + column;
    for (int64_t line = first; line < first + lines; ++line) {
      const T* window = padded + shape.position(line) * channels;
      for (int64_t at = 0; at < shape.width; at += kRows, window += kRows * channels, to += kRows * columns) {
        window_rows<kRows, kTiles>(window, channels, shape.pitch() * channels, packed + column * kTaps * channels, to, columns);
      }
    }
  }
}

template <typename T>
FUSED_RESNET_INLINE void window_product(const Padded& shape, const T* padded, int64_t pixel, int64_t count, const T* packed,
                                        int64_t columns, T* out) {
  const bool narrow = columns == kNarrowChannels;
  if constexpr (kByVectors<T>) {
    if (narrow && shape.width % kTallRows == 0) return line_product<kTallRows, 1>(shape, padded, pixel, count, packed, columns, out);
    if (!narrow && shape.width % kSumRows == 0) return line_product<kSumRows, kSumTiles>(shape, padded, pixel, count, packed, columns, out);
    if constexpr (kSumRows > kOddRows) {  // 7, 14, 28: of images of 224 pixels
      if (!narrow && shape.width % kOddRows == 0)
        return line_product<kOddRows, kSumTiles>(shape, padded, pixel, count, packed, columns, out);
    }
  }
  if (narrow) return window_product<kNarrowRows, kNarrowChannels>(shape, padded, pixel, count, packed, columns, out);
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

template <typename T>
void window_forward(const ConvForward& given, int64_t first_unit, int64_t last_unit, void* scratch) {
  const NormAddAct& norm = given.norm;
  const Moments& moments_of_y = given.moments;
  const int64_t inputs = norm.extent.channels, outputs = moments_of_y.extent.channels, height = given.images.height;
  [[maybe_unused]] const Tiles<T> tiles(inputs == kNarrowChannels);
  const Padded shape(given.images, inputs);
  const auto* act = static_cast<const T*>(given.pending ? norm.act : norm.x);
  auto *y = static_cast<T*>(given.y), *padded = static_cast<T*>(scratch);
  __builtin_memset(padded, 0, shape.values(given.images.per_unit) * sizeof(T));
  for (int64_t i = first_unit; i < last_unit; ++i) {
    const Unit unit(given.images, moments_of_y.parts, i);
    if (given.pending) write_act<T>(norm, unit.first_row, unit.last_row);
    copy_lines(shape, act + unit.first_row * inputs, unit.images * height, padded);  // a last unit's rest is of others: dropped
    for (int64_t part = unit.first_part; part < unit.last_part; ++part) {
      const PartRows rows(moments_of_y.parts, part, norm.extent.rows);
      window_product(shape, padded, rows.first - unit.first_row, rows.last - rows.first, static_cast<const T*>(given.packed), outputs,
                     y + rows.first * outputs);
      if (moments_of_y.mean) moments<T>(moments_of_y, part, part + 1);
    }
  }
}

template <typename T>
int64_t window_forward_scratch(const ConvForward& given) {
  return Padded(given.images, given.norm.extent.channels).values(given.images.per_unit) * static_cast<int64_t>(sizeof(T));
}

// Positions that a band of about `most` has at most: of whole lines, and borders between images.
template <typename T>
FUSED_RESNET_INLINE int64_t band_positions(const Padded& shape, int64_t most) {
  if (!kByVectors<T>) return most;
  const int64_t lines = most / shape.pitch() + 1;
  return (lines + lines / shape.height + 2) * (shape.pitch() + kTileSide);
}

// What a unit of backward works in; `size` is in bytes.
template <typename T>
struct WindowScratch {
  T *dy, *act, *dx, *left, *even, *odd;
  int64_t size;

  FUSED_RESNET_INLINE WindowScratch(const ConvBackward& given, void* scratch) {
    const int64_t inputs = given.reduce.extent.channels, outputs = given.apply.extent.channels, images = given.images.per_unit;
    const Padded shape(given.images, inputs);
    Arena<T> arena(scratch);
    dy = arena.take(Padded(given.images, outputs).values(images));
    act = arena.take(given.sums ? shape.values(images) : 0);
    dx = arena.take(given.pending ? given.reduce.parts.rows_per_part * inputs : 0);
    left = arena.take(given.sums ? band_positions<T>(shape, kBand<T>) * outputs : 0);
    even = arena.take(given.sums ? right_rows(shape) * inputs : 0);
    odd = arena.take(given.sums && kWord<T> > 1 ? right_rows(shape) * inputs : 0);
    size = arena.size();
  }

  // Of the right factor of a band: its positions, and those that its windows reach.
  FUSED_RESNET_INLINE static int64_t right_rows(const Padded& shape) {
    return (band_positions<T>(shape, kBand<T>) + 2 * shape.border() + kDepth<T> - 1) / kDepth<T> * kDepth<T>;
  }
};

// Where the right factor of dweight begins for a tap, `distance` positions along depth. Depth goes by words, which for bfloat16 are pairs:
// the factor is packed twice then, in pairs that begin at even positions, and at odd ones.
template <typename T>
FUSED_RESNET_INLINE const T* at_distance(const T* even, const T* odd, int64_t distance) {
  return (distance % kWord<T> ? odd : even) + distance / kWord<T> * kDepth<T>;
}

// The pixels of which dweight is summed at once, as runs along depth: by tiles one run of positions, borders among them; by vectors the
// lines without their borders, so that products have none.
template <typename T>
struct Band {
  static constexpr int64_t kMostRuns = 64;
  int64_t runs, words;    // words of a run; the last of a line may be half a pair, whose other half is zero
  int64_t at[kMostRuns];  // where the windows of a run begin, in positions after those of the first

  Band() = default;
  // One run of so many pixels.
  FUSED_RESNET_INLINE explicit Band(int64_t pixels) : runs(1), words((pixels + kDepth<T> - 1) / kDepth<T> * kTileSide) { at[0] = 0; }

  FUSED_RESNET_INLINE int64_t steps() const { return (runs * words + kTileSide - 1) / kTileSide; }
  // Positions that the right factor has.
  FUSED_RESNET_INLINE int64_t reach(const Padded& shape) const {
    return (at[runs - 1] + words * kWord<T> + 2 * shape.border() + kDepth<T> - 1) / kDepth<T> * kDepth<T>;
  }
  // Of a run's right factor for a tap, `distance` positions away.
  FUSED_RESNET_INLINE const T* right(const T* even, const T* odd, int64_t run, int64_t distance) const {
    return at_distance(even, odd, at[run] + distance);
  }
};

// Calls body(band, position, count) for the bands of some images, each of about `most` positions, from `position` on; by tiles of `count`.
template <typename T, typename Body>
FUSED_RESNET_INLINE void over_bands(const Padded& shape, int64_t images, int64_t most, Body&& body) {
  if constexpr (kByVectors<T>) {
    Band<T> band;
    const int64_t lines = images * shape.height, line_words = (shape.width + kWord<T> - 1) / kWord<T>;
    int64_t each = most / shape.pitch();
    each = each < 1 ? 1 : each < Band<T>::kMostRuns ? each : Band<T>::kMostRuns;
    for (int64_t line = 0; line < lines; line += each) {
      band.runs = line + each < lines ? each : lines - line;
      band.words = line_words;
      for (int64_t i = 0; i < band.runs; ++i) band.at[i] = shape.position(line + i) - shape.position(line);
      body(band, shape.position(line), 0);
    }
  } else {
    const int64_t positions = shape.positions(images);
    for (int64_t begin = 0; begin < positions; begin += most) {
      const int64_t count = begin + most < positions ? most : positions - begin;
      body(Band<T>(count), begin, count);
    }
  }
}

// The left factor of a band: `rows` of dy's outputs, of which `dy` has the first at the band's first position.
template <typename T>
FUSED_RESNET_INLINE void pack_band(const Padded& shape, const Band<T>& band, const T* dy, int64_t count, int64_t rows, int64_t outputs,
                                   T* packed) {
  if constexpr (kByVectors<T>) {
    const int64_t depth = band.words * kWord<T>;
    const auto row_of = [&](int64_t row) FUSED_RESNET_LAMBDA {
      const int64_t run = row / depth, pixel = row % depth;
      return run < band.runs && pixel < shape.width ? dy + (band.at[run] + pixel) * outputs : nullptr;
    };
    pack_rows(row_of, band.runs * depth, 1, 0, rows / kTileSide, packed);
  } else {
    pack_left(dy, count, rows, outputs, packed);
  }
}

// Two by two tiles of the sums of a tap.
template <typename T>
FUSED_RESNET_INLINE void add_band_block(const Band<T>& band, const T* left, const T* even, const T* odd, int64_t distance, int64_t between,
                                        float* sums, int64_t below, bool first) {
  if constexpr (kByVectors<T>) {
    const auto right_of = [&](int64_t run) FUSED_RESNET_LAMBDA { return band.right(even, odd, run, distance); };
    add_block(left, right_of, between, band.steps(), band.runs, band.words, sums, below, first);
  } else {
    add_block(left, at_distance(even, odd, distance), between, band.steps(), sums, below, first);
  }
}

// sums of dweight (+)= dyᵀ · act of a unit.
template <typename T>
FUSED_RESNET_INLINE void add_window_outer(const Padded& shape, const WindowScratch<T>& space, int64_t images, int64_t outputs, float* sums,
                                          bool first) {
  const int64_t inputs = shape.channels, across = inputs / kTileSide;
  over_bands<T>(shape, images, kBand<T>, [&](const Band<T>& band, int64_t position, int64_t count) FUSED_RESNET_LAMBDA {
    const int64_t depth = band.reach(shape), between = depth * kTileSide, steps = band.steps();
    pack_band(shape, band, space.dy + (shape.border() + position) * outputs, count, outputs, outputs, space.left);
    pack(space.act + position * inputs, depth, inputs, 1, 0, across, space.even);
    if constexpr (kWord<T> > 1) pack(space.act + (position + 1) * inputs, depth, inputs, 1, 0, across, space.odd);
    for (int64_t line = 0; line < kWindow; ++line) {
      float* to = sums + line * kWindow * outputs * inputs;
      const auto right_of = [&](int64_t run, int64_t tap) FUSED_RESNET_LAMBDA {
        return band.right(space.even, space.odd, run, line * shape.pitch() + tap);
      };
      if (inputs == kNarrowChannels) {
        if constexpr (kByVectors<T>) {
          add_narrow_outer(space.left, right_of, band.runs, band.words, to, first);
        } else {
          add_narrow_outer(space.left, {right_of(0, 0), right_of(0, 1), right_of(0, 2)}, steps, to, first);
        }
        continue;
      }
      for (int64_t tap = 0; tap < kWindow; ++tap, to += outputs * inputs) {
        for (int64_t row = 0; row < outputs / kTileSide; row += 2) {
          for (int64_t column = 0; column < across; column += 2) {
            add_band_block(band, space.left + row * steps * kTileValues<T>, space.even + column * between, space.odd + column * between,
                           line * shape.pitch() + tap, between, to + (row * across + column) * kTileSums, across * kTileSums, first);
          }
        }
      }
    }
    first = false;
  });
}

template <typename T>
void window_backward(const ConvBackward& given, int64_t first_group, int64_t last_group, void* scratch) {
  const WindowScratch<T> space(given, scratch);
  const int64_t inputs = given.reduce.extent.channels, outputs = given.apply.extent.channels;
  const Images& images = given.images;
  const Padded shape(images, inputs), shape_of_dy(images, outputs);
  const int64_t units = (images.count + images.per_unit - 1) / images.per_unit;
  const auto* act = static_cast<const T*>(given.act);
  const auto clear = [&] {
    __builtin_memset(space.dy, 0, shape_of_dy.values(images.per_unit) * sizeof(T));
    if (given.sums) __builtin_memset(space.act, 0, shape.values(images.per_unit) * sizeof(T));
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
        backward_apply<T>(apply, unit.first_row, unit.last_row);
        copy_lines(shape_of_dy, static_cast<const T*>(apply.dy) + unit.first_row * outputs, lines, space.dy);
      } else {
        for (int64_t line = 0, row = unit.first_row; line < lines; ++line, row += images.width) {
          apply.dy = shape_of_dy.line(space.dy, line) - row * outputs;
          backward_apply<T>(apply, row, row + images.width);
        }
      }
      if (given.packed) {
        [[maybe_unused]] const Tiles<T> tiles(inputs == kNarrowChannels);
        for (int64_t part = unit.first_part; part < unit.last_part; ++part) {
          const PartRows rows(given.reduce.parts, part, given.reduce.extent.rows);
          T* dx = given.pending ? space.dx : static_cast<T*>(given.reduce.dz) + rows.first * inputs;
          window_product(
              shape_of_dy, space.dy, rows.first - unit.first_row, rows.last - rows.first, static_cast<const T*>(given.packed), inputs, dx);
          finish_gradient(given, part, rows, dx);
        }
      }
      if (given.sums) {
        [[maybe_unused]] const Tiles<T> tiles;
        copy_lines(shape, act + unit.first_row * inputs, lines, space.act);
        add_window_outer(shape, space, unit.images, outputs, given.sums + group * kTaps * outputs * inputs, i == first_unit);
      }
    }
  }
}

template <typename T>
int64_t window_backward_scratch(const ConvBackward& given) {
  return WindowScratch<T>(given, nullptr).size;
}

}  // namespace FUSED_RESNET_ISA
}  // namespace fused_resnet
