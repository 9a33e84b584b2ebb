// The window of a pool over the images of a tensor, and what comes out of it.
#pragma once

#include "tensors.h"

namespace fused_resnet {

// A pool over images of [height, width], checked.
struct Pool {
  int64_t size, stride, padding, height, width;

  Pool(const Arguments& check, const Tensor& x, int64_t kernel_size, int64_t stride, int64_t padding)
      : size(kernel_size), stride(stride), padding(padding), height(x.size(2)), width(x.size(3)) {
    if (size < 1 || size > 16) check.fail("kernel_size: expected 1 to 16, got ", size);  // a tap's number goes into a byte
    if (stride < 1) check.fail("stride: expected at least 1, got ", stride);
    if (padding < 0 || padding > size / 2) check.fail("padding: expected 0 to half of kernel_size, got ", padding);
    if (height + 2 * padding < size || width + 2 * padding < size) {
      check.fail("x: expected a spatial size that a window of ", size, " fits into, got shape ", shape_of(x));
    }
  }

  int64_t pooled(int64_t extent) const { return (extent + 2 * padding - size) / stride + 1; }
  int64_t pooled_height() const { return pooled(height); }
  int64_t pooled_width() const { return pooled(width); }

  // An uninitialised output of this pool over x.
  Tensor empty(const Tensor& x, ScalarType dtype) const { return empty_image(x, pooled_height(), pooled_width(), dtype); }
};

}  // namespace fused_resnet
