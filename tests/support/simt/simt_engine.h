// What the stand-in headers ask of the engine: the meeting points of threads, and a launch. See docs/simt.md.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

// A place where a thread waits for others. All who meet must name the same kind.
enum class Kind : uint8_t {
  kSyncthreads,
  kSyncthreadsCount,
  kSyncthreadsAnd,
  kSyncthreadsOr,
  kSyncwarp,
  kBallot,
  kAny,
  kAll,
  kShuffle,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
};

struct Dimensions {
  unsigned x, y, z;
};

struct Argument {
  const void* value;
  size_t bytes;
};

struct Launch {
  const void* kernel;  // its address: what it is known by
  Dimensions grid, block;
  size_t dynamic_bytes;
  void (*thread)(void* closure);  // runs one thread of the kernel
  void* closure;
  const Argument* arguments;  // what reports name addresses by
  size_t argument_count;
};

// All threads of the block meet; returns the number of them whose predicate is not zero.
int meet_block(Kind kind, bool predicate);
// The lanes of `mask` meet. Shuffles return the bits of the lane that `operand` and `width` select, as CUDA defines them; the
// others a mask of the lanes whose value is not zero.
uint64_t meet_warp(Kind kind, unsigned mask, uint64_t value, unsigned operand, int width);
void fence();

// These return a cudaError_t, and remember it.
int launch(const Launch& launch);
int fail(int error);
int last_error(bool clear);
const char* last_message();  // of the last launch; "" if nothing was wrong with it
int allow_dynamic_bytes(const void* kernel, int bytes);
int device_attribute(int* value, int attribute, int device);

}  // namespace simt
