#include "dispatch.h"

#include <atomic>

namespace fused_resnet {
namespace {

struct InstructionSet {
  const Kernels* kernels;
  bool (*runs)();
};

// From the plainest to the best. fused_resnet.native.INSTRUCTION_SETS has their names.
const InstructionSet kInstructionSets[] = {
    {&portable::kKernels, [] { return true; }},
#if defined(__x86_64__)
    {&avx2::kKernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
    {&avx512::kKernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512dq");
     }},
#endif
};
constexpr int64_t kCount = sizeof kInstructionSets / sizeof *kInstructionSets;

int64_t best() {
  int64_t number = kCount - 1;
  while (!kInstructionSets[number].runs()) --number;
  return number;
}

std::atomic<int64_t>& in_use() {
  static std::atomic<int64_t> number{best()};
  return number;
}

}  // namespace

const Kernels& kernels() { return *kInstructionSets[in_use().load(std::memory_order_relaxed)].kernels; }

int64_t use_instruction_set(int64_t number) {
  if (number < 0) number = best();
  if (number >= kCount || !kInstructionSets[number].runs()) return -1;
  in_use() = number;
  return number;
}

}  // namespace fused_resnet
