// The second step of a reduction: partial sums added in a fixed order.
//
// Bytes       4 per sum, part and channel read, 4 per sum and channel written.
#pragma once

#include "reduce.cuh"

namespace fused_resnet {

// A row of blocks for each of the sums.
__global__ void __launch_bounds__(kThreads) merge_sums_kernel(const MergeSumsArguments arguments) {
  const int blocks_per_sum = static_cast<int>(ceil_div(arguments.channels, kMergeChannels));
  const int which = blockIdx.x / blocks_per_sum;
  const MergeThread at(blockIdx.x % blocks_per_sum);
  const float* partial = arguments.partial + static_cast<int64_t>(which) * arguments.parts * arguments.channels + at.channel;
  float sum = 0.0f;
  if (at.channel < arguments.channels) {
#pragma unroll 4
    for (int part = at.lane; part < arguments.parts; part += kMergeLanes) {
      sum += partial[static_cast<int64_t>(part) * arguments.channels];
    }
  }
  sum = merge_lanes(sum);
  if (at.lane == 0 && at.channel < arguments.channels) {
    (which == 0 ? arguments.s1 : which == 1 ? arguments.s2 : arguments.residual_s2)[at.channel] = sum;
  }
}

}  // namespace fused_resnet
