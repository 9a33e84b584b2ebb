// The operators that are 1x1 convolutions with the passes around them, for machines with AMX (pointwise.h).
#include <cstdlib>
#include <memory>
#include <new>

#include "../reduction_inputs.h"
#include "work.h"

namespace fused_resnet {
namespace {

// Channels come in pairs of tiles, and a part's rows in steps of the instruction.
constexpr int64_t kBlock = 32, kTileSide = 16;
// A part has at most kPartRows rows, so that what it works in fits into a core's cache, and at least kLeastRows, or most of the time would
// go into reading the weight again.
constexpr int64_t kPartRows = 256, kPartUnit = 16, kLeastRows = 64;
// Sums of dweight: so many that the usual numbers of threads get equal shares, but at most a quarter of the bytes that the pass moves.
constexpr int64_t kMostGroups = 16, kFewestGroups = 8, kShare = 4;

Parts parts_of_rows(int64_t rows) {
  const int64_t wanted = std::min(ceil_div(ceil_div(rows, kPartRows), kPartUnit) * kPartUnit, ceil_div(rows, kLeastRows));
  const int64_t each = ceil_div(ceil_div(rows, wanted), kBlock) * kBlock;
  return {ceil_div(rows, each), each};
}

// How many sums of dweight there are; 0 where it is better made of the whole dy.
int64_t groups_of_parts(const Parts& parts, int64_t rows, int64_t inputs, int64_t outputs) {
  const int64_t moved = rows * (2 * outputs + 3 * inputs) * 2;
  const int64_t groups = std::min({kMostGroups, parts.count, moved / kShare / (inputs * outputs * 4)});
  return groups < kFewestGroups && groups < parts.count ? 0 : groups;
}

// Memory of this thread to work in. What it held before is lost.
void* scratch(int64_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  if (bytes > size) {
    size = ceil_div(bytes, 4096) * 4096;
    memory.reset(std::aligned_alloc(4096, size));
    if (!memory) {
      size = 0;
      throw std::bad_alloc();
    }
  }
  return memory.get();
}

// As `share`, with memory to work in.
template <typename Arguments>
void share_with_scratch(void (*kernel)(const Arguments&, int64_t, int64_t, void*), const Arguments& arguments, int64_t count, int64_t bytes) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) { kernel(arguments, first, last, scratch(bytes)); });
}

struct Weight {
  int64_t outputs, inputs;

  // Of a convolution that reads `x`.
  Weight(const Arguments& check, const Tensor& weight, const Tensor& x) : outputs(0), inputs(x.size(1)) {
    if (x.scalar_type() != ScalarType::BFloat16) check.fail("expected tensors of bfloat16");
    const bool fits = weight.dim() == 4 && weight.size(1) == inputs && weight.size(2) == 1 && weight.size(3) == 1 && weight.size(0) > 0 &&
                      weight.is_cpu() && weight.scalar_type() == ScalarType::BFloat16 && weight.stride(0) == inputs && weight.stride(1) == 1;
    if (!fits) check.fail("weight: expected a dense bfloat16 [K, ", inputs, ", 1, 1] on the CPU, got ", shape_of(weight));
    outputs = weight.size(0);
    if (outputs % kBlock || inputs % kBlock) check.fail("weight: expected channels that are multiples of ", kBlock, ", got ", shape_of(weight));
  }

  Tensor packed(const Tensor& weight, bool forward) const {
    const Tensor packed = torch::stable::new_empty(weight, {outputs, inputs});
    const PackWeight arguments{weight.const_data_ptr(), outputs, inputs, forward, packed.mutable_data_ptr()};
    share(kernels().pack_weight, arguments, (forward ? outputs : inputs) / kTileSide, kTileSide * (forward ? inputs : outputs));
    return packed;
  }
};

// [images of x, channels, height and width of x], bfloat16, in channels_last.
Tensor empty_like_with_channels(const Tensor& x, int64_t channels) {
  return in_large_pages(torch::stable::empty({x.size(0), channels, x.size(2), x.size(3)}, ScalarType::BFloat16, std::nullopt, x.device(),
                                             std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast));
}

}  // namespace

