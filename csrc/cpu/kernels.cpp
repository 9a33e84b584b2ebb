// The kernels of one instruction set: compiled once for each, with FUSED_RESNET_ISA as its namespace and its -m flags.
#include "backward_reduce.h"
#include "elementwise.h"
#include "pointwise.h"
#include "pools.h"
#include "statistics.h"
#include "weight.h"
#include "weight_gradient.h"
#include "window.h"

namespace fused_resnet {
namespace FUSED_RESNET_ISA {
namespace {

// Calls body with a null pointer to the element type.
template <typename Body>
FUSED_RESNET_INLINE void with_element(Element element, Body&& body) {
  switch (element) {
    case Element::kHalf: return body(static_cast<Half*>(nullptr));
    case Element::kBFloat16: return body(static_cast<BFloat16*>(nullptr));
    default: return body(static_cast<float*>(nullptr));
  }
}

template <typename Pointer>
struct Pointee;
template <typename T>
struct Pointee<T*> {
  using Type = T;
};

template <typename Body>
FUSED_RESNET_INLINE void with_residual(Residual kind, Body&& body) {
  switch (kind) {
    case Residual::kNone: return body(Constant<static_cast<int>(Residual::kNone)>{});
    case Residual::kMaterialised: return body(Constant<static_cast<int>(Residual::kMaterialised)>{});
    default: return body(Constant<static_cast<int>(Residual::kRaw)>{});
  }
}

void norm_add_act_of(const NormAddAct& given, int64_t first, int64_t last) {
  with_element(given.extent.element, [&](auto element) {
    using T = typename Pointee<decltype(element)>::Type;
    with_residual(given.kind, [&](auto kind) {
      constexpr auto kResidual = static_cast<Residual>(kind.value);
      if (given.mask) {
        if constexpr (kResidual != Residual::kNone) norm_add_act<T, kResidual, true, true>(given, first, last);
      } else if (given.relu) {
        norm_add_act<T, kResidual, true, false>(given, first, last);
      } else {
        norm_add_act<T, kResidual, false, false>(given, first, last);
      }
    });
  });
}

void moments_of(const Moments& given, int64_t first, int64_t last) {
  with_element(given.extent.element, [&](auto element) { moments<typename Pointee<decltype(element)>::Type>(given, first, last); });
}

template <typename T, typename Source>
void backward_reduce_from(const BackwardReduce& given, int64_t first, int64_t last) {
  const bool raw = given.residual != nullptr;
  switch (given.kind) {
    case Mask::kRecomputed: return backward_reduce<T, Source, Mask::kRecomputed, false>(given, first, last);
    case Mask::kBits:
      return raw ? backward_reduce<T, Source, Mask::kBits, true>(given, first, last)
                 : backward_reduce<T, Source, Mask::kBits, false>(given, first, last);
    default:
      return raw ? backward_reduce<T, Source, Mask::kNone, true>(given, first, last)
                 : backward_reduce<T, Source, Mask::kNone, false>(given, first, last);
  }
}

void backward_reduce_of(const BackwardReduce& given, int64_t first, int64_t last) {
  with_element(given.extent.element, [&](auto element) {
    using T = typename Pointee<decltype(element)>::Type;
    switch (given.gradient) {
      case Gradient::kPlain: return backward_reduce_from<T, PlainGradient<T>>(given, first, last);
      case Gradient::kSummed: return backward_reduce_from<T, SummedGradient<T>>(given, first, last);
      case Gradient::kAveraged: return backward_reduce_from<T, AveragedGradient<T>>(given, first, last);
      default: return backward_reduce<T, MaxPooledGradient<T>, Mask::kRecomputed, false>(given, first, last);
    }
  });
}

void backward_apply_of(const BackwardApply& given, int64_t first, int64_t last) {
  with_element(given.extent.element, [&](auto element) { backward_apply<typename Pointee<decltype(element)>::Type>(given, first, last); });
}

void max_pool_of(const MaxPool& given, int64_t first, int64_t last) {
  with_element(given.extent.element, [&](auto element) { max_pool<typename Pointee<decltype(element)>::Type>(given, first, last); });
}

void avg_pool_of(const AvgPool& given, int64_t first, int64_t last) {
  with_element(given.given.extent.element, [&](auto element) {
    using T = typename Pointee<decltype(element)>::Type;
    with_residual(given.given.kind, [&](auto kind) { avg_pool<T, static_cast<Residual>(kind.value)>(given, first, last); });
  });
}

// Convolutions are of fp32 and of bfloat16.
template <typename Function>
FUSED_RESNET_INLINE Function* of_element(Element element, Function* of_fp32, Function* of_bfloat16) {
  return element == Element::kFloat ? of_fp32 : of_bfloat16;
}

void pack_weight_of(const PackWeight& given, int64_t first, int64_t last) {
  of_element(given.element, pack_weight<float>, pack_weight<BFloat16>)(given, first, last);
}

void pointwise_forward_of(const ConvForward& given, int64_t first, int64_t last, void* scratch) {
  with_residual(given.norm.kind, [&](auto kind) {
    constexpr auto kResidual = static_cast<Residual>(kind.value);
    of_element(given.norm.extent.element, pointwise_forward<float, kResidual>, pointwise_forward<BFloat16, kResidual>)(given, first, last, scratch);
  });
}

int64_t pointwise_forward_scratch_of(const ConvForward& given) {
  return of_element(given.norm.extent.element, pointwise_forward_scratch<float>, pointwise_forward_scratch<BFloat16>)(given);
}

void pointwise_backward_of(const ConvBackward& given, int64_t first, int64_t last, void* scratch) {
  of_element(given.reduce.extent.element, pointwise_backward<float>, pointwise_backward<BFloat16>)(given, first, last, scratch);
}

int64_t pointwise_backward_scratch_of(const ConvBackward& given) {
  return of_element(given.reduce.extent.element, pointwise_backward_scratch<float>, pointwise_backward_scratch<BFloat16>)(given);
}

void window_forward_of(const ConvForward& given, int64_t first, int64_t last, void* scratch) {
  with_residual(given.norm.kind, [&](auto kind) {
    constexpr auto kResidual = static_cast<Residual>(kind.value);
    of_element(given.norm.extent.element, window_forward<float, kResidual>, window_forward<BFloat16, kResidual>)(given, first, last, scratch);
  });
}

int64_t window_forward_scratch_of(const ConvForward& given) {
  return of_element(given.norm.extent.element, window_forward_scratch<float>, window_forward_scratch<BFloat16>)(given);
}

void window_backward_of(const ConvBackward& given, int64_t first, int64_t last, void* scratch) {
  of_element(given.reduce.extent.element, window_backward<float>, window_backward<BFloat16>)(given, first, last, scratch);
}

int64_t window_backward_scratch_of(const ConvBackward& given) {
  return of_element(given.reduce.extent.element, window_backward_scratch<float>, window_backward_scratch<BFloat16>)(given);
}

void weight_gradient_of(const WeightGradient& given, int64_t first, int64_t last, void* scratch) {
  of_element(given.element, weight_gradient<float>, weight_gradient<BFloat16>)(given, first, last, scratch);
}

int64_t weight_gradient_scratch_of(const WeightGradient& given) {
  return of_element(given.element, weight_gradient_scratch<float>, weight_gradient_scratch<BFloat16>)(given);
}

void merge_weight_of(const MergeWeight& given, int64_t first, int64_t last) {
  of_element(given.element, merge_weight<float>, merge_weight<BFloat16>)(given, first, last);
}

}  // namespace

const Kernels kKernels = {
    norm_add_act_of, moments_of,    merge_moments, backward_reduce_of, merge_sums,
    prepare_apply,   backward_apply_of, max_pool_of,   avg_pool_of,
    pack_weight_of,
    pointwise_forward_of, pointwise_backward_of, pointwise_forward_scratch_of, pointwise_backward_scratch_of,
    window_forward_of, window_backward_of, window_forward_scratch_of, window_backward_scratch_of,
    weight_gradient_of, weight_gradient_scratch_of, merge_weight_of,
};

}  // namespace FUSED_RESNET_ISA
}  // namespace fused_resnet
