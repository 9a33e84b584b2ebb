// The operators on CPU tensors: checks, results, and the division of work among PyTorch's threads.
#include "../operators.h"

#include <torch/csrc/stable/library.h>

#include "../on_device.h"
#include "../pool.h"
#include "../reduction_inputs.h"
#include "work.h"

namespace fused_resnet {

const char* const kDeviceTensor = "a CPU tensor";

bool on_device(const Tensor& tensor) { return tensor.is_cpu(); }

namespace {

PoolWindow window_of(const Pool& pool) {
  return {static_cast<int>(pool.size),          static_cast<int>(pool.stride), static_cast<int>(pool.padding),
          static_cast<int>(pool.height),        static_cast<int>(pool.width),  static_cast<int>(pool.pooled_height()),
          static_cast<int>(pool.pooled_width())};
}

// The moments of y's parts in `partial`, and what merges them.
MergeMoments moments_of_parts(const Tensor& y, OptionalTensor& partial) {
  const Moments arguments = moments_arguments(y, parts_of(y), partial);
  share(kernels().moments, arguments, arguments.parts.count, arguments.parts.rows_per_part * arguments.extent.channels);
  return merge_moments_arguments(arguments);
}

// The backward reduction of a gradient, which the caller has filled in: (dz, s1, s2, residual_s2).
std::tuple<Tensor, Tensor, Tensor, OptionalTensor> reduce(BackwardReduce arguments, const ReductionInputs& inputs, bool relu) {
  const Tensor& x = inputs.x;
  const Tensor dz = empty_activation(x), s1 = empty_vector(x), s2 = empty_vector(x);
  OptionalTensor residual_s2;
  if (inputs.residual) residual_s2 = empty_vector(x);
  const int64_t count = inputs.residual ? 3 : 2;
  arguments.extent = extent_of(x);
  arguments.kind = !relu ? Mask::kNone : inputs.mask ? Mask::kBits : Mask::kRecomputed;
  arguments.mask = read<uint8_t>(inputs.mask);
  arguments.x = x.const_data_ptr();
  arguments.mean = read<float>(inputs.mean);
  arguments.scale = read<float>(inputs.scale);
  arguments.bias = read<float>(inputs.bias);
  arguments.residual = read<void>(inputs.residual);
  arguments.residual_mean = read<float>(inputs.residual_mean);
  arguments.dz = dz.mutable_data_ptr();
  arguments.parts = parts_of(x);
  const int channels = arguments.extent.channels;
  const Tensor sums = torch::stable::new_empty(x, {count, arguments.parts.count, channels}, ScalarType::Float);
  arguments.sums = write<float>(sums);
  share(kernels().backward_reduce, arguments, arguments.parts.count, arguments.parts.rows_per_part * channels);
  const MergeSums merged{
      arguments.sums,
      arguments.parts.count,
      channels,
      static_cast<int>(count),
      {nullptr, read<float>(inputs.invstd), read<float>(inputs.residual_invstd)},
      {write<float>(s1), write<float>(s2), write<float>(residual_s2)}};
  share(kernels().merge_sums, merged, channels, 4 * arguments.parts.count);
  return {dz, s1, s2, residual_s2};
}

}  // namespace

Coefficients5 batch_stats(const Tensor& y, const OptionalTensor& gamma, const OptionalTensor& beta, double eps) {
  const Arguments check("batch_stats");
  check.activation("y", y);
  check.vector("gamma", gamma, y);
  check.vector("beta", beta, y);

  OptionalTensor partial;
  MergeMoments merged = moments_of_parts(y, partial);
  const Coefficients5 results = empty_coefficients(y, y.size(1));
  merged.gamma = read<float>(gamma);
  merged.beta = read<float>(beta);
  merged.eps = eps;
  write_to(merged, results);
  merge(merged);
  return results;
}

std::tuple<Tensor, Tensor> batch_moments(const Tensor& y) {
  const Arguments check("batch_moments");
  check.activation("y", y);

  OptionalTensor partial;
  MergeMoments merged = moments_of_parts(y, partial);
  const Tensor mean = empty_vector(y), m2 = empty_vector(y);
  merged.mean = write<float>(mean);
  merged.m2 = write<float>(m2);
  merge(merged);
  return {mean, m2};
}

Coefficients5 merge_moments(const Tensor& counts, const Tensor& means, const Tensor& m2s, const OptionalTensor& gamma,
                            const OptionalTensor& beta, double eps) {
  const Arguments check("merge_moments");
  const int64_t channels = check.moments(counts, means, m2s, gamma, beta);

  const Coefficients5 results = empty_coefficients(means, channels);
  MergeMoments merged{};
  merged.means = read<float>(means);
  merged.m2s = read<float>(m2s);
  merged.counts = read<int64_t>(counts);
  merged.parts = {means.size(0), 0};
  merged.channels = static_cast<int>(channels);
  merged.gamma = read<float>(gamma);
  merged.beta = read<float>(beta);
  merged.eps = eps;
  write_to(merged, results);
  merge(merged);
  return results;
}

std::tuple<Tensor, OptionalTensor> norm_add_act(const Tensor& x, const Tensor& scale, const Tensor& bias, const OptionalTensor& residual,
                                                const OptionalTensor& residual_scale, const OptionalTensor& residual_bias, bool relu,
                                                bool save_mask) {
  const Arguments check("norm_add_act");
  check.activation("x", x);
  check.vector("scale", scale, x);
  check.vector("bias", bias, x);
  check.residual(residual, residual_scale, residual_bias, x);
  if (save_mask && !(relu && residual)) check.fail("save_mask: expected False without a ReLU and a residual");

  const Tensor act = empty_activation(x);
  OptionalTensor mask;
  if (save_mask) mask = empty_mask(x);
  NormAddAct arguments = norm_add_act_arguments(x, scale, bias, residual, residual_scale, residual_bias);
  arguments.relu = relu;
  arguments.act = act.mutable_data_ptr();
  arguments.mask = write<uint8_t>(mask);
  share(kernels().norm_add_act, arguments, arguments.extent.rows, arguments.extent.channels);
  return {act, mask};
}

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

