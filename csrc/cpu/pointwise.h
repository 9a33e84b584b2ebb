// 1x1 convolutions with the passes around them, part by part, while the rows of a part lie in a cache.
//
// Formula     forward:  act = norm_add_act(x), or x itself; y = act · weightᵀ; moments of y.
//             backward: dy = backward_apply(dz, y); dx = dy · weight, to the reduction of the input's norm; dweight = dyᵀ · act.
// Shapes      rows are pixels: act, x, dx [rows, C]; y, dz, dy [rows, K]; weight [K, C]. bfloat16, C and K multiples of kBlockSide.
// Bytes       forward: x, a residual, act and y once each. Backward: dz, y, act, x and the gradient once each; dy stays in the cache
//             where dweight is summed here.
// Precision   as the passes and a convolution apart: dy, dx and y are rounded to bfloat16, products are summed in fp32.
// Determinism parts, and groups of them that share a sum of dweight, depend on shapes alone.
#pragma once

#include "backward_reduce.h"
#include "elementwise.h"
#include "statistics.h"
#include "tiles.h"

namespace fused_resnet {
namespace FUSED_RESNET_ISA {

template <Residual kResidual>
void pointwise_forward(const ConvForward& given, int64_t first_part, int64_t last_part, void* scratch) {
  [[maybe_unused]] const Tiles tiles;
  const NormAddAct& norm = given.norm;
  const Moments& moments_of_y = given.moments;
  const int64_t inputs = norm.extent.channels, outputs = moments_of_y.extent.channels;
  const auto* act = static_cast<const BFloat16*>(given.pending ? norm.act : norm.x);
  auto* y = static_cast<BFloat16*>(given.y);
  for (int64_t part = first_part; part < last_part; ++part) {
    const PartRows rows(moments_of_y.parts, part, norm.extent.rows);
    if (given.pending) {
      if constexpr (kResidual == Residual::kNone) {
        norm_add_act<BFloat16, kResidual, true, false>(norm, rows.first, rows.last);
      } else {
        norm_add_act<BFloat16, kResidual, true, true>(norm, rows.first, rows.last);
      }
    }
    multiply(act + rows.first * inputs, rows.last - rows.first, inputs, static_cast<const BFloat16*>(given.packed), outputs,
             y + rows.first * outputs, static_cast<BFloat16*>(scratch));
    if (moments_of_y.mean) moments<BFloat16>(moments_of_y, part, part + 1);
  }
}

inline int64_t pointwise_forward_scratch(const ConvForward& given) {
  return kBlockSide * given.norm.extent.channels * static_cast<int64_t>(sizeof(BFloat16));
}

// What a part of backward works in; `size` is in bytes.
struct PointwiseScratch {
  BFloat16 *dy, *dx, *left, *right, *spare;
  int64_t size;

  FUSED_RESNET_INLINE PointwiseScratch(const ConvBackward& given, void* scratch) {
    const int64_t rows = (given.reduce.parts.rows_per_part + kDepth - 1) / kDepth * kDepth;
    const int64_t inputs = given.reduce.extent.channels, outputs = given.apply.extent.channels;
    Arena arena(scratch);
    dy = arena.take(given.apply.dy ? 0 : rows * outputs);
    dx = arena.take(given.pending ? rows * inputs : 0);
    left = arena.take(given.sums ? rows * outputs : 0);
    right = arena.take(given.sums ? rows * inputs : 0);
    spare = arena.take(kBlockSide * outputs);
    size = arena.size();
  }
};

// dx += dact, rounded.
FUSED_RESNET_INLINE void add_gradient(BFloat16* dx, const BFloat16* dact, int64_t values) {
  for (int64_t i = 0; i < values; i += kLanes) store(dx + i, rounded(BFloat16{}, load(dx + i) + load(dact + i)));
}

template <typename Source>
FUSED_RESNET_INLINE void reduce_part(const BackwardReduce& given, int64_t part) {
  const bool raw = given.residual != nullptr;
  if (given.kind == Mask::kRecomputed) return backward_reduce<BFloat16, Source, Mask::kRecomputed, false>(given, part, part + 1);
  if (raw) return backward_reduce<BFloat16, Source, Mask::kBits, true>(given, part, part + 1);
  backward_reduce<BFloat16, Source, Mask::kBits, false>(given, part, part + 1);
}

// Of the convolution's gradient of the rows of a part: what is asked for, a reduction or a sum.
FUSED_RESNET_INLINE void finish_gradient(const ConvBackward& given, int64_t part, const PartRows& rows, BFloat16* dx) {
  const int64_t inputs = given.reduce.extent.channels;
  const auto* dact = static_cast<const BFloat16*>(given.reduce.dact);
  if (given.pending) {
    BackwardReduce reduce = given.reduce;
    reduce.d = dx - rows.first * inputs;
    dact ? reduce_part<SummedGradient<BFloat16>>(reduce, part) : reduce_part<PlainGradient<BFloat16>>(reduce, part);
  } else if (dact) {
    add_gradient(dx, dact + rows.first * inputs, (rows.last - rows.first) * inputs);
  }
}

inline void pointwise_backward(const ConvBackward& given, int64_t first_group, int64_t last_group, void* scratch) {
  [[maybe_unused]] const Tiles tiles;
  const PointwiseScratch space(given, scratch);
  const int64_t inputs = given.reduce.extent.channels, outputs = given.apply.extent.channels;
  const auto* act = static_cast<const BFloat16*>(given.act);
  for (int64_t group = first_group; group < last_group; ++group) {
    const int64_t first_part = group * given.units_per_group, end = first_part + given.units_per_group;
    const int64_t last_part = end < given.reduce.parts.count ? end : given.reduce.parts.count;
    for (int64_t part = first_part; part < last_part; ++part) {
      const PartRows rows(given.reduce.parts, part, given.reduce.extent.rows);
      const int64_t count = rows.last - rows.first;
      BackwardApply apply = given.apply;
      if (!apply.dy) apply.dy = space.dy - rows.first * outputs;
      backward_apply<BFloat16>(apply, rows.first, rows.last);
      const BFloat16* dy = static_cast<const BFloat16*>(apply.dy) + rows.first * outputs;
      if (given.packed) {
        BFloat16* dx = given.pending ? space.dx : static_cast<BFloat16*>(given.reduce.dz) + rows.first * inputs;
        multiply(dy, count, outputs, static_cast<const BFloat16*>(given.packed), inputs, dx, space.spare);
        finish_gradient(given, part, rows, dx);
      }
      if (given.sums) {
        pack_left(dy, count, outputs, outputs, space.left);
        pack(act + rows.first * inputs, count, inputs, 1, 0, inputs / kTileSide, space.right);
        const int64_t steps = (count + kDepth - 1) / kDepth;
        add_outer(space.left, outputs, space.right, inputs, steps * kTileValues, steps, given.sums + group * outputs * inputs, part == first_part);
      }
    }
  }
}

inline int64_t pointwise_backward_scratch(const ConvBackward& given) { return PointwiseScratch(given, nullptr).size; }

}  // namespace FUSED_RESNET_ISA
}  // namespace fused_resnet