// y = conv(act) with act = norm_add_act(x, …), or x itself without a scale -> (y, act, mask, mean, invstd, var, scale, bias): act and mask
// where they are made, and y's statistics where they are asked for.
std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>
pointwise_forward(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& bias, const OptionalTensor& residual,
                  const OptionalTensor& residual_scale, const OptionalTensor& residual_bias, const Tensor& weight, bool statistics,
                  const OptionalTensor& gamma, const OptionalTensor& beta, double eps) {
  const Arguments check("pointwise_forward");
  check.activation("x", x);
  check.together("scale", scale.has_value(), "bias", bias.has_value());
  check.vector("scale", scale, x);
  check.vector("bias", bias, x);
  check.residual(residual, residual_scale, residual_bias, x);
  if (residual && !scale) check.fail("residual: expected None without a scale");
  const Weight shape(check, weight, x);

  const Tensor packed = shape.packed(weight, true), y = empty_like_with_channels(x, shape.outputs);
  PointwiseForward arguments{};
  arguments.pending = scale.has_value();
  OptionalTensor act, mask, partial;
  if (scale) {
    act = in_large_pages(torch::stable::empty_like(x));
    if (residual) mask = empty_mask(x);
    arguments.norm = norm_add_act_arguments(x, *scale, *bias, residual, residual_scale, residual_bias);
    arguments.norm.act = act->mutable_data_ptr();
    arguments.norm.mask = write<uint8_t>(mask);
  } else {
    arguments.norm.extent = extent_of(x);
    arguments.norm.x = x.const_data_ptr();
  }
  arguments.packed = packed.const_data_ptr();
  arguments.y = y.mutable_data_ptr();
  const int64_t rows = rows_of(x);
  const Parts parts = parts_of_rows(rows);
  arguments.moments.extent = extent_of(y);
  arguments.moments.y = y.const_data_ptr();
  arguments.moments.parts = parts;
  const int64_t size = parts.count * shape.outputs;
  if (statistics) {
    check.vector("gamma", gamma, y);
    check.vector("beta", beta, y);
    partial = torch::stable::new_empty(y, {3, parts.count, shape.outputs}, ScalarType::Float);
    arguments.moments.mean = write<float>(partial);
    arguments.moments.m2 = arguments.moments.mean + size;
    arguments.moments.sum = arguments.moments.mean + 2 * size;
  }
  share_with_scratch(kernels().pointwise_forward, arguments, parts.count, kBlock * shape.inputs * 2);
  if (!statistics) return {y, act, mask, {}, {}, {}, {}, {}};
  const Coefficients5 results = empty_coefficients(y, shape.outputs);
  MergeMoments merged{};
  merged.means = arguments.moments.mean;
  merged.m2s = arguments.moments.m2;
  merged.parts = parts;
  merged.rows = rows;
  merged.channels = static_cast<int>(shape.outputs);
  merged.gamma = read<float>(gamma);
  merged.beta = read<float>(beta);
  merged.eps = eps;
  write_to(merged, results);
  merge(merged);
  const auto& [mean, invstd, var, norm_scale, norm_bias] = results;
  return {y, act, mask, mean, invstd, var, norm_scale, norm_bias};
}

