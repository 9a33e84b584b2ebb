// The operators `norm_backward_reduce` and `norm_backward_apply`.
#include "norm_backward.cuh"

#include "apply_inputs.h"
#include "backward_reduction.h"
#include "operators.h"

namespace fused_resnet {
namespace {

// Calls body with the mask and whether there is a raw residual, as constants. With one, a mask is bits.
template <typename Body>
void with_mask_and_residual(bool relu, bool has_bits, bool raw, Body&& body) {
  const auto with_mask = [&](auto mask) {
    if constexpr (mask() == Mask::kRecomputed) {
      body(mask, std::false_type{});
    } else {
      with_bool(raw, [&](auto is_raw) { body(mask, is_raw); });
    }
  };
  if (!relu) {
    with_mask(std::integral_constant<Mask, Mask::kNone>{});
  } else if (has_bits) {
    with_mask(std::integral_constant<Mask, Mask::kBits>{});
  } else {
    with_mask(std::integral_constant<Mask, Mask::kRecomputed>{});
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, OptionalTensor> norm_backward_reduce(
    const Tensor& d, const OptionalTensor& dact, const Tensor& x, const Tensor& mean, const Tensor& invstd, const Tensor& scale,
    const Tensor& bias, const OptionalTensor& residual, const OptionalTensor& residual_mean, const OptionalTensor& residual_invstd,
    const OptionalTensor& mask, bool relu) {
  const Arguments check("norm_backward_reduce");
  const ReductionInputs inputs{x, mean, invstd, scale, bias, residual, residual_mean, residual_invstd, mask};
  inputs.check(check);
  check.activation_like("d", d, x);
  if (dact) check.activation_like("dact", *dact, x);
  if (relu && residual && !mask) check.fail("mask: expected a tensor, since relu and residual are given");

  const DeviceGuard guard(x);
  BackwardReduction reduction(check, inputs);
  const int channels = channels_of(x);
  with_element(x, [&](auto element) {
    using T = std::remove_pointer_t<decltype(element)>;
    with_mask_and_residual(relu, mask.has_value(), residual.has_value(), [&](auto kind, auto raw) {
      if (dact) {
        const SummedGradient<T> gradient{read<T>(d), read<T>(dact), channels};
        reduction.launch<T, kind(), raw()>(gradient, aligned(gradient.d, gradient.dact));
      } else {
        const PlainGradient<T> gradient{read<T>(d), channels};
        reduction.launch<T, kind(), raw()>(gradient, aligned(gradient.d));
      }
    });
  });
  return {reduction.dz, reduction.s1, reduction.s2, reduction.residual_s2};
}

std::tuple<Tensor, Tensor, Tensor, OptionalTensor> norm_add_act_avg_pool_backward(
    const Tensor& dout, const Tensor& x, const Tensor& mean, const Tensor& invstd, const Tensor& scale, const Tensor& bias,
    const OptionalTensor& residual, const OptionalTensor& residual_mean, const OptionalTensor& residual_invstd,
    const OptionalTensor& mask) {
  const Arguments check("norm_add_act_avg_pool_backward");
  const ReductionInputs inputs{x, mean, invstd, scale, bias, residual, residual_mean, residual_invstd, mask};
  inputs.check(check);
  check.activation_of("dout", dout, x, 1, 1);
  if (residual && !mask) check.fail("mask: expected a tensor, since residual is given");

  const DeviceGuard guard(x);
  BackwardReduction reduction(check, inputs);
  with_element(x, [&](auto element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const AveragedGradient<T> gradient{read<T>(dout), channels_of(x), Divisor(x.size(2) * x.size(3))};
    with_mask_and_residual(true, mask.has_value(), residual.has_value(), [&](auto kind, auto raw) {
      if constexpr (kind() != Mask::kNone) reduction.launch<T, kind(), raw()>(gradient, aligned(gradient.d));
    });
  });
  return {reduction.dz, reduction.s1, reduction.s2, reduction.residual_s2};
}

Tensor norm_backward_apply(const Tensor& dz, const Tensor& y, const Tensor& mean, const Tensor& invstd, const OptionalTensor& gamma,
                           const Tensor& s1, const Tensor& s2) {
  const Arguments check("norm_backward_apply");
  ApplyInputs{dz, y, mean, invstd, gamma, s1, s2}.check(check);

  const DeviceGuard guard(y);
  const Tensor dy = torch::stable::empty_like(y);
  const int channels = channels_of(y);
  with_element(y, [&](auto element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const NormBackwardApplyArguments<T> arguments{
        read<T>(dz),     read<T>(y),      read<float>(mean), read<float>(invstd), read<float>(gamma),
        read<float>(s1), read<float>(s2), write<T>(dy),      rows_of(y),          channels,
    };
    with_width<T>(channels, aligned(arguments.dz, arguments.y, arguments.dy), [&](auto width) {
      launch(check, norm_backward_apply_kernel<T, width()>, elementwise_blocks(rows_of(y), channels, multiprocessors_of(check, y), 3), y,
             arguments);
    });
  });
  return dy;
}

}  // namespace fused_resnet
