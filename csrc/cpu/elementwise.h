// norm + residual + ReLU, and batch norm's backward: passes that write what they read.
//
// Formula     act = round(relu(fma(x, scale, bias) + r)), r nothing, the residual, or fma(residual, residual_scale, residual_bias), and
//             one bit an element: whether a gradient passes. dy = gamma·invstd·(dz − s1/n − x̂·s2/n). Ioffe & Szegedy 2015, section 3.
// Shapes      T [rows, channels]; mask: uint8 [rows, ceil(channels / 8)]; vectors float [channels].
// Bytes       x, act and a residual, rows * channels * sizeof(T) each, and the mask; apply: dz, y, dy.
// Precision   fp32, one rounding to T.
#pragma once

#include "walk.h"

namespace fused_resnet {
namespace FUSED_RESNET_ISA {

// z of a block of channels; its vectors stay in registers from row to row.
template <int kVectors, Residual kResidual>
struct Preactivation {
  Block<kVectors> scale, bias, residual_scale, residual_bias;

  template <typename Count>
  FUSED_RESNET_INLINE Preactivation(const NormAddAct& given, int channel, Count count)
      : scale(load_block<kVectors>(given.scale + channel, count)), bias(load_block<kVectors>(given.bias + channel, count)) {
    if constexpr (kResidual == Residual::kRaw) {
      residual_scale = load_block<kVectors>(given.residual_scale + channel, count);
      residual_bias = load_block<kVectors>(given.residual_bias + channel, count);
    }
  }

  // Of the elements at `x` and `residual`, which is not read where there is none.
  template <typename T, typename Count>
  FUSED_RESNET_INLINE Block<kVectors> operator()(const T* x, const T* residual, Count count) const {
    Block<kVectors> z = load_block<kVectors>(x, count);
    [[maybe_unused]] Block<kVectors> added;
    if constexpr (kResidual != Residual::kNone) added = load_block<kVectors>(residual, count);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      z.at[v] = fma(z.at[v], scale.at[v], bias.at[v]);
      if constexpr (kResidual == Residual::kMaterialised) z.at[v] = z.at[v] + added.at[v];
      if constexpr (kResidual == Residual::kRaw) z.at[v] = z.at[v] + fma(added.at[v], residual_scale.at[v], residual_bias.at[v]);
    }
    return z;
  }
};

// ReLU of z in place; the bits of its mask.
template <int kVectors>
FUSED_RESNET_INLINE unsigned activate(Block<kVectors>& z) {
  unsigned bits = 0;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const Flags flags = passes_gradient(z.at[v]);
    bits |= bits_of(flags) << v * kLanes;
    z.at[v] = keep(flags, z.at[v]);
  }
  return bits;
}

template <typename T, Residual kResidual, bool kRelu, bool kMask>
void norm_add_act(const NormAddAct& given, int64_t first_row, int64_t last_row) {
  const int channels = given.extent.channels;
  over_tiles(first_row, last_row, tile_rows<T>(channels), [&](int64_t first, int64_t last) FUSED_RESNET_LAMBDA {
    over_channels(channels, [&](auto vectors, int channel, auto count) FUSED_RESNET_LAMBDA {
      const Preactivation<vectors.value, kResidual> preactivation(given, channel, count);
      const int64_t from = first * channels + channel;
      const T* x = static_cast<const T*>(given.x) + from;
      const T* residual = kResidual == Residual::kNone ? x : static_cast<const T*>(given.residual) + from;
      T* act = static_cast<T*>(given.act) + from;
      [[maybe_unused]] uint8_t* mask = given.mask + (kMask ? first * groups_of(channels) + channel / kGroup : 0);
      for (int64_t row = first; row < last; ++row, x += channels, residual += channels, act += channels) {
        auto z = preactivation(x, residual, count);
        if constexpr (kRelu) {
          [[maybe_unused]] const unsigned bits = activate(z);
          if constexpr (kMask) {
            store_mask<vectors.value>(mask, bits, count);
            mask += groups_of(channels);
          }
        }
        store_block(act, z, count);
      }
    });
  });
}

// dy = factor·dz + slope·(y − mean) + constant. y − mean stays a difference: folded into the constant it would lose the digits that a
// mean far above the deviation takes.
inline void prepare_apply(const BackwardApply& given, int64_t first_channel, int64_t last_channel) {
  const int channels = given.extent.channels;
  const auto n = static_cast<float>(given.extent.rows);
  float *factor = given.coefficients, *slope = factor + channels, *constant = slope + channels;
  for (int64_t c = first_channel; c < last_channel; ++c) {
    factor[c] = given.gamma ? given.gamma[c] * given.invstd[c] : given.invstd[c];
    slope[c] = -factor[c] * given.invstd[c] * (given.s2[c] / n);
    constant[c] = -factor[c] * (given.s1[c] / n);
  }
}

template <typename T>
void backward_apply(const BackwardApply& given, int64_t first_row, int64_t last_row) {
  const int channels = given.extent.channels;
  over_tiles(first_row, last_row, tile_rows<T>(channels), [&](int64_t first, int64_t last) FUSED_RESNET_LAMBDA {
    over_channels(channels, [&](auto vectors, int channel, auto count) FUSED_RESNET_LAMBDA {
      constexpr int kVectors = vectors.value;
      const float* coefficients = given.coefficients + channel;
      const auto factor = load_block<kVectors>(coefficients, count), slope = load_block<kVectors>(coefficients + channels, count);
      const auto constant = load_block<kVectors>(coefficients + 2 * static_cast<int64_t>(channels), count);
      const auto mean = load_block<kVectors>(given.mean + channel, count);
      const int64_t from = first * channels + channel;
      const T *dz = static_cast<const T*>(given.dz) + from, *y = static_cast<const T*>(given.y) + from;
      T* dy = static_cast<T*>(given.dy) + from;
      for (int64_t row = first; row < last; ++row, dz += channels, y += channels, dy += channels) {
        auto result = load_block<kVectors>(dz, count);
        const auto value = load_block<kVectors>(y, count);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          result.at[v] = fma(factor.at[v], result.at[v], fma(slope.at[v], value.at[v] - mean.at[v], constant.at[v]));
        }
        store_block(dy, result, count);
      }
    });
  });
}

}  // namespace FUSED_RESNET_ISA
}  // namespace fused_resnet
