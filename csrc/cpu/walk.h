// How a kernel walks over a matrix [rows, channels]: in tiles of a few rows, and in each from block to block of channels, so that what
// belongs to a channel stays in registers while the memory of a tile is read in one go.
#pragma once

#include "kernels.h"
#include "vector.h"

// On a lambda: it becomes a part of the loop that calls it.
#define FUSED_RESNET_LAMBDA __attribute__((always_inline))

namespace fused_resnet {
namespace FUSED_RESNET_ISA {

constexpr int64_t kTileBytes = 1024;  // of one operand: a page

template <typename T>
FUSED_RESNET_INLINE int64_t tile_rows(int channels) {
  const int64_t rows = kTileBytes / (static_cast<int64_t>(channels) * static_cast<int64_t>(sizeof(T)));
  return rows < 1 ? 1 : rows;
}

// Calls body(first, last) for the tiles of the rows [first, last).
template <typename Body>
FUSED_RESNET_INLINE void over_tiles(int64_t first, int64_t last, int64_t tile, Body&& body) {
  for (int64_t row = first; row < last; row += tile) body(row, row + tile < last ? row + tile : last);
}

// The rows of a part.
struct PartRows {
  int64_t first, last;

  FUSED_RESNET_INLINE PartRows(const Parts& parts, int64_t part, int64_t rows)
      : first(part * parts.rows_per_part), last(first + parts.rows_per_part < rows ? first + parts.rows_per_part : rows) {}
};

}  // namespace FUSED_RESNET_ISA
}  // namespace fused_resnet
