// Registers the operators of this library. Schemas mirror the passes of `fused_resnet.reference.Reference`.
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace fused_resnet {

using torch::stable::Tensor;

std::tuple<Tensor, std::optional<Tensor>> norm_add_act(
    const Tensor& x, const Tensor& scale, const Tensor& bias, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& residual_scale, const std::optional<Tensor>& residual_bias, bool relu, bool save_mask);

}  // namespace fused_resnet

STABLE_TORCH_LIBRARY(fused_resnet_native, library) {
  library.def(
      "norm_add_act(Tensor x, Tensor scale, Tensor bias, Tensor? residual, Tensor? residual_scale, Tensor? residual_bias, "
      "bool relu, bool save_mask) -> (Tensor act, Tensor? mask)");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_native, CUDA, library) {
  library.impl("norm_add_act", TORCH_BOX(&fused_resnet::norm_add_act));
}

// Registered for CPU tensors too, so that a misplaced one is refused by the name of its argument.
STABLE_TORCH_LIBRARY_IMPL(fused_resnet_native, CPU, library) {
  library.impl("norm_add_act", TORCH_BOX(&fused_resnet::norm_add_act));
}
