// The operators `norm_act_max_pool` and `norm_act_max_pool_backward`.
#include "max_pool.cuh"

#include "backward_reduction.h"
#include "operators.h"

namespace fused_resnet {
namespace {

// A pool over images of [height, width], checked.
struct Pool {
  int64_t size, stride, padding, height, width;

  Pool(const Arguments& check, const Tensor& x, int64_t kernel_size, int64_t stride, int64_t padding)
      : size(kernel_size), stride(stride), padding(padding), height(x.size(2)), width(x.size(3)) {
    if (size < 1 || size > 16) check.fail("kernel_size: expected 1 to 16, got ", size);  // a tap's number goes into a byte
    if (stride < 1) check.fail("stride: expected at least 1, got ", stride);
    if (padding < 0 || padding > size / 2) check.fail("padding: expected 0 to half of kernel_size, got ", padding);
    if (height + 2 * padding < size || width + 2 * padding < size) {
      check.fail("x: expected a spatial size that a window of ", size, " fits into, got shape ", shape_of(x));
    }
  }

  int64_t pooled(int64_t extent) const { return (extent + 2 * padding - size) / stride + 1; }
  int64_t pooled_height() const { return pooled(height); }
  int64_t pooled_width() const { return pooled(width); }

  // Calls body with the geometry; `height` and `width` are of the pixels that a kernel counts.
  template <typename Body>
  void with_geometry(int64_t counted_height, int64_t counted_width, Body&& body) const {
    const auto geometry = [&](auto window) {
      return PoolGeometry<decltype(window)>{
          window, static_cast<int>(height), static_cast<int>(width), static_cast<int>(pooled_height()),
          static_cast<int>(pooled_width()), Divisor(counted_width), Divisor(counted_height),
      };
    };
    if (size == StemWindow::size && stride == StemWindow::stride && padding == StemWindow::padding) {
      body(geometry(StemWindow{}));
    } else {
      body(geometry(AnyWindow{static_cast<int>(size), static_cast<int>(stride), static_cast<int>(padding)}));
    }
  }
};

Tensor empty_pooled(const Tensor& x, const Pool& pool, ScalarType dtype) {
  return torch::stable::empty({x.size(0), x.size(1), pool.pooled_height(), pool.pooled_width()}, dtype, std::nullopt, x.device(),
                              std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
}

}  // namespace

std::tuple<Tensor, Tensor> norm_act_max_pool(const Tensor& x, const Tensor& scale, const Tensor& bias, int64_t kernel_size,
                                             int64_t stride, int64_t padding) {
  const Arguments check("norm_act_max_pool");
  check.activation("x", x);
  check.vector("scale", scale, x);
  check.vector("bias", bias, x);
  const Pool pool(check, x, kernel_size, stride, padding);

  const DeviceGuard guard(x);
  const Tensor out = empty_pooled(x, pool, x.scalar_type()), index = empty_pooled(x, pool, ScalarType::Byte);
  const int channels = channels_of(x);
  with_element(x, [&](auto element) {
    using T = std::remove_pointer_t<decltype(element)>;
    pool.with_geometry(pool.pooled_height(), pool.pooled_width(), [&](auto geometry) {
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
    pool.with_geometry(pool.height, pool.width, [&](auto geometry) {
      const MaxPooledGradient<T, decltype(geometry.window)> gradient{read<T>(dout), read<uint8_t>(index), channels_of(x), geometry};
      reduction.launch<T, Mask::kRecomputed, false>(gradient, aligned(gradient.dout, gradient.index));
    });
  });
  return {reduction.dz, reduction.s1, reduction.s2};
}

}  // namespace fused_resnet
