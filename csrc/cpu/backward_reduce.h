// Backward of norm + residual + ReLU to (dz, s1, s2), and of pools behind it.
//
// Formula     dz = round(d · mask), s1 = Σ dz, s2 = Σ dz·x̂ and, of a raw residual, s2r = Σ dz·x̂r, over dz as rounded, with
//             x̂ = (x − mean)·invstd. d is a gradient of the shape of x, the sum of two, or that of a pool's output.
// Shapes      d, dact, x, residual, dz: T [rows, channels]; mask: uint8 [rows, ceil(channels / 8)]; vectors float [channels].
// Bytes       rows * channels * sizeof(T) for each of d, dact, x, a raw residual read, and dz written; rows * groups for a mask;
//             4 per sum, part and channel written and read again.
// Precision   fp32, one rounding to T. A mask without bits is recomputed from z = fma(x, scale, bias), as forward computed it.
// Determinism sums have a fixed order: equal bits on every run and for any number of threads.
#pragma once

#include "walk.h"

namespace fused_resnet {
namespace FUSED_RESNET_ISA {

// ---- where d comes from -------------------------------------------------------------------------------------------------
// Each is made for a part's tile, which starts at `first`; `together` tells how many rows from there one tile may have; and gives d of
// a block of channels of one of its rows.

template <typename T>
struct PlainGradient {
  const T* d;
  int channels;

  FUSED_RESNET_INLINE PlainGradient(const BackwardReduce& given, int64_t first)
      : d(static_cast<const T*>(given.d) + first * given.extent.channels), channels(given.extent.channels) {}

  static FUSED_RESNET_INLINE int64_t together(const BackwardReduce& given, int64_t) { return given.extent.rows; }

  template <int kVectors, typename Count>
  FUSED_RESNET_INLINE Block<kVectors> block(int64_t row, int channel, Count count) const {
    return load_block<kVectors>(d + row * channels + channel, count);
  }
};

template <typename T>
struct SummedGradient {
  PlainGradient<T> first_of_two;
  const T* dact;

  FUSED_RESNET_INLINE SummedGradient(const BackwardReduce& given, int64_t first)
      : first_of_two(given, first), dact(static_cast<const T*>(given.dact) + first * given.extent.channels) {}

  static FUSED_RESNET_INLINE int64_t together(const BackwardReduce& given, int64_t) { return given.extent.rows; }

  template <int kVectors, typename Count>
  FUSED_RESNET_INLINE Block<kVectors> block(int64_t row, int channel, Count count) const {
    auto sum = first_of_two.template block<kVectors>(row, channel, count);
    const auto added = load_block<kVectors>(dact + row * first_of_two.channels + channel, count);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum.at[v] = sum.at[v] + added.at[v];
    return sum;
  }
};

// Of a global average pool: one value [images, channels] for all pixels of an image, divided by their number. A tile is of one image.
template <typename T>
struct AveragedGradient {
  const T* d;
  Floats pixels;

  FUSED_RESNET_INLINE AveragedGradient(const BackwardReduce& given, int64_t first)
      : d(static_cast<const T*>(given.d) + first / given.pixels * given.extent.channels),
        pixels(broadcast(static_cast<float>(given.pixels))) {}

  static FUSED_RESNET_INLINE int64_t together(const BackwardReduce& given, int64_t first) { return given.pixels - first % given.pixels; }

  template <int kVectors, typename Count>
  FUSED_RESNET_INLINE Block<kVectors> block(int64_t, int channel, Count count) const {
    auto share = load_block<kVectors>(d + channel, count);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) share.at[v] = share.at[v] / pixels;
    return share;
  }
};

// Of a max pool: Σ dout over the windows that the pixel won, each of which says which of its taps did. A tile is of one line of pixels.
template <typename T>
struct MaxPooledGradient {
  const T* dout;  // of the image, as index
  const uint8_t* index;
  PoolWindow window;
  int channels, h, w;

  FUSED_RESNET_INLINE MaxPooledGradient(const BackwardReduce& given, int64_t first)
      : window(given.window), channels(given.extent.channels) {
    const int64_t line = first / window.width, image = line / window.height;
    h = static_cast<int>(line % window.height);
    w = static_cast<int>(first % window.width);
    const int64_t from = image * window.pooled_height * window.pooled_width * channels;
    dout = static_cast<const T*>(given.d) + from;
    index = given.index + from;
  }

  static FUSED_RESNET_INLINE int64_t together(const BackwardReduce& given, int64_t first) {
    return given.window.width - first % given.window.width;
  }

  // Windows p of which tap at - p·stride + padding is pixel `at`: [low, high].
  FUSED_RESNET_INLINE int low(int at) const {
    const int reached = at + window.padding - window.size + 1;
    return reached <= 0 ? 0 : (reached + window.stride - 1) / window.stride;
  }
  FUSED_RESNET_INLINE int high(int at, int pooled) const {
    const int last = (at + window.padding) / window.stride;
    return last < pooled ? last : pooled - 1;
  }

