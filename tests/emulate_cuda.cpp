// The kernels of csrc/cuda/lora_linear.cuh and head.cuh run on a CPU, as they are: a block's threads are
// coroutines, ldmatrix and mma.sync follow the tables of the PTX manual in float32, shared and
// fresh global memory is full of NaN. tests/test_cuda_emulation.py compiles and calls this.
//
// What runs is as unkind as a GPU may be: one warp after the other goes as far as it can, forwards or
// backwards, and copies that do not wait land either at once or as late as they may. A missing
// barrier or wait, or a tile overwritten too early, gives a wrong result in one of the two.
//
// Source of the layouts: PTX ISA, "Matrix fragments for mma.m16n8k16" and "ldmatrix".

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __restrict__
#define __launch_bounds__(...)

// ------------------------------------------------------------------------------------------------
// bfloat16. (float16 is the same kernel text with another instruction.)
// ------------------------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};

static float bf16_as_float(uint32_t bits) {
  const uint32_t word = bits << 16;
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}

// ------------------------------------------------------------------------------------------------
// A block
// ------------------------------------------------------------------------------------------------

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
static Index threadIdx, blockIdx;

struct Copy {
  void* to;
  const void* from;
};

// What a lane shows the others of its warp.
struct Shown {
  const void* row;             // in ldmatrix
  uint32_t left[4], right[2];  // in mma
  float x;                     // in shfl
};

struct Thread {
  ucontext_t context;
  bool done = false, at_barrier = false;
  int warp_turns = 0, block_turns = 0;  // barriers that this thread has reached
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> committed;  // the oldest first
  Shown shown[2];  // in turns: some lanes may still read the last one
};

struct Block {
  bool backwards, late;
  ucontext_t scheduler;
  std::vector<Thread> threads;
  std::vector<int> at_warp_barriers;  // how often a thread has come to one, by warp
  int at_block_barriers = 0;
  std::vector<unsigned char> memory;
  std::function<void()> body;
  const char* trouble = nullptr;
};
static Block* block = nullptr;

static Thread& self() { return block->threads[threadIdx.x]; }

static void give_way() {
  const Index index = threadIdx;
  swapcontext(&self().context, &block->scheduler);
  threadIdx = index;
}

// What this lane shows goes out; afterwards `shown_by(lane)` is what another one showed.
static void show(const Shown& mine) {
  const int turn = ++self().warp_turns;
  self().shown[turn % 2] = mine;
  int& here = block->at_warp_barriers[threadIdx.x / 32];
  ++here;
  while (here < 32 * turn) give_way();
}

static const Shown& shown_by(int lane) {
  return block->threads[threadIdx.x / 32 * 32 + lane].shown[self().warp_turns % 2];
}

static void __syncthreads() {
  const int turn = ++self().block_turns;
  ++block->at_block_barriers;
  self().at_barrier = true;
  do give_way();
  while (block->at_block_barriers < static_cast<int>(block->threads.size()) * turn);
  self().at_barrier = false;
}

static void thread_begins() {
  block->body();
  self().done = true;
  give_way();
}

// Every warp in turn as far as it can go, until all are done. False when nothing moves any more.
static bool run_block(Block& one) {
  block = &one;
  const int count = static_cast<int>(one.threads.size());
  constexpr size_t STACK = 64 * 1024;
  static std::vector<char> stacks;
  stacks.resize(count * STACK);
  for (int i = 0; i < count; ++i) {
    ucontext_t& context = one.threads[i].context;
    getcontext(&context);
    context.uc_stack.ss_sp = &stacks[i * STACK];
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, thread_begins, 0);
  }
  auto all = [&](int first, int threads, auto state) {
    return std::all_of(&one.threads[first], &one.threads[first] + threads, state);
  };
  auto stands = [](const Thread& t) { return t.done || t.at_barrier; };
  auto done = [](const Thread& t) { return t.done; };
  for (int rounds = 0; !all(0, count, done); ++rounds) {
    for (int i = 0; i < count; i += 32) {
      const int warp = one.backwards ? count - 32 - i : i;
      for (int turns = 0; turns == 0 || !all(warp, 32, stands); ++turns) {
        for (int lane = 0; lane < 32; ++lane) {
          threadIdx.x = warp + (one.backwards ? 31 - lane : lane);
          if (!self().done) swapcontext(&one.scheduler, &self().context);
        }
        if (turns > 100'000) return false;
      }
    }
    if (rounds > 100'000) return false;
  }
  return true;
}

// ------------------------------------------------------------------------------------------------
// The functions of device.cuh
// ------------------------------------------------------------------------------------------------

namespace perl_kernels {

float to_float(float x) { return x; }
float to_float(BFloat16 x) { return bf16_as_float(x.bits); }

template <typename T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    uint32_t word;
    std::memcpy(&word, &x, 4);
    if (x != x) return {0x7FFF};
    return {static_cast<uint16_t>((word + 0x7FFF + (word >> 16 & 1)) >> 16)};
  }
}

