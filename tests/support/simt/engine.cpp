// Runs the threads of a block as fibers of one host thread, a block at a time, and checks how they meet. See docs/simt.md.
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "simt_internal.h"

#ifdef __SANITIZE_ADDRESS__
#error "the engine is compiled without AddressSanitizer; SIMT_ASAN says that the kernels are"
#endif
#ifdef SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// What kernels see as constants, under the names that the compiler gives them there.
uint3 simt_thread_index __asm__("threadIdx"), simt_block_index __asm__("blockIdx");
dim3 simt_block_extent __asm__("blockDim"), simt_grid_extent __asm__("gridDim");
int simt_warp_size __asm__("warpSize") = 32;

// The array that every `extern __shared__` array of the module names; compile.py defines both ends.
extern thread_local char simt_dynamic_shared[], simt_dynamic_shared_end[];

extern "C" {
// Saves the registers that a call preserves and the stack pointer to *save, and goes on where `load` was saved.
void simt_switch(void** save, void* load);
// The second half of it: goes on at what the stack pointer points to. Not to be called: a signal handler returns to it.
void simt_resume();
}
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
namespace {

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

std::mutex launching;  // one launch at a time; it guards all of the following
Fiber fibers[kMaxThreads];
Fiber* current = nullptr;  // the running one; nullptr outside of a launch
char* stacks = nullptr;    // kMaxThreads of kGuardBytes and, above them, kStackBytes
unsigned guarded = 0;      // stacks whose guard is in place
Launch active;
unsigned threads;
uint64_t block;
void* host_stack_pointer;
#ifdef SIMT_ASAN
const void* host_stack;
size_t host_stack_bytes;
#endif

struct Shared {
  char* begin;
  size_t bytes;
} shared;  // all shared variables of this module, as the launching thread has them

struct {
  unsigned arrived, nonzero;
  int result;
  Kind kind;
} barrier;

uint16_t ready[kMaxThreads];  // a ring
unsigned ready_begin, ready_count;
uint64_t random_state = 0;  // 0: first come, first served

std::string message;  // of the last launch that failed
int failure;          // of the launch that runs: its cudaError_t
int failed_thread;    // -1: the block as a whole
std::string failure_text;
const void* failure_site;
struct {
  int signal;  // 0: none
  bool overflow, general;
  const void* address;
} fault;
pthread_t launching_thread;

int remembered_error = cudaSuccess;
int multiprocessors = 16;
unsigned launches = 0;

std::map<const void*, int>& allowed_dynamic_bytes() {
  static std::map<const void*, int> map;
  return map;
}

const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::kSyncthreads: return "__syncthreads";
    case Kind::kSyncthreadsCount: return "__syncthreads_count";
    case Kind::kSyncthreadsAnd: return "__syncthreads_and";
    case Kind::kSyncthreadsOr: return "__syncthreads_or";
    case Kind::kSyncwarp: return "__syncwarp";
    case Kind::kBallot: return "__ballot_sync";
    case Kind::kAny: return "__any_sync";
    case Kind::kAll: return "__all_sync";
    case Kind::kShuffle: return "__shfl_sync";
    case Kind::kShuffleUp: return "__shfl_up_sync";
    case Kind::kShuffleDown: return "__shfl_down_sync";
    case Kind::kShuffleXor: return "__shfl_xor_sync";
  }
  return "?";
}

uint64_t random_below(uint64_t bound) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (random_state >> 11) % bound;
}

// ---- reports ---------------------------------------------------------------------------------------------------------

std::string index_text(uint3 index, Dimensions extent) {
  if (extent.y == 1 && extent.z == 1) return std::to_string(index.x);
  return text("(%u, %u, %u)", index.x, index.y, index.z);
}

uint3 index_of(uint64_t linear, Dimensions extent) {
  return {static_cast<unsigned>(linear % extent.x), static_cast<unsigned>(linear / extent.x % extent.y),
          static_cast<unsigned>(linear / extent.x / extent.y)};
}

std::vector<std::string> output_of(const std::string& command) {
  std::vector<std::string> lines;
  if (FILE* output = popen(("unset LD_PRELOAD; " + command).c_str(), "r")) {
    char line[4096];
    while (fgets(line, sizeof line, output)) lines.emplace_back(line, strcspn(line, "\n"));
    pclose(output);
  }
  return lines;
}

// What addr2line says of an address of this module: the function, or "file:line" of it and of each call that was inlined there.
std::vector<std::string> lines_of(const void* address, const char* options) {
  Dl_info module;
  if (!dladdr(address, &module)) return {};
  const auto offset = static_cast<const char*>(address) - static_cast<const char*>(module.dli_fbase);
  return output_of(text("addr2line %s -e '%s' 0x%zx 2>/dev/null", options, module.dli_fname, offset));
}

