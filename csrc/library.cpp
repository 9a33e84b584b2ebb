// Registers the operators. Schemas mirror the passes of `fused_resnet.reference.Reference`.
#include "operators.h"

#include <torch/csrc/stable/library.h>

// The namespace under torch.ops: a build for another device than CUDA has one of its own, so that both can be loaded.
#ifndef FUSED_RESNET_NAMESPACE
#define FUSED_RESNET_NAMESPACE fused_resnet_native
#endif

// The registration macros make strings of their arguments, which are therefore expanded first.
#define DEFINE_LIBRARY(name, variable) STABLE_TORCH_LIBRARY(name, variable)
#define IMPLEMENT_LIBRARY(name, key, variable) STABLE_TORCH_LIBRARY_IMPL(name, key, variable)

DEFINE_LIBRARY(FUSED_RESNET_NAMESPACE, library) {
  library.def("batch_stats(Tensor y, Tensor? gamma, Tensor? beta, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("batch_moments(Tensor y) -> (Tensor, Tensor)");
  library.def(
      "merge_moments(Tensor counts, Tensor means, Tensor m2s, Tensor? gamma, Tensor? beta, float eps) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "norm_add_act(Tensor x, Tensor scale, Tensor bias, Tensor? residual, Tensor? residual_scale, Tensor? residual_bias, "
      "bool relu, bool save_mask) -> (Tensor, Tensor?)");
  library.def(
      "norm_backward_reduce(Tensor d, Tensor? dact, Tensor x, Tensor mean, Tensor invstd, Tensor scale, Tensor bias, "
      "Tensor? residual, Tensor? residual_mean, Tensor? residual_invstd, Tensor? mask, bool relu) -> "
      "(Tensor, Tensor, Tensor, Tensor?)");
  library.def("norm_backward_apply(Tensor dz, Tensor y, Tensor mean, Tensor invstd, Tensor? gamma, Tensor s1, Tensor s2) -> Tensor");
  library.def("norm_act_max_pool(Tensor x, Tensor scale, Tensor bias, int kernel_size, int stride, int padding) -> (Tensor, Tensor)");
  library.def(
      "norm_act_max_pool_backward(Tensor dout, Tensor index, Tensor x, Tensor mean, Tensor invstd, Tensor scale, Tensor bias, "
      "int kernel_size, int stride, int padding) -> (Tensor, Tensor, Tensor)");
  library.def(
      "norm_add_act_avg_pool(Tensor x, Tensor scale, Tensor bias, Tensor? residual, Tensor? residual_scale, "
      "Tensor? residual_bias) -> (Tensor, Tensor?)");
  library.def(
      "norm_add_act_avg_pool_backward(Tensor dout, Tensor x, Tensor mean, Tensor invstd, Tensor scale, Tensor bias, "
      "Tensor? residual, Tensor? residual_mean, Tensor? residual_invstd, Tensor? mask) -> (Tensor, Tensor, Tensor, Tensor?)");
}

namespace {

void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("batch_stats", TORCH_BOX(&fused_resnet::batch_stats));
  library.impl("batch_moments", TORCH_BOX(&fused_resnet::batch_moments));
  library.impl("merge_moments", TORCH_BOX(&fused_resnet::merge_moments));
  library.impl("norm_add_act", TORCH_BOX(&fused_resnet::norm_add_act));
  library.impl("norm_backward_reduce", TORCH_BOX(&fused_resnet::norm_backward_reduce));
  library.impl("norm_backward_apply", TORCH_BOX(&fused_resnet::norm_backward_apply));
  library.impl("norm_act_max_pool", TORCH_BOX(&fused_resnet::norm_act_max_pool));
  library.impl("norm_act_max_pool_backward", TORCH_BOX(&fused_resnet::norm_act_max_pool_backward));
  library.impl("norm_add_act_avg_pool", TORCH_BOX(&fused_resnet::norm_add_act_avg_pool));
  library.impl("norm_add_act_avg_pool_backward", TORCH_BOX(&fused_resnet::norm_add_act_avg_pool_backward));
}

}  // namespace

IMPLEMENT_LIBRARY(FUSED_RESNET_NAMESPACE, CUDA, library) { implement(library); }

// Registered for CPU tensors too, so that a misplaced one is refused by the name of its argument.
IMPLEMENT_LIBRARY(FUSED_RESNET_NAMESPACE, CPU, library) { implement(library); }
