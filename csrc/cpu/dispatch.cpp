#include "dispatch.h"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fused_resnet {
namespace {

struct InstructionSet {
  const Kernels* kernels;  // nullptr where the build left it out
  bool (*runs)();

  bool available() const { return kernels && runs(); }
};

#if defined(__x86_64__)
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}

bool runs_avx512_bf16() { return runs_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Linux saves the tiles of those processes alone that asked for it: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
bool runs_amx() {
#if defined(__linux__)
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
  constexpr long kRequest = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if (!runs_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (d & kBFloat16) && (d & kTiles) && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// From the plainest to the best. fused_resnet.native.INSTRUCTION_SETS has their names.
const InstructionSet kInstructionSets[] = {
    {&portable::kKernels, [] { return true; }},
#if defined(__x86_64__)
    {&avx2::kKernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
    {&avx512::kKernels, runs_avx512},
    {&avx512_bf16::kKernels, runs_avx512_bf16},
    {&amx::kKernels, runs_amx},
#endif
};
constexpr int64_t kCount = sizeof kInstructionSets / sizeof *kInstructionSets;

int64_t best() {
  int64_t number = kCount - 1;
  while (!kInstructionSets[number].available()) --number;
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
  if (number >= kCount || !kInstructionSets[number].available()) return -1;
  in_use() = number;
  return number;
}

}  // namespace fused_resnet
