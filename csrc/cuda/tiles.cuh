// Where things lie, and which elements dropout keeps: arithmetic that is the same on host and device.
#pragma once

#include <cstdint>

namespace perl_kernels {

constexpr int THREADS = 256;  // of a block
constexpr int WARPS = THREADS / 32;

// Elements of 16 bits in 16 bytes: what one copy moves, and what one Philox call decides on.
constexpr int CHUNK = 8;

__host__ __device__ constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// ------------------------------------------------------------------------------------------------
// Tiles in shared memory
// ------------------------------------------------------------------------------------------------

// First element of a chunk in a tile of COLUMNS 16-bit columns. The chunks of a row are permuted so
// that eight rows of one chunk, which the tensor cores' loads read together, lie in all banks.
template <int COLUMNS>
__host__ __device__ constexpr int chunk_at(int row, int chunk) {
  constexpr int CHUNKS = COLUMNS / CHUNK;
  constexpr int ROWS_PER_LINE = CHUNKS >= 8 ? 1 : 8 / CHUNKS;  // a line: 128 bytes, all banks
  constexpr int MASK = CHUNKS >= 8 ? 7 : CHUNKS - 1;
  return row * COLUMNS + (chunk ^ (row / ROWS_PER_LINE & MASK)) * CHUNK;
}

// ------------------------------------------------------------------------------------------------
// Fragments of mma.m16n8k16. ldmatrix fills four registers from four 8 x 8 matrices; lane i names
// row i % 8 of matrix i / 8. These say which element of a tile that row begins with.
// ------------------------------------------------------------------------------------------------

struct Place {
  int row, column;
};

// The left operand, 16 x 16, from a tile of the same orientation. Also two right operands of
// 16 x 8, side by side, from a tile whose rows are summed over (transposed on the way).
__host__ __device__ constexpr Place block_row(int lane) { return {lane % 16, lane / 16 * 8}; }

// The left operand from a tile that holds its transpose (transposed on the way).
__host__ __device__ constexpr Place turned_block_row(int lane) {
  return {lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8};
}

// Two right operands of 16 x 8, one below the other, from a tile whose columns are summed over.
__host__ __device__ constexpr Place right_row(int lane) { return {lane % 8, lane / 8 * 8}; }

// The first of the two rows (the sum's index), and the column, of register i of a right operand.
__host__ __device__ constexpr Place right_element(int lane, int i) {
  return {lane % 4 * 2 + i * 8, lane / 4};
}

// Row and column of number i of the four that a lane holds of a 16 x 8 product.
__host__ __device__ constexpr Place product_element(int lane, int i) {
  return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2};
}

// ------------------------------------------------------------------------------------------------
// Dropout: the numbers of perl_kernels/_dropout.py
// ------------------------------------------------------------------------------------------------

struct alignas(16) Words {
  uint32_t word[4];
};

// Philox-4x32-7 of counter (group, row, 0, 0): the numbers of columns 8 * group .. 8 * group + 7.
__host__ __device__ constexpr Words philox(uint64_t seed, uint32_t row, uint32_t group) {
  uint32_t c0 = group, c1 = row, c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < 7; ++round) {
    const uint64_t p0 = uint64_t{c0} * 0xD2511F53u, p1 = uint64_t{c2} * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// All ones over the 16-bit elements of a word that are kept: its lower number is the even column's.
__host__ __device__ constexpr uint32_t kept(uint32_t word, uint32_t threshold) {
  return ((word & 0xFFFFu) >= threshold ? 0x0000FFFFu : 0u) |
         ((word >> 16) >= threshold ? 0xFFFF0000u : 0u);
}

// ------------------------------------------------------------------------------------------------
// Sharing out
// ------------------------------------------------------------------------------------------------

// How many steps a block takes, where `blocks` columns of blocks with `steps` each may be cut into
// pieces to fill `slots` places on the device. In units of one step, a block costs RING_FILL more
// before its first, and `extra` to write its part and have it added to the others.
__host__ __device__ constexpr int64_t steps_of_a_piece(int64_t blocks, int64_t steps,
                                                       int64_t slots, int64_t extra) {
  constexpr int64_t RING_FILL = 4;
  int64_t best = steps, least = ceil_div(blocks, slots) * (steps + RING_FILL);
  for (int64_t waves = 1; waves <= 4; ++waves) {
    const int64_t pieces = waves * slots / blocks;
    if (pieces < 2) continue;
    const int64_t each = ceil_div(steps, pieces);
    const int64_t taken = ceil_div(blocks * ceil_div(steps, each), slots);
    const int64_t cost = taken * (each + RING_FILL + extra);
    if (cost < least) best = each, least = cost;
  }
  return best;
}

}  // namespace perl_kernels
