// What batch norm's backward takes.
#pragma once

#include "arguments.h"

namespace fused_resnet {

struct ApplyInputs {
  const Tensor& dz;
  const Tensor& y;
  const Tensor& mean;
  const Tensor& invstd;
  const OptionalTensor& gamma;
  const Tensor& s1;
  const Tensor& s2;

  void check(const Arguments& check) const {
    check.activation("y", y);
    check.activation_like("dz", dz, y);
    check.vector("mean", mean, y);
    check.vector("invstd", invstd, y);
    check.vector("gamma", gamma, y);
    check.vector("s1", s1, y);
    check.vector("s2", s2, y);
  }
};

}  // namespace fused_resnet
