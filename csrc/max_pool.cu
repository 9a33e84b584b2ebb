// The operators `norm_act_max_pool` and `norm_act_max_pool_backward`.
#include "max_pool.cuh"

#include "backward_reduction.h"
#include "operators.h"
#include "pool.h"

namespace fused_resnet {
namespace {

// Calls body with the geometry; `height` and `width` are of the pixels that a kernel counts.
template <typename Body>
void with_geometry(const Pool& pool, int64_t counted_height, int64_t counted_width, Body&& body) {
  const auto geometry = [&](auto window) {
    return PoolGeometry<decltype(window)>{
        window,
        static_cast<int>(pool.height),
        static_cast<int>(pool.width),
        static_cast<int>(pool.pooled_height()),
        static_cast<int>(pool.pooled_width()),
        Divisor(counted_width),
        Divisor(counted_height),
    };
  };
  if (pool.size == StemWindow::size && pool.stride == StemWindow::stride && pool.padding == StemWindow::padding) {
    body(geometry(StemWindow{}));
  } else {
    body(geometry(AnyWindow{static_cast<int>(pool.size), static_cast<int>(pool.stride), static_cast<int>(pool.padding)}));
  }
}

}  // namespace

std::tuple<Tensor, Tensor> norm_act_max_pool(const Tensor& x, const Tensor& scale, const Tensor& bias, int64_t kernel_size, int64_t stride,
                                             int64_t padding) {
  const Arguments check("norm_act_max_pool");
  check.activation("x", x);
  check.vector("scale", scale, x);
  check.vector("bias", bias, x);
  const Pool pool(check, x, kernel_size, stride, padding);

  const DeviceGuard guard(x);
  const Tensor out = pool.empty(x, x.scalar_type()), index = pool.empty(x, ScalarType::Byte);
  const int channels = channels_of(x);
  with_element(x, [&](auto element) {
    using T = std::remove_pointer_t<decltype(element)>;
    with_geometry(pool, pool.pooled_height(), pool.pooled_width(), [&](auto geometry) {
      using Window = decltype(geometry.window);
      const MaxPoolArguments<T, Window> arguments{
          read<T>(x), read<float>(scale), read<float>(bias), write<T>(out), write<uint8_t>(index), rows_of(out), channels, geometry,
      };
      with_width<T>(channels, aligned(arguments.x, arguments.out, arguments.index), [&](auto width) {
        launch(check, norm_act_max_pool_kernel<T, width(), Window>,
               elementwise_blocks(rows_of(out), channels, multiprocessors_of(check, x), kPoolBlocksPerMultiprocessor), x, arguments);
      });
    });
  });
  return {out, index};
}

std::tuple<Tensor, Tensor, Tensor> norm_act_max_pool_backward(
    const Tensor& dout, const Tensor& index, const Tensor& x, const Tensor& mean, const Tensor& invstd, const Tensor& scale,
    const Tensor& bias, int64_t kernel_size, int64_t stride, int64_t padding) {
  const Arguments check("norm_act_max_pool_backward");
  const OptionalTensor none;
  const ReductionInputs inputs{x, mean, invstd, scale, bias, none, none, none, none};
  inputs.check(check);
  const Pool pool(check, x, kernel_size, stride, padding);
  check.activation_of("dout", dout, x, pool.pooled_height(), pool.pooled_width());
  check.pool_index("index", index, dout);

  const DeviceGuard guard(x);
  BackwardReduction reduction(check, inputs);
  with_element(x, [&](auto element) {
    using T = std::remove_pointer_t<decltype(element)>;
    with_geometry(pool, pool.height, pool.width, [&](auto geometry) {
      const MaxPooledGradient<T, decltype(geometry.window)> gradient{read<T>(dout), read<uint8_t>(index), channels_of(x), geometry};
      reduction.launch<T, Mask::kRecomputed, false>(gradient, aligned(gradient.dout, gradient.index));
    });
  });
  return {reduction.dz, reduction.s1, reduction.s2};
}

}  // namespace fused_resnet
