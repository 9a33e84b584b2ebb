// norm + ReLU + max pool, and norm + residual + ReLU + global average pool: stem and tail of a ResNet.
//
// Formula     max pool: out = max over the window of act = round(relu(fma(x, scale, bias))); index = r·size + s, the tap that won: the
//             first of equals wins, as in PyTorch; a NaN wins; padding never does. Average pool: out = round(mean of act over pixels),
//             act as rounded, and one bit an element of ReLU's mask with a residual.
// Shapes      x: T [images, H, W, channels]; out: T [images, P, Q, channels] or [images, channels]; index: uint8 like out.
// Bytes       x read; out, index and mask written. The activation itself is never written.
// Precision   rounded activations are compared and averaged; fp32.
#pragma once

#include "elementwise.h"

namespace fused_resnet {
namespace FUSED_RESNET_ISA {

template <typename T>
void max_pool(const MaxPool& given, int64_t first_line, int64_t last_line) {
  const int channels = given.extent.channels;
  const PoolWindow& window = given.window;
  for (int64_t line = first_line; line < last_line; ++line) {
    const int64_t image = line / window.pooled_height;
    const int top = static_cast<int>(line % window.pooled_height) * window.stride - window.padding;
    const int first_r = top < 0 ? -top : 0, last_r = window.height - top < window.size ? window.height - top : window.size;
    const T* pixels = static_cast<const T*>(given.x) + image * window.height * window.width * channels;
    for (int q = 0; q < window.pooled_width; ++q) {
      const int left = q * window.stride - window.padding;
      const int first_s = left < 0 ? -left : 0, last_s = window.width - left < window.size ? window.width - left : window.size;
      const int64_t to = (line * window.pooled_width + q) * channels;
      over_channels(channels, [&](auto vectors, int channel, auto count) FUSED_RESNET_LAMBDA {
        constexpr int kVectors = vectors.value;
        const auto scale = load_block<kVectors>(given.scale + channel, count), bias = load_block<kVectors>(given.bias + channel, count);
        Block<kVectors> best, winner = {};
        for (int v = 0; v < kVectors; ++v) best.at[v] = broadcast(-1.0f);  // below every activation
        for (int r = first_r; r < last_r; ++r) {
          const T* from = pixels + (static_cast<int64_t>(top + r) * window.width + left + first_s) * channels + channel;
          for (int s = first_s; s < last_s; ++s, from += channels) {
            const Floats tap = broadcast(static_cast<float>(r * window.size + s));
            const auto value = load_block<kVectors>(from, count);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
              const Floats act = rounded<T>(relu(fma(value.at[v], scale.at[v], bias.at[v])));
              // A comparison with NaN is false, so a NaN is let in by name, and nothing gets past one.
              const Flags wins = either(is_above(act, best.at[v]), both(is_nan(act), is_equal(best.at[v], best.at[v])));
              best.at[v] = select(wins, act, best.at[v]);
              winner.at[v] = select(wins, tap, winner.at[v]);
            }
          }
        }
        store_block(static_cast<T*>(given.out) + to + channel, best, count);
        store_block(given.index + to + channel, winner, count);
      });
    }
  }
}

template <typename T, Residual kResidual>
void avg_pool(const AvgPool& pool, int64_t first_image, int64_t last_image) {
  const NormAddAct& given = pool.given;
  const int channels = given.extent.channels;
  const Floats pixels = broadcast(static_cast<float>(pool.pixels));
  for (int64_t image = first_image; image < last_image; ++image) {
    float* sums = pool.sums + image * channels;
    for (int c = 0; c < channels; ++c) sums[c] = 0.0f;
    const int64_t begin = image * pool.pixels, end = begin + pool.pixels;
    over_tiles(begin, end, tile_rows<T>(channels), [&](int64_t first, int64_t last) FUSED_RESNET_LAMBDA {
      over_channels(channels, [&](auto vectors, int channel, auto count) FUSED_RESNET_LAMBDA {
        constexpr int kVectors = vectors.value;
        const Preactivation<kVectors, kResidual> preactivation(given, channel, count);
        auto sum = load_block<kVectors>(sums + channel, count);
        const int64_t from = first * channels + channel;
        const T* x = static_cast<const T*>(given.x) + from;
        const T* residual = kResidual == Residual::kNone ? x : static_cast<const T*>(given.residual) + from;
        [[maybe_unused]] uint8_t* mask =
            kResidual == Residual::kNone ? nullptr : given.mask + first * groups_of(channels) + channel / kGroup;
        for (int64_t row = first; row < last; ++row, x += channels, residual += channels) {
          auto z = preactivation(x, residual, count);
          [[maybe_unused]] const unsigned bits = activate(z);
          if constexpr (kResidual != Residual::kNone) {
            store_mask<kVectors>(mask, bits, count);
            mask += groups_of(channels);
          }
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sum.at[v] = sum.at[v] + rounded<T>(z.at[v]);
        }
        store_block(sums + channel, sum, count);
      });
    });
    over_channels(channels, [&](auto vectors, int channel, auto count) FUSED_RESNET_LAMBDA {
      auto mean = load_block<vectors.value>(sums + channel, count);
#pragma GCC unroll 4
      for (int v = 0; v < vectors.value; ++v) mean.at[v] = mean.at[v] / pixels;
      store_block(static_cast<T*>(pool.out) + image * channels + channel, mean, count);
    });
  }
}

}  // namespace FUSED_RESNET_ISA
}  // namespace fused_resnet
