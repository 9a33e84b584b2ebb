#include "cuda_runtime.h"

#include <cstdio>
#include <memory>
#include <random>
#include <sstream>
#include <vector>

#include <cxxabi.h>
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;
__shared__ unsigned char dynamic_shared_memory[kMostDynamicSharedMemory];

namespace simt {
namespace {

enum class State { kRunnable, kAtBarrier, kAtCollective, kDone };

constexpr size_t kStack = 256 << 10;

// A stack with a page before it that can't be touched.
struct Stack {
  char* begin;
  size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));

  Stack() {
    void* memory = mmap(nullptr, guard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) throw std::bad_alloc();
    begin = static_cast<char*>(memory) + guard;
  }
  Stack(const Stack&) = delete;
  ~Stack() { munmap(begin - guard, guard + kStack); }
};

struct Thread {
  Stack stack;
  ucontext_t context;
  State state;
  Kind kind;  // this and all that follow: of the collective that it waits at
  unsigned mask;
  uint64_t value;
  int argument;
};

std::vector<std::unique_ptr<Thread>> threads;  // kept from launch to launch, for their stacks
unsigned thread_count = 0, running = 0, warp_lanes = 0;
ucontext_t scheduler;
const std::function<void()>* body = nullptr;
std::string kernel_name, message;
bool failed = false, in_kernel = false;
int multiprocessors = 2;
unsigned seed = 0;

#if defined(__SANITIZE_ADDRESS__)
void* fake_stack_of_scheduler = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_size = 0;
void leave_scheduler(const Thread& thread) {
  __sanitizer_start_switch_fiber(&fake_stack_of_scheduler, thread.stack.begin, kStack);
}
void enter_scheduler() { __sanitizer_finish_switch_fiber(fake_stack_of_scheduler, nullptr, nullptr); }
void leave_thread(void** keep) { __sanitizer_start_switch_fiber(keep, scheduler_stack, scheduler_size); }
void enter_thread(void* kept) { __sanitizer_finish_switch_fiber(kept, &scheduler_stack, &scheduler_size); }
#else
void leave_scheduler(const Thread&) {}
void enter_scheduler() {}
void leave_thread(void**) {}
void enter_thread(void*) {}
#endif

// Gives the processor back; returns when this thread is to go on.
void yield() {
  Thread& self = *threads[running];
  void* fake_stack = nullptr;
  leave_thread(&fake_stack);
  swapcontext(&self.context, &scheduler);
  enter_thread(fake_stack);
}

void run_thread() {
  enter_thread(nullptr);
  (*body)();
  threads[running]->state = State::kDone;
  leave_thread(nullptr);
  setcontext(&scheduler);
}

void resume(unsigned t) {
  running = t;
  threadIdx = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y));
  leave_scheduler(*threads[t]);
  swapcontext(&scheduler, &threads[t]->context);
  enter_scheduler();
}

std::string place(unsigned t) {
  std::ostringstream text;
  text << "block " << blockIdx.x << "," << blockIdx.y << "," << blockIdx.z << " thread " << t;
  return text.str();
}

const char* name_of(Kind kind) { return kind == Kind::kShuffleXor ? "__shfl_xor_sync" : "__syncwarp"; }

// ---- shared memory ---------------------------------------------------------------------------------------------------------

thread_local char anchor;  // the segment of this module is allocated when one of its variables is first used

struct Segment {
  char* begin = nullptr;
  size_t size = 0;
};

// The thread-local variables of this module.
Segment shared_memory() {
  anchor = 0;
  Segment found;
  const auto look = [](dl_phdr_info* info, size_t, void* to) {
    auto* segment = static_cast<Segment*>(to);
    const char* data = static_cast<const char*>(info->dlpi_tls_data);
    for (int i = 0; data && i < info->dlpi_phnum; ++i) {
      const auto& header = info->dlpi_phdr[i];
      if (header.p_type == PT_TLS && &anchor >= data && &anchor < data + header.p_memsz) {
        *segment = {const_cast<char*>(data), header.p_memsz};
        return 1;
      }
    }
    return 0;
  };
  dl_iterate_phdr(look, &found);
  return found;
}

Segment segment;

// ---- waiting ---------------------------------------------------------------------------------------------------------------

bool release_barrier() {
  for (unsigned t = 0; t < thread_count; ++t) {
    if (threads[t]->state != State::kAtBarrier) return false;
  }
  for (unsigned t = 0; t < thread_count; ++t) threads[t]->state = State::kRunnable;
  order.barrier();
  return true;
}

// Ends the collective that thread t waits at, if all lanes of its mask are there.
bool release_collective(unsigned t) {
  const Kind kind = threads[t]->kind;
  const unsigned mask = threads[t]->mask, first = t / kWarp * kWarp;
  uint64_t values[kWarp];
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (first + lane >= thread_count) return false;
    const Thread& other = *threads[first + lane];
    if (other.state != State::kAtCollective || other.kind != kind || other.mask != mask) return false;
    values[lane] = other.value;
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Thread& other = *threads[first + lane];
    if (kind == Kind::kShuffleXor) {
      const unsigned from = lane ^ static_cast<unsigned>(other.argument);
      if (from >= kWarp || !(mask >> from & 1)) {
        running = first + lane;
        message = place(running) + ": __shfl_xor_sync reads lane " + std::to_string(from) + ", which is not in its mask";
        failed = true;
        return true;
      }
      other.value = values[from];
    }
    other.state = State::kRunnable;
  }
  order.collective(first / kWarp, mask);
  return true;
}

