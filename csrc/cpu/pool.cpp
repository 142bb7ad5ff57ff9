// A pool for torch's large CPU tensors: what a step's peak needs and no more.
//
// The C library keeps freed blocks in a heap where a block of another size does not fit; giving them
// back to the system instead means that their pages are zeroed anew at every step. Here freed memory
// is kept, and pages of free blocks are moved behind each other (mremap: page tables change, no byte
// is copied) where no single one is large enough. So the pool never holds more than was in use at
// once, rounded up to EXTENT a tensor.
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace perl_kernels::cpu {
namespace {

#ifdef __linux__

// A huge page, which moves by one entry of a page table.
constexpr size_t EXTENT = size_t{2} << 20;
// Smaller tensors stay with torch's own allocator: rounding up would cost too much of them.
constexpr size_t SMALLEST = 2 * EXTENT;

class Pool {
 public:
  // nullptr where the system has no memory left.
  void* take(size_t bytes) {
    const size_t size = (bytes + EXTENT - 1) / EXTENT * EXTENT;
    std::lock_guard<std::mutex> lock(mutex);
    auto best = free_.end();
    for (auto block = free_.begin(); block != free_.end(); ++block) {
      if (block->second >= size && (best == free_.end() || block->second < best->second)) {
        best = block;
      }
    }
    char* data;
    if (best != free_.end()) {
      data = best->first;
      const size_t rest = best->second - size;
      free_.erase(best);
      if (rest > 0) free_.emplace(data + size, rest);
      free_bytes_ -= size;
    } else {
      data = stitch(size);
      if (data == nullptr) return nullptr;
    }
    used_.emplace(data, size);
    used_bytes_ += size;
    return data;
  }

  // False where the memory is not the pool's.
  bool give(void* pointer) {
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = used_.find(pointer);
    if (found == used_.end()) return false;
    char* data = static_cast<char*>(pointer);
    size_t size = found->second;
    used_.erase(found);
    used_bytes_ -= size;
    free_bytes_ += size;
    auto next = free_.lower_bound(data);
    if (next != free_.end() && data + size == next->first) {
      size += next->second;
      next = free_.erase(next);
    }
    if (next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == data) {
        before->second += size;
        return true;
      }
    }
    free_.emplace(data, size);
    return true;
  }

  void empty() {
    std::lock_guard<std::mutex> lock(mutex);
    for (const auto& [data, size] : free_) munmap(data, size);
    free_.clear();
    free_bytes_ = 0;
  }

  std::vector<int64_t> bytes() {
    std::lock_guard<std::mutex> lock(mutex);
    return {static_cast<int64_t>(used_bytes_), static_cast<int64_t>(free_bytes_)};
  }

  std::mutex mutex;

 private:
  // New addresses, with the pages of free blocks behind them as far as these reach.
  char* stitch(size_t size) {
    void* reserved = mmap(
        nullptr, size + EXTENT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
        -1, 0);
    if (reserved == MAP_FAILED) return nullptr;
    char* start = static_cast<char*>(reserved);
    const size_t skipped = (EXTENT - reinterpret_cast<uintptr_t>(start) % EXTENT) % EXTENT;
    char* data = start + skipped;
    if (skipped > 0) munmap(start, skipped);
    if (skipped < EXTENT) munmap(data + size, EXTENT - skipped);
    madvise(data, size, MADV_HUGEPAGE);
    size_t filled = 0;
    while (filled < size && !free_.empty()) {
      auto largest = free_.begin();
      for (auto block = free_.begin(); block != free_.end(); ++block) {
        if (block->second > largest->second) largest = block;
      }
      const size_t part = std::min(largest->second, size - filled);
      char* from = largest->first + (largest->second - part);
      if (mremap(from, part, part, MREMAP_MAYMOVE | MREMAP_FIXED, data + filled) == MAP_FAILED) break;
      filled += part;
      free_bytes_ -= part;
      largest->second -= part;
      if (largest->second == 0) free_.erase(largest);
    }
    return data;
  }

  std::map<char*, size_t> free_;  // by address; neighbours are one block
  std::unordered_map<void*, size_t> used_;
  size_t used_bytes_ = 0, free_bytes_ = 0;
};

Pool& pool() {
  static Pool* made = new Pool;  // outlives every tensor
  return *made;
}

class PooledAllocator final : public at::Allocator {
 public:
  explicit PooledAllocator(at::Allocator* others) : others_(others) {}

  at::DataPtr allocate(size_t bytes) override {
    if (bytes < SMALLEST) return others_->allocate(bytes);
    void* data = pool().take(bytes);
    if (data == nullptr) {
      c10::profiledCPUMemoryReporter().OutOfMemory(bytes);
      TORCH_CHECK(false, "the system has no ", bytes, " bytes of memory left for a tensor");
    }
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, &give_back, at::Device(at::kCPU)};
  }

  // Tensors of either allocator: it is asked for by who holds a bare pointer.
  at::DeleterFnPtr raw_deleter() const override { return &give_back_any; }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static void give_back(void* data) {
    c10::profiledCPUMemoryReporter().Delete(data);
    pool().give(data);
  }

  static void give_back_any(void* data) {
    if (data == nullptr) return;
    if (pool().give(data)) {
      c10::profiledCPUMemoryReporter().Delete(data);
    } else {
      c10::GetDefaultCPUAllocator()->raw_deleter()(data);
    }
  }

  at::Allocator* others_;
};

bool use_pool() {
  static const bool installed = [] {
    c10::SetCPUAllocator(new PooledAllocator(c10::GetCPUAllocator()), /*priority=*/1);
    // A child process may be forked while another thread takes memory.
    pthread_atfork(
        [] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
    return true;
  }();
  return installed;
}

std::vector<int64_t> pool_bytes() { return pool().bytes(); }
void empty_pool() { pool().empty(); }

#else

bool use_pool() { return false; }
std::vector<int64_t> pool_bytes() { return {0, 0}; }
void empty_pool() {}

#endif

}  // namespace

TORCH_LIBRARY_IMPL(perl_kernels, CatchAll, m) {
  m.impl("use_cpu_pool", use_pool);
  m.impl("cpu_pool_bytes", pool_bytes);
  m.impl("empty_cpu_pool", empty_pool);
}

}  // namespace perl_kernels::cpu
