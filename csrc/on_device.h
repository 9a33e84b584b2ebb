// Where the tensors of the operators have to be. device.cpp answers for CUDA, cpu/operators.cpp for CPUs.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace fused_resnet {

// Whether the kernels can reach the memory of `tensor`.
bool on_device(const torch::stable::Tensor& tensor);

// What such a tensor is called in an error.
extern const char* const kDeviceTensor;

}  // namespace fused_resnet