// Who waits where, for a block that can't go on.
void describe_deadlock() {
  std::ostringstream text;
  unsigned shown = 0, done = 0;
  for (unsigned t = 0; t < thread_count; ++t) done += threads[t]->state == State::kDone;
  for (unsigned t = 0; t < thread_count && shown < 4; ++t) {
    const Thread& thread = *threads[t];
    if (thread.state == State::kDone) continue;
    text << (shown++ ? "; " : "") << place(t) << " waits at ";
    if (thread.state == State::kAtBarrier) {
      text << "__syncthreads";
    } else {
      text << name_of(thread.kind) << " with mask 0x" << std::hex << thread.mask << std::dec;
    }
  }
  text << "; not all threads get there: " << done << " of " << thread_count << " have ended";
  message = text.str();
  failed = true;
}

void run_block(const std::vector<unsigned>& turns) {
  std::memset(segment.begin, 0xff, segment.size);  // NaN, and the largest integer
  order.block();
  for (unsigned t = 0; t < thread_count; ++t) {
    Thread& thread = *threads[t];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.begin;
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
    thread.state = State::kRunnable;
  }
  for (bool all_done = false; !all_done && !failed;) {
    bool progress = false;
    all_done = true;
    for (const unsigned t : turns) {
      while (!failed && threads[t]->state == State::kRunnable) {
        progress = true;
        resume(t);
        if (!failed && threads[t]->state == State::kAtCollective) release_collective(t);
      }
      all_done &= threads[t]->state == State::kDone;
    }
    if (!all_done && !failed && !release_barrier() && !progress) describe_deadlock();
  }
}

std::string symbol(void* address) {
  Dl_info info{};
  if (!dladdr(address, &info) || !info.dli_sname) return "kernel";
  int status = 0;
  std::unique_ptr<char, decltype(&std::free)> name(abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status), std::free);
  return status == 0 ? name.get() : info.dli_sname;
}

}  // namespace

size_t dynamic_bytes = 0;

void barrier() {
  threads[running]->state = State::kAtBarrier;
  yield();
}

uint64_t collective(Kind kind, unsigned mask, uint64_t value, int argument) {
  Thread& self = *threads[running];
  if (!(mask >> running % kWarp & 1)) fail(std::string(name_of(kind)) + " with a mask that lacks the calling lane");
  self.kind = kind;
  self.mask = mask;
  self.value = value;
  self.argument = argument;
  self.state = State::kAtCollective;
  yield();
  return self.value;
}

void fail(const std::string& what) {
  message = place(running) + ": " + what;
  failed = true;
  leave_thread(nullptr);
  setcontext(&scheduler);
  std::abort();
}

bool launch(void* kernel, const std::function<void()>& thread_body) {
  segment = shared_memory();
  kernel_name = symbol(kernel);
  body = &thread_body;
  failed = false;
  thread_count = blockDim.x * blockDim.y * blockDim.z;
  while (threads.size() < thread_count) threads.push_back(std::make_unique<Thread>());
  std::vector<unsigned> turns(thread_count);
  for (unsigned t = 0; t < thread_count; ++t) turns[t] = t;
  std::mt19937 random(seed);
  order.launch();
  in_kernel = true;
  const uint64_t blocks = static_cast<uint64_t>(gridDim.x) * gridDim.y * gridDim.z;
  for (uint64_t b = 0; b < blocks && !failed; ++b) {
    const uint64_t block = seed % 2 ? blocks - 1 - b : b;
    blockIdx = dim3(block % gridDim.x, block / gridDim.x % gridDim.y, block / gridDim.x / gridDim.y);
    if (seed) std::shuffle(turns.begin(), turns.end(), random);
    run_block(turns);
  }
  in_kernel = false;
  if (failed) {
    message = kernel_name + ": " + message;
    std::fprintf(stderr, "simt: %s\n", message.c_str());
  }
  return !failed;
}

Position here() { return {blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z), running}; }

bool watched(uintptr_t address) {
  if (!in_kernel || failed) return false;
  const auto stack = reinterpret_cast<uintptr_t>(threads[running]->stack.begin);
  return address < stack || address >= stack + kStack;
}

bool in_shared_memory(uintptr_t address) {
  const auto begin = reinterpret_cast<uintptr_t>(segment.begin);
  return address >= begin && address < begin + segment.size;
}

bool past_dynamic_shared_memory(uintptr_t address) {
  const auto begin = reinterpret_cast<uintptr_t>(dynamic_shared_memory);
  return address >= begin + dynamic_bytes && address < begin + sizeof dynamic_shared_memory;
}

#if !defined(SIMT_RACES)
Order order{[] {}, [] {}, [] {}, [](unsigned, unsigned) {}};
#endif

}  // namespace simt

const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "cudaErrorLaunchFailure" : "cudaErrorInvalidConfiguration";
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? simt::message.c_str() : "grid, block or shared memory out of range";
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorInvalidValue;
  *value = simt::multiprocessors;
  return cudaSuccess;
}

extern "C" {
const char* simt_last_message() { return simt::message.c_str(); }
void simt_set_multiprocessors(int count) { simt::multiprocessors = count; }
void simt_set_seed(unsigned value) { simt::seed = value; }
}