// The gradients of such a convolution whose norm takes the batch's statistics: dy by norm_backward_apply of the first seven, then what is
// asked for. With x_scale, x is raw, and dx is dz of its norm, of dx + dact; else it is dx + dact itself. dy is given back where dw was
// asked for and is better made of the whole dy. -> (dx, s1, s2, residual_s2, dw, dy).
std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor> pointwise_backward(
    const Tensor& dz, const Tensor& y, const Tensor& mean, const Tensor& invstd, const OptionalTensor& gamma, const Tensor& s1, const Tensor& s2,
    const Tensor& weight, const Tensor& act, const OptionalTensor& dact, const Tensor& x, const OptionalTensor& x_mean,
    const OptionalTensor& x_invstd, const OptionalTensor& x_scale, const OptionalTensor& x_bias, const OptionalTensor& residual,
    const OptionalTensor& residual_mean, const OptionalTensor& residual_invstd, const OptionalTensor& mask, bool need_dx, bool need_dw) {
  const Arguments check("pointwise_backward");
  check.activation("x", x);
  const Weight shape(check, weight, x);
  check.activation("y", y);
  if (y.size(1) != shape.outputs || rows_of(y) != rows_of(x)) check.fail("y: expected the convolution of x, got ", shape_of(y));
  check.activation_like("dz", dz, y);
  check.vector("mean", mean, y);
  check.vector("invstd", invstd, y);
  check.vector("gamma", gamma, y);
  check.vector("s1", s1, y);
  check.vector("s2", s2, y);
  check.activation_like("act", act, x);
  if (dact) check.activation_like("dact", *dact, x);
  const bool pending = x_scale.has_value();
  check.together("x_scale", pending, "x_mean", x_mean.has_value());
  check.together("x_scale", pending, "x_invstd", x_invstd.has_value());
  check.together("x_scale", pending, "x_bias", x_bias.has_value());

  const int64_t rows = rows_of(x);
  PointwiseBackward arguments{};
  arguments.pending = pending;
  arguments.act = act.const_data_ptr();
  const Tensor coefficients = torch::stable::new_empty(y, {3, shape.outputs}, ScalarType::Float);
  arguments.apply = {extent_of(y), dz.const_data_ptr(), y.const_data_ptr(), read<float>(mean), read<float>(invstd), read<float>(gamma),
                     read<float>(s1), read<float>(s2), write<float>(coefficients), nullptr};
  kernels().prepare_apply(arguments.apply, 0, arguments.apply.extent.channels);

  BackwardReduce& reduce = arguments.reduce;
  reduce.extent = extent_of(x);
  reduce.parts = parts_of_rows(rows);
  OptionalTensor dx, dx_s1, dx_s2, residual_s2, sums, packed, dw, dy, weight_sums;
  const int64_t count = residual ? 3 : 2, channels = shape.inputs;
  if (need_dx) {
    packed = shape.packed(weight, false);
    arguments.packed = read<void>(packed);
    dx = in_large_pages(torch::stable::empty_like(x));
    reduce.dz = write<void>(dx);
    reduce.dact = read<void>(dact);
    if (pending) {
      const ReductionInputs inputs{x, *x_mean, *x_invstd, *x_scale, *x_bias, residual, residual_mean, residual_invstd, mask};
      inputs.check(check);
      if (residual && !mask) check.fail("mask: expected a tensor, since residual is given");
      dx_s1 = empty_vector(x);
      dx_s2 = empty_vector(x);
      if (residual) residual_s2 = empty_vector(x);
      reduce.kind = mask ? Mask::kBits : Mask::kRecomputed;
      reduce.mask = read<uint8_t>(mask);
      reduce.x = x.const_data_ptr();
      reduce.mean = read<float>(x_mean);
      reduce.scale = read<float>(x_scale);
      reduce.bias = read<float>(x_bias);
      reduce.residual = read<void>(residual);
      reduce.residual_mean = read<float>(residual_mean);
      sums = torch::stable::new_empty(x, {count, reduce.parts.count, channels}, ScalarType::Float);
      reduce.sums = write<float>(sums);
    }
  }
  arguments.groups = need_dw ? groups_of_parts(reduce.parts, rows, channels, shape.outputs) : 0;
  if (arguments.groups) {
    arguments.parts_per_group = ceil_div(reduce.parts.count, arguments.groups);
    arguments.groups = ceil_div(reduce.parts.count, arguments.parts_per_group);
    weight_sums = torch::stable::new_empty(x, {arguments.groups, shape.outputs, channels}, ScalarType::Float);
    arguments.sums = write<float>(weight_sums);
    dw = torch::stable::empty_like(weight);
    arguments.dweight = write<void>(dw);
  } else {
    arguments.groups = reduce.parts.count;
    arguments.parts_per_group = 1;
    if (need_dw) {
      dy = in_large_pages(torch::stable::empty_like(y));
      arguments.apply.dy = write<void>(dy);
    }
  }
  share_with_scratch(kernels().pointwise_backward, arguments, arguments.groups, kernels().pointwise_scratch(arguments));
  if (dw) share(kernels().merge_weight, arguments, shape.outputs / kTileSide, kTileSide * channels * arguments.groups);
  if (sums) {
    const MergeSums merged{reduce.sums, reduce.parts.count, static_cast<int>(channels), static_cast<int>(count),
                           {nullptr, read<float>(x_invstd), read<float>(residual_invstd)},
                           {write<float>(dx_s1), write<float>(dx_s2), write<float>(residual_s2)}};
    share(kernels().merge_sums, merged, channels, 4 * reduce.parts.count);
  }
  return {dx, dx_s1, dx_s2, residual_s2, dw, dy};
}

}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_cpu, library) {
  library.def(
      "pointwise_forward(Tensor x, Tensor? scale, Tensor? bias, Tensor? residual, Tensor? residual_scale, Tensor? residual_bias, "
      "Tensor weight, bool statistics, Tensor? gamma, Tensor? beta, float eps) -> "
      "(Tensor, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)");
  library.def(
      "pointwise_backward(Tensor dz, Tensor y, Tensor mean, Tensor invstd, Tensor? gamma, Tensor s1, Tensor s2, Tensor weight, Tensor act, "
      "Tensor? dact, Tensor x, Tensor? x_mean, Tensor? x_invstd, Tensor? x_scale, Tensor? x_bias, Tensor? residual, "
      "Tensor? residual_mean, Tensor? residual_invstd, Tensor? mask, bool need_dx, bool need_dw) -> "
      "(Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cpu, CPU, library) {
  library.impl("pointwise_forward", TORCH_BOX(&fused_resnet::pointwise_forward));
  library.impl("pointwise_backward", TORCH_BOX(&fused_resnet::pointwise_backward));
}
