// Finds races: pairs of accesses to a byte by different threads, at least one of them a write and at least one not atomic, that
// nothing orders. The kernels are compiled with -fsanitize=thread, whose callbacks these are.
//
// What orders, in the words of PTX's memory model:
// - a barrier of the block: what its threads did before it, before what they do after it. It ends an *epoch* of the block.
// - __syncwarp: likewise, among the lanes of its mask. It ends an interval of each lane's *time*. Shuffles and votes order nothing.
// - a fence, an atomic write, an atomic read of its value by another thread, another fence: what came before the first fence,
//   before what comes after the second. Barriers may stand between a fence and its atomic operation.
// Blocks of a launch are ordered by the last alone.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "simt_internal.h"

namespace simt::race {
namespace {

constexpr unsigned kLanes = 32;
constexpr uintptr_t kWordBytes = 8, kPageWords = 64, kPageBytes = kWordBytes * kPageWords;

// ---- what a thread knows of the past -----------------------------------------------------------------------------------

using Times = std::array<uint32_t, kLanes>;

// Of one block: all of the epochs before `epoch`, and of that one what the lanes did up to these times.
struct Past {
  uint32_t epoch;
  std::map<unsigned, Times> warps;
};
using Knowledge = std::map<uint64_t, Past>;  // by block
using Known = std::shared_ptr<const Knowledge>;  // nullptr: nothing

void raise_to(Times& times, const Times& other) {
  for (unsigned lane = 0; lane < kLanes; ++lane) times[lane] = std::max(times[lane], other[lane]);
}

void add(Knowledge& sum, uint64_t block, const Past& past) {
  const auto [entry, is_new] = sum.emplace(block, past);
  Past& present = entry->second;
  if (is_new || present.epoch > past.epoch) return;
  if (present.epoch < past.epoch) {
    present = past;
    return;
  }
  for (const auto& [warp, times] : past.warps) raise_to(present.warps.emplace(warp, times).first->second, times);
}

// The union of what several threads know.
class Union {
 public:
  void add(const Known& known) {
    if (!known || known == last_) return;
    if (!last_) {
      last_ = known;
      return;
    }
    if (!sum_) sum_ = std::make_shared<Knowledge>(*last_);
    for (const auto& [block, past] : *known) race::add(*sum_, block, past);
    last_ = known;
  }
  Known result() const { return sum_ ? sum_ : last_; }

 private:
  Known last_;
  std::shared_ptr<Knowledge> sum_;
};

Known join(const Known& a, const Known& b) {
  Union both;
  both.add(a);
  both.add(b);
  return both.result();
}

struct Thread {
  Times times;     // of the lanes of its warp, in this epoch; its own entry is its own time
  Known others;    // of other blocks, and through them or through fences of other warps of this one
  Known released;  // what it knew at its last fence: its atomic writes pass it on
  Known acquired;  // what its atomic reads were passed: known from its next fence on
};

std::vector<Thread> threads;
uint32_t epoch;

// ---- who accessed what --------------------------------------------------------------------------------------------------

struct Access {
  uint64_t block;
  const void* site;
  uint32_t epoch, time;
  uint16_t thread;
  uint8_t bytes;  // of the word: a bit each
  bool is_write, is_atomic;
};

// Accesses that a later one could still race with.
struct Word {
  std::vector<Access> writes, reads;
};
struct Page {
  Word words[kPageWords];
};

// Words by address.
class Shadow {
 public:
  Word& word_at(uintptr_t address) {
    const uintptr_t number = address / kPageBytes;
    if (!last_page_ || number != last_number_) {
      std::unique_ptr<Page>& page = pages_[number];
      if (!page) page = std::make_unique<Page>();
      last_number_ = number;
      last_page_ = page.get();
    }
    return last_page_->words[address / kWordBytes % kPageWords];
  }
  void clear() {
    pages_.clear();
    last_page_ = nullptr;
  }

