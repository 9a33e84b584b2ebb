// Runs a CUDA kernel on the host: each thread of a block is a fiber, and blocks run one after another. A fiber goes on until it has to
// wait for others: at a barrier for all threads of the block, at a collective for all lanes that its mask names. Waiting that can't
// end is an error that says who waits where.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace simt {

enum class Kind { kShuffleXor, kSyncWarp };

constexpr unsigned kWarp = 32;

// Called by kernels.
void barrier();
uint64_t collective(Kind kind, unsigned mask, uint64_t value, int argument);

// Runs `body` once for each thread of blockDim in each block of gridDim. `kernel` is named in messages. Returns false where a thread
// misbehaved or raced; the message is then kept, and printed.
bool launch(void* kernel, const std::function<void()>& body);

// Of the dynamic shared memory, how much the launch asked for.
extern size_t dynamic_bytes;

// Ends the running kernel with a message about the running thread. Does not return to it.
[[noreturn]] void fail(const std::string& message);

// ---- for the race detector (races.cpp) -------------------------------------------------------------------------------------

struct Position {
  unsigned block, thread;
};

Position here();
// Whether a kernel runs, and the address is not on the stack of its running thread.
bool watched(uintptr_t address);
bool in_shared_memory(uintptr_t address);
// Whether the address is in dynamic shared memory that the launch did not ask for.
bool past_dynamic_shared_memory(uintptr_t address);

// What orders accesses. Defined by races.cpp, or as nothing where races are not looked for.
struct Order {
  void (*launch)();                                   // a kernel begins
  void (*block)();                                    // a block begins
  void (*barrier)();                                  // all threads of the block met
  void (*collective)(unsigned warp, unsigned mask);   // the lanes of a mask met
};
extern Order order;

}  // namespace simt

// For the host: see compile.py.
extern "C" {
const char* simt_last_message();
void simt_set_multiprocessors(int count);
void simt_set_seed(unsigned seed);  // of the order in which threads run; 0: as they are numbered
}