  BackwardReduce arguments{};
  arguments.gradient = dact ? Gradient::kSummed : Gradient::kPlain;
  arguments.d = d.const_data_ptr();
  arguments.dact = read<void>(dact);
  return reduce(arguments, inputs, relu);
}

Tensor norm_backward_apply(const Tensor& dz, const Tensor& y, const Tensor& mean, const Tensor& invstd, const OptionalTensor& gamma,
                           const Tensor& s1, const Tensor& s2) {
  const ApplyInputs inputs{dz, y, mean, invstd, gamma, s1, s2};
  inputs.check(Arguments("norm_backward_apply"));

  const Tensor dy = empty_activation(y);
  OptionalTensor coefficients;
  BackwardApply arguments = backward_apply_arguments(inputs, coefficients);
  arguments.dy = dy.mutable_data_ptr();
  share(kernels().backward_apply, arguments, arguments.extent.rows, arguments.extent.channels);
  return dy;
}

std::tuple<Tensor, Tensor> norm_act_max_pool(const Tensor& x, const Tensor& scale, const Tensor& bias, int64_t kernel_size, int64_t stride,
                                             int64_t padding) {
  const Arguments check("norm_act_max_pool");
  check.activation("x", x);
  check.vector("scale", scale, x);
  check.vector("bias", bias, x);
  const Pool pool(check, x, kernel_size, stride, padding);

  const Tensor out = pool.empty(x, x.scalar_type()), index = pool.empty(x, ScalarType::Byte);
  const MaxPool arguments{extent_of(x),    x.const_data_ptr(),     read<float>(scale),   read<float>(bias),
                          window_of(pool), out.mutable_data_ptr(), write<uint8_t>(index)};
  share(kernels().max_pool, arguments, x.size(0) * pool.pooled_height(),
        pool.pooled_width() * kernel_size * kernel_size * arguments.extent.channels);
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

  BackwardReduce arguments{};
  arguments.gradient = Gradient::kMaxPooled;
  arguments.d = dout.const_data_ptr();
  arguments.index = read<uint8_t>(index);
  arguments.window = window_of(pool);
  const auto [dz, s1, s2, no_residual] = reduce(arguments, inputs, true);
  return {dz, s1, s2};
}

std::tuple<Tensor, OptionalTensor> norm_add_act_avg_pool(const Tensor& x, const Tensor& scale, const Tensor& bias,
                                                         const OptionalTensor& residual, const OptionalTensor& residual_scale,
                                                         const OptionalTensor& residual_bias) {
  const Arguments check("norm_add_act_avg_pool");
  check.activation("x", x);
  check.vector("scale", scale, x);
  check.vector("bias", bias, x);
  check.residual(residual, residual_scale, residual_bias, x);

  const Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), 1, 1});
  const Tensor sums = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Float);
  OptionalTensor mask;
  if (residual) mask = empty_mask(x);
  AvgPool arguments{norm_add_act_arguments(x, scale, bias, residual, residual_scale, residual_bias), x.size(2) * x.size(3),
                    write<float>(sums), out.mutable_data_ptr()};
  arguments.given.mask = write<uint8_t>(mask);
  share(kernels().avg_pool, arguments, x.size(0), arguments.pixels * arguments.given.extent.channels);
  return {out, mask};
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

  BackwardReduce arguments{};
  arguments.gradient = Gradient::kAveraged;
  arguments.d = dout.const_data_ptr();
  arguments.pixels = x.size(2) * x.size(3);
  return reduce(arguments, inputs, true);
}

}  // namespace fused_resnet

// Beside the passes: the choice of the instruction set.
STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_cpu, library) { library.def("use_instruction_set(int number) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cpu, CompositeExplicitAutograd, library) {
  library.impl("use_instruction_set", TORCH_BOX(&fused_resnet::use_instruction_set));
}