// The shared variable that has the given offset in the thread-local segment: "byte 4 of kernel(float*)::partial".
std::string variable_text(size_t offset) {
  Dl_info module;
  if (dladdr(&active, &module)) {
    for (const std::string& line : output_of(text("readelf -sW '%s' | c++filt", module.dli_fname))) {
      size_t begin, bytes;
      int name = 0;
      if (sscanf(line.c_str(), " %*u: %zx %zu TLS %*s %*s %*s %n", &begin, &bytes, &name) == 2 && name && offset - begin < bytes) {
        return text("byte %zu of %s", offset - begin, line.c_str() + name);
      }
    }
  }
  return text("byte %zu of the module's shared variables", offset);
}

std::string kernel_text() {
  const auto lines = lines_of(active.kernel, "-Cf");
  return lines.empty() || lines[0] == "??" ? text("kernel at %p", active.kernel) : lines[0];
}

}  // namespace

std::string text(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  char* buffer = nullptr;
  const int length = vasprintf(&buffer, format, arguments);
  va_end(arguments);
  std::string result(buffer, length < 0 ? 0 : length);
  free(buffer);
  return result;
}

std::string site_text(const void* return_address) {
  // The call, not what follows it; and the caller of what the stand-in headers define.
  for (const std::string& line : lines_of(static_cast<const char*>(return_address) - 1, "-i")) {
    if (line.find("/cuda_runtime.h:") == line.npos && line.find("??") == line.npos) return line.substr(0, line.find(" ("));
  }
  return text("%p", return_address);
}

std::string thread_text(uint64_t of_block, unsigned of_thread) {
  return "block " + index_text(index_of(of_block, active.grid), active.grid) + ", thread " +
         index_text(index_of(of_thread, active.block), active.block);
}

std::string memory_text(const void* pointer) {
  const auto address = static_cast<const char*>(pointer);
  if (address >= simt_dynamic_shared && address < simt_dynamic_shared_end) {
    return text("byte %zd of dynamic shared memory", address - simt_dynamic_shared);
  }
  if (address >= shared.begin && address < shared.begin + shared.bytes) {
    return variable_text(address - shared.begin);
  }
  // What may be pointers among the arguments, structs too; the nearest at or below the address.
  const char* nearest = nullptr;
  size_t argument = 0, offset = 0;
  for (size_t i = 0; i < active.argument_count; ++i) {
    for (size_t at = 0; at + sizeof nearest <= active.arguments[i].bytes; at += alignof(char*)) {
      const char* candidate;
      std::memcpy(&candidate, static_cast<const char*>(active.arguments[i].value) + at, sizeof candidate);
      if (candidate > address || candidate <= nearest) continue;
      nearest = candidate, argument = i, offset = at;
    }
  }
  std::string result = text("global memory at %p", pointer);
  if (nearest) result += text(", byte %zd past the pointer in argument %zu", address - nearest, argument);
  if (nearest && active.arguments[argument].bytes > sizeof nearest) result += text(" (at byte %zu of it)", offset);
  return result;
}

