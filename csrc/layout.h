// How activations and masks lie in memory, and what the passes are told apart by: for kernels and for the code that calls them.
//
// An activation [N, C, H, W] in NHWC is a matrix T [rows, channels], rows = N * H * W. A thread works on groups of eight consecutive
// channels of a row: one byte of a packed ReLU mask, and 16 bytes of a 16-bit type.
#pragma once

#include <cstdint>

namespace fused_resnet {

constexpr int kGroup = 8;
constexpr int kThreads = 256;  // of a block, in every kernel

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The groups of a row, and the bytes of a packed mask in it: channel c is bit c % 8 of byte c / 8, and unused bits are 0.
constexpr int groups_of(int channels) { return (channels + kGroup - 1) / kGroup; }

// What is added to norm(x).
enum class Residual { kNone, kMaterialised, kRaw };

// Where the mask of a gradient comes from: there is no ReLU, or from x, or from saved bits.
enum class Mask { kNone, kRecomputed, kBits };

}  // namespace fused_resnet
