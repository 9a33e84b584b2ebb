// Backward of norm + residual + ReLU: the reduction to (dz, s1, s2), and batch norm's backward.
//
// Formula     dz = round(d · mask), s1 = Σ dz, s2 = Σ dz·x̂ and, of a raw residual, s2r = Σ dz·x̂r, over dz as rounded, with
//             x̂ = (x − mean)·invstd and rows as n. Then dx = gamma·invstd·(dz − s1/n − x̂·s2/n). Ioffe & Szegedy 2015, section 3.
//             d is a gradient of the shape of x, or the sum of two, or that of a pool's output: see the `...Gradient` types.
//             dz is also the gradient of a residual, materialised or raw: the two branches of a block share it and s1.
// Shapes      d, dact, x, residual, dz, dx: T [rows, channels]; mask: uint8 [rows, ceil(channels / 8)]; vectors float [channels].
// Bytes       reduction: rows * channels * sizeof(T) for each of d, dact, x, a raw residual read, and dz written; rows * groups for
//             a mask. Apply: three of those. Partial sums: 4 per sum, part and channel, written and read again.
// FLOPs       4 to 8 an element; apply: 5.
// Precision   fp32, one rounding to T. A mask without bits is recomputed from z = fmaf(x, scale, bias), as forward computed it.
// Determinism sums have a fixed order (reduce.cuh): equal bits on every run.
#pragma once

#include "reduce.cuh"

namespace fused_resnet {

// ---- where d comes from ------------------------------------------------------------------------------------------------
// Each has Loaded<kWidth>, what a thread holds between a load and its use, with `get(i)` for channel i of the group;
// and load<kWidth>(row, channel, valid).

// A gradient of the shape of x.
template <typename T>
struct PlainGradient {
  static constexpr int kOperands = 1;
  template <int kWidth>
  using Loaded = Group<T, kWidth>;

  const T* d;
  int channels;

  template <int kWidth>
  __device__ __forceinline__ Loaded<kWidth> load(int64_t row, int channel, int valid) const {
    return Loaded<kWidth>::load(d + row * channels + channel, valid);
  }
};

// The sum of two: what the main path handed back, and what came by the residual path.
template <typename T>
struct SummedGradient {
  static constexpr int kOperands = 2;
  template <int kWidth>
  struct Loaded {
    Group<T, kWidth> d, dact;
    __device__ __forceinline__ float get(int i) const { return d.get(i) + dact.get(i); }
  };

  const T* d;
  const T* dact;
  int channels;

  template <int kWidth>
  __device__ __forceinline__ Loaded<kWidth> load(int64_t row, int channel, int valid) const {
    const int64_t at = row * channels + channel;
    return {Group<T, kWidth>::load(d + at, valid), Group<T, kWidth>::load(dact + at, valid)};
  }
};

// Of a global average pool: one value [images, channels] for all pixels of an image, divided by their number.
template <typename T>
struct AveragedGradient {
  static constexpr int kOperands = 1;
  template <int kWidth>
  struct Loaded {
    Group<T, kWidth> d;
    float pixels;
    __device__ __forceinline__ float get(int i) const { return d.get(i) / pixels; }
  };

  const T* d;
  int channels;
  Divisor pixels;

