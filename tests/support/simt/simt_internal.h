// What the engine offers the detectors of races and of undefined behaviour, and what it asks of the former.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace simt {

// As printf does.
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
// "block 3, thread 17", with three coordinates where there is more than one dimension.
std::string thread_text(uint64_t block, unsigned thread);
// "file:line" of the call that returns to this address.
std::string site_text(const void* return_address);

// Where an address lies: "byte 8 of dynamic shared memory", "byte 64 past the pointer in argument 0".
std::string memory_text(const void* address);

bool in_kernel();  // whether a thread of a kernel runs; if not, the two below mean nothing
unsigned current_thread();
uint64_t current_block();
// The thread on whose stack an address lies; -1 if on none.
int owner_of_stack(const void* address);
// Ends the launch that runs, with an error.
[[noreturn]] void stop_launch(std::string why, const void* site);

namespace race {
#ifdef SIMT_RACE
void begin_launch(unsigned threads, const char* shared, size_t shared_bytes);
void end_launch();
void begin_block();
void meet_block();
void meet_warp(unsigned first_thread, unsigned mask);
void fence();
#else
inline void begin_launch(unsigned, const char*, size_t) {}
inline void end_launch() {}
inline void begin_block() {}
inline void meet_block() {}
inline void meet_warp(unsigned, unsigned) {}
inline void fence() {}
#endif
}  // namespace race

}  // namespace simt
