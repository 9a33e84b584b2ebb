// The operator `norm_add_act_avg_pool`. Its backward is in norm_backward.cu.
#include "avg_pool.cuh"

#include "launch.h"
#include "operators.h"

namespace fused_resnet {

std::tuple<Tensor, OptionalTensor> norm_add_act_avg_pool(const Tensor& x, const Tensor& scale, const Tensor& bias,
                                                         const OptionalTensor& residual, const OptionalTensor& residual_scale,
                                                         const OptionalTensor& residual_bias) {
  const Arguments check("norm_add_act_avg_pool");
  check.activation("x", x);
  check.vector("scale", scale, x);
  check.vector("bias", bias, x);
  check.residual(residual, residual_scale, residual_bias, x);

  const DeviceGuard guard(x);
  const Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), 1, 1});
  OptionalTensor mask;
  if (residual) mask = empty_mask(x);
  const int channels = channels_of(x);
  const int64_t pixels = x.size(2) * x.size(3);
  const ReductionTile tile = image_tile(x.size(0), pixels, channels);
  with_element(x, [&](auto element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const AvgPoolArguments<T> arguments{
        read<T>(x),
        read<float>(scale),
        read<float>(bias),
        read<T>(residual),
        read<float>(residual_scale),
        read<float>(residual_bias),
        write<T>(out),
        write<uint8_t>(mask),
        rows_of(x),
        channels,
        tile,
    };
    with_width<T>(channels, aligned(arguments.x, arguments.residual), [&](auto width) {
      with_residual(residual.has_value(), residual_scale.has_value(), [&](auto kind) {
        launch(check, norm_add_act_avg_pool_kernel<T, width(), kind(), kind() != Residual::kNone>, tile.blocks(), x, arguments);
      });
    });
  });
  return {out, mask};
}

}  // namespace fused_resnet
