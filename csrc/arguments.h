// What the operators expect of their arguments. Every error names the operator, the argument, and what was expected.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>

namespace fused_resnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

class Arguments {
 public:
  explicit Arguments(const char* operator_name) : operator_(operator_name) {}

  template <typename... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    std::ostringstream message;
    message << operator_ << ": ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }

  // A floating [N, C, H, W] in channels_last with at least one element, fewer than 2^31 pixels and 2^31 - 8 channels.
  void activation(const char* name, const Tensor& tensor) const;
  // An activation of the shape, dtype and device of x.
  void activation_like(const char* name, const Tensor& tensor, const Tensor& x) const;
  // An activation of x's dtype, device, images and channels, [height, width] large.
  void activation_of(const char* name, const Tensor& tensor, const Tensor& x, int64_t height, int64_t width) const;
  // A contiguous float32 [C] on the device of x.
  void vector(const char* name, const Tensor& tensor, const Tensor& x) const;
  void vector(const char* name, const OptionalTensor& tensor, const Tensor& x) const;
  // A contiguous tensor of that dtype and shape on the device of x.
  void tensor(const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape, const Tensor& x) const;
  // A packed ReLU mask of x: contiguous uint8 [N, H, W, ceil(C / 8)].
  void mask(const char* name, const Tensor& tensor, const Tensor& x) const;
  // A residual of x: none, an activation, or one with an affine map of its own, which is scale and bias.
  void residual(const OptionalTensor& residual, const OptionalTensor& scale, const OptionalTensor& bias, const Tensor& x) const;
  // What a pool's forward recorded for `out`: uint8 of its shape, in channels_last.
  void pool_index(const char* name, const Tensor& tensor, const Tensor& out) const;
  // Moments of sets of rows, counts int64 [parts], means and m2s [parts, C], and a norm's vectors. Returns C.
  int64_t moments(const Tensor& counts, const Tensor& means, const Tensor& m2s, const OptionalTensor& gamma,
                  const OptionalTensor& beta) const;
  // Both or neither.
  void together(const char* first, bool has_first, const char* second, bool has_second) const;

 private:
  const char* operator_;
};

// [N, C, H, W] as text, for errors.
std::string shape_of(const Tensor& tensor);

inline int64_t rows_of(const Tensor& x) { return x.numel() / x.size(1); }
inline int channels_of(const Tensor& x) { return static_cast<int>(x.size(1)); }

}  // namespace fused_resnet
