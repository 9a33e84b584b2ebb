// act = relu(norm(x) + residual) and its packed mask, in one trip over memory.
//
// Formula     z   = fmaf(x, scale[c], bias[c]) + r
//             r   = 0 | residual | fmaf(residual, residual_scale[c], residual_bias[c])
//             act = z <= 0 ? 0 : z   (z itself without relu; a NaN stays a NaN)
//             bit = !(z <= 0)
// Shapes      x, residual, act: T [rows, channels]. scale, bias, residual_scale, residual_bias: float [channels].
//             mask: uint8 [rows, groups], groups = ceil(channels / 8).
// Bytes       rows * channels * sizeof(T) * (2, or 3 with a residual), and rows * groups with a mask. The vectors are read once
//             per thread, from the caches.
// FLOPs       2 to 6 an element.
// Precision   fp32 arithmetic, one rounding (to nearest even) to T. Equals `Reference.norm_add_act`.
// Determinism every output element is computed by one thread from one element of each input: equal bits on every run and grid.
#pragma once

#include "elements.cuh"

namespace fused_resnet {

template <typename T>
struct NormAddActArguments {
  const T* x;
  const float* scale;
  const float* bias;
  const T* residual;            // nullptr for kNone
  const float* residual_scale;  // nullptr but for kRaw
  const float* residual_bias;   // nullptr but for kRaw
  T* act;
  uint8_t* mask;  // nullptr without a mask
  int64_t rows;
  int channels;
};

// Three blocks on a multiprocessor: 80 registers a thread, which is what two affine maps and the loads in flight need without a
// spill. With four 16-byte loads in flight in each thread that is 48 KiB a multiprocessor.
template <typename T, int kWidth, Residual kResidual, bool kRelu, bool kMask>
__global__ void __launch_bounds__(kThreads, 3) norm_add_act_kernel(const NormAddActArguments<T> arguments) {
  constexpr bool kAdds = kResidual != Residual::kNone;
  Walk walk(arguments.rows, arguments.channels);
  const int valid = walk.valid;
  const Preactivation<kResidual> preactivation(
      arguments.scale, arguments.bias, arguments.residual_scale, arguments.residual_bias, walk.channel, valid);
  walk.go<steps_in_flight<T, kWidth>(kAdds ? 2 : 1)>([&](auto steps) {
    Group<T, kWidth> x[steps];
    [[maybe_unused]] Group<T, kWidth> residual[steps];
#pragma unroll
    for (int s = 0; s < steps; ++s) {
      x[s] = Group<T, kWidth>::load(arguments.x + walk.offset + s * walk.step, valid);
      if constexpr (kAdds) residual[s] = Group<T, kWidth>::load(arguments.residual + walk.offset + s * walk.step, valid);
    }
#pragma unroll
    for (int s = 0; s < steps; ++s) {
      Group<T, kWidth> act;
      [[maybe_unused]] unsigned bits = 0;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const float z = preactivation(i, x[s].get(i), kAdds ? residual[s].get(i) : 0.0f);
        if constexpr (kMask) bits |= static_cast<unsigned>(!stops(z)) << i;
        act.set(i, kRelu ? relu(z) : z);
      }
      act.store(arguments.act + walk.offset + s * walk.step, valid);
      if constexpr (kMask) {
        // The same place; without partial groups it costs no registers of its own.
        const int64_t at = kWidth == kGroup ? (walk.offset + s * walk.step) / kGroup : walk.byte + s * walk.stride;
        arguments.mask[at] = static_cast<uint8_t>(bits);
      }
    }
  });
}

}  // namespace fused_resnet
