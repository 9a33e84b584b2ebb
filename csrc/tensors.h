// Pointers into tensors, and the tensors that the operators make.
#pragma once

#include <cstdint>
#include <optional>

#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "layout.h"

namespace fused_resnet {

template <typename T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
const T* read(const OptionalTensor& tensor) {
  return tensor ? read<T>(*tensor) : nullptr;
}
template <typename T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <typename T>
T* write(const OptionalTensor& tensor) {
  return tensor ? write<T>(*tensor) : nullptr;
}

inline Tensor empty_vector(const Tensor& like) { return torch::stable::new_empty(like, {like.size(1)}, ScalarType::Float); }

inline Tensor empty_mask(const Tensor& x) {
  return torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(3), groups_of(channels_of(x))}, ScalarType::Byte);
}

// [images of x, channels of x, height, width] in channels_last.
inline Tensor empty_image(const Tensor& x, int64_t height, int64_t width, ScalarType dtype) {
  return torch::stable::empty(
      {x.size(0), x.size(1), height, width}, dtype, std::nullopt, x.device(), std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
}

}  // namespace fused_resnet