 private:
  struct Page {
    Word words[kPageWords];
  };
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  uintptr_t last_number_ = 0;
  Page* last_page_ = nullptr;
};

// Memory, and what the atomic writes to an address passed on. What is shared by a block ends with it.
struct Memory {
  Shadow shadow;
  std::unordered_map<uintptr_t, Known> passed;
  void clear() {
    shadow.clear();
    passed.clear();
  }
} global_memory, shared_memory;
uintptr_t shared_begin, shared_end;

Memory& memory_at(uintptr_t address) { return address >= shared_begin && address < shared_end ? shared_memory : global_memory; }

bool happened_before(const Access& access) {
  const Thread& self = threads[current_thread()];
  const unsigned warp = access.thread / kLanes, lane = access.thread % kLanes;
  if (access.block == current_block()) {
    if (access.epoch < epoch || access.thread == current_thread()) return true;
    if (warp == current_thread() / kLanes && self.times[lane] >= access.time) return true;
  }
  if (!self.others) return false;
  const auto past = self.others->find(access.block);
  if (past == self.others->end() || past->second.epoch < access.epoch) return false;
  if (past->second.epoch > access.epoch) return true;
  const auto times = past->second.warps.find(warp);
  return times != past->second.warps.end() && times->second[lane] >= access.time;
}

const char* name_of(const Access& access) {
  if (access.is_atomic) return access.is_write ? "atomic write" : "atomic read";
  return access.is_write ? "write" : "read";
}

[[noreturn]] void report(const Access& earlier, const Access& later, uintptr_t word) {
  const auto byte = static_cast<unsigned>(__builtin_ctz(earlier.bytes & later.bytes));
  stop_launch(text("race: %s of %s, which nothing orders with the %s by %s at %s", name_of(later),
                   memory_text(reinterpret_cast<const void*>(word + byte)).c_str(), name_of(earlier),
                   thread_text(earlier.block, earlier.thread).c_str(), site_text(earlier.site).c_str()),
              later.site);
}

// Checks the accesses against a new one. Those are forgotten for which the new one stands: whatever is not ordered with them will
// not be ordered with it either, and conflicts with it too.
void check(std::vector<Access>& accesses, const Access& later, uintptr_t word) {
  auto kept = accesses.begin();
  for (Access& earlier : accesses) {
    if (earlier.bytes & later.bytes) {
      const bool conflict = (earlier.is_write || later.is_write) && !(earlier.is_atomic && later.is_atomic);
      const bool before = happened_before(earlier);
      if (conflict && !before) report(earlier, later, word);
      // What an atomic operation has read, it comes after: a counter may be reset by whoever drew the last ticket.
      const bool after = before || (earlier.is_atomic && later.is_atomic);
      if (after && (later.is_write || !earlier.is_write) && (earlier.is_atomic || !later.is_atomic)) {
        earlier.bytes &= static_cast<uint8_t>(~later.bytes);
      }
    }
    if (earlier.bytes) *kept++ = earlier;
  }
  accesses.erase(kept, accesses.end());
}

// Reads don't race with reads, so only those of this block are looked at, which are the last; and two reads from different warps
// in this epoch stand for all others: no thread's writes are ordered with both.
void remember_read(std::vector<Access>& reads, const Access& read) {
  auto first = reads.end();
  int other_warp = -1;
  while (first != reads.begin() && first[-1].block == read.block) {
    --first;
    if (first->epoch != read.epoch || first->is_atomic || (first->bytes & read.bytes) != read.bytes) continue;
    if (first->thread == read.thread && first->time == read.time) return;
    if (other_warp >= 0 && first->thread / kLanes != other_warp) return;
    other_warp = first->thread / kLanes;
  }
  auto kept = first;
  for (auto earlier = first; earlier != reads.end(); ++earlier) {
    if ((earlier->bytes & read.bytes) && happened_before(*earlier) && (earlier->is_atomic || !read.is_atomic)) {
      earlier->bytes &= static_cast<uint8_t>(~read.bytes);
    }
    if (earlier->bytes) *kept++ = *earlier;
  }
  reads.erase(kept, reads.end());
  reads.push_back(read);
}

bool busy = false;  // the containers here use memcpy, which is watched too

void on_access(const volatile void* pointer, size_t bytes, bool is_write, bool is_atomic, const void* site) {
  if (!in_kernel() || busy || bytes == 0) return;
  const int owner = owner_of_stack(const_cast<const void*>(pointer));
  const unsigned self = current_thread();
  if (owner == static_cast<int>(self)) return;
  busy = true;
  if (owner >= 0) stop_launch(text("access to a local variable of thread %d", owner), site);
  const auto begin = reinterpret_cast<uintptr_t>(pointer), end = begin + bytes;
  for (uintptr_t address = begin & ~(kWordBytes - 1); address < end; address += kWordBytes) {
    const uintptr_t skipped = begin > address ? begin - address : 0, left = std::min(end - address, kWordBytes);
    const auto mask = static_cast<uint8_t>((0xffu << skipped) & (0xffu >> (kWordBytes - left)));
    const Access access = {
        current_block(), site, epoch, threads[self].times[self % kLanes], static_cast<uint16_t>(self), mask, is_write, is_atomic};
    Word& word = memory_at(address).shadow.word_at(address);
    check(word.writes, access, address);
    if (is_write) {
      check(word.reads, access, address);
      word.writes.push_back(access);
    } else {
      remember_read(word.reads, access);
    }
  }
  busy = false;
}

// An atomic operation passes on what was known at the last fence, and is passed what those before it did.
void on_atomic(const volatile void* pointer, size_t bytes, bool reads, bool writes, const void* site) {
  if (!in_kernel() || busy) return;
  on_access(pointer, bytes, writes, true, site);
  busy = true;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  Thread& self = threads[current_thread()];
  Known& passed = memory_at(address).passed[address];
  if (reads) self.acquired = join(self.acquired, passed);
  if (writes) passed = reads ? join(passed, self.released) : self.released;
  busy = false;
}

void begin_epoch(Thread& thread, unsigned lane) {
  thread.times.fill(0);
  thread.times[lane] = 1;
}

// The threads from `first` whose bit is set know, from here on, what any of them knew.
template <typename Includes>
void share(unsigned first, unsigned end, Includes&& includes) {
  Union others, released, acquired;
  for (unsigned t = first; t < end; ++t) {
    if (!includes(t)) continue;
    others.add(threads[t].others);
    released.add(threads[t].released);
    acquired.add(threads[t].acquired);
  }
  const Known all_others = others.result(), all_released = released.result(), all_acquired = acquired.result();
  for (unsigned t = first; t < end; ++t) {
    if (!includes(t)) continue;
    threads[t].others = all_others;
    threads[t].released = all_released;
    threads[t].acquired = all_acquired;
  }
}

}  // namespace

void begin_launch(unsigned count, const char* shared, size_t shared_bytes) {
  threads.assign(count, Thread{});
  shared_begin = reinterpret_cast<uintptr_t>(shared);
  shared_end = shared_begin + shared_bytes;
  busy = false;
}

void end_launch() {
  threads.clear();
  global_memory.clear();
  shared_memory.clear();
}

void begin_block() {
  epoch = 0;
  shared_memory.clear();
  for (unsigned t = 0; t < threads.size(); ++t) {
    threads[t] = Thread{};
    begin_epoch(threads[t], t % kLanes);
  }
}

void meet_block() {
  busy = true;
  ++epoch;
  share(0, static_cast<unsigned>(threads.size()), [](unsigned) { return true; });
  for (unsigned t = 0; t < threads.size(); ++t) begin_epoch(threads[t], t % kLanes);
  busy = false;
}

void meet_warp(unsigned first, unsigned mask) {
  busy = true;
  const auto end = std::min(first + kLanes, static_cast<unsigned>(threads.size()));
  const auto includes = [&](unsigned t) { return (mask >> (t - first) & 1) != 0; };
  share(first, end, includes);
  Times all = {};
  for (unsigned t = first; t < end; ++t) {
    if (includes(t)) raise_to(all, threads[t].times);
  }
  for (unsigned t = first; t < end; ++t) {
    if (!includes(t)) continue;
    threads[t].times = all;
    ++threads[t].times[t - first];
  }
  busy = false;
}

void fence() {
  busy = true;
  const unsigned thread = current_thread();
  Thread& self = threads[thread];
  self.others = join(self.others, self.acquired);
  self.acquired = nullptr;
  auto known = self.others ? std::make_shared<Knowledge>(*self.others) : std::make_shared<Knowledge>();
  add(*known, current_block(), {epoch, {{thread / kLanes, self.times}}});
  self.released = known;
  ++self.times[thread % kLanes];
  busy = false;
}

}  // namespace simt::race