  template <int kVectors, typename Count>
  FUSED_RESNET_INLINE Block<kVectors> block(int64_t row, int channel, Count count) const {
    const int here = w + static_cast<int>(row);
    Block<kVectors> sum = {};
    for (int p = low(h), last_p = high(h, window.pooled_height); p <= last_p; ++p) {
      for (int q = low(here), last_q = high(here, window.pooled_width); q <= last_q; ++q) {
        const int r = h + window.padding - p * window.stride, s = here + window.padding - q * window.stride;
        const Floats tap = broadcast(static_cast<float>(r * window.size + s));
        const int64_t from = (static_cast<int64_t>(p) * window.pooled_width + q) * channels + channel;
        const auto gradient = load_block<kVectors>(dout + from, count), winner = load_block<kVectors>(index + from, count);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum.at[v] = sum.at[v] + keep(is_equal(winner.at[v], tap), gradient.at[v]);
      }
    }
    return sum;
  }
};

// ---- reduction ----------------------------------------------------------------------------------------------------------

template <typename T, typename Source, Mask kMask, bool kRaw>
void backward_reduce(const BackwardReduce& given, int64_t first_part, int64_t last_part) {
  constexpr int kSums = kRaw ? 3 : 2;
  const int channels = given.extent.channels;
  const int64_t stride = given.parts.count * channels, longest = tile_rows<T>(channels);
  for (int64_t part = first_part; part < last_part; ++part) {
    const PartRows rows(given.parts, part, given.extent.rows);
    float* sums = given.sums + part * channels;
    for (int k = 0; k < kSums; ++k) {
      for (int c = 0; c < channels; ++c) sums[k * stride + c] = 0.0f;
    }
    for (int64_t first = rows.first, last; first < rows.last; first = last) {
      const int64_t together = Source::together(given, first);
      last = first + (together < longest ? together : longest);
      if (last > rows.last) last = rows.last;
      const Source gradient(given, first);
      over_channels(channels, [&](auto vectors, int channel, auto count) FUSED_RESNET_LAMBDA {
        constexpr int kVectors = vectors.value;
        const auto mean = load_block<kVectors>(given.mean + channel, count);
        [[maybe_unused]] Block<kVectors> scale, bias, residual_mean, third;
        if constexpr (kMask == Mask::kRecomputed) {
          scale = load_block<kVectors>(given.scale + channel, count);
          bias = load_block<kVectors>(given.bias + channel, count);
        }
        auto s1 = load_block<kVectors>(sums + channel, count), s2 = load_block<kVectors>(sums + stride + channel, count);
        if constexpr (kRaw) {
          residual_mean = load_block<kVectors>(given.residual_mean + channel, count);
          third = load_block<kVectors>(sums + 2 * stride + channel, count);
        }
        const int64_t from = first * channels + channel;
        const T* x = static_cast<const T*>(given.x) + from;
        [[maybe_unused]] const T* residual = kRaw ? static_cast<const T*>(given.residual) + from : nullptr;
        [[maybe_unused]] const uint8_t* mask = kMask == Mask::kBits ? given.mask + first * groups_of(channels) + channel / kGroup : nullptr;
        T* dz = static_cast<T*>(given.dz) + from;
        for (int64_t row = 0; row < last - first; ++row, x += channels, dz += channels) {
          auto d = gradient.template block<kVectors>(row, channel, count);
          const auto value = load_block<kVectors>(x, count);
          [[maybe_unused]] Block<kVectors> other;
          if constexpr (kRaw) {
            other = load_block<kVectors>(residual, count);
            residual += channels;
          }
          [[maybe_unused]] unsigned bits = 0;
          if constexpr (kMask == Mask::kBits) {
            bits = load_mask<kVectors>(mask, count);
            mask += groups_of(channels);
          }
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            if constexpr (kMask == Mask::kBits) d.at[v] = keep(flags_of(bits >> v * kLanes), d.at[v]);
            if constexpr (kMask == Mask::kRecomputed) d.at[v] = keep(passes_gradient(fma(value.at[v], scale.at[v], bias.at[v])), d.at[v]);
            d.at[v] = rounded(T{}, d.at[v]);
            s1.at[v] = s1.at[v] + d.at[v];
            s2.at[v] = fma(d.at[v], value.at[v] - mean.at[v], s2.at[v]);
            if constexpr (kRaw) third.at[v] = fma(d.at[v], other.at[v] - residual_mean.at[v], third.at[v]);
          }
          store_block(dz, d, count);
        }
        store_block(sums + channel, s1, count);
        store_block(sums + stride + channel, s2, count);
        if constexpr (kRaw) store_block(sums + 2 * stride + channel, third, count);
      });
    }
  }
}

// Adds the parts up, in their order. invstd is a factor of a whole sum.
inline void merge_sums(const MergeSums& given, int64_t first_channel, int64_t last_channel) {
  constexpr int kColumns = 16;
  for (int k = 0; k < given.count; ++k) {
    const float* sums = given.sums + k * given.parts * given.channels;
    for (int64_t begin = first_channel; begin < last_channel; begin += kColumns) {
      const int64_t columns = last_channel - begin < kColumns ? last_channel - begin : kColumns;
      double total[kColumns] = {};
      for (int64_t part = 0; part < given.parts; ++part) {
        for (int64_t i = 0; i < columns; ++i) total[i] += sums[part * given.channels + begin + i];
      }
      for (int64_t i = 0; i < columns; ++i) {
        given.total[k][begin + i] = static_cast<float>(total[i] * (given.factor[k] ? given.factor[k][begin + i] : 1.0f));
      }
    }
  }
}

}  // namespace FUSED_RESNET_ISA
}  // namespace fused_resnet
