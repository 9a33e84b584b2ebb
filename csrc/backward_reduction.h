// The backward reduction of any gradient, from tensors to (dz, s1, s2, residual_s2): what norm_backward.cu and the pools share.
#pragma once

#include "merge_sums.h"
#include "norm_backward.cuh"
#include "reduction_inputs.h"

namespace fused_resnet {

class BackwardReduction {
 public:
  // Allocates the results, under the DeviceGuard of the caller.
  BackwardReduction(const Arguments& check, const ReductionInputs& inputs)
      : dz(torch::stable::empty_like(inputs.x)),
        s1(empty_vector(inputs.x)),
        s2(empty_vector(inputs.x)),
        check_(check),
        inputs_(inputs),
        tile_(reduction_tile(rows_of(inputs.x), channels_of(inputs.x), multiprocessors_of(check, inputs.x))) {
    if (inputs.residual) residual_s2 = empty_vector(inputs.x);
  }

  // Launches the reduction, and the merge of its parts where there are several. `pointers_aligned`: those of the gradient.
  template <typename T, Mask kMask, bool kRaw, typename Gradient>
  void launch(const Gradient& gradient, bool pointers_aligned) {
    constexpr int kSums = kRaw ? 3 : 2;
    const Tensor& x = inputs_.x;
    const int channels = channels_of(x);
    NormBackwardReduceArguments<T, Gradient> arguments{
        gradient,
        read<T>(x),
        read<float>(inputs_.mean),
        read<float>(inputs_.invstd),
        read<float>(inputs_.scale),
        read<float>(inputs_.bias),
        read<T>(inputs_.residual),
        read<float>(inputs_.residual_mean),
        read<float>(inputs_.residual_invstd),
        read<uint8_t>(inputs_.mask),
        write<T>(dz),
        {write<float>(s1), write<float>(s2), write<float>(residual_s2)},
        rows_of(x),
        channels,
        tile_,
    };
    MergeSumsArguments merge{nullptr, arguments.sum[0], arguments.sum[1], arguments.sum[2], tile_.parts, channels};
    OptionalTensor partial;
    if (tile_.parts > 1) {
      partial = torch::stable::new_empty(x, {kSums, tile_.parts, channels}, ScalarType::Float);
      merge.partial = read<float>(partial);
      for (int k = 0; k < kSums; ++k) {
        arguments.sum[k] = write<float>(partial) + static_cast<int64_t>(k) * tile_.parts * channels;
      }
    }
    with_width<T>(channels, pointers_aligned && aligned(arguments.x, arguments.residual, arguments.dz), [&](auto width) {
      fused_resnet::launch(check_, norm_backward_reduce_kernel<T, width(), Gradient, kMask, kRaw>, tile_.blocks(), x, arguments);
    });
    if (partial) merge_sums(check_, merge, kSums, x);
  }

  Tensor dz, s1, s2;
  OptionalTensor residual_s2;

 private:
  const Arguments& check_;
  const ReductionInputs& inputs_;
  ReductionTile tile_;
};

}  // namespace fused_resnet
