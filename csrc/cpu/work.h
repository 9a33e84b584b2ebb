// What the operators on CPU tensors share: the division of work among PyTorch's threads, and the arguments of kernels.
#pragma once

#include <algorithm>

#include <torch/csrc/stable/library.h>

#include "../apply_inputs.h"
#include "../operators.h"
#include "../tensors.h"
#include "dispatch.h"
#include "memory.h"

namespace fused_resnet {

// A part has at most kPartRows rows, so that little is lost to partial sums and little precision to long ones; and there are kPartUnit
// parts, or a multiple of them, so that the usual numbers of threads get equal shares, as soon as each has kLeastRows rows.
constexpr int64_t kPartRows = 256, kPartUnit = 16, kLeastRows = 32;
// What is worth a thread of its own, in elements.
constexpr int64_t kGrain = 16384;

inline Parts parts_of(const Tensor& x) {
  const int64_t rows = rows_of(x);
  int64_t wanted = ceil_div(ceil_div(rows, kPartRows), kPartUnit) * kPartUnit;
  wanted = std::min(wanted, ceil_div(rows, kLeastRows));
  const int64_t each = ceil_div(rows, wanted);
  return {ceil_div(rows, each), each};
}

inline Extent extent_of(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  const Element element = dtype == ScalarType::Half ? Element::kHalf : dtype == ScalarType::BFloat16 ? Element::kBFloat16 : Element::kFloat;
  return {rows_of(x), channels_of(x), element};
}

// Calls kernel(arguments, first, last) on ranges of [0, count), `size` elements each, by PyTorch's threads.
template <typename Arguments>
void share(void (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& arguments, int64_t count, int64_t size) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size)), [&](int64_t first, int64_t last) {
    kernel(arguments, first, last);
  });
}

inline void merge(const MergeMoments& arguments) {
  share(kernels().merge_moments, arguments, arguments.channels, 8 * arguments.parts.count);
}

// The results of a norm's statistics.
inline Coefficients5 empty_coefficients(const Tensor& like, int64_t channels) {
  const auto empty = [&] { return torch::stable::new_empty(like, {channels}, ScalarType::Float); };
  return {empty(), empty(), empty(), empty(), empty()};
}

inline void write_to(MergeMoments& arguments, const Coefficients5& results) {
  const auto& [mean, invstd, var, scale, bias] = results;
  arguments.mean = write<float>(mean);
  arguments.invstd = write<float>(invstd);
  arguments.var = write<float>(var);
  arguments.scale = write<float>(scale);
  arguments.bias = write<float>(bias);
}

inline NormAddAct norm_add_act_arguments(const Tensor& x, const Tensor& scale, const Tensor& bias, const OptionalTensor& residual,
                                         const OptionalTensor& residual_scale, const OptionalTensor& residual_bias) {
  const Residual kind = residual_scale ? Residual::kRaw : residual ? Residual::kMaterialised : Residual::kNone;
  return {extent_of(x),
          x.const_data_ptr(),
          read<float>(scale),
          read<float>(bias),
          kind,
          read<void>(residual),
          read<float>(residual_scale),
          read<float>(residual_bias),
          true,
          nullptr,
          nullptr};
}

// Batch norm's backward, ready but for dy. `coefficients` holds what is made of the sums.
inline BackwardApply backward_apply_arguments(const ApplyInputs& inputs, OptionalTensor& coefficients) {
  const Extent extent = extent_of(inputs.y);
  coefficients = torch::stable::new_empty(inputs.y, {3, extent.channels}, ScalarType::Float);
  const BackwardApply arguments{
      extent,
      inputs.dz.const_data_ptr(),
      inputs.y.const_data_ptr(),
      read<float>(inputs.mean),
      read<float>(inputs.invstd),
      read<float>(inputs.gamma),
      read<float>(inputs.s1),
      read<float>(inputs.s2),
      write<float>(coefficients),
      nullptr,
  };
  kernels().prepare_apply(arguments, 0, extent.channels);
  return arguments;
}

// The moments of y's parts. `partial` holds them.
inline Moments moments_arguments(const Tensor& y, const Parts& parts, OptionalTensor& partial) {
  const Extent extent = extent_of(y);
  const int64_t size = parts.count * extent.channels;
  partial = torch::stable::new_empty(y, {3, parts.count, extent.channels}, ScalarType::Float);
  float* means = write<float>(partial);
  return {extent, y.const_data_ptr(), parts, means, means + size, means + 2 * size};
}

// What merges them, without a norm and results.
inline MergeMoments merge_moments_arguments(const Moments& moments) {
  MergeMoments merged{};
  merged.means = moments.mean;
  merged.m2s = moments.m2;
  merged.parts = moments.parts;
  merged.rows = moments.extent.rows;
  merged.channels = moments.extent.channels;
  return merged;
}

}  // namespace fused_resnet
