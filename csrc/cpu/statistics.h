// Statistics of a raw convolution output.
//
// Formula     mean = Σ y / n, M2 = Σ (y − mean)², n = rows; then var = M2 / n, invstd = 1 / sqrt(var + eps), scale = gamma·invstd,
//             bias = beta − mean·scale.
// Shapes      y: T [rows, channels]; moments of parts float [parts, channels]; the rest float [channels].
// Bytes       rows * channels * sizeof(T) read; 8 per part and channel written and read again.
// Precision   never E[y²] − E[y]², which loses all digits where the mean is far above the deviation. A part sums differences from the
//             mean of its first kSample rows, and their squares. With δ the distance of that from the part's mean, kSample·δ² is at
//             most M2 and M2 = Σd² − n·δ² loses at most the factor 1 + n/kSample of eps, whatever the mean: 17 for kPartRows rows.
//             Parts are merged by Chan, Golub & LeVeque 1979; coefficients are made in fp64.
// Determinism the merges have a fixed order: equal bits on every run and for any number of threads.
#pragma once

#include "walk.h"

namespace fused_resnet {
namespace FUSED_RESNET_ISA {

constexpr int64_t kSample = 16;

// The mean of the first rows of a part, for each channel.
template <typename T>
FUSED_RESNET_INLINE void sample_mean(const T* y, int64_t rows, int channels, float* mean) {
  const Floats share = broadcast(1.0f / static_cast<float>(rows));
  over_channels(channels, [&](auto vectors, int channel, auto count) FUSED_RESNET_LAMBDA {
    constexpr int kVectors = vectors.value;
    const T* from = y + channel;
    const auto first = load_block<kVectors>(from, count);
    Block<kVectors> sum = {};
    for (int64_t row = 1; row < rows; ++row) {
      from += channels;
      const auto value = load_block<kVectors>(from, count);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum.at[v] = sum.at[v] + (value.at[v] - first.at[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum.at[v] = fma(sum.at[v], share, first.at[v]);
    store_block(mean + channel, sum, count);
  });
}

template <typename T>
void moments(const Moments& given, int64_t first_part, int64_t last_part) {
  const int channels = given.extent.channels;
  const T* y = static_cast<const T*>(given.y);
  for (int64_t part = first_part; part < last_part; ++part) {
    const PartRows rows(given.parts, part, given.extent.rows);
    const int64_t n = rows.last - rows.first;
    float *mean = given.mean + part * channels, *m2 = given.m2 + part * channels, *sum = given.sum + part * channels;
    sample_mean(y + rows.first * channels, n < kSample ? n : kSample, channels, mean);
    for (int c = 0; c < channels; ++c) sum[c] = m2[c] = 0.0f;
    over_tiles(rows.first, rows.last, tile_rows<T>(channels), [&](int64_t first, int64_t last) FUSED_RESNET_LAMBDA {
      over_channels(channels, [&](auto vectors, int channel, auto count) FUSED_RESNET_LAMBDA {
        constexpr int kVectors = vectors.value;
        const auto shift = load_block<kVectors>(mean + channel, count);
        auto s = load_block<kVectors>(sum + channel, count), squares = load_block<kVectors>(m2 + channel, count);
        const T* from = y + first * channels + channel;
        for (int64_t row = first; row < last; ++row, from += channels) {
          const auto value = load_block<kVectors>(from, count);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            const Floats away = value.at[v] - shift.at[v];
            s.at[v] = s.at[v] + away;
            squares.at[v] = fma(away, away, squares.at[v]);
          }
        }
        store_block(sum + channel, s, count);
        store_block(m2 + channel, squares, count);
      });
    });
    for (int c = 0; c < channels; ++c) {
      const float away = sum[c] / static_cast<float>(n), left = m2[c] - sum[c] * away;
      mean[c] += away;
      m2[c] = left < 0.0f ? 0.0f : left;  // a NaN stays
    }
  }
}

// n = Σ nᵢ, mean = Σ nᵢ·meanᵢ / n, M2 = Σ M2ᵢ + nᵢ·(meanᵢ − mean)². The means are taken about the first, so that their sum is one of
// small differences.
inline void merge_moments(const MergeMoments& given, int64_t first_channel, int64_t last_channel) {
  const int channels = given.channels;
  const auto count_of = [&](int64_t part) FUSED_RESNET_LAMBDA {
    if (given.counts) return static_cast<double>(given.counts[part]);
    const PartRows rows(given.parts, part, given.rows);
    return static_cast<double>(rows.last - rows.first);
  };
  double total = 0.0;
  for (int64_t part = 0; part < given.parts.count; ++part) total += count_of(part);
  constexpr int kColumns = 16;
  for (int64_t begin = first_channel; begin < last_channel; begin += kColumns) {
    const int64_t columns = last_channel - begin < kColumns ? last_channel - begin : kColumns;
    double shift[kColumns], offset[kColumns] = {}, m2[kColumns] = {};
    for (int64_t i = 0; i < columns; ++i) shift[i] = given.means[begin + i];
    for (int64_t part = 0; part < given.parts.count; ++part) {
      const double share = count_of(part) / total;
      const float* means = given.means + part * channels + begin;
      for (int64_t i = 0; i < columns; ++i) offset[i] += share * (means[i] - shift[i]);
    }
    for (int64_t part = 0; part < given.parts.count; ++part) {
      const double n = count_of(part);
      const float *means = given.means + part * channels + begin, *m2s = given.m2s + part * channels + begin;
      for (int64_t i = 0; i < columns; ++i) {
        const double away = means[i] - shift[i] - offset[i];
        m2[i] += m2s[i] + n * away * away;
      }
    }
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t c = begin + i;
      const auto mean = static_cast<float>(shift[i] + offset[i]);
      given.mean[c] = mean;
      if (given.m2) {
        given.m2[c] = static_cast<float>(m2[i]);
        continue;
      }
      const auto var = static_cast<float>(m2[i] / total);
      const auto invstd = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(var) + given.eps));
      const auto scale = static_cast<float>(static_cast<double>(invstd) * (given.gamma ? given.gamma[c] : 1.0f));
      given.var[c] = var;
      given.invstd[c] = invstd;
      given.scale[c] = scale;
      given.bias[c] = static_cast<float>((given.beta ? given.beta[c] : 0.0f) - static_cast<double>(mean) * scale);
    }
  }
}

}  // namespace FUSED_RESNET_ISA
}  // namespace fused_resnet
