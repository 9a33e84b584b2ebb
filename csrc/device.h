// What the operators ask of the device that their tensors are on. device.cpp answers for CUDA.
#pragma once

#include <cuda_runtime.h>

#include "on_device.h"

namespace fused_resnet {

// CUDA's number of the device of such a tensor.
int ordinal_of(const torch::stable::Tensor& tensor);

// Makes the device of a tensor the current one for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(const torch::stable::Tensor& tensor);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  void* guard_;
};

// PyTorch's current stream on the device of `tensor`. Throws where there is none.
cudaStream_t current_stream(const torch::stable::Tensor& tensor);

}  // namespace fused_resnet
