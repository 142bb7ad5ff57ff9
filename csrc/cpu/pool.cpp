// A pool for torch's CPU tensors but the small ones: what a step's peak needs and no more.
//
// The C library keeps freed blocks in a heap where a block of another size does not fit; giving them
// back to the system instead means that their pages are zeroed anew at every step. Here freed memory
// is kept, and pages of free blocks are moved behind each other (mremap: page tables change, no byte
// is copied) where no single one is large enough. So the pool never holds more than was in use at
// once, each tensor rounded up (`rounded`), and what is left of an EXTENT.
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>
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
// What smaller tensors are made of: a multiple of every page size that Linux has.
constexpr size_t GRAIN = size_t{64} << 10;
// Tensors below stay with torch's own allocator: rounding up would cost too much of them.
constexpr size_t SMALLEST = 4 * GRAIN;
// A quarter of the mappings that Linux gives a process. Steps that repeat make a few hundred seams.
constexpr size_t MOST_SEAMS = 1 << 14;

size_t up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

size_t rounded(size_t bytes) { return up(bytes, bytes < 2 * EXTENT ? GRAIN : EXTENT); }

class Pool {
 public:
  // nullptr where the system gives no memory.
  void* take(size_t bytes) {
    const size_t size = rounded(bytes);
    std::lock_guard<std::mutex> lock(mutex);
    auto best = by_size_.lower_bound({size, nullptr});
    if (best == by_size_.end()) {
      if (!stitch(size)) return nullptr;
      best = by_size_.lower_bound({size, nullptr});
    }
    auto [room, data] = *best;
    remove(free_.find(data));
    // Whole extents from a block's start, others from its end: so the former stay on huge pages.
    char* rest = data;
    if (size % EXTENT == 0) {
      rest += size;
    } else {
      data += room - size;
    }
    if (room > size) add(rest, room - size);
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
    auto next = free_.lower_bound(data);
    if (next != free_.end() && data + size == next->first) {
      size += next->second;
      next = remove(next);
    }
    if (next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == data) {
        data = before->first;
        size += before->second;
        remove(before);
      }
    }
    add(data, size);
    return true;
  }

  void empty() {
    std::lock_guard<std::mutex> lock(mutex);
    release();
  }

  std::vector<int64_t> bytes() {
    std::lock_guard<std::mutex> lock(mutex);
    return {static_cast<int64_t>(used_bytes_), static_cast<int64_t>(free_bytes_)};
  }

  std::mutex mutex;

 private:
  using Blocks = std::map<char*, size_t>;

  void add(char* data, size_t size) {
    free_.emplace(data, size);
    by_size_.emplace(size, data);
    free_bytes_ += size;
  }

  Blocks::iterator remove(Blocks::iterator block) {
    by_size_.erase({block->second, block->first});
    free_bytes_ -= block->second;
    return free_.erase(block);
  }

  // Gives free blocks back to the system; seams are left in the others alone.
  void release() {
    for (const auto& [data, size] : free_) munmap(data, size);
    free_.clear();
    by_size_.clear();
    free_bytes_ = 0;
    std::set<char*> left;
    for (const auto& [data, size] : used_) {
      char* const start = static_cast<char*>(data);
      left.insert(start);
      left.insert(seams_.lower_bound(start), seams_.lower_bound(start + size));
    }
    seams_.swap(left);
  }

  // Makes a free block of new addresses, of at least so many bytes: with the pages of free blocks
  // as far as these reach, and new ones before them.
  bool stitch(size_t size) {
    if (seams_.size() > MOST_SEAMS) release();
    const size_t fresh = size > free_bytes_ ? up(size - free_bytes_, EXTENT) : 0;
    const size_t total = fresh > 0 ? fresh + free_bytes_ : size;
    void* reserved = map(nullptr, total + EXTENT, 0);
    if (reserved == MAP_FAILED) return false;
    char* start = static_cast<char*>(reserved);
    char* data = reinterpret_cast<char*>(up(reinterpret_cast<uintptr_t>(start), EXTENT));
    const size_t skipped = data - start;
    if (skipped > 0) munmap(start, skipped);
    if (skipped < EXTENT) munmap(data + total, EXTENT - skipped);
    madvise(data, total, MADV_HUGEPAGE);
    seams_.insert(data);
    for (size_t filled = fresh; filled < total;) {
      const auto [room, from] = *by_size_.rbegin();
      const size_t part = std::min(room, total - filled);
      remove(free_.find(from));
      if (room > part) add(from + part, room - part);
      move(from, data + filled, part);
      filled += part;
    }
    add(data, total);
    return true;
  }

  // Before Linux 6.17 a call that would move two mappings fails, and has unmapped the target by then,
  // for any thread to take: so from seam to seam.
  void move(char* from, char* to, size_t size) {
    seams_.insert(from + size);
    for (char* const end = from + size; from < end;) {
      const size_t part = *seams_.upper_bound(from) - from;
      if (mremap(from, part, part, MREMAP_MAYMOVE | MREMAP_FIXED, to) == MAP_FAILED) {
        // The process has as many mappings as it may have: new pages in the place of these.
        munmap(from, part);
        map(to, part, MAP_FIXED);
      }
      seams_.erase(from);
      seams_.insert(to);
      from += part;
      to += part;
    }
  }

  static void* map(void* address, size_t size, int flags) {
    return mmap(
        address, size, PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);
  }

  Blocks free_;  // by address; neighbours are one block
  std::set<std::pair<size_t, char*>> by_size_;  // the same
  std::set<char*> seams_;  // where one of the system's mappings may begin
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
    if (data == nullptr) return others_->allocate(bytes);
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
