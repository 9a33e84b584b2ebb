// norm + residual + ReLU + global average pool: the tail of a ResNet. Its backward is norm_backward.cuh's, of an AveragedGradient.
//
// Formula     out = round(mean over the pixels of round(relu(fmaf(x, scale[c], bias[c]) + r))), r as in norm_add_act.cuh, and one bit
//             an element of ReLU's mask.
// Shapes      x, residual: T [images, pixels, channels]; out: T [images, channels]; mask: uint8 [images, pixels, ceil(channels / 8)].
// Bytes       rows * channels * sizeof(T), twice with a residual, and the mask written. The activation itself is never written.
// FLOPs       4 to 7 an element.
// Precision   fp32 sums of rounded activations, one rounding.
// Determinism a block sums an image's slab of channels in a fixed order: equal bits on every run.
#pragma once

#include "reduce.cuh"

namespace fused_resnet {

template <typename T>
struct AvgPoolArguments {
  const T* x;
  const float* scale;
  const float* bias;
  const T* residual;            // nullptr for kNone
  const float* residual_scale;  // nullptr but for kRaw
  const float* residual_bias;   // nullptr but for kRaw
  T* out;
  uint8_t* mask;  // nullptr without a mask
  int64_t rows;
  int channels;
  ReductionTile tile;  // a part is an image
};

template <typename T, int kWidth, Residual kResidual, bool kMask>
__global__ void __launch_bounds__(kThreads, 3) norm_add_act_avg_pool_kernel(const AvgPoolArguments<T> arguments) {
  constexpr bool kAdds = kResidual != Residual::kNone;
  const int channels = arguments.channels;
  const ReductionThread at(arguments.tile, arguments.rows, channels);
  const int valid = at.valid;
  const Preactivation<kResidual> preactivation(
      arguments.scale, arguments.bias, arguments.residual_scale, arguments.residual_bias, at.channel, valid);
  float sum[1][kGroup] = {};
  at.go<steps_in_flight<T, kWidth>(kAdds ? 2 : 1)>([&](int64_t row, auto steps) {
    Group<T, kWidth> x[steps];
    [[maybe_unused]] Group<T, kWidth> residual[steps];
#pragma unroll
    for (int s = 0; s < steps; ++s) {
      const int64_t from = (row + s * at.height) * channels + at.channel;
      x[s] = Group<T, kWidth>::load(arguments.x + from, valid);
      if constexpr (kAdds) residual[s] = Group<T, kWidth>::load(arguments.residual + from, valid);
    }
#pragma unroll
    for (int s = 0; s < steps; ++s) {
      [[maybe_unused]] unsigned bits = 0;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const float z = preactivation(i, x[s].get(i), kAdds ? residual[s].get(i) : 0.0f);
        if constexpr (kMask) bits |= static_cast<unsigned>(!stops(z)) << i;
        sum[0][i] += widen(narrow<T>(relu(z)));
      }
      if constexpr (kMask) {
        arguments.mask[(row + s * at.height) * groups_of(channels) + at.channel / kGroup] = static_cast<uint8_t>(bits);
      }
    }
  });
  block_sums(sum, at, arguments.tile, channels, [&](int, int channel, float total) {
    const auto pixels = static_cast<float>(arguments.tile.rows_per_part);
    arguments.out[static_cast<int64_t>(at.part) * channels + channel] = narrow<T>(total / pixels);
  });
}

}  // namespace fused_resnet
