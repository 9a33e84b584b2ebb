// The operator `norm_add_act`.
#include "norm_add_act.cuh"

#include "launch.h"
#include "operators.h"

namespace fused_resnet {

std::tuple<Tensor, OptionalTensor> norm_add_act(const Tensor& x, const Tensor& scale, const Tensor& bias, const OptionalTensor& residual,
                                                const OptionalTensor& residual_scale, const OptionalTensor& residual_bias, bool relu,
                                                bool save_mask) {
  const Arguments check("norm_add_act");
  check.activation("x", x);
  check.vector("scale", scale, x);
  check.vector("bias", bias, x);
  check.residual(residual, residual_scale, residual_bias, x);
  if (save_mask && !(relu && residual)) check.fail("save_mask: expected False without a ReLU and a residual");

  const DeviceGuard guard(x);
  const Tensor act = torch::stable::empty_like(x);
  OptionalTensor mask;
  if (save_mask) mask = empty_mask(x);
  const int channels = channels_of(x);
  const int64_t blocks = elementwise_blocks(rows_of(x), channels, multiprocessors_of(check, x), 3);
  with_element(x, [&](auto element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const NormAddActArguments<T> arguments{
        read<T>(x),    read<float>(scale),   read<float>(bias), read<T>(residual), read<float>(residual_scale), read<float>(residual_bias),
        write<T>(act), write<uint8_t>(mask), rows_of(x),        channels,
    };
    with_width<T>(channels, aligned(arguments.x, arguments.residual, arguments.act), [&](auto width) {
      with_residual(residual.has_value(), residual_scale.has_value(), [&](auto kind) {
        with_bool(relu, [&](auto has_relu) {
          with_bool(save_mask, [&](auto asks_mask) {
            constexpr bool kMask = asks_mask() && has_relu() && kind() != Residual::kNone;
            launch(check, norm_add_act_kernel<T, width(), kind(), has_relu(), kMask>, blocks, x, arguments);
          });
        });
      });
    });
  });
  return {act, mask};
}

}  // namespace fused_resnet
