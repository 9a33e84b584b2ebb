// 1x1 convolutions with the passes around them, part by part, while the rows of a part lie in a cache.
//
// Formula     forward:  act = norm_add_act(x), or x itself; y = act · weightᵀ; moments of y.
//             backward: dy = backward_apply(dz, y); dx = dy · weight, to the reduction of the input's norm; dweight = dyᵀ · act.
// Shapes      rows are pixels: act, x, dx [rows, C]; y, dz, dy [rows, K]; weight [K, C]. bfloat16 or fp32, C and K multiples of kBlockSide.
// Bytes       forward: x, a residual, act and y once each. Backward: dz, y, act, x and the gradient once each; dy stays in the cache
//             where dweight is summed here.
// Precision   as the passes and a convolution apart: dy, dx and y are rounded to T, products are summed in fp32.
// Determinism parts, and groups of them that share a sum of dweight, depend on shapes alone.
#pragma once

#include "backward_reduce.h"
#include "elementwise.h"
#include "statistics.h"
#include "products.h"
#include "tiles.h"

namespace fused_resnet {
namespace FUSED_RESNET_ISA {

// The activation of some rows; with a residual, its mask.
template <typename T>
FUSED_RESNET_INLINE void write_act(const NormAddAct& norm, int64_t first_row, int64_t last_row) {
  switch (norm.kind) {
    case Residual::kNone: return norm_add_act<T, Residual::kNone, true, false>(norm, first_row, last_row);
    case Residual::kMaterialised: return norm_add_act<T, Residual::kMaterialised, true, true>(norm, first_row, last_row);
    default: return norm_add_act<T, Residual::kRaw, true, true>(norm, first_row, last_row);
  }
}

template <typename T>
void pointwise_forward(const ConvForward& given, int64_t first_part, int64_t last_part, void* scratch) {
  [[maybe_unused]] const Tiles<T> tiles;
  const NormAddAct& norm = given.norm;
  const Moments& moments_of_y = given.moments;
  const int64_t inputs = norm.extent.channels, outputs = moments_of_y.extent.channels;
  const auto* act = static_cast<const T*>(given.pending ? norm.act : norm.x);
  auto* y = static_cast<T*>(given.y);
  for (int64_t part = first_part; part < last_part; ++part) {
    const PartRows rows(moments_of_y.parts, part, norm.extent.rows);
    if (given.pending) write_act<T>(norm, rows.first, rows.last);
    multiply(act + rows.first * inputs, rows.last - rows.first, inputs, static_cast<const T*>(given.packed), outputs,
             y + rows.first * outputs, static_cast<T*>(scratch));
    if (moments_of_y.mean) moments<T>(moments_of_y, part, part + 1);
  }
}

template <typename T>
int64_t pointwise_forward_scratch(const ConvForward& given) {
  return kBlockSide * given.norm.extent.channels * static_cast<int64_t>(sizeof(T));
}

// What a part of backward works in; `size` is in bytes.
template <typename T>
struct PointwiseScratch {
  T *dy, *dx, *left, *right, *spare;
  int64_t size;

  FUSED_RESNET_INLINE PointwiseScratch(const ConvBackward& given, void* scratch) {
    const int64_t rows = (given.reduce.parts.rows_per_part + kDepth<T> - 1) / kDepth<T> * kDepth<T>;
    const int64_t inputs = given.reduce.extent.channels, outputs = given.apply.extent.channels;
    Arena<T> arena(scratch);
    dy = arena.take(given.apply.dy ? 0 : rows * outputs);
    dx = arena.take(given.pending ? rows * inputs : 0);
    left = arena.take(given.sums ? rows * outputs : 0);
    right = arena.take(given.sums ? rows * inputs : 0);
    spare = arena.take(kBlockSide * outputs);
    size = arena.size();
  }
};

// dx += dact, rounded.
template <typename T>
FUSED_RESNET_INLINE void add_gradient(T* dx, const T* dact, int64_t values) {
  for (int64_t i = 0; i < values; i += kLanes) store(dx + i, rounded(T{}, load(dx + i) + load(dact + i)));
}

template <typename T, typename Source>
FUSED_RESNET_INLINE void reduce_part(const BackwardReduce& given, int64_t part) {
  const bool raw = given.residual != nullptr;
  if (given.kind == Mask::kRecomputed) return backward_reduce<T, Source, Mask::kRecomputed, false>(given, part, part + 1);
  if (raw) return backward_reduce<T, Source, Mask::kBits, true>(given, part, part + 1);
  backward_reduce<T, Source, Mask::kBits, false>(given, part, part + 1);
}

// Of the convolution's gradient of the rows of a part: what is asked for, a reduction or a sum.
template <typename T>
FUSED_RESNET_INLINE void finish_gradient(const ConvBackward& given, int64_t part, const PartRows& rows, T* dx) {
  const int64_t inputs = given.reduce.extent.channels;
  const auto* dact = static_cast<const T*>(given.reduce.dact);
  if (given.pending) {
    BackwardReduce reduce = given.reduce;
    reduce.d = dx - rows.first * inputs;
    dact ? reduce_part<T, SummedGradient<T>>(reduce, part) : reduce_part<T, PlainGradient<T>>(reduce, part);
  } else if (dact) {
    add_gradient(dx, dact + rows.first * inputs, (rows.last - rows.first) * inputs);
  }
}

template <typename T>
void pointwise_backward(const ConvBackward& given, int64_t first_group, int64_t last_group, void* scratch) {
  [[maybe_unused]] const Tiles<T> tiles;
  const PointwiseScratch<T> space(given, scratch);
  const int64_t inputs = given.reduce.extent.channels, outputs = given.apply.extent.channels;
  const auto* act = static_cast<const T*>(given.act);
  for (int64_t group = first_group; group < last_group; ++group) {
    const int64_t first_part = group * given.units_per_group, end = first_part + given.units_per_group;
    const int64_t last_part = end < given.reduce.parts.count ? end : given.reduce.parts.count;
    for (int64_t part = first_part; part < last_part; ++part) {
      const PartRows rows(given.reduce.parts, part, given.reduce.extent.rows);
      const int64_t count = rows.last - rows.first;
      BackwardApply apply = given.apply;
      if (!apply.dy) apply.dy = space.dy - rows.first * outputs;
      backward_apply<T>(apply, rows.first, rows.last);
      const T* dy = static_cast<const T*>(apply.dy) + rows.first * outputs;
      if (given.packed) {
        T* dx = given.pending ? space.dx : static_cast<T*>(given.reduce.dz) + rows.first * inputs;
        multiply(dy, count, outputs, static_cast<const T*>(given.packed), inputs, dx, space.spare);
        finish_gradient(given, part, rows, dx);
      }
      if (given.sums) {
        pack_left(dy, count, outputs, outputs, space.left);
        pack(act + rows.first * inputs, count, inputs, 1, 0, inputs / kTileSide, space.right);
        const int64_t steps = (count + kDepth<T> - 1) / kDepth<T>;
        add_outer(space.left, outputs, space.right, inputs, steps * kTileValues<T>, steps, given.sums + group * outputs * inputs,
                  part == first_part);
      }
    }
  }
}

template <typename T>
int64_t pointwise_backward_scratch(const ConvBackward& given) {
  return PointwiseScratch<T>(given, nullptr).size;
}

}  // namespace FUSED_RESNET_ISA
}  // namespace fused_resnet
