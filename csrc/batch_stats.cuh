// Statistics of a raw convolution output, and the affine map that normalises it.
//
// Formula     mean = Σ y / n, var = Σ (y − mean)² / n, invstd = 1 / sqrt(var + eps), scale = gamma · invstd,
//             bias = beta − mean · scale, over n = rows.
// Shapes      y: T [rows, channels]; all vectors float [channels]; partial results float [parts, channels].
// Bytes       rows * channels * sizeof(T), and 8 per part and channel written and read again.
// FLOPs       7 an element.
// Precision   never E[y²] − E[y]², which loses all digits where the mean is much larger than the deviation. A thread makes Welford's
//             update (1962) of differences from the first row of its part, which are small; threads, warps and parts are merged by
//             Chan, Golub & LeVeque 1979: (n, mean, M2) of a union from those of its parts.
// Determinism the merges have a fixed order: equal bits on every run.
#pragma once

#include "reduce.cuh"

namespace fused_resnet {

// Count, mean and M2 = Σ (y − mean)² of a set of rows.
struct Moments {
  float count, mean, m2;

  // Of the union with another set. Chan, Golub & LeVeque 1979.
  __device__ __forceinline__ void merge(const Moments& other) {
    const float total = count + other.count;
    const float share = total > 0.0f ? other.count / total : 0.0f;
    const float away = other.mean - mean;
    mean = fmaf(away, share, mean);
    m2 += fmaf(away * away, count * share, other.m2);
    count = total;
  }
};

// What is made of the moments of all rows. Each [channels].
struct StatisticsOutput {
  const float* gamma;  // or nullptr
  const float* beta;   // or nullptr
  float* mean;
  float* m2;      // nullptr, or the one result beside the mean: moments, to be merged with those of other devices
  float* invstd;  // this and all that follow: nullptr with m2
  float* var;
  float* scale;
  float* bias;
  float eps;

  __device__ __forceinline__ void write(int channel, const Moments& moments) const {
    mean[channel] = moments.mean;
    if (m2) {
      m2[channel] = moments.m2;
      return;
    }
    const float variance = moments.m2 / moments.count;
    const float inverse = 1.0f / sqrtf(variance + eps);
    const float factor = gamma ? inverse * gamma[channel] : inverse;
    invstd[channel] = inverse;
    var[channel] = variance;
    scale[channel] = factor;
    bias[channel] = fmaf(-moments.mean, factor, beta ? beta[channel] : 0.0f);
  }
};

template <typename T>
struct BatchStatsArguments {
  const T* y;
  float* partial_mean;  // [parts, channels], as partial_m2; nullptr where one part is all
  float* partial_m2;
  StatisticsOutput output;  // written where one part is all
  int64_t rows;
  int channels;
  ReductionTile tile;
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) batch_stats_kernel(const BatchStatsArguments<T> arguments) {
  const ReductionTile& tile = arguments.tile;
  const ReductionThread at(tile, arguments.rows, arguments.channels);
  const T* y = arguments.y + at.channel;

  float shift[kGroup] = {}, mean[kGroup] = {}, m2[kGroup] = {};
  if (at.valid > 0) {
    const auto first = Group<T, kWidth>::load(y + at.first * arguments.channels, at.valid);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) shift[i] = first.get(i);
  }
  float count = 0.0f;
  at.go<steps_in_flight<T, kWidth>(1)>([&](int64_t row, auto steps) {
    Group<T, kWidth> value[steps];
#pragma unroll
    for (int s = 0; s < steps; ++s) {
      value[s] = Group<T, kWidth>::load(y + (row + s * at.height) * arguments.channels, at.valid);
    }
#pragma unroll
    for (int s = 0; s < steps; ++s) {
      count += 1.0f;
      const float share = 1.0f / count;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const float shifted = value[s].get(i) - shift[i];
        const float away = shifted - mean[i];
        mean[i] = fmaf(away, share, mean[i]);
        m2[i] = fmaf(away, shifted - mean[i], m2[i]);
      }
    }
  });

  // All threads of a column have one shift, so their moments can be merged as they are. Lanes of a warp first. The
  // lowest lanes, which are kept, are those that have rows if any has.
  __shared__ float shared_count[kWarps];
  __shared__ float shared[2][kWarps][kSlab];
  const int warp = threadIdx.x / kWarp;
  for (int apart = tile.columns; apart < kWarp; apart *= 2) {
    const float other_count = __shfl_xor_sync(~0u, count, apart);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      Moments own{count, mean[i], m2[i]};
      own.merge({other_count, __shfl_xor_sync(~0u, mean[i], apart), __shfl_xor_sync(~0u, m2[i], apart)});
      mean[i] = own.mean;
      m2[i] = own.m2;
    }
    count += other_count;
  }
  if (threadIdx.x % kWarp < tile.columns) {
    if (at.column == 0) shared_count[warp] = count;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      shared[0][warp][at.column * kGroup + i] = mean[i];
      shared[1][warp][at.column * kGroup + i] = m2[i];
    }
  }
  __syncthreads();
  const int t = threadIdx.x;
  const int channel = at.channel - at.column * kGroup + t;
  if (t >= tile.columns * kGroup || channel >= arguments.channels) return;
  Moments moments{shared_count[0], shared[0][0][t], shared[1][0][t]};
