#include "device.h"

#include <stdexcept>
#include <string>

#include <dlfcn.h>

#include <torch/csrc/stable/accelerator.h>

namespace fused_resnet {

using Guard = torch::stable::accelerator::DeviceGuard;
using torch::stable::Tensor;

const char* const kDeviceTensor = "a CUDA tensor";

bool on_device(const Tensor& tensor) { return tensor.is_cuda(); }

int ordinal_of(const Tensor& tensor) { return tensor.get_device_index(); }

DeviceGuard::DeviceGuard(const Tensor& tensor) : guard_(new Guard(tensor.get_device_index())) {}

DeviceGuard::~DeviceGuard() { delete static_cast<Guard*>(guard_); }

// Looked up by name, since a PyTorch without CUDA lacks the function, and the library, with its checks, loads there too.
cudaStream_t current_stream(const Tensor& tensor) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  const int32_t device = tensor.get_device_index();
  void* stream = nullptr;
  if (!get || get(device, &stream) != TORCH_SUCCESS) {
    throw std::runtime_error("PyTorch gives no CUDA stream for device " + std::to_string(device));
  }
  return static_cast<cudaStream_t>(stream);
}

}  // namespace fused_resnet
