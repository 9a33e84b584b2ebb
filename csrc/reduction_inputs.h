// What every backward reduction takes beside its gradient.
#pragma once

#include "arguments.h"

namespace fused_resnet {

struct ReductionInputs {
  const Tensor& x;
  const Tensor& mean;
  const Tensor& invstd;
  const Tensor& scale;
  const Tensor& bias;
  const OptionalTensor& residual;  // of a raw residual, as its mean and invstd
  const OptionalTensor& residual_mean;
  const OptionalTensor& residual_invstd;
  const OptionalTensor& mask;

  void check(const Arguments& check) const {
    check.activation("x", x);
    check.vector("mean", mean, x);
    check.vector("invstd", invstd, x);
    check.vector("scale", scale, x);
    check.vector("bias", bias, x);
    check.together("residual", residual.has_value(), "residual_mean", residual_mean.has_value());
    check.together("residual", residual.has_value(), "residual_invstd", residual_invstd.has_value());
    if (residual) check.activation_like("residual", *residual, x);
    check.vector("residual_mean", residual_mean, x);
    check.vector("residual_invstd", residual_invstd, x);
    if (mask) check.mask("mask", *mask, x);
  }
};

}  // namespace fused_resnet
