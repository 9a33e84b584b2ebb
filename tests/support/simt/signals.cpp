// Faults of the machine in a kernel: they end the launch, with their reason, and not the process.
#include <pthread.h>
#include <signal.h>
#include <ucontext.h>

#include <string>

#include "engine_state.h"

#ifdef SIMT_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

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

}  // namespace

Handlers::Handlers() {
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

Handlers::~Handlers() {
  for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &former_actions[i], nullptr);
  sigaltstack(&former_stack, nullptr);
}

std::string fault_text() {
  if (fault.overflow) return text("stack overflow: a thread has %zu bytes of stack", kStackBytes);
  if (fault.signal == SIGFPE) return "integer division by zero";
  if (fault.general) return "access to an address that is misaligned, or that no memory can have";
  return text("access to %p, which is not mapped: ", fault.address) + memory_text(fault.address);
}

}  // namespace simt
