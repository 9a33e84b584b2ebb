// Runs the threads of a block as fibers of one host thread, a block at a time, and checks how they meet. See docs/simt.md.
#include <link.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <string>

#include "engine_state.h"

#ifdef SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// What kernels see as constants, under the names that the compiler gives them there.
uint3 simt_thread_index, simt_block_index;
dim3 simt_block_extent __asm__("blockDim"), simt_grid_extent __asm__("gridDim");
int simt_warp_size __asm__("warpSize") = 32;

__asm__(R"(
  .text
  .globl simt_switch, simt_resume
  .hidden simt_switch, simt_resume
  .type simt_switch, @function
  .type simt_resume, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
simt_resume:
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace simt {
std::mutex launching;
Fiber fibers[kMaxThreads];
Fiber* current = nullptr;
char* stacks = nullptr;
Launch active;
unsigned threads;
uint64_t block;
void* host_stack_pointer;
#ifdef SIMT_ASAN
const void* host_stack;
size_t host_stack_bytes;
#endif
Shared shared;

int failure;
int failed_thread;
std::string failure_text;
const void* failure_site;
MachineFault fault;
pthread_t launching_thread;

namespace {

unsigned guarded = 0;  // stacks whose guard is in place

struct {
  unsigned arrived, nonzero;
  int result;
  Kind kind;
} barrier;

uint16_t ready[kMaxThreads];  // a ring
unsigned ready_begin, ready_count;
uint64_t random_state = 0;  // 0: first come, first served

std::string message;  // of the last launch that failed
int remembered_error = cudaSuccess;
int multiprocessors = 16;
unsigned launches = 0;

std::map<const void*, int>& allowed_dynamic_bytes() {
  static std::map<const void*, int> map;
  return map;
}

uint64_t random_below(uint64_t bound) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (random_state >> 11) % bound;
}

// ---- fibers ----------------------------------------------------------------------------------------------------------

void enqueue(Fiber& fiber) {
  fiber.state = State::kReady;
  ready[(ready_begin + ready_count++) % kMaxThreads] = static_cast<uint16_t>(&fiber - fibers);
}

// The fiber that runs next; nullptr if none can.
Fiber* dequeue() {
  if (ready_count == 0) return nullptr;
  uint16_t& first = ready[ready_begin];
  if (random_state) std::swap(first, ready[(ready_begin + random_below(ready_count)) % kMaxThreads]);
  ready_begin = (ready_begin + 1) % kMaxThreads;
  --ready_count;
  return &fibers[first];
}

// Leaves the stack that runs, whose stack pointer goes to *save, for that of a fiber, or of the host for nullptr.
void switch_to(Fiber* next, void** save, bool ended) {
  current = next;
  if (next) simt_thread_index = next->index;
#ifdef SIMT_ASAN
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(
      ended ? nullptr : &fake_stack, next ? stack_of(next - fibers) : host_stack, next ? kStackBytes : host_stack_bytes);
#else
  (void)ended;
#endif
  simt_switch(save, next ? next->stack_pointer : host_stack_pointer);
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// Hands over from a fiber that waits or has ended.
void hand_over(bool ended) {
  Fiber* self = current;
  switch_to(dequeue(), &self->stack_pointer, ended);
}

void run_fiber() {
#ifdef SIMT_ASAN
  const void* from;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &from, &bytes);
  if (!host_stack) host_stack = from, host_stack_bytes = bytes;
#endif
  active.thread(active.closure);
  current->state = State::kEnded;
  hand_over(true);
}

void prepare(unsigned thread) {
  Fiber& fiber = fibers[thread];
  fiber.index = index_of(thread, active.block);
  // As simt_switch leaves a stack: six registers, the address to return to, and the place of a return address above it, so
  // that the stack is aligned as at a call, and a backtrace ends.
  void** top = reinterpret_cast<void**>(stack_of(thread) + kStackBytes) - 8;
  std::fill_n(top, 8, nullptr);
  top[6] = reinterpret_cast<void*>(&run_fiber);
  fiber.stack_pointer = top;
  enqueue(fiber);
}

bool guard_stacks() {
  if (!stacks) {
    void* memory = mmap(
        nullptr, kMaxThreads * (kGuardBytes + kStackBytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return false;
    stacks = static_cast<char*>(memory);
  }
  for (; guarded < threads; ++guarded) {
    if (mprotect(stack_of(guarded) - kGuardBytes, kGuardBytes, PROT_NONE) != 0) return false;
  }
  return true;
}

#ifdef SIMT_ASAN
// AddressSanitizer ends the process; its stack trace names the kernel, this the thread.
void on_report(const char*) {
  if (in_kernel()) fprintf(stderr, "simt: in %s\n", thread_text(block, static_cast<unsigned>(current - fibers)).c_str());
}
#endif

// ---- shared memory ---------------------------------------------------------------------------------------------------

int find_module(dl_phdr_info* module, size_t, void* result) {
  const auto inside = reinterpret_cast<ElfW(Addr)>(&find_module);
  const ElfW(Phdr)* tls = nullptr;
  bool found = false;
  for (int i = 0; i < module->dlpi_phnum; ++i) {
    const ElfW(Phdr) & part = module->dlpi_phdr[i];
    const ElfW(Addr) begin = module->dlpi_addr + part.p_vaddr;
    if (part.p_type == PT_LOAD && inside >= begin && inside < begin + part.p_memsz) found = true;
    if (part.p_type == PT_TLS) tls = &part;
  }
  if (found && tls) *static_cast<Shared*>(result) = {static_cast<char*>(module->dlpi_tls_data), tls->p_memsz};
  return found;
}

Shared find_shared() {
  Shared found = {};
  *const_cast<volatile char*>(simt_dynamic_shared) = 0;  // the segment is allocated when it is first used
  dl_iterate_phdr(&find_module, &found);
  return found;
}

// Fills with what is a NaN as float, double, half and bfloat16, and another integer in each of 15 blocks.
void poison(char* begin, char* end) {
  const auto word = static_cast<uint16_t>(0xfff1 + (block + launches) % 15);
  std::memset(begin, 0xff, end - begin);
  for (char* p = begin; p + sizeof word <= end; p += sizeof word) std::memcpy(p, &word, sizeof word);
}

// ---- launches --------------------------------------------------------------------------------------------------------

// The bound of __launch_bounds__, which stands before the kernel as that many no-ops; none: 1024. What aligns functions may add
// fewer than a warp's worth.
unsigned bound_of(const void* kernel) {
  const auto code = static_cast<const unsigned char*>(kernel);
  unsigned count = 0;
  while (count < kMaxThreads && code[-1 - static_cast<int>(count)] == 0x90) ++count;
  count = count / kLanes * kLanes;
  return count ? count : kMaxThreads;
}

int check(const Launch& launch) {
  const Dimensions grid = launch.grid, block = launch.block;
  const auto product = static_cast<uint64_t>(block.x) * block.y * block.z;
  const auto dynamic = allowed_dynamic_bytes().find(launch.kernel);
  const int dynamic_limit = dynamic == allowed_dynamic_bytes().end() ? kDefaultDynamicBytes : dynamic->second;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || product == 0) return cudaErrorInvalidConfiguration;
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  if (block.x > 1024 || block.y > 1024 || block.z > 64 || product > kMaxThreads) return cudaErrorInvalidConfiguration;
  if (launch.dynamic_bytes > static_cast<size_t>(dynamic_limit)) return cudaErrorInvalidValue;
  if (product > bound_of(launch.kernel)) return cudaErrorLaunchOutOfResources;
  return cudaSuccess;
}

void run_block() {
  simt_block_index = index_of(block, active.grid);
  char* const dynamic_end = simt_dynamic_shared + active.dynamic_bytes;
  poison(shared.begin, dynamic_end);
  poison(simt_dynamic_shared_end, shared.begin + shared.bytes);
  barrier = {};
  ready_begin = ready_count = 0;
  for (unsigned t = 0; t < threads; ++t) prepare(t);
  race::begin_block();
  switch_to(dequeue(), &host_stack_pointer, false);
  const auto has_ended = [](const Fiber& fiber) { return fiber.state == State::kEnded; };
  if (!failure && !std::all_of(fibers, fibers + threads, has_ended)) {
    failure = cudaErrorLaunchFailure;
    failure_text = deadlock_text();
  }
}

}  // namespace

// By its stack: other host threads may run what calls this at the same time.
bool in_kernel() { return owner_of_stack(__builtin_frame_address(0)) >= 0; }
unsigned current_thread() { return static_cast<unsigned>(current - fibers); }
uint64_t current_block() { return block; }

int owner_of_stack(const void* address) {
  const auto p = static_cast<const char*>(address);
  if (p < stacks || p >= stack_of(kMaxThreads) - kGuardBytes) return -1;
  return static_cast<int>((p - stacks) / (kGuardBytes + kStackBytes));
}

void stop_launch(std::string why, const void* site) {
  failure = cudaErrorLaunchFailure;
  failed_thread = static_cast<int>(current_thread());
  failure_text = std::move(why);
  failure_site = site;
  void* abandoned;
  switch_to(nullptr, &abandoned, true);
  __builtin_unreachable();
}

void fence() { race::fence(); }

__attribute__((noinline)) int meet_block(Kind kind, bool predicate) {
  Fiber& self = *current;
  self.kind = kind;
  self.site = __builtin_return_address(0);
  if (barrier.arrived > 0 && barrier.kind != kind) {
    stop_launch(text("%s, while other threads of the block wait in %s", name_of(kind), name_of(barrier.kind)), self.site);
  }
  barrier.kind = kind;
  barrier.nonzero += predicate;
  self.state = State::kAtBlock;
  if (++barrier.arrived < threads) {
    hand_over(false);
    return barrier.result;
  }
  barrier = {0, 0, static_cast<int>(barrier.nonzero), kind};
  race::meet_block();
  for (unsigned t = 0; t < threads; ++t) {
    if (&fibers[t] != &self) enqueue(fibers[t]);
  }
  self.state = State::kReady;
  return barrier.result;
}

__attribute__((noinline)) uint64_t meet_warp(Kind kind, unsigned mask, uint64_t value, unsigned operand, int width) {
  Fiber& self = *current;
  const unsigned thread = current_thread(), lane = thread % kLanes, first = thread - lane;
  const unsigned lanes = std::min(kLanes, threads - first);
  self.kind = kind;
  self.mask = mask;
  self.value = value;
  self.site = __builtin_return_address(0);
  if (!(mask >> lane & 1)) stop_launch(text("%s: mask 0x%08x lacks lane %u, which calls", name_of(kind), mask, lane), self.site);
  if (lanes < kLanes && mask >> lanes) {
    const char* format = "%s: mask 0x%08x names lanes that the block, with %u in this warp, does not have";
    stop_launch(text(format, name_of(kind), mask, lanes), self.site);
  }
  if (width < 1 || width > static_cast<int>(kLanes) || (width & (width - 1))) {
    stop_launch(text("%s: width %d is not a power of two up to 32", name_of(kind), width), self.site);
  }
  const unsigned segment = lane & ~(width - 1u), segment_last = segment + width - 1;
  operand %= kLanes;
  self.source = lane;
  if (kind == Kind::kShuffle) self.source = segment | (operand & (width - 1u));
  if (kind == Kind::kShuffleUp && lane - segment >= operand) self.source = lane - operand;
  if (kind == Kind::kShuffleDown && lane + operand <= segment_last) self.source = lane + operand;
  if (kind == Kind::kShuffleXor && (lane ^ operand) <= segment_last) self.source = lane ^ operand;

  self.state = State::kAtWarp;
  Fiber* const warp = &fibers[first];
  for (int l = lanes - 1; l >= 0; --l) {  // from the last, which in the plain order comes last
    const bool there = warp[l].state == State::kAtWarp && warp[l].kind == kind && warp[l].mask == mask;
    if ((mask >> l & 1) && !there) {
      hand_over(false);
      return self.value;
    }
  }
  uint64_t values[kLanes], nonzero = 0;
  for (unsigned l = 0; l < lanes; ++l) {
    values[l] = warp[l].value;
    if ((mask >> l & 1) && values[l]) nonzero |= 1ull << l;
  }
  const bool shuffles = kind >= Kind::kShuffle;
  for (unsigned l = 0; l < lanes; ++l) {
    if (!(mask >> l & 1)) continue;
    if (shuffles && !(mask >> warp[l].source & 1)) {
      current = &warp[l];  // it is to blame
      stop_launch(text("%s: lane %u reads lane %u, which mask 0x%08x lacks", name_of(kind), l, warp[l].source, mask), warp[l].site);
    }
    warp[l].value = shuffles ? values[warp[l].source] : nonzero;
    if (&warp[l] != &self) enqueue(warp[l]);
  }
  self.state = State::kReady;
  if (kind == Kind::kSyncwarp) race::meet_warp(first, mask);
  return self.value;
}

int fail(int error) { return remembered_error = error; }

int last_error(bool clear) {
  const int error = remembered_error;
  if (clear) remembered_error = cudaSuccess;
  return error;
}

const char* last_message() { return message.c_str(); }

int allow_dynamic_bytes(const void* kernel, int bytes) {
  std::lock_guard<std::mutex> lock(launching);
  if (bytes < 0 || bytes > simt_dynamic_shared_end - simt_dynamic_shared) return fail(cudaErrorInvalidValue);
  allowed_dynamic_bytes()[kernel] = bytes;
  return cudaSuccess;
}

int device_attribute(int* value, int attribute, int device) {
  if (device != 0) return fail(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = kMaxThreads; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = kDefaultDynamicBytes; break;
    case cudaDevAttrWarpSize: *value = kLanes; break;
    case cudaDevAttrMultiProcessorCount: *value = multiprocessors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(simt_dynamic_shared_end - simt_dynamic_shared); break;
    default: return fail(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

int launch(const Launch& launch) {
  std::lock_guard<std::mutex> lock(launching);
  message.clear();
  if (const int error = check(launch)) return fail(error);
  active = launch;
  threads = launch.block.x * launch.block.y * launch.block.z;
  simt_block_extent = {launch.block.x, launch.block.y, launch.block.z};
  simt_grid_extent = {launch.grid.x, launch.grid.y, launch.grid.z};
  launching_thread = pthread_self();
  failure = cudaSuccess;
  failed_thread = -1;
  failure_text.clear();
  failure_site = nullptr;
  fault = {};
#ifdef SIMT_ASAN
  host_stack = nullptr;
  __asan_set_error_report_callback(on_report);
#endif
  if (!guard_stacks()) return fail(cudaErrorLaunchOutOfResources);
  ++launches;

  shared = find_shared();
  const uint64_t blocks = static_cast<uint64_t>(launch.grid.x) * launch.grid.y * launch.grid.z;
  uint64_t start = 0, step = 1;  // the i-th block to run is (start + i * step) % blocks
  if (random_state) {
    start = random_below(blocks);
    do step = 1 + random_below(blocks);
    while (std::gcd(step, blocks) != 1);
  }
#ifdef SIMT_ASAN
  char* const tail = simt_dynamic_shared + launch.dynamic_bytes;
  __asan_poison_memory_region(tail, simt_dynamic_shared_end - tail);
#endif
  race::begin_launch(threads, shared.begin, shared.bytes);
  {
    const Handlers handlers;
    for (uint64_t i = 0; i < blocks && !failure; ++i) {
      block = static_cast<uint64_t>((start + static_cast<unsigned __int128>(i) * step) % blocks);
      run_block();
    }
  }
  race::end_launch();
#ifdef SIMT_ASAN
  __asan_unpoison_memory_region(tail, simt_dynamic_shared_end - tail);
  if (failure) __asan_unpoison_memory_region(stacks, threads * (kGuardBytes + kStackBytes));  // of abandoned threads
#endif
  if (!failure) return cudaSuccess;
  if (fault.signal) failure_text = fault_text();
  const std::string where = failed_thread < 0 ? "block " + index_text(simt_block_index, launch.grid) : thread_text(block, failed_thread);
  message = kernel_text() + ": " + where + ": " + failure_text;
  if (failure_site) message += "\n  at " + site_text(failure_site);
  fprintf(stderr, "simt: %s\n", message.c_str());
  return fail(failure);
}

}  // namespace simt

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

// What was wrong with the last launch; empty if nothing was, or if it did not start.
SIMT_EXPORT const char* simt_last_message() { return simt::last_message(); }

// 0: blocks and threads run in order. Else in an order drawn from the seed, another in each launch.
SIMT_EXPORT void simt_set_seed(uint64_t seed) {
  std::lock_guard<std::mutex> lock(simt::launching);
  simt::random_state = seed * 0x9e3779b97f4a7c15u;  // odd: only 0 becomes 0
}

// What cudaDeviceGetAttribute says of the number of multiprocessors.
SIMT_EXPORT void simt_set_multiprocessors(int count) {
  std::lock_guard<std::mutex> lock(simt::launching);
  simt::multiprocessors = count;
}
