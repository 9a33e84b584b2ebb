// norm + ReLU + max pool, forward, and where its backward takes the gradient from.
//
// Formula     out = max over the window of act = round(relu(fmaf(x, scale[c], bias[c]))); index = r·size + s, the tap that won. The
//             first of equals wins, as in PyTorch; a NaN wins; padding never does.
//             Backward: d = Σ dout over the windows that the pixel won, a gather without atomics: at most ceil(size/stride)² windows
//             hold a pixel, and each says which of its taps won. The rest is norm_backward.cuh's.
// Shapes      x: T [N, H, W, channels]; out: T [N, P, Q, channels]; index: uint8 [N, P, Q, channels].
// Bytes       forward: x once from memory, where the caches hold the rows that windows share, out and index written. Backward: x,
//             dout and index read, dz written. For 3x3/2 and 2-byte elements 2.75 bytes an element of x forward, 4.75 backward.
// FLOPs       forward 6 a tap; backward 7 an element and 1 a window.
// Precision   rounded activations are compared; the sum over windows is fp32.
// Determinism no two threads write one element: equal bits on every run.
#pragma once

#include "norm_backward.cuh"

namespace fused_resnet {

// A square window; kSize 0 stands for one that is known at run time only.
template <int kSize, int kStride, int kPadding>
struct Window {
  static constexpr int size = kSize, stride = kStride, padding = kPadding;
};

template <>
struct Window<0, 0, 0> {
  int size, stride, padding;
};

using AnyWindow = Window<0, 0, 0>;
using StemWindow = Window<3, 2, 1>;

// Registers allow two blocks: nine taps' comparisons, and a row of the window in flight.
constexpr int kPoolBlocksPerMultiprocessor = 2;

template <typename WindowType>
struct PoolGeometry {
  WindowType window;
  int height, width;     // of x
  int pooled_height, pooled_width;
  Divisor per_row, per_column;  // of the pixels that the kernel counts: x's in backward, out's in forward

  // Pixel `row` of the matrix -> (image, h, w).
  __device__ __forceinline__ void locate(int64_t row, unsigned& image, int& h, int& w) const {
    const auto pixel = static_cast<unsigned>(row);
    const unsigned line = per_row.quotient(pixel);
    w = static_cast<int>(per_row.remainder(pixel, line));
    image = per_column.quotient(line);
    h = static_cast<int>(per_column.remainder(line, image));
  }
};

template <typename T, typename WindowType>
struct MaxPoolArguments {
  const T* x;
  const float* scale;
  const float* bias;
  T* out;
  uint8_t* index;
  int64_t rows;  // of out
  int channels;
  PoolGeometry<WindowType> geometry;
};

template <typename T, int kWidth, typename WindowType>
__global__ void __launch_bounds__(kThreads, kPoolBlocksPerMultiprocessor)
    norm_act_max_pool_kernel(const MaxPoolArguments<T, WindowType> arguments) {
  const auto& geometry = arguments.geometry;
  const auto& window = geometry.window;
  const int channels = arguments.channels;
  Walk walk(arguments.rows, channels);
  const int valid = walk.valid;
  const Preactivation<Residual::kNone> preactivation(arguments.scale, arguments.bias, nullptr, nullptr, walk.channel, valid);
  const int groups = groups_of(channels);
  walk.go<1>([&](auto) {
    unsigned image;
    int p, q;
    geometry.locate(walk.byte / groups, image, p, q);
    const int top = p * window.stride - window.padding, left = q * window.stride - window.padding;
    const int64_t corner = (static_cast<int64_t>(image) * geometry.height + top) * geometry.width + left;
    float best[kGroup];
    int winner[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      best[i] = -INFINITY;
      winner[i] = 0;
    }
    const auto compare = [&](const Group<T, kWidth>& x, int tap) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const float act = widen(narrow<T>(relu(preactivation(i, x.get(i), 0.0f))));
        // A comparison with NaN is false, so a NaN is let in by name, and nothing gets past one.
        const bool wins = act > best[i] || (act != act && best[i] == best[i]);
        best[i] = wins ? act : best[i];
        winner[i] = wins ? tap : winner[i];
      }
    };
    if constexpr (std::is_same_v<WindowType, AnyWindow>) {
      for (int tap = 0; tap < window.size * window.size; ++tap) {
        const int r = tap / window.size, s = tap % window.size;
        if (top + r < 0 || top + r >= geometry.height || left + s < 0 || left + s >= geometry.width) continue;
        compare(Group<T, kWidth>::load(arguments.x + (corner + r * geometry.width + s) * channels + walk.channel, valid), tap);
      }
    } else {
      constexpr int kSize = WindowType::size;
      Group<T, kWidth> x[kSize];  // a row of the window in flight
#pragma unroll
      for (int r = 0; r < kSize; ++r) {
        if (top + r < 0 || top + r >= geometry.height) continue;
#pragma unroll
        for (int s = 0; s < kSize; ++s) {
          if (left + s < 0 || left + s >= geometry.width) continue;
          x[s] = Group<T, kWidth>::load(arguments.x + (corner + r * geometry.width + s) * channels + walk.channel, valid);
        }
#pragma unroll
        for (int s = 0; s < kSize; ++s) {
          if (left + s >= 0 && left + s < geometry.width) compare(x[s], r * kSize + s);
        }
      }
    }
    Group<T, kWidth> out;
    Group<uint8_t, kWidth> index;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      out.set(i, best[i]);
      index.vector[i / kWidth].lane[i % kWidth] = static_cast<uint8_t>(winner[i]);
    }
    out.store(arguments.out + walk.offset, valid);
    index.store(arguments.index + walk.offset, valid);
  });
}

// The gradient of a max pool's input, for norm_backward_reduce_kernel.
template <typename T, typename WindowType>
struct MaxPooledGradient {
  static constexpr int kOperands = 1;
  template <int kWidth>
  struct Loaded {
    float d[kGroup];
    __device__ __forceinline__ float get(int i) const { return d[i]; }
  };

  const T* dout;
  const uint8_t* index;
  int channels;
  PoolGeometry<WindowType> geometry;

  template <int kWidth>
  __device__ __forceinline__ Loaded<kWidth> load(int64_t row, int channel, int valid) const {
    const auto& window = geometry.window;
    unsigned image;
    int h, w;
    geometry.locate(row, image, h, w);
    Loaded<kWidth> sum{};
    const int reach = (window.size + window.stride - 1) / window.stride;
    const int last_p = (h + window.padding) / window.stride, last_q = (w + window.padding) / window.stride;
#pragma unroll
    for (int i = 0; i < reach; ++i) {
#pragma unroll
      for (int j = 0; j < reach; ++j) {
        const int p = last_p - i, q = last_q - j;
        const int r = h + window.padding - p * window.stride, s = w + window.padding - q * window.stride;
        if (p < 0 || p >= geometry.pooled_height || q < 0 || q >= geometry.pooled_width) continue;
        if (r >= window.size || s >= window.size) continue;
        const int64_t from = ((static_cast<int64_t>(image) * geometry.pooled_height + p) * geometry.pooled_width + q) * channels + channel;
        const auto gradient = Group<T, kWidth>::load(dout + from, valid);
        const auto winner = Group<uint8_t, kWidth>::load(index + from, valid);
#pragma unroll
        for (int c = 0; c < kGroup; ++c) {
          const bool won = winner.vector[c / kWidth].lane[c % kWidth] == r * window.size + s;
          sum.d[c] += won ? gradient.get(c) : 0.0f;
        }
      }
    }
    return sum;
  }
};

}  // namespace fused_resnet
