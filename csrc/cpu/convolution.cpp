// The operators that are convolutions with the passes around them, by products of matrices: 1x1 (pointwise.h) and 3x3 (window.h).
#include <cstdlib>
#include <memory>
#include <new>

#include "../reduction_inputs.h"
#include "work.h"

namespace fused_resnet {
namespace {

// Of a 3x3 convolution, and positions that its dweight takes at once.
constexpr int64_t kTaps = 9, kWindowBand = 512;
// A part has at most kPartRows rows, so that what it works in fits into a core's cache, and at least kLeastRows, or most of the time would
// go into reading the weight again.
constexpr int64_t kPartRows = 256, kPartUnit = 16, kLeastRows = 64;
// Sums of dweight: so many that the usual numbers of threads get equal shares, but at most a quarter of the bytes that the pass moves.
constexpr int64_t kMostGroups = 16, kFewestGroups = 8, kShare = 4;

Parts parts_of_rows(int64_t rows) {
  const int64_t wanted = std::min(ceil_div(ceil_div(rows, kPartRows), kPartUnit) * kPartUnit, ceil_div(rows, kLeastRows));
  const int64_t each = ceil_div(ceil_div(rows, wanted), kBlockSide) * kBlockSide;
  return {ceil_div(rows, each), each};
}

// How a 3x3 convolution walks over x: as many images at once as have the rows of a part, but so few that the usual numbers of threads get
// equal shares.
Images images_of(const Tensor& x) {
  const int64_t count = x.size(0), pixels = x.size(2) * x.size(3);
  const int64_t each = std::max<int64_t>(1, std::min(kPartRows / std::max<int64_t>(1, pixels), count / kPartUnit));
  return {count, x.size(2), x.size(3), ceil_div(count, ceil_div(count, each))};
}

int64_t units_of(const Images& images) { return ceil_div(images.count, images.per_unit); }

// Parts of a unit of images: all of it, or as many of its lines as divide it.
Parts parts_of_images(const Images& images) {
  const int64_t rows = images.count * images.height * images.width;
  int64_t each = images.per_unit * images.height * images.width;
  if (each > kPartRows) {
    int64_t lines = std::max<int64_t>(1, kPartRows / images.width);
    while (images.height % lines) --lines;
    each = lines * images.width;
  }
  return {ceil_div(rows, each), each};
}

// How many sums of dweight there are; 0 where it is better made of the whole dy. `units` of work share them.
int64_t groups_of(int64_t units, int64_t rows, int64_t inputs, int64_t outputs, int64_t taps) {
  const int64_t moved = rows * (2 * outputs + 3 * inputs) * 2;
  const int64_t fewest = std::min(kFewestGroups, units),
                groups = std::min({kMostGroups, units, moved / kShare / (inputs * outputs * taps * 4)});
  if (outputs == kNarrowChannels) return std::max(fewest, groups);  // WeightGradient takes blocks of 32
  return groups < fewest ? 0 : groups;
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
void share_with_scratch(void (*kernel)(const Arguments&, int64_t, int64_t, void*), const Arguments& arguments, int64_t count,
                        int64_t bytes) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) { kernel(arguments, first, last, scratch(bytes)); });
}

// Of as many images at once as a band of kWindowBand positions has; inputs in so many groups that kPartUnit threads have work.
void share_weight_gradient(const Convolutions& with, WeightGradient& given) {
  Images& images = given.images;
  if (given.taps > 1) images.per_unit = std::clamp<int64_t>(kWindowBand / ((images.height + 1) * (images.width + 1)), 1, images.count);
  const int64_t blocks = given.outputs / kBlockSide, columns = given.inputs / kBlockSide;
  while (blocks * given.column_groups < kPartUnit && columns % (2 * given.column_groups) == 0) given.column_groups *= 2;
  share_with_scratch(with.weight_gradient, given, blocks * given.column_groups, with.weight_gradient_scratch(given));
}

struct Weight {
  const Convolutions& with;  // in use when the operator began
  int64_t outputs, inputs, taps;

  // Of a convolution that reads `x`.
  Weight(const Arguments& check, const Tensor& weight, const Tensor& x)
      : with(kernels().convolutions(extent_of(x).element)), outputs(0), inputs(x.size(1)), taps(1) {
    if (x.scalar_type() == ScalarType::Half) check.fail("x: expected float32 or bfloat16, got float16");
    const int64_t window = weight.dim() == 4 ? weight.size(2) : 0;
    const bool known = (window == 1 || window == 3) && weight.size(3) == window && weight.size(1) == inputs && weight.size(0) > 0;
    const bool dense = known && weight.stride(1) == 1 && weight.stride(0) == inputs * window * window &&
                       (window == 1 || (weight.stride(2) == inputs * window && weight.stride(3) == inputs));
    if (!dense || !weight.is_cpu() || weight.scalar_type() != x.scalar_type()) {
      check.fail("weight: expected a tensor of x's dtype, [K, ", inputs, ", 1, 1] or [K, ", inputs,
                 ", 3, 3] in channels_last on the CPU, got ", shape_of(weight));
    }
    outputs = weight.size(0);
    taps = window * window;
    const bool narrow = taps == kTaps && outputs == kNarrowChannels && inputs == kNarrowChannels;
    if (!narrow && (outputs % kBlockSide || inputs % kBlockSide)) {
      check.fail("weight: expected channels that are multiples of ", kBlockSide, ", got ", shape_of(weight));
    }
  }

