// What the engine says of a launch that failed: which thread, where, and at which bytes.
#include <dlfcn.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "engine_state.h"

namespace simt {

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

std::string index_text(uint3 index, Dimensions extent) {
  if (extent.y == 1 && extent.z == 1) return std::to_string(index.x);
  return text("(%u, %u, %u)", index.x, index.y, index.z);
}

uint3 index_of(uint64_t linear, Dimensions extent) {
  return {static_cast<unsigned>(linear % extent.x), static_cast<unsigned>(linear / extent.x % extent.y),
          static_cast<unsigned>(linear / extent.x / extent.y)};
}

namespace {

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

}  // namespace

std::string kernel_text() {
  const auto lines = lines_of(active.kernel, "-Cf");
  return lines.empty() || lines[0] == "??" ? text("kernel at %p", active.kernel) : lines[0];
}

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

}  // namespace

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

}  // namespace simt
