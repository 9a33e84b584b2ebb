// A race detector for kernels: the callbacks that GCC's -fsanitize=thread puts before each access to memory, with an order of events
// that knows blocks, barriers and warps instead of locks.
//
// Two accesses to a byte by different threads, one of them a write, race unless one comes before the other:
//   - in one block, where a barrier lies between them;
//   - in one warp, where a collective of both lanes lies between them, or a chain of such;
//   - never in two blocks of a launch: csrc/ has no atomics, and the kernels' results must not depend on which block comes first.
// Each thread has the number of barriers passed and a clock; each lane of a warp knows how far the clocks of the others had come
// when it last met them. Of the reads of a byte since its last write the first kReaders are kept.
#include "simt.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <unordered_map>
#include <vector>

namespace simt {
namespace {

struct Access {
  unsigned block = 0, thread = 0;
  uint32_t barriers = 0, clock = 0;  // a clock of 0: no access
};

constexpr size_t kReaders = 4;

struct Byte {
  Access write;
  std::array<Access, kReaders> reads;
};

struct Clocks {
  uint32_t own = 1;
  std::array<uint32_t, kWarp> known{};  // of the lanes of the warp
};

std::unordered_map<uintptr_t, Byte> bytes;
std::vector<Clocks> clocks;
uint32_t barriers = 0;

bool before(const Access& earlier, const Position& now) {
  if (earlier.clock == 0) return true;
  if (earlier.block != now.block) return false;
  if (earlier.thread == now.thread || earlier.barriers < barriers) return true;
  return earlier.thread / kWarp == now.thread / kWarp && clocks[now.thread].known[earlier.thread % kWarp] >= earlier.clock;
}

void report(uintptr_t address, bool writes, const Access& other, bool other_writes) {
  char text[256];
  std::snprintf(text, sizeof text, "race in %s memory at 0x%lx: this %s and a %s by block %u thread %u are not ordered",
                in_shared_memory(address) ? "shared" : "global", static_cast<unsigned long>(address), writes ? "write" : "read",
                other_writes ? "write" : "read", other.block, other.thread);
  fail(text);
}

void access(const void* memory, size_t size, bool writes) {
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  if (!watched(begin)) return;
  if (past_dynamic_shared_memory(begin + size - 1)) fail("an access past the dynamic shared memory of the launch");
  const Position now = here();
  if (clocks.size() <= now.thread) clocks.resize(now.thread + 1);
  const Access access{now.block, now.thread, barriers, clocks[now.thread].own};
  for (uintptr_t address = begin; address < begin + size; ++address) {
    Byte& byte = bytes[address];
    if (!before(byte.write, now)) report(address, writes, byte.write, true);
    if (writes) {
      for (const Access& read : byte.reads) {
        if (!before(read, now)) report(address, writes, read, false);
      }
      byte.write = access;
      byte.reads = {};
    } else {
      // In the place of one that is before this: whoever comes after this comes after that, too.
      const auto place = std::find_if(byte.reads.begin(), byte.reads.end(), [&](const Access& read) { return before(read, now); });
      if (place != byte.reads.end()) *place = access;
    }
  }
}

void begin_launch() { bytes.clear(); }

void begin_block() {
  // Shared memory is another block's from now on.
  for (auto at = bytes.begin(); at != bytes.end();) at = in_shared_memory(at->first) ? bytes.erase(at) : std::next(at);
  clocks.assign(clocks.size(), Clocks{});
  barriers = 0;
}

void meet_at_barrier() { ++barriers; }

void meet_in_warp(unsigned warp, unsigned mask) {
  if (clocks.size() < (warp + 1) * kWarp) clocks.resize((warp + 1) * kWarp);
  std::array<uint32_t, kWarp> joined{};
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Clocks& mine = clocks[warp * kWarp + lane];
    for (unsigned other = 0; other < kWarp; ++other) joined[other] = std::max(joined[other], mine.known[other]);
    joined[lane] = std::max(joined[lane], mine.own);
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    clocks[warp * kWarp + lane].known = joined;
    ++clocks[warp * kWarp + lane].own;
  }
}

}  // namespace

Order order{begin_launch, begin_block, meet_at_barrier, meet_in_warp};

}  // namespace simt

extern "C" {
#define ACCESSES(size)                                                           \
  void __tsan_read##size(void* at) { simt::access(at, size, false); }            \
  void __tsan_write##size(void* at) { simt::access(at, size, true); }            \
  void __tsan_unaligned_read##size(void* at) { simt::access(at, size, false); }  \
  void __tsan_unaligned_write##size(void* at) { simt::access(at, size, true); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
#undef ACCESSES
void __tsan_read_range(void* at, unsigned long size) { simt::access(at, size, false); }
void __tsan_write_range(void* at, unsigned long size) { simt::access(at, size, true); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
// Reference counts of the code around the kernels. In a kernel an atomic would be an order of events that this does not know.
unsigned __tsan_atomic32_fetch_add(volatile unsigned* at, unsigned value, int) {
  if (simt::watched(reinterpret_cast<uintptr_t>(at))) simt::fail("an atomic operation, which the race detector does not model");
  return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);
}
}
