#include "arguments.h"

#include <limits>

#include "layout.h"
#include "on_device.h"

namespace fused_resnet {
namespace {

constexpr int64_t kMost = std::numeric_limits<int>::max();

std::string text_of(std::initializer_list<int64_t> shape) {
  std::ostringstream text;
  const char* comma = "[";
  for (const int64_t extent : shape) {
    text << comma << extent;
    comma = ", ";
  }
  text << ']';
  return text.str();
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

bool same_device(const Tensor& tensor, const Tensor& x) { return on_device(tensor) && tensor.get_device_index() == x.get_device_index(); }

}  // namespace

std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ']';
  return text.str();
}

void Arguments::activation(const char* name, const Tensor& tensor) const {
  if (!on_device(tensor)) fail(name, ": expected ", kDeviceTensor);
  const ScalarType dtype = tensor.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Half && dtype != ScalarType::BFloat16) {
    fail(name, ": expected float32, float16 or bfloat16, got ", torch::headeronly::toString(dtype));
  }
  if (tensor.dim() != 4) fail(name, ": expected a tensor [N, C, H, W], got shape ", shape_of(tensor));
  if (tensor.numel() == 0) fail(name, ": expected at least one element, got shape ", shape_of(tensor));
  if (tensor.size(1) > kMost - kGroup) fail(name, ": expected fewer than 2^31 - 8 channels, got shape ", shape_of(tensor));
  if (rows_of(tensor) > kMost) fail(name, ": expected fewer than 2^31 pixels, got shape ", shape_of(tensor));
  if (!is_channels_last(tensor)) fail(name, ": expected memory format channels_last, shape ", shape_of(tensor));
}

void Arguments::activation_of(const char* name, const Tensor& tensor, const Tensor& x, int64_t height, int64_t width) const {
  activation(name, tensor);
  if (!same_device(tensor, x)) fail(name, ": expected a tensor on the device of x");
  if (tensor.scalar_type() != x.scalar_type()) {
    fail(name, ": expected the dtype of x, ", torch::headeronly::toString(x.scalar_type()), ", got ",
         torch::headeronly::toString(tensor.scalar_type()));
  }
  if (tensor.size(0) != x.size(0) || tensor.size(1) != x.size(1) || tensor.size(2) != height || tensor.size(3) != width) {
    fail(name, ": expected shape ", text_of({x.size(0), x.size(1), height, width}), ", got ", shape_of(tensor));
  }
}

void Arguments::activation_like(const char* name, const Tensor& tensor, const Tensor& x) const {
  activation_of(name, tensor, x, x.size(2), x.size(3));
}

void Arguments::tensor(const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape,
                       const Tensor& x) const {
  if (!same_device(tensor, x)) fail(name, ": expected a tensor on the device of x");
  if (tensor.scalar_type() != dtype) {
    fail(name, ": expected ", torch::headeronly::toString(dtype), ", got ", torch::headeronly::toString(tensor.scalar_type()));
  }
  bool right = tensor.dim() == static_cast<int64_t>(shape.size()) && tensor.is_contiguous();
  for (int64_t d = 0; right && d < tensor.dim(); ++d) right = tensor.size(d) == shape.begin()[d];
  if (!right) fail(name, ": expected a contiguous tensor ", text_of(shape), ", got shape ", shape_of(tensor));
}

void Arguments::vector(const char* name, const Tensor& tensor, const Tensor& x) const {
  this->tensor(name, tensor, ScalarType::Float, {x.size(1)}, x);
}

void Arguments::vector(const char* name, const OptionalTensor& tensor, const Tensor& x) const {
  if (tensor) vector(name, *tensor, x);
}

void Arguments::mask(const char* name, const Tensor& tensor, const Tensor& x) const {
  this->tensor(name, tensor, ScalarType::Byte, {x.size(0), x.size(2), x.size(3), groups_of(channels_of(x))}, x);
}

void Arguments::residual(const OptionalTensor& residual, const OptionalTensor& scale, const OptionalTensor& bias, const Tensor& x) const {
  if (residual) activation_like("residual", *residual, x);
  if (scale && !residual) fail("residual_scale: expected a residual with it");
  together("residual_scale", scale.has_value(), "residual_bias", bias.has_value());
  vector("residual_scale", scale, x);
  vector("residual_bias", bias, x);
}

void Arguments::pool_index(const char* name, const Tensor& tensor, const Tensor& out) const {
  if (!same_device(tensor, out)) fail(name, ": expected a tensor on the device of x");
  bool right = tensor.scalar_type() == ScalarType::Byte && tensor.dim() == 4;
  for (int64_t d = 0; right && d < 4; ++d) right = tensor.size(d) == out.size(d);
  if (!right || !is_channels_last(tensor)) {
    fail(name, ": expected uint8 in channels_last of shape ", shape_of(out), ", got ", torch::headeronly::toString(tensor.scalar_type()),
         " of shape ", shape_of(tensor));
  }
}

int64_t Arguments::moments(const Tensor& counts, const Tensor& means, const Tensor& m2s, const OptionalTensor& gamma,
                           const OptionalTensor& beta) const {
  if (!on_device(means)) fail("means: expected ", kDeviceTensor);
  if (means.dim() != 2 || means.numel() == 0) fail("means: expected a tensor [parts, C], got shape ", shape_of(means));
  const int64_t parts = means.size(0), channels = means.size(1);
  tensor("means", means, ScalarType::Float, {parts, channels}, means);
  tensor("m2s", m2s, ScalarType::Float, {parts, channels}, means);
  tensor("counts", counts, ScalarType::Long, {parts}, means);
  vector("gamma", gamma, means);
  vector("beta", beta, means);
  return channels;
}

void Arguments::together(const char* first, bool has_first, const char* second, bool has_second) const {
  if (has_first && !has_second) fail(second, ": expected a tensor, since ", first, " is given");
  if (has_second && !has_first) fail(first, ": expected a tensor, since ", second, " is given");
}

}  // namespace fused_resnet