  Tensor packed(const Tensor& weight, bool forward) const {
    const Tensor packed = torch::stable::new_empty(weight, {outputs, taps * inputs});
    const PackWeight arguments{weight.const_data_ptr(), outputs, inputs, taps, forward, packed.mutable_data_ptr()};
    share(with.pack_weight, arguments, (forward ? outputs : inputs) / kTileSide, kTileSide * taps * (forward ? inputs : outputs));
    return packed;
  }
};

}  // namespace

// y = conv(act) with act = norm_add_act(x, …), or x itself without a scale -> (y, act, mask, mean, invstd, var, scale, bias): act and mask
// where they are made, and y's statistics where they are asked for.
std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>
conv_forward(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& bias, const OptionalTensor& residual,
             const OptionalTensor& residual_scale, const OptionalTensor& residual_bias, const Tensor& weight, bool statistics,
             const OptionalTensor& gamma, const OptionalTensor& beta, double eps) {
  const Arguments check("conv_forward");
  check.activation("x", x);
  check.together("scale", scale.has_value(), "bias", bias.has_value());
  check.vector("scale", scale, x);
  check.vector("bias", bias, x);
  check.residual(residual, residual_scale, residual_bias, x);
  if (residual && !scale) check.fail("residual: expected None without a scale");
  const Weight shape(check, weight, x);

  const Tensor packed = shape.packed(weight, true), y = empty_activation(x, shape.outputs, x.size(2), x.size(3));
  ConvForward arguments{};
  arguments.pending = scale.has_value();
  OptionalTensor act, mask, partial;
  if (scale) {
    act = empty_activation(x);
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
  const bool windows = shape.taps > 1;
  if (windows) arguments.images = images_of(x);
  const Parts parts = windows ? parts_of_images(arguments.images) : parts_of_rows(rows);
  if (statistics) {
    check.vector("gamma", gamma, y);
    check.vector("beta", beta, y);
    arguments.moments = moments_arguments(y, parts, partial);
  } else {
    arguments.moments.extent = extent_of(y);
    arguments.moments.parts = parts;
  }
  if (windows) {
    share_with_scratch(shape.with.window_forward, arguments, units_of(arguments.images), shape.with.window_forward_scratch(arguments));
  } else {
    share_with_scratch(shape.with.pointwise_forward, arguments, parts.count, shape.with.pointwise_forward_scratch(arguments));
  }
  if (!statistics) return {y, act, mask, {}, {}, {}, {}, {}};
  const Coefficients5 results = empty_coefficients(y, shape.outputs);
  MergeMoments merged = merge_moments_arguments(arguments.moments);
  merged.gamma = read<float>(gamma);
  merged.beta = read<float>(beta);
  merged.eps = eps;
  write_to(merged, results);
  merge(merged);
  const auto& [mean, invstd, var, norm_scale, norm_bias] = results;
  return {y, act, mask, mean, invstd, var, norm_scale, norm_bias};
}

// The gradients of such a convolution whose norm takes the batch's statistics: dy by norm_backward_apply of the first seven, then what is
// asked for. With x_scale, x is raw, and dx is dz of its norm, of dx + dact; else it is dx + dact itself.
// -> (dx, s1, s2, residual_s2, dw).
std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor> conv_backward(
    const Tensor& dz, const Tensor& y, const Tensor& mean, const Tensor& invstd, const OptionalTensor& gamma, const Tensor& s1,
    const Tensor& s2, const Tensor& weight, const Tensor& act, const OptionalTensor& dact, const Tensor& x, const OptionalTensor& x_mean,
    const OptionalTensor& x_invstd, const OptionalTensor& x_scale, const OptionalTensor& x_bias, const OptionalTensor& residual,
    const OptionalTensor& residual_mean, const OptionalTensor& residual_invstd, const OptionalTensor& mask, bool need_dx, bool need_dw) {
  const Arguments check("conv_backward");
  check.activation("x", x);
  const Weight shape(check, weight, x);
  const ApplyInputs norm{dz, y, mean, invstd, gamma, s1, s2};
  norm.check(check);
  if (y.size(1) != shape.outputs || rows_of(y) != rows_of(x)) check.fail("y: expected the convolution of x, got ", shape_of(y));
  check.activation_like("act", act, x);
  if (dact) check.activation_like("dact", *dact, x);
  const bool pending = x_scale.has_value();
  check.together("x_scale", pending, "x_mean", x_mean.has_value());
  check.together("x_scale", pending, "x_invstd", x_invstd.has_value());
  check.together("x_scale", pending, "x_bias", x_bias.has_value());

  const int64_t rows = rows_of(x);
  ConvBackward arguments{};
  arguments.pending = pending;
  arguments.act = act.const_data_ptr();
  OptionalTensor coefficients;
  arguments.apply = backward_apply_arguments(norm, coefficients);

  BackwardReduce& reduce = arguments.reduce;
  reduce.extent = extent_of(x);
  const bool windows = shape.taps > 1;
  arguments.taps = shape.taps;
  if (windows) arguments.images = images_of(x);
  reduce.parts = windows ? parts_of_images(arguments.images) : parts_of_rows(rows);
  OptionalTensor dx, dx_s1, dx_s2, residual_s2, sums, packed, dw, dy, weight_sums;
  const int64_t count = residual ? 3 : 2, channels = shape.inputs;
  if (need_dx) {
    packed = shape.packed(weight, false);
    arguments.packed = read<void>(packed);
    dx = empty_activation(x);
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
  const int64_t units = windows ? units_of(arguments.images) : reduce.parts.count;
  arguments.groups = need_dw ? groups_of(units, rows, channels, shape.outputs, shape.taps) : 0;
  if (arguments.groups) {
    arguments.units_per_group = ceil_div(units, arguments.groups);
    arguments.groups = ceil_div(units, arguments.units_per_group);
    weight_sums = torch::stable::new_empty(x, {arguments.groups, shape.taps, shape.outputs, channels}, ScalarType::Float);
    arguments.sums = write<float>(weight_sums);
  } else {
    arguments.groups = units;
    arguments.units_per_group = 1;
    if (need_dw) {
      dy = empty_activation(y);
      arguments.apply.dy = write<void>(dy);
    }
  }
  if (windows) {
    share_with_scratch(shape.with.window_backward, arguments, arguments.groups, shape.with.window_backward_scratch(arguments));
  } else {
    share_with_scratch(shape.with.pointwise_backward, arguments, arguments.groups, shape.with.pointwise_backward_scratch(arguments));
  }
  if (need_dw) {
    dw = torch::stable::empty_like(weight);
    MergeWeight merged{arguments.sums, arguments.groups, shape.outputs, channels, shape.taps, write<void>(dw)};
    if (!merged.sums) {
      WeightGradient whole{arguments.apply.dy, arguments.act, rows, shape.outputs, channels, shape.taps, arguments.images, 1, nullptr};
      weight_sums = torch::stable::new_empty(x, {shape.taps, shape.outputs, channels}, ScalarType::Float);
      whole.sums = write<float>(weight_sums);
      share_weight_gradient(shape.with, whole);
      merged.sums = whole.sums;
      merged.groups = 1;
    }
    share(shape.with.merge_weight, merged, shape.outputs / kTileSide, kTileSide * shape.taps * channels * merged.groups);
  }
  if (sums) {
    const MergeSums merged{
        reduce.sums,
        reduce.parts.count,
        static_cast<int>(channels),
        static_cast<int>(count),
        {nullptr, read<float>(x_invstd), read<float>(residual_invstd)},
        {write<float>(dx_s1), write<float>(dx_s2), write<float>(residual_s2)}};
    share(kernels().merge_sums, merged, channels, 4 * reduce.parts.count);
  }
  return {dx, dx_s1, dx_s2, residual_s2, dw};
}

}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_cpu, library) {
  library.def(
      "conv_forward(Tensor x, Tensor? scale, Tensor? bias, Tensor? residual, Tensor? residual_scale, Tensor? residual_bias, "
      "Tensor weight, bool statistics, Tensor? gamma, Tensor? beta, float eps) -> "
      "(Tensor, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)");
  library.def(
      "conv_backward(Tensor dz, Tensor y, Tensor mean, Tensor invstd, Tensor? gamma, Tensor s1, Tensor s2, Tensor weight, Tensor act, "
      "Tensor? dact, Tensor x, Tensor? x_mean, Tensor? x_invstd, Tensor? x_scale, Tensor? x_bias, Tensor? residual, "
      "Tensor? residual_mean, Tensor? residual_invstd, Tensor? mask, bool need_dx, bool need_dw) -> "
      "(Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cpu, CPU, library) {
  library.impl("conv_forward", TORCH_BOX(&fused_resnet::conv_forward));
  library.impl("conv_backward", TORCH_BOX(&fused_resnet::conv_backward));
}
