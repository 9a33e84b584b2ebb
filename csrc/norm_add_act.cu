// The operator `norm_add_act`: checks its arguments, allocates its results, and launches the kernel of norm_add_act.cuh.
// Of PyTorch, only the stable ABI is used, so one binary serves every release since the one it targets.
#include "norm_add_act.cuh"

#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include <dlfcn.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace fused_resnet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "norm_add_act: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ']';
  return text.str();
}

void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) fail(what, ": ", cudaGetErrorName(status), ": ", cudaGetErrorString(status));
}

// Whether a 4-D tensor lies in memory as [N, H, W, C] without gaps. Strides of dimensions of size 1 do not count.
bool is_channels_last(const Tensor& tensor) {
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

void check_activation(const char* name, const Tensor& tensor) {
  if (!tensor.is_cuda()) fail(name, ": expected a CUDA tensor");
  const ScalarType dtype = tensor.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Half && dtype != ScalarType::BFloat16) {
    fail(name, ": expected float32, float16 or bfloat16, got ", torch::headeronly::toString(dtype));
  }
  if (tensor.dim() != 4) fail(name, ": expected a tensor [N, C, H, W], got shape ", shape_of(tensor));
  if (tensor.size(1) > std::numeric_limits<int>::max() - kGroup) fail(name, ": expected fewer than 2^31 - 8 channels");
  if (tensor.numel() != 0 && !is_channels_last(tensor)) {
    fail(name, ": expected memory format channels_last, shape ", shape_of(tensor));
  }
}

void check_vector(const char* name, const Tensor& tensor, const Tensor& x) {
  const int64_t channels = x.size(1);
  if (!tensor.is_cuda() || tensor.get_device_index() != x.get_device_index()) fail(name, ": expected a tensor on the device of x");
  if (tensor.scalar_type() != ScalarType::Float) {
    fail(name, ": expected float32, got ", torch::headeronly::toString(tensor.scalar_type()));
  }
  if (tensor.dim() != 1 || tensor.size(0) != channels || (channels > 1 && tensor.stride(0) != 1)) {
    fail(name, ": expected a contiguous tensor [", channels, "], got shape ", shape_of(tensor));
  }
}

void check_residual(const Tensor& residual, const Tensor& x) {
  check_activation("residual", residual);
  if (residual.get_device_index() != x.get_device_index()) fail("residual: expected a tensor on the device of x");
  if (residual.scalar_type() != x.scalar_type()) {
    fail("residual: expected the dtype of x, ", torch::headeronly::toString(x.scalar_type()), ", got ",
         torch::headeronly::toString(residual.scalar_type()));
  }
  for (int64_t d = 0; d < 4; ++d) {
    if (residual.size(d) != x.size(d)) fail("residual: expected the shape of x, ", shape_of(x), ", got ", shape_of(residual));
  }
}

// PyTorch's current stream. Looked up by name, since a PyTorch without CUDA lacks the function, and the library, with its
// checks, loads there too.
cudaStream_t current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  if (!get || get(device, &stream) != TORCH_SUCCESS) fail("PyTorch gives no CUDA stream for device ", device);
  return static_cast<cudaStream_t>(stream);
}

int multiprocessors_of(int32_t device) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "the number of multiprocessors");
  return count;
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Turns a run-time value into a template argument.
template <typename Body>
void with_bool(bool value, Body&& body) {
  if (value) {
    body(std::true_type{});
  } else {
    body(std::false_type{});
  }
}

template <typename T, Residual kResidual>
void launch(const NormAddActArguments<T>& arguments, bool relu, int32_t device) {
  constexpr int kWide = 16 / sizeof(T);
  const auto blocks =
      static_cast<unsigned>(norm_add_act_blocks(arguments.pixels, arguments.channels, multiprocessors_of(device)));
  const cudaStream_t stream = current_stream(device);
  const bool wide = arguments.channels % kWide == 0 && is_aligned(arguments.x) && is_aligned(arguments.act) &&
                    is_aligned(arguments.residual);
  with_bool(wide, [&](auto wide_constant) {
    with_bool(relu, [&](auto relu_constant) {
      with_bool(arguments.mask != nullptr, [&](auto mask_constant) {
        constexpr int kWidth = decltype(wide_constant)::value ? kWide : 1;
        norm_add_act_kernel<T, kWidth, kResidual, decltype(relu_constant)::value, decltype(mask_constant)::value>
            <<<blocks, kThreads, 0, stream>>>(arguments);
      });
    });
  });
  check_cuda(cudaGetLastError(), "launch of norm_add_act_kernel");
}

template <typename T>
void run(const Tensor& x, const Tensor& scale, const Tensor& bias, const Tensor* residual, const Tensor* residual_scale,
         const Tensor* residual_bias, bool relu, const Tensor& act, const Tensor* mask) {
  const auto vector = [](const Tensor* tensor) {
    return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
  };
  const NormAddActArguments<T> arguments{
      static_cast<const T*>(x.const_data_ptr()),
      vector(&scale),
      vector(&bias),
      residual ? static_cast<const T*>(residual->const_data_ptr()) : nullptr,
      vector(residual_scale),
      vector(residual_bias),
      static_cast<T*>(act.mutable_data_ptr()),
      mask ? static_cast<uint8_t*>(mask->mutable_data_ptr()) : nullptr,
      x.numel() / x.size(1),
      static_cast<int>(x.size(1)),
  };
  const int32_t device = x.get_device_index();
  if (residual_scale) {
    launch<T, Residual::kRaw>(arguments, relu, device);
  } else if (residual) {
    launch<T, Residual::kMaterialised>(arguments, relu, device);
  } else {
    launch<T, Residual::kNone>(arguments, relu, device);
  }
}

const Tensor* pointer_to(const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }

}  // namespace

std::tuple<Tensor, std::optional<Tensor>> norm_add_act(
    const Tensor& x, const Tensor& scale, const Tensor& bias, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& residual_scale, const std::optional<Tensor>& residual_bias, bool relu, bool save_mask) {
  check_activation("x", x);
  check_vector("scale", scale, x);
  check_vector("bias", bias, x);
  if (residual) check_residual(*residual, x);
  if (residual_scale && !residual) fail("residual_scale: expected a residual with it");
  if (residual_scale && !residual_bias) fail("residual_bias: expected a tensor, since residual_scale is given");
  if (residual_bias && !residual_scale) fail("residual_scale: expected a tensor, since residual_bias is given");
  if (residual_scale) check_vector("residual_scale", *residual_scale, x);
  if (residual_bias) check_vector("residual_bias", *residual_bias, x);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor act = torch::stable::empty_like(x);
  std::optional<Tensor> mask;
  if (save_mask) {
    mask = torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(3), (x.size(1) + kGroup - 1) / kGroup}, ScalarType::Byte);
  }
  if (x.numel() == 0) return {act, mask};

  const auto typed_run = [&](auto zero) {
    run<decltype(zero)>(x, scale, bias, pointer_to(residual), pointer_to(residual_scale), pointer_to(residual_bias), relu, act,
                        pointer_to(mask));
  };
  switch (x.scalar_type()) {
    case ScalarType::Half: typed_run(__half{}); break;
    case ScalarType::BFloat16: typed_run(__nv_bfloat16{}); break;
    default: typed_run(float{});
  }
  return {act, mask};
}

}  // namespace fused_resnet