  template <int kWidth>
  __device__ __forceinline__ Loaded<kWidth> load(int64_t row, int channel, int valid) const {
    const int64_t image = pixels.quotient(static_cast<unsigned>(row));
    return {Group<T, kWidth>::load(d + image * channels + channel, valid), static_cast<float>(pixels.divisor)};
  }
};

// ---- reduction ---------------------------------------------------------------------------------------------------------

template <typename T, typename Gradient>
struct NormBackwardReduceArguments {
  Gradient gradient;
  const T* x;
  const float* mean;
  const float* invstd;
  const float* scale;  // this and bias: read for Mask::kRecomputed
  const float* bias;
  const T* residual;             // nullptr but for a raw residual, as its mean and invstd
  const float* residual_mean;
  const float* residual_invstd;
  const uint8_t* mask;  // nullptr but for Mask::kBits
  T* dz;
  float* sum[3];  // s1, s2 and, of a raw residual, s2r: each [parts, channels]
  int64_t rows;
  int channels;
  ReductionTile tile;
};

template <typename T, int kWidth, typename Gradient, Mask kMask, bool kRaw>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    norm_backward_reduce_kernel(const NormBackwardReduceArguments<T, Gradient> arguments) {
  constexpr int kSums = kRaw ? 3 : 2;
  const ReductionTile& tile = arguments.tile;
  const int channels = arguments.channels;
  const ReductionThread at(tile, arguments.rows, channels);
  const int valid = at.valid;

  const auto mean = Coefficients::load(arguments.mean, at.channel, valid);
  [[maybe_unused]] Coefficients scale, bias, residual_mean;
  if constexpr (kMask == Mask::kRecomputed) {
    scale = Coefficients::load(arguments.scale, at.channel, valid);
    bias = Coefficients::load(arguments.bias, at.channel, valid);
  }
  if constexpr (kRaw) residual_mean = Coefficients::load(arguments.residual_mean, at.channel, valid);

  // Σ dz, Σ dz·(x − mean), Σ dz·(xr − meanr): invstd is a factor of the whole sum.
  float sum[kSums][kGroup] = {};
  at.go<steps_in_flight<T, kWidth>(Gradient::kOperands + 1 + kRaw)>([&](int64_t row, auto steps) {
    typename Gradient::template Loaded<kWidth> d[steps];
    Group<T, kWidth> x[steps];
    [[maybe_unused]] Group<T, kWidth> residual[steps];
    [[maybe_unused]] unsigned bits[steps];
#pragma unroll
    for (int s = 0; s < steps; ++s) {
      const int64_t here = row + s * at.height;
      d[s] = arguments.gradient.template load<kWidth>(here, at.channel, valid);
      x[s] = Group<T, kWidth>::load(arguments.x + here * channels + at.channel, valid);
      if constexpr (kRaw) residual[s] = Group<T, kWidth>::load(arguments.residual + here * channels + at.channel, valid);
      if constexpr (kMask == Mask::kBits) bits[s] = arguments.mask[here * groups_of(channels) + at.channel / kGroup];
    }
#pragma unroll
    for (int s = 0; s < steps; ++s) {
      Group<T, kWidth> dz;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        bool stopped = false;
        if constexpr (kMask == Mask::kBits) stopped = !(bits[s] >> i & 1);
        if constexpr (kMask == Mask::kRecomputed) stopped = stops(fmaf(x[s].get(i), scale[i], bias[i]));
        dz.set(i, stopped ? 0.0f : d[s].get(i));
        const float rounded = dz.get(i);
        sum[0][i] += rounded;
        sum[1][i] = fmaf(rounded, x[s].get(i) - mean[i], sum[1][i]);
        if constexpr (kRaw) sum[2][i] = fmaf(rounded, residual[s].get(i) - residual_mean[i], sum[2][i]);
      }
      dz.store(arguments.dz + (row + s * at.height) * channels + at.channel, valid);
    }
  });
  block_sums(sum, at, tile, channels, [&](int k, int channel, float total) {
    if (k == 1) total *= arguments.invstd[channel];
    if (k == 2) total *= arguments.residual_invstd[channel];
    arguments.sum[k][static_cast<int64_t>(at.part) * channels + channel] = total;
  });
}

// ---- apply -------------------------------------------------------------------------------------------------------------

template <typename T>
struct NormBackwardApplyArguments {
  const T* dz;
  const T* y;
  const float* mean;
  const float* invstd;
  const float* gamma;  // or nullptr
  const float* s1;
  const float* s2;
  T* dy;
  int64_t rows;
  int channels;
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, 3) norm_backward_apply_kernel(const NormBackwardApplyArguments<T> arguments) {
  Walk walk(arguments.rows, arguments.channels);
  const int valid = walk.valid;
  const auto mean = Coefficients::load(arguments.mean, walk.channel, valid);
  // dy = factor·dz + slope·(y − mean) + constant. y − mean stays a difference: folded into the constant it would lose the digits that
  // a mean far above the deviation takes.
  Coefficients factor = Coefficients::load(arguments.gamma, walk.channel, valid, 1.0f), slope, constant;
  {
    const auto invstd = Coefficients::load(arguments.invstd, walk.channel, valid);
    const auto s1 = Coefficients::load(arguments.s1, walk.channel, valid);
    const auto s2 = Coefficients::load(arguments.s2, walk.channel, valid);
    const auto n = static_cast<float>(arguments.rows);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      factor.at[i] *= invstd[i];
      slope.at[i] = -factor[i] * invstd[i] * (s2[i] / n);
      constant.at[i] = -factor[i] * (s1[i] / n);
    }
  }
  walk.go<steps_in_flight<T, kWidth>(2)>([&](auto steps) {
    Group<T, kWidth> dz[steps], y[steps];
#pragma unroll
    for (int s = 0; s < steps; ++s) {
      dz[s] = Group<T, kWidth>::load(arguments.dz + walk.offset + s * walk.step, valid);
      y[s] = Group<T, kWidth>::load(arguments.y + walk.offset + s * walk.step, valid);
    }
#pragma unroll
    for (int s = 0; s < steps; ++s) {
      Group<T, kWidth> dy;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        dy.set(i, fmaf(factor[i], dz[s].get(i), fmaf(slope[i], y[s].get(i) - mean[i], constant[i])));
      }
      dy.store(arguments.dy + walk.offset + s * walk.step, valid);
    }
  });
}

}  // namespace fused_resnet