#pragma unroll
  for (int w = 1; w < kWarps; ++w) moments.merge({shared_count[w], shared[0][w][t], shared[1][w][t]});
  moments.mean += widen(arguments.y[at.first * arguments.channels + channel]);
  if (tile.parts == 1) {
    arguments.output.write(channel, moments);
  } else {
    const int64_t to = static_cast<int64_t>(at.part) * arguments.channels + channel;
    arguments.partial_mean[to] = moments.mean;
    arguments.partial_m2[to] = moments.m2;
  }
}

// The rows that each partial result stands for: `counts`, or else rows_per_part in all but the last.
struct PartCounts {
  const int64_t* counts;  // [parts] or nullptr
  int64_t rows, rows_per_part;

  __device__ __forceinline__ float operator()(int part) const {
    if (counts) return static_cast<float>(counts[part]);
    const int64_t left = rows - part * rows_per_part;
    return static_cast<float>(left < rows_per_part ? left : rows_per_part);
  }
};

struct MergeMomentsArguments {
  const float* mean;  // [parts, channels], `stride` elements from part to part, as m2
  const float* m2;
  int64_t stride;
  PartCounts counts;
  StatisticsOutput output;
  int parts;
  int channels;
};

// Merges partial moments: n = Σ nᵢ, mean = Σ nᵢ·meanᵢ / n, M2 = Σ M2ᵢ + nᵢ·(meanᵢ − mean)². Chan, Golub & LeVeque 1979. The means are
// taken about the first, so that their sum is one of small differences. The partial results are read twice, from the cache. They
// are a tile's, or those that other devices sent.
__global__ void __launch_bounds__(kThreads) merge_moments_kernel(const MergeMomentsArguments arguments) {
  const MergeThread at(blockIdx.x);
  const bool inside = at.channel < arguments.channels;
  const float* means = arguments.mean + at.channel;
  const float* m2s = arguments.m2 + at.channel;
  const float shift = inside ? means[0] : 0.0f;
  float count = 0.0f, weighted = 0.0f;
  if (inside) {
#pragma unroll 4
    for (int part = at.lane; part < arguments.parts; part += kMergeLanes) {
      const float n = arguments.counts(part);
      count += n;
      weighted = fmaf(n, means[part * arguments.stride] - shift, weighted);
    }
  }
  Moments moments{merge_lanes(count), 0.0f, 0.0f};
  const float offset = merge_lanes(weighted) / moments.count;
  moments.mean = shift + offset;
  float m2 = 0.0f;
  if (inside) {
#pragma unroll 4
    for (int part = at.lane; part < arguments.parts; part += kMergeLanes) {
      const float away = means[part * arguments.stride] - shift - offset;
      m2 += fmaf(arguments.counts(part) * away, away, m2s[part * arguments.stride]);
    }
  }
  moments.m2 = merge_lanes(m2);
  if (inside && at.lane == 0) arguments.output.write(at.channel, moments);
}

}  // namespace fused_resnet
