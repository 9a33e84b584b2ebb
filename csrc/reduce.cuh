// How a matrix [rows, channels] is summed along its rows, in two steps of a fixed order: each block sums a part of the rows for a
// slab of channels, and a second kernel adds the parts. Where one block has all rows, its sums are the result. There are no
// atomics: equal bits on every run.
#pragma once

#include "elements.cuh"

namespace fused_resnet {

// ---- tiles -------------------------------------------------------------------------------------------------------------

// A block is `columns` groups of channels wide and kThreads / columns rows high; it goes along the rows of its part.
// Blocks of one part follow each other in launch order, so that neighbours read neighbouring memory.
struct ReductionTile {
  int columns;  // a power of two, at most kWideColumns
  int slabs;    // blocks along the channels
  int parts;    // blocks along the rows, and so the partial results
  int64_t rows_per_part;  // the last part may have fewer, and none has no row

  int64_t blocks() const { return static_cast<int64_t>(slabs) * parts; }
};

constexpr int kBlocksPerMultiprocessor = 2;  // what registers allow at kThreads of 128 registers
constexpr int kWideColumns = 8;              // 64 channels: at least 128 bytes of a row, a whole cache line
constexpr int kNarrowColumns = 2;            // 32 bytes of a 16-bit type, a sector
constexpr int kSlab = kWideColumns * kGroup;  // the most channels of a block
constexpr int64_t kFewRows = 1024;           // eight for each thread of a narrow tile
constexpr int64_t kMoreRows = 4 * kFewRows;  // 7x7 images in a batch of 83

// Few rows, as of 7x7, 4x4 and 1x1 images in a small batch, are one part: narrow slabs make blocks enough of many channels, and the
// second kernel, whose launch would take longer than the sums, is not needed. So are some more rows, where narrow slabs alone give
// a block to half of the multiprocessors (2,048 channels do on 132): by arithmetic, 3,136 rows are 24 loads for a thread, 6 trips to
// memory of four loads each, about what the shorter sums and the second kernel would take, and one launch less.
// Else as many parts as fill the device once. First guesses; not tuned on a device.
inline ReductionTile reduction_tile(int64_t rows, int channels, int multiprocessors) {
  const int groups = groups_of(channels);
  const bool many_slabs = 2 * ceil_div(groups, kNarrowColumns) >= multiprocessors;
  const bool one_part = rows <= (many_slabs ? kMoreRows : kFewRows);
  const int most = one_part ? kNarrowColumns : kWideColumns;
  int columns = 1;
  while (columns < most && columns < groups) columns *= 2;
  ReductionTile tile{columns, static_cast<int>(ceil_div(groups, columns)), 1, rows};
  if (!one_part) {
    const int64_t height = kThreads / columns;
    const int64_t wanted = ceil_div(static_cast<int64_t>(multiprocessors) * kBlocksPerMultiprocessor, tile.slabs);
    tile.rows_per_part = ceil_div(ceil_div(rows, wanted), height) * height;
    tile.parts = static_cast<int>(ceil_div(rows, tile.rows_per_part));
  }
  return tile;
}

// Each image is a part.
inline ReductionTile image_tile(int64_t images, int64_t pixels, int channels) {
  return {kWideColumns, static_cast<int>(ceil_div(channels, kSlab)), static_cast<int>(images), pixels};
}

// Where a thread stands in a ReductionTile.
struct ReductionThread {
  int column, lane, height;  // of the tile; `lane` counts the rows of threads
  int part, channel, valid;  // of the matrix; valid < 1 where the slab goes past the last channel
  int64_t first, end;        // rows of the part

  __device__ __forceinline__ ReductionThread(const ReductionTile& tile, int64_t rows, int channels)
      : column(threadIdx.x & (tile.columns - 1)),
        lane(threadIdx.x / tile.columns),
        height(kThreads / tile.columns),
        part(blockIdx.x / tile.slabs),
        channel((static_cast<int>(blockIdx.x % tile.slabs) * tile.columns + column) * kGroup),
        valid(channels - channel < kGroup ? channels - channel : kGroup),
        first(part * tile.rows_per_part),
        end(first + tile.rows_per_part < rows ? first + tile.rows_per_part : rows) {}

  // Calls `body(row, steps)` with how many of the next rows, `height` apart, it is to take, as a constant: kSteps as long as there
  // are as many, so that their loads are in flight together, and then one by one.
  template <int kSteps, typename Body>
  __device__ __forceinline__ void go(Body&& body) const {
    if (valid < 1) return;
    int64_t row = first + lane;
    for (; row + (kSteps - 1) * height < end; row += kSteps * height) body(row, std::integral_constant<int, kSteps>{});
#pragma unroll 1
    for (; row < end; row += height) body(row, std::integral_constant<int, 1>{});
  }
};

// ---- sums --------------------------------------------------------------------------------------------------------------

// The sums of a block over its rows of threads: sum[k][i] of each thread -> `emit(k, channel, total)`, once for each sum and
// channel of the slab. Every thread of the block must call it. Warps first, then across warps.
template <int kSums, typename Emit>
__device__ __forceinline__ void block_sums(float (&sum)[kSums][kGroup], const ReductionThread& at, const ReductionTile& tile, int channels,
                                           Emit&& emit) {
  __shared__ float shared[kSums][kWarps][kSlab];
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      for (int apart = tile.columns; apart < kWarp; apart *= 2) sum[k][i] += __shfl_xor_sync(~0u, sum[k][i], apart);
    }
    if (threadIdx.x % kWarp < tile.columns) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) shared[k][threadIdx.x / kWarp][at.column * kGroup + i] = sum[k][i];
    }
  }
  __syncthreads();
  const int t = threadIdx.x;
  const int channel = at.channel - at.column * kGroup + t;
  if (t >= tile.columns * kGroup || channel >= channels) return;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += shared[k][warp][t];
    emit(k, channel, total);
  }
}

// ---- merging partial results -------------------------------------------------------------------------------------------

// Partial results are float [parts, channels]. A block merges those of kMergeChannels channels, 32 bytes of a row, by kMergeLanes
// threads a channel.
constexpr int kMergeChannels = 8;
constexpr int kMergeLanes = kThreads / kMergeChannels;

inline int64_t merge_blocks(int channels) { return ceil_div(channels, kMergeChannels); }

struct MergeThread {
  int channel, lane;

  __device__ __forceinline__ explicit MergeThread(int block)
      : channel(block * kMergeChannels + threadIdx.x % kMergeChannels), lane(threadIdx.x / kMergeChannels) {}
};

// The sum of `value` over the lanes of each channel, in every thread. Every thread of the block must call it.
__device__ __forceinline__ float merge_lanes(float value) {
  __shared__ float shared[kWarps][kMergeChannels];
  for (int apart = kMergeChannels; apart < kWarp; apart *= 2) value += __shfl_xor_sync(~0u, value, apart);
  __syncthreads();  // whoever still reads the last call's
  if (threadIdx.x % kWarp < kMergeChannels) shared[threadIdx.x / kWarp][threadIdx.x % kMergeChannels] = value;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += shared[warp][threadIdx.x % kMergeChannels];
  return total;
}

struct MergeSumsArguments {
  const float* partial;  // [sums, parts, channels]
  float* s1;             // [channels], as all that follow
  float* s2;
  float* residual_s2;  // not written where there are two sums
  int parts;
  int channels;
};

}  // namespace fused_resnet
