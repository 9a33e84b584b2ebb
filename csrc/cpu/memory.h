// Memory of activations.
//
// A step makes large tensors, drops them, and makes the same again. Handed back to the system and asked for anew, memory is cleared page by
// page as it is first written, which takes longer than writing it; and in pages of 4 KiB a pass waits for translations. So a large tensor's
// memory comes in large pages and is kept for the next tensor of its size, as the allocators of GPUs do.
#pragma once

#include <cstdint>

#include "../tensors.h"

namespace fused_resnet {

// An activation [images of like, channels, height, width] of like's dtype, in channels_last.
Tensor empty_activation(const Tensor& like, int64_t channels, int64_t height, int64_t width);
// As x.
Tensor empty_activation(const Tensor& x);
// Gives the memory that no tensor has back to the system. Bytes.
int64_t release_memory();

}  // namespace fused_resnet
