// The operators of this library. Each is the pass of that name in `fused_resnet.reference.Reference`, which defines its result;
// schemas are in library.cpp, kernels in the .cuh file of its family.
#pragma once

#include <optional>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

#include "arguments.h"

namespace fused_resnet {

using Coefficients5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // mean, invstd, var, scale, bias

Coefficients5 batch_stats(const Tensor& y, const OptionalTensor& gamma, const OptionalTensor& beta, double eps);

std::tuple<Tensor, Tensor> batch_moments(const Tensor& y);

Coefficients5 merge_moments(const Tensor& counts, const Tensor& means, const Tensor& m2s, const OptionalTensor& gamma,
                            const OptionalTensor& beta, double eps);

std::tuple<Tensor, OptionalTensor> norm_add_act(const Tensor& x, const Tensor& scale, const Tensor& bias, const OptionalTensor& residual,
                                                const OptionalTensor& residual_scale, const OptionalTensor& residual_bias, bool relu,
                                                bool save_mask);

std::tuple<Tensor, Tensor, Tensor, OptionalTensor> norm_backward_reduce(
    const Tensor& d, const OptionalTensor& dact, const Tensor& x, const Tensor& mean, const Tensor& invstd, const Tensor& scale,
    const Tensor& bias, const OptionalTensor& residual, const OptionalTensor& residual_mean, const OptionalTensor& residual_invstd,
    const OptionalTensor& mask, bool relu);

Tensor norm_backward_apply(const Tensor& dz, const Tensor& y, const Tensor& mean, const Tensor& invstd, const OptionalTensor& gamma,
                           const Tensor& s1, const Tensor& s2);

std::tuple<Tensor, Tensor> norm_act_max_pool(const Tensor& x, const Tensor& scale, const Tensor& bias, int64_t kernel_size, int64_t stride,
                                             int64_t padding);

std::tuple<Tensor, Tensor, Tensor> norm_act_max_pool_backward(
    const Tensor& dout, const Tensor& index, const Tensor& x, const Tensor& mean, const Tensor& invstd, const Tensor& scale,
    const Tensor& bias, int64_t kernel_size, int64_t stride, int64_t padding);

std::tuple<Tensor, OptionalTensor> norm_add_act_avg_pool(const Tensor& x, const Tensor& scale, const Tensor& bias,
                                                         const OptionalTensor& residual, const OptionalTensor& residual_scale,
                                                         const OptionalTensor& residual_bias);

std::tuple<Tensor, Tensor, Tensor, OptionalTensor> norm_add_act_avg_pool_backward(
    const Tensor& dout, const Tensor& x, const Tensor& mean, const Tensor& invstd, const Tensor& scale, const Tensor& bias,
    const OptionalTensor& residual, const OptionalTensor& residual_mean, const OptionalTensor& residual_invstd, const OptionalTensor& mask);

}  // namespace fused_resnet
