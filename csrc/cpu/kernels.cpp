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

template <typename T>
constexpr Convolutions convolutions = {
    pack_weight<T>,
    pointwise_forward<T>,
    pointwise_backward<T>,
    pointwise_forward_scratch<T>,
    pointwise_backward_scratch<T>,
    window_forward<T>,
    window_backward<T>,
    window_forward_scratch<T>,
    window_backward_scratch<T>,
    weight_gradient<T>,
    weight_gradient_scratch<T>,
    merge_weight<T>,
};

}  // namespace

// Those of fp32 are avx512's where AVX-512 is, and those of bfloat16 the portable ones where no instruction multiplies it: compiled once.
#define FUSED_RESNET_NUMBER_portable 0
#define FUSED_RESNET_NUMBER_avx2 1
#define FUSED_RESNET_NUMBER_avx512 2
#define FUSED_RESNET_NUMBER_avx512_bf16 3
#define FUSED_RESNET_NUMBER_amx 4
#define FUSED_RESNET_JOINED(a, b) a##b
#define FUSED_RESNET_NUMBER_OF(isa) FUSED_RESNET_JOINED(FUSED_RESNET_NUMBER_, isa)
#define FUSED_RESNET_NUMBER FUSED_RESNET_NUMBER_OF(FUSED_RESNET_ISA)

#if FUSED_RESNET_NUMBER == FUSED_RESNET_NUMBER_portable
const Convolutions kBFloat16Convolutions = convolutions<BFloat16>;
#elif FUSED_RESNET_NUMBER == FUSED_RESNET_NUMBER_avx512
const Convolutions kFloatConvolutions = convolutions<float>;
#endif
#if FUSED_RESNET_NUMBER <= FUSED_RESNET_NUMBER_avx512
constexpr const Convolutions *kOfFloat = &convolutions<float>, *kOfBFloat16 = &portable::kBFloat16Convolutions;
#else
constexpr const Convolutions *kOfFloat = &avx512::kFloatConvolutions, *kOfBFloat16 = &convolutions<BFloat16>;
#endif

const Kernels kKernels = {
    norm_add_act_of,   moments_of,  merge_moments, backward_reduce_of, merge_sums,  prepare_apply,
    backward_apply_of, max_pool_of, avg_pool_of,   kOfFloat,           kOfBFloat16,
};

}  // namespace FUSED_RESNET_ISA
}  // namespace fused_resnet
