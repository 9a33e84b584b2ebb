// What the engine's own sources share: the threads of the block that runs, and what is known of a launch that fails.
#pragma once

#include <pthread.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>

#include "cuda_runtime.h"
#include "simt_internal.h"

#ifdef __SANITIZE_ADDRESS__
#error "the engine is compiled without AddressSanitizer; SIMT_ASAN says that the kernels are"
#endif

// What kernels see as constants, under the names that the compiler gives them there.
extern uint3 simt_thread_index __asm__("threadIdx"), simt_block_index __asm__("blockIdx");
// The array that every `extern __shared__` array of the module names; compile.py defines both ends.
extern thread_local char simt_dynamic_shared[], simt_dynamic_shared_end[];

extern "C" {
// Saves the registers that a call preserves and the stack pointer to *save, and goes on where `load` was saved.
void simt_switch(void** save, void* load);
// The second half of it: goes on at what the stack pointer points to. Not to be called: a signal handler returns to it.
void simt_resume();
}

// Each module that is loaded has an engine of its own.
#pragma GCC visibility push(hidden)
namespace simt {

constexpr unsigned kMaxThreads = 1024, kLanes = 32;
constexpr int kDefaultDynamicBytes = 48 << 10;
constexpr size_t kGuardBytes = 4096;
#ifdef SIMT_ASAN
constexpr size_t kStackBytes = 256 << 10;  // red zones around every local variable
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

enum class State : uint8_t { kReady, kAtBlock, kAtWarp, kEnded };

struct Fiber {
  void* stack_pointer;
  uint3 index;
  State state;
  Kind kind;           // where it waits: with whom, and for what
  unsigned mask;
  unsigned source;     // the lane that a shuffle reads
  uint64_t value;      // what it brings to a meeting of its warp, then what it takes away
  const void* site;    // the call at which it waits
};

struct Shared {
  char* begin;
  size_t bytes;
};

struct MachineFault {
  int signal;  // 0: none
  bool overflow, general;
  const void* address;
};

// ---- engine.cpp ------------------------------------------------------------------------------------------------------

extern std::mutex launching;  // one launch at a time; it guards all of the following
extern Fiber fibers[kMaxThreads];
extern Fiber* current;  // the running one; nullptr outside of a launch
extern char* stacks;    // kMaxThreads of kGuardBytes and, above them, kStackBytes
extern Launch active;
extern unsigned threads;
extern uint64_t block;
extern void* host_stack_pointer;
#ifdef SIMT_ASAN
extern const void* host_stack;
extern size_t host_stack_bytes;
#endif
extern Shared shared;  // all shared variables of this module, as the launching thread has them

extern int failure;        // of the launch that runs: its cudaError_t
extern int failed_thread;  // -1: the block as a whole
extern std::string failure_text;
extern const void* failure_site;
extern MachineFault fault;
extern pthread_t launching_thread;

inline char* stack_of(unsigned thread) { return stacks + thread * (kGuardBytes + kStackBytes) + kGuardBytes; }

// ---- reports.cpp -----------------------------------------------------------------------------------------------------

const char* name_of(Kind kind);
std::string index_text(uint3 index, Dimensions extent);
uint3 index_of(uint64_t linear, Dimensions extent);
std::string kernel_text();
// Who waits where when no thread can go on, those who wait alike together.
std::string deadlock_text();

// ---- signals.cpp -----------------------------------------------------------------------------------------------------

// Catches faults of the machine while it lives.
class Handlers {
 public:
  Handlers();
  ~Handlers();
};
std::string fault_text();

}  // namespace simt
#pragma GCC visibility pop