unsigned char* shared_memory() { return block->memory.data(); }

float of_other_lane(float x, int mask) {
  Shown mine{};
  mine.x = x;
  show(mine);
  return shown_by(threadIdx.x % 32 ^ mask).x;
}

static void check_aligned(const void* at, const char* what) {
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0) block->trouble = what;
}

static void perform(const Copy& copy) {
  if (copy.from) {
    std::memcpy(copy.to, copy.from, 16);
  } else {
    std::memset(copy.to, 0, 16);
  }
}

void copy_async(void* to, const void* from, bool inside) {
  check_aligned(to, "a copy to an address off 16 bytes");
  check_aligned(from, "a copy from an address off 16 bytes");
  const Copy copy{to, inside ? from : nullptr};
  if (block->late) {
    self().open.push_back(copy);
  } else {
    perform(copy);
  }
}

void commit_copies() {
  self().committed.push_back(std::move(self().open));
  self().open.clear();
}

template <int PENDING>
void wait_copies() {
  auto& groups = self().committed;
  while (groups.size() > PENDING) {
    for (const Copy& copy : groups.front()) perform(copy);
    groups.erase(groups.begin());
  }
}

static void load_matrices(uint32_t (&m)[4], const void* row, bool turned) {
  check_aligned(row, "ldmatrix of a row off 16 bytes");
  Shown mine{};
  mine.row = row;
  show(mine);
  const int lane = threadIdx.x % 32;
  for (int j = 0; j < 4; ++j) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int r = turned ? lane % 4 * 2 + i : lane / 4, c = turned ? lane / 4 : lane % 4 * 2 + i;
      pair[i] = static_cast<const uint16_t*>(shown_by(8 * j + r).row)[c];
    }
    m[j] = pair[0] | uint32_t{pair[1]} << 16;
  }
}

void load_matrices(uint32_t (&m)[4], const void* row) { load_matrices(m, row, false); }
void load_matrices_turned(uint32_t (&m)[4], const void* row) { load_matrices(m, row, true); }

template <typename T>
void multiply(float (&acc)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  show({nullptr, {left[0], left[1], left[2], left[3]}, {right0, right1}});
  const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
  for (int k = 0; k < 16; ++k) {
    const int from = k % 8 / 2, shift = 16 * (k % 2), high = k >= 8;
    auto of_row = [&](int i) {  // row or row + 8
      return bf16_as_float(shown_by(row * 4 + from).left[i + 2 * high] >> shift & 0xFFFF);
    };
    auto of_column = [&](int i) {  // column or column + 1
      return bf16_as_float(shown_by((column + i) * 4 + from).right[high] >> shift & 0xFFFF);
    };
    const float rows[2] = {of_row(0), of_row(1)}, columns[2] = {of_column(0), of_column(1)};
    for (int i = 0; i < 4; ++i) acc[i] += rows[i / 2] * columns[i % 2];
  }
}

}  // namespace perl_kernels

#include "head.cuh"
#include "lora_linear.cuh"

// ------------------------------------------------------------------------------------------------
// What the test calls
// ------------------------------------------------------------------------------------------------

namespace {

using namespace perl_kernels;

constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

struct Emulator {
  int multiprocessors, shared_bytes;
  bool backwards, late;
  const char* trouble = nullptr;
  std::vector<std::unique_ptr<float[]>> memory;

