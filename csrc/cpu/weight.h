// The weight of a convolution, packed for products, and its gradient, merged of partial sums.
//
// Shapes      weight, dweight: bfloat16 or fp32 [K, taps, C], taps line by line. Forward, the right factor is [taps · C, K]; backward
//             [taps · K, C], the taps from last to first, since dx gathers what y scattered.
// Determinism sums are merged in the order of their groups.
#pragma once

#include "packed.h"

namespace fused_resnet {
namespace FUSED_RESNET_ISA {

// A 3x3 weight of kNarrowChannels channels on both sides: words of depth one after another.
template <typename T>
FUSED_RESNET_INLINE void pack_narrow(const T* from, bool forward, T* to) {
  constexpr int64_t kTaps = kWindow * kWindow;
  for (int64_t k = 0; k < kTaps * kNarrowChannels; ++k) {
    const int64_t tap = k / kNarrowChannels, channel = k % kNarrowChannels;
    for (int64_t column = 0; column < kNarrowChannels; ++column) {
      to[k / kWord<T> * kDepth<T> + column * kWord<T> + k % kWord<T>] =
          forward ? from[(column * kTaps + tap) * kNarrowChannels + channel]
                  : from[(channel * kTaps + kTaps - 1 - tap) * kNarrowChannels + column];
    }
  }
}

// Of the column blocks [first, last).
template <typename T>
void pack_weight(const PackWeight& given, int64_t first_block, int64_t last_block) {
  const auto* from = static_cast<const T*>(given.weight);
  auto* to = static_cast<T*>(given.packed);
  if (given.inputs == kNarrowChannels) return pack_narrow(from, given.forward, to);
  if (given.forward) return pack_transposed(from, given.taps * given.inputs, first_block, last_block, to);
  for (int64_t tap = 0; tap < given.taps; ++tap) {
    pack(from + (given.taps - 1 - tap) * given.inputs, given.outputs, given.taps * given.inputs, given.taps, first_block, last_block,
         to + tap * given.outputs * kTileSide);
  }
}

// dweight of the groups' sums, of the rows of tiles [first, last).
template <typename T>
void merge_weight(const MergeWeight& given, int64_t first_block, int64_t last_block) {
  const int64_t across = given.inputs / kTileSide, size = given.outputs * given.inputs;
  auto* to = static_cast<T*>(given.dweight);
  for (int64_t block = first_block; block < last_block; ++block) {
    for (int64_t tap = 0; tap < given.taps; ++tap) {
      for (int64_t row = 0; row < kTileSide; ++row) {
        T* line = to + ((block * kTileSide + row) * given.taps + tap) * given.inputs;
        for (int64_t column = 0; column < given.inputs; column += kLanes) {
          const float* from =
              given.sums + tap * size + (block * across + column / kTileSide) * kTileSums + row * kTileSide + column % kTileSide;
          Floats sum = load(from);
          for (int64_t group = 1; group < given.groups; ++group) sum = sum + load(from + group * given.taps * size);
          store(line + column, rounded(T{}, sum));
        }
      }
    }
  }
}

}  // namespace FUSED_RESNET_ISA
}  // namespace fused_resnet