// ---- what the compiler calls ---------------------------------------------------------------------------------------------

using simt::race::on_access;
using simt::race::on_atomic;

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

#define SIMT_ACCESSES(bytes)                                                                           \
  void __tsan_read##bytes(void* p) { on_access(p, bytes, false, false, __builtin_return_address(0)); } \
  void __tsan_write##bytes(void* p) { on_access(p, bytes, true, false, __builtin_return_address(0)); }
#define SIMT_UNALIGNED_ACCESSES(bytes)                                                                           \
  void __tsan_unaligned_read##bytes(void* p) { on_access(p, bytes, false, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##bytes(void* p) { on_access(p, bytes, true, false, __builtin_return_address(0)); }
SIMT_ACCESSES(1)
SIMT_ACCESSES(2)
SIMT_ACCESSES(4)
SIMT_ACCESSES(8)
SIMT_ACCESSES(16)
SIMT_UNALIGNED_ACCESSES(2)
SIMT_UNALIGNED_ACCESSES(4)
SIMT_UNALIGNED_ACCESSES(8)
SIMT_UNALIGNED_ACCESSES(16)
void __tsan_read_range(void* p, size_t bytes) { on_access(p, bytes, false, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { on_access(p, bytes, true, false, __builtin_return_address(0)); }
void __tsan_vptr_read(void** p) { on_access(p, sizeof *p, false, false, __builtin_return_address(0)); }
void __tsan_vptr_update(void** p, void*) { on_access(p, sizeof *p, true, false, __builtin_return_address(0)); }

// Orders stronger than relaxed are those of the host's own code: kernels have none.
#define SIMT_CHANGE(T, bits, name)                                    \
  T __tsan_atomic##bits##_fetch_##name(volatile T* p, T value, int) { \
    on_atomic(p, sizeof *p, true, true, __builtin_return_address(0)); \
    return __atomic_fetch_##name(p, value, __ATOMIC_SEQ_CST);         \
  }
#define SIMT_EXCHANGE(T, bits, strength, weak)                                                                   \
  int __tsan_atomic##bits##_compare_exchange_##strength(volatile T* p, T* expected, T value, int, int) {         \
    const bool done = __atomic_compare_exchange_n(p, expected, value, weak, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
    on_atomic(p, sizeof *p, true, done, __builtin_return_address(0));                                            \
    return done;                                                                                                 \
  }
#define SIMT_ATOMICS(T, bits)                                          \
  T __tsan_atomic##bits##_load(const volatile T* p, int) {             \
    on_atomic(p, sizeof *p, true, false, __builtin_return_address(0)); \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                       \
  }                                                                    \
  void __tsan_atomic##bits##_store(volatile T* p, T value, int) {      \
    on_atomic(p, sizeof *p, false, true, __builtin_return_address(0)); \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                      \
  }                                                                    \
  T __tsan_atomic##bits##_exchange(volatile T* p, T value, int) {      \
    on_atomic(p, sizeof *p, true, true, __builtin_return_address(0));  \
    return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);            \
  }                                                                    \
  SIMT_CHANGE(T, bits, add)                                            \
  SIMT_CHANGE(T, bits, sub)                                            \
  SIMT_CHANGE(T, bits, and)                                            \
  SIMT_CHANGE(T, bits, or)                                             \
  SIMT_CHANGE(T, bits, xor)                                            \
  SIMT_EXCHANGE(T, bits, strong, false)                                \
  SIMT_EXCHANGE(T, bits, weak, true)
SIMT_ATOMICS(uint8_t, 8)
SIMT_ATOMICS(uint16_t, 16)
SIMT_ATOMICS(uint32_t, 32)
SIMT_ATOMICS(uint64_t, 64)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

// The compiler leaves these to interceptors; the linker's --wrap leads the module's calls here.
void* __real_memcpy(void*, const void*, size_t);
void* __real_memmove(void*, const void*, size_t);
void* __real_memset(void*, int, size_t);
void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
  on_access(from, bytes, false, false, __builtin_return_address(0));
  on_access(to, bytes, true, false, __builtin_return_address(0));
  return __real_memcpy(to, from, bytes);
}
void* __wrap_memmove(void* to, const void* from, size_t bytes) {
  on_access(from, bytes, false, false, __builtin_return_address(0));
  on_access(to, bytes, true, false, __builtin_return_address(0));
  return __real_memmove(to, from, bytes);
}
void* __wrap_memset(void* to, int value, size_t bytes) {
  on_access(to, bytes, true, false, __builtin_return_address(0));
  return __real_memset(to, value, bytes);
}

}  // extern "C"