  float* floats(int64_t count) {
    memory.push_back(std::make_unique<float[]>(count));
    std::fill_n(memory.back().get(), count, NOT_A_NUMBER);
    return memory.back().get();
  }

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t x, int64_t y, int64_t z, int shared,
              Arguments... arguments) {
    if (shared > shared_bytes) trouble = "more shared memory than a block may have";
    if (x < 1 || y < 1 || z < 1 || y > 65535 || z > 65535) trouble = "a grid of no such size";
    Block one{backwards, late};
    one.body = [&] { kernel(arguments...); };
    for (int64_t i = 0; i < x * y * z && !trouble; ++i) {
      blockIdx = {unsigned(i % x), unsigned(i / x % y), unsigned(i / x / y)};
      one.threads = std::vector<Thread>(THREADS);
      one.at_warp_barriers.assign(WARPS, 0);
      one.at_block_barriers = 0;
      one.memory.assign(shared + 128, 0xFF);  // a NaN wherever it is read as a number
      if (!run_block(one)) trouble = "threads wait for each other";
      if (one.trouble) trouble = one.trouble;
    }
  }
};

Matrix<BFloat16> matrix(const int64_t* m) {  // address, rows, columns, row stride, column stride
  return {reinterpret_cast<const void*>(m[0]), m[1], m[2], m[3], m[4]};
}

}  // namespace

// Machine: multiprocessors, bytes of shared memory, threads in reverse, copies late.
// Each returns null, or what the device would have refused.

extern "C" const char* emulate_shrink(const int64_t* machine, const int64_t* x, const int64_t* a,
                                      const int64_t* seed, int threshold, float kept_scale,
                                      void* s) {
  Emulator emulator{int(machine[0]), int(machine[1]), machine[2] != 0, machine[3] != 0};
  const Dropout dropout{seed, static_cast<uint32_t>(threshold), kept_scale};
  shrink(emulator, matrix(x), matrix(a), dropout, static_cast<BFloat16*>(s));
  return emulator.trouble;
}

extern "C" const char* emulate_ds_db(const int64_t* machine, const int64_t* dy, const int64_t* b,
                                     const int64_t* s, float scale, void* ds, int64_t ds_stride,
                                     void* db, int db_is_float) {
  Emulator emulator{int(machine[0]), int(machine[1]), machine[2] != 0, machine[3] != 0};
  auto run = [&](auto* of_db) {
    ds_db(emulator, matrix(dy), matrix(b), matrix(s), scale, static_cast<BFloat16*>(ds),
          ds_stride, of_db);
  };
  db_is_float ? run(static_cast<float*>(db)) : run(static_cast<BFloat16*>(db));
  return emulator.trouble;
}

// logits (sides * rows, columns) and dz as matrices, whose rows say which there are; `row`: addresses
// of bias, target, the seven statistics, d_log_prob and d_kl, 0 for none.
extern "C" const char* emulate_head_rows(const int64_t* machine, const int64_t* logits,
                                         const int64_t* dz, const int64_t* row, int64_t rows,
                                         float inverse_temperature, float softcap,
                                         int64_t ignore_index, int is_float) {
  Emulator emulator{int(machine[0]), int(machine[1]), machine[2] != 0, machine[3] != 0};
  auto number = [&](int i) { return reinterpret_cast<float*>(row[i]); };
  auto run = [&](auto element) {
    using T = decltype(element);
    const HeadRows<T> of{
        reinterpret_cast<const float*>(logits[0]), rows, logits[2], logits[3],
        reinterpret_cast<const T*>(row[0]), reinterpret_cast<const int64_t*>(row[1]), ignore_index,
        {inverse_temperature, softcap}, number(2), number(3), number(4), number(5), number(6),
        number(7), number(8), number(9), number(10),
        dz[1] > 0 ? reinterpret_cast<T*>(dz[0]) : nullptr, dz[1] > rows, dz[3]};
    head_rows(emulator, of, logits[1] > rows);
  };
  is_float ? run(float{}) : run(BFloat16{});
  return emulator.trouble;
}

// Which of the 8 groups of 16 bytes that make up all banks a chunk lies in.
extern "C" int bank_group(int columns, int row, int chunk) {
  auto of = [&](auto width) { return chunk_at<decltype(width)::value>(row, chunk) / CHUNK % 8; };
  switch (columns) {
    case 16: return of(std::integral_constant<int, 16>{});
    case 32: return of(std::integral_constant<int, 32>{});
    case 64: return of(std::integral_constant<int, 64>{});
    case 256: return of(std::integral_constant<int, 256>{});
    default: return of(std::integral_constant<int, 512>{});
  }
}

extern "C" int64_t piece(int64_t blocks, int64_t steps, int64_t slots, int64_t extra) {
  return steps_of_a_piece(blocks, steps, slots, extra);
}