namespace {

// "threads 0-4, 6, 8-31"
std::string ranges_text(const std::vector<unsigned>& members) {
  std::string result = members.size() == 1 ? "thread " : "threads ";
  for (size_t i = 0; i < members.size();) {
    size_t end = i + 1;
    while (end < members.size() && members[end] == members[end - 1] + 1) ++end;
    if (i) result += ", ";
    result += std::to_string(members[i]);
    if (end - i > 1) result += "-" + std::to_string(members[end - 1]);
    i = end;
  }
  return result;
}

// Who waits where when no thread can go on, those who wait alike together.
std::string deadlock_text() {
  struct Group {
    const Fiber* example;
    std::vector<unsigned> members;
  };
  std::vector<Group> groups;
  for (unsigned t = 0; t < threads; ++t) {
    const Fiber& fiber = fibers[t];
    const auto alike = [&](const Group& group) {
      const Fiber& other = *group.example;
      if (fiber.state != other.state) return false;
      if (fiber.state == State::kEnded) return true;
      const bool meets = fiber.kind == other.kind && fiber.site == other.site;
      return meets && (fiber.state == State::kAtBlock || (fiber.mask == other.mask && t / kLanes == group.members[0] / kLanes));
    };
    const auto group = std::find_if(groups.begin(), groups.end(), alike);
    if (group == groups.end()) groups.push_back({&fiber, {t}});
    else group->members.push_back(t);
  }
  constexpr size_t kShown = 12;
  std::string result = "no thread can go on";
  for (size_t i = 0; i < std::min(groups.size(), kShown); ++i) {
    const Fiber& fiber = *groups[i].example;
    const bool one = groups[i].members.size() == 1;
    result += "\n  " + ranges_text(groups[i].members);
    if (fiber.state == State::kEnded) {
      result += one ? " has ended" : " have ended";
      continue;
    }
    result += text(one ? " waits in %s" : " wait in %s", name_of(fiber.kind));
    if (fiber.state == State::kAtWarp) {
      result += text(", mask 0x%08x of warp %u", fiber.mask, groups[i].members[0] / kLanes);
      std::vector<unsigned> absent;
      const unsigned first = groups[i].members[0] / kLanes * kLanes;
      for (unsigned lane = 0; lane < kLanes; ++lane) {
        const Fiber& other = fibers[first + lane];
        const bool there = other.state == State::kAtWarp && other.kind == fiber.kind && other.mask == fiber.mask;
        if ((fiber.mask >> lane & 1) && !there) absent.push_back(first + lane);
      }
      result += ", for " + ranges_text(absent);
    }
    result += ", at " + site_text(fiber.site);
  }
  if (groups.size() > kShown) result += text("\n  and %zu more groups", groups.size() - kShown);
  return result;
}

// ---- fibers ----------------------------------------------------------------------------------------------------------

char* stack_of(unsigned thread) { return stacks + thread * (kGuardBytes + kStackBytes) + kGuardBytes; }

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
  __sanitizer_start_switch_fiber(ended ? nullptr : &fake_stack, next ? stack_of(next - fibers) : host_stack,
                                 next ? kStackBytes : host_stack_bytes);
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
    void* memory = mmap(nullptr, kMaxThreads * (kGuardBytes + kStackBytes), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return false;
    stacks = static_cast<char*>(memory);
  }
  for (; guarded < threads; ++guarded) {
    if (mprotect(stack_of(guarded) - kGuardBytes, kGuardBytes, PROT_NONE) != 0) return false;
  }
  return true;
}

// ---- faults of the machine -------------------------------------------------------------------------------------------

struct sigaction former_actions[2];
stack_t former_stack;
constexpr int kSignals[2] = {SIGSEGV, SIGFPE};

void on_signal(int signal, siginfo_t* info, void* raw_context) {
  const auto address = static_cast<char*>(info->si_addr);
  const bool ours = current && pthread_equal(pthread_self(), launching_thread);
  bool overflow = false;
  if (ours && signal == SIGSEGV && info->si_code != SI_KERNEL && address >= stacks && address < stack_of(kMaxThreads)) {
    overflow = static_cast<size_t>(address - stacks) % (kGuardBytes + kStackBytes) < kGuardBytes;
  }
#ifdef SIMT_ASAN
  const bool taken = overflow || (ours && signal == SIGFPE);  // the rest it reports itself
#else
  const bool taken = ours;
#endif
  if (!taken) {  // as before the launch: the instruction faults again
    sigaction(signal, &former_actions[signal == SIGFPE], nullptr);
    return;
  }
  auto& registers = static_cast<ucontext_t*>(raw_context)->uc_mcontext.gregs;
  fault = {signal, overflow, info->si_code == SI_KERNEL, address};
  failure = signal == SIGSEGV && !overflow ? cudaErrorIllegalAddress : cudaErrorLaunchFailure;
  failed_thread = static_cast<int>(current_thread());
  failure_site = reinterpret_cast<const void*>(registers[REG_RIP] + 1);
  current = nullptr;
#ifdef SIMT_ASAN
  __sanitizer_start_switch_fiber(nullptr, host_stack, host_stack_bytes);
#endif
  registers[REG_RSP] = reinterpret_cast<greg_t>(host_stack_pointer);
  registers[REG_RIP] = reinterpret_cast<greg_t>(&simt_resume);
}

// Catches faults of the machine while it lives.
class Handlers {
 public:
  Handlers() {
    static char memory[64 << 10];
    stack_t stack = {};
    stack.ss_sp = memory;
    stack.ss_size = sizeof memory;
    sigaltstack(&stack, &former_stack);
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &action, &former_actions[i]);
  }
  ~Handlers() {
    for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &former_actions[i], nullptr);
    sigaltstack(&former_stack, nullptr);
  }
};

std::string fault_text() {
  if (fault.overflow) return text("stack overflow: a thread has %zu bytes of stack", kStackBytes);
  if (fault.signal == SIGFPE) return "integer division by zero";
  if (fault.general) return "access to an address that is misaligned, or that no memory can have";
  return text("access to %p, which is not mapped: ", fault.address) + memory_text(fault.address);
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
    const ElfW(Phdr)& part = module->dlpi_phdr[i];
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
  const std::string where =
      failed_thread < 0 ? "block " + index_text(simt_block_index, launch.grid) : thread_text(block, failed_thread);
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
