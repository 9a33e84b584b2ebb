#include "memory.h"

// With AddressSanitizer each tensor is one of its own, so that it sees what is read or written beyond.
#if defined(__clang__)
#if __has_feature(address_sanitizer)
#define FUSED_RESNET_ADDRESS_SANITIZER
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define FUSED_RESNET_ADDRESS_SANITIZER
#endif

#if defined(__linux__) && !defined(FUSED_RESNET_ADDRESS_SANITIZER)
#define FUSED_RESNET_KEEPS_MEMORY
#include <pthread.h>
#include <sys/mman.h>
#endif

#include <map>
#include <mutex>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace fused_resnet {
namespace {

#if defined(FUSED_RESNET_KEEPS_MEMORY)

constexpr int64_t kPage = 2 << 20;  // a large page; smaller tensors are PyTorch's
constexpr int64_t kUnit = 64 << 10;  // of the size of a block
// What a block's end takes of its last large page, at least, or it comes in small pages: a large one takes all of its memory.
constexpr int64_t kLeastOfPage = kPage / 4 * 3;
// A block serves a tensor of at least 1 / (1 + 1 / kWaste) of its size.
constexpr int64_t kWaste = 8;
// A block that was not asked for while this many times of all blocks' bytes were is given back: its size is no longer made.
constexpr int64_t kPatience = 8;

class Memory {
 public:
  // nullptr where the system has none. `size`: whole units.
  void* take(int64_t size, int64_t& taken) {
    const std::lock_guard<std::mutex> lock(mutex_);
    asked_ += size;
    if (asked_ > checked_ + mapped_) {
      give_back(asked_ - kPatience * mapped_);
      checked_ = asked_;
    }
    auto found = unused_.lower_bound(size);
    if (found == unused_.end() || found->first > size + size / kWaste) {
      void* memory = map(size);
      if (!memory) {
        give_back(asked_);
        memory = map(size);
      }
      taken = size;
      return memory;
    }
    void* memory = found->second.memory;
    taken = found->first;
    unused_.erase(found);
    return memory;
  }

  void put(void* memory, int64_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    unused_.insert({size, {memory, asked_}});
  }

  int64_t release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t before = mapped_;
    give_back(asked_);
    return before - mapped_;
  }

  std::mutex& mutex() { return mutex_; }

 private:
  struct Unused {
    void* memory;
    int64_t since;  // of asked_
  };

  void* map(int64_t size) {
    void* all = mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) return nullptr;
    // What lies before the first large page, and after the block, goes back at once.
    const auto begin = reinterpret_cast<uintptr_t>(all), first = (begin + kPage - 1) / kPage * kPage, last = first + size;
    if (first > begin) munmap(all, first - begin);
    if (begin + kPage > first) munmap(reinterpret_cast<void*>(last), begin + kPage - first);
    const int64_t end = size % kPage, large = size - (end < kLeastOfPage ? end : 0);
    madvise(reinterpret_cast<void*>(first), large, MADV_HUGEPAGE);
    mapped_ += size;
    return reinterpret_cast<void*>(first);
  }

  // What has been unused since before `since`.
  void give_back(int64_t since) {
    for (auto block = unused_.begin(); block != unused_.end();) {
      if (block->second.since > since) {
        ++block;
        continue;
      }
      munmap(block->second.memory, block->first);
      mapped_ -= block->first;
      block = unused_.erase(block);
    }
  }

  std::mutex mutex_;
  std::multimap<int64_t, Unused> unused_;
  int64_t asked_ = 0, checked_ = 0, mapped_ = 0;  // bytes; checked_: of asked_, when old blocks were last looked for
};

// Never destroyed: tensors may outlive whatever a process destroys at its end. A process that forks does so while no thread is inside.
Memory& memory() {
  static Memory* const instance = [] {
    pthread_atfork([] { memory().mutex().lock(); }, [] { memory().mutex().unlock(); }, [] { memory().mutex().unlock(); });
    return new Memory;
  }();
  return *instance;
}

#endif

}  // namespace

Tensor empty_activation(const Tensor& like, int64_t channels, int64_t height, int64_t width) {
  const int64_t images = like.size(0);
#if defined(FUSED_RESNET_KEEPS_MEMORY)
  const int64_t bytes = images * channels * height * width * static_cast<int64_t>(like.element_size());
  if (bytes >= kPage) {
    int64_t size = (bytes + kUnit - 1) / kUnit * kUnit;
    if (void* taken = memory().take(size, size)) {
      return torch::stable::from_blob(taken, {images, channels, height, width}, {height * width * channels, 1, width * channels, channels},
                                      like.device(), like.scalar_type(), [size](void* block) { memory().put(block, size); });
    }
  }
#endif
  return torch::stable::empty({images, channels, height, width}, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

Tensor empty_activation(const Tensor& x) { return empty_activation(x, x.size(1), x.size(2), x.size(3)); }

int64_t release_memory() {
#if defined(FUSED_RESNET_KEEPS_MEMORY)
  return memory().release();
#else
  return 0;
#endif
}

}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_cpu, library) { library.def("release_memory() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cpu, CompositeExplicitAutograd, library) {
  library.impl("release_memory", TORCH_BOX(&fused_resnet::release_memory));
}
