// The thin products of lora_linear for 16-bit tensors, on the tensor cores.
//
//     shrink   s  = drop(x) a^T                         reads x once
//     ds_db    ds = scale * dy b ; db = scale * dy^T s  reads dy once
//
// Both are bound by reading their one large tensor. A ring of tiles in shared memory, filled by
// copies that do not wait, keeps enough bytes on the way; one barrier a step frees the oldest tile
// and shows the next. Dropout is applied by the thread that copied a chunk, where the chunk lies:
// each mask is computed once, whatever the rank. Sums over pieces of a long dimension are float32
// parts, added in a fixed order: no atomics, the same bits every time.
//
// Plain C++ but for the functions of device.cuh, so that tests/emulate_cuda.cpp runs this very text
// on a CPU. Letters: N tokens, D features, O outputs, R ranks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "tiles.cuh"

namespace perl_kernels {

template <typename T>
struct alignas(16) Chunk {
  T value[CHUNK];
};

struct alignas(8) Pair {
  float first, second;
};

// A matrix in global memory. Where every row begins on a 16-byte boundary, whole chunks are copied
// (`wide`); else element by element.
template <typename T>
struct Matrix {
  const T* data;
  int64_t rows, columns, row_stride, column_stride;
  bool wide;

  Matrix(const void* at, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride)
      : data(static_cast<const T*>(at)), rows(rows), columns(columns), row_stride(row_stride),
        column_stride(column_stride),
        wide(column_stride == 1 && row_stride % CHUNK == 0 && columns % CHUNK == 0 &&
             reinterpret_cast<uintptr_t>(at) % sizeof(Chunk<T>) == 0) {}
};

struct Dropout {
  const int64_t* seed;  // on the device; null: none
  uint32_t threshold;
  float kept_scale;  // 1 / (1 - p)
};

// body(i) for this thread's share of 0 .. COUNT - 1, unrolled, so that its copies and its Philox
// calls do not wait for each other. The same share at every call.
template <int COUNT, typename Body>
__device__ void for_own(Body body) {
#pragma unroll
  for (int j = 0; j < ceil_div(COUNT, THREADS); ++j) {
    const int i = j * THREADS + static_cast<int>(threadIdx.x);
    if (COUNT % THREADS == 0 || i < COUNT) body(i);
  }
}

// The tile at (first_row, first_column), zeros beyond the matrix; first_column is a chunk's.
template <int ROWS, int COLUMNS, typename T>
__device__ void copy_tile(T* tile, const Matrix<T>& from, int64_t first_row, int64_t first_column) {
  constexpr int CHUNKS = COLUMNS / CHUNK;
  if (from.wide) {
    for_own<ROWS * CHUNKS>([&](int i) {
      const int64_t row = first_row + i / CHUNKS, column = first_column + i % CHUNKS * CHUNK;
      const bool inside = row < from.rows && column < from.columns;
      copy_async(tile + chunk_at<COLUMNS>(i / CHUNKS, i % CHUNKS),
                 from.data + (inside ? row * from.row_stride + column : 0), inside);
    });
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {  // the share of for_own
    const int64_t row = first_row + i / CHUNKS, column = first_column + i % CHUNKS * CHUNK;
    Chunk<T> chunk{};
#pragma unroll
    for (int j = 0; j < CHUNK; ++j) {
      if (row < from.rows && column + j < from.columns) {
        chunk.value[j] = from.data[row * from.row_stride + (column + j) * from.column_stride];
      }
    }
    *reinterpret_cast<Chunk<T>*>(tile + chunk_at<COLUMNS>(i / CHUNKS, i % CHUNKS)) = chunk;
  }
}

// ------------------------------------------------------------------------------------------------
// Forward
// ------------------------------------------------------------------------------------------------

template <int RANKS_, int ROWS_, int STAGES_>
struct ShrinkTile {
  static constexpr int RANKS = RANKS_, ROWS = ROWS_, STAGES = STAGES_, COLUMNS = 64;
  static constexpr int X = ROWS * COLUMNS, STAGE = X + RANKS * COLUMNS;  // elements
  static constexpr int BYTES = 2 * STAGES * STAGE;
  static constexpr int BLOCKS_PER_SM = RANKS > 64 ? 1 : 2;
  static constexpr int WARPS_ACROSS = RANKS > 64 ? 4 : 2;
  static constexpr int WARP_RANKS = RANKS / WARPS_ACROSS;
  static constexpr int WARP_ROWS = ROWS / (WARPS / WARPS_ACROSS);
  static constexpr int UNROLL = RANKS > 128 ? 1 : 2;  // of two: its sums leave few registers
};

// One block: ROWS rows, RANKS ranks, and `piece` columns from blockIdx.y * piece on.
template <typename T, typename Tile>
__global__ void __launch_bounds__(THREADS, Tile::BLOCKS_PER_SM) shrink_kernel(
    const Matrix<T> x,  // (N, D)
    const Matrix<T> a,  // (R, D)
    const Dropout dropout, int64_t piece,
    T* __restrict__ s,            // (N, R), where there is one piece
    float* __restrict__ s_parts)  // (pieces, N, R), else null
{
  T* const ring = reinterpret_cast<T*>(shared_memory());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp / Tile::WARPS_ACROSS * Tile::WARP_ROWS;
  const int warp_rank = warp % Tile::WARPS_ACROSS * Tile::WARP_RANKS;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * Tile::ROWS;
  const int64_t first_column = blockIdx.y * piece;
  const int64_t first_rank = static_cast<int64_t>(blockIdx.z) * Tile::RANKS;
  const int64_t columns = x.columns - first_column < piece ? x.columns - first_column : piece;
  const int steps = static_cast<int>(ceil_div(columns, Tile::COLUMNS));
  const uint64_t seed = dropout.seed ? static_cast<uint64_t>(*dropout.seed) : 0;

  auto tile_of = [&](int step) { return ring + step % Tile::STAGES * Tile::STAGE; };
  auto copy = [&](int step) {
    if (step < steps) {
      T* tile = tile_of(step);
      const int64_t column = first_column + static_cast<int64_t>(step) * Tile::COLUMNS;
      copy_tile<Tile::ROWS, Tile::COLUMNS>(tile, x, first_row, column);
      copy_tile<Tile::RANKS, Tile::COLUMNS>(tile + Tile::X, a, first_rank, column);
    }
    commit_copies();
  };
  auto drop = [&](int step) {
    T* tile = tile_of(step);
    constexpr int CHUNKS = Tile::COLUMNS / CHUNK;
    const int64_t column = first_column + static_cast<int64_t>(step) * Tile::COLUMNS;
    for_own<Tile::ROWS * CHUNKS>([&](int i) {  // the chunks that this thread copied
      const uint32_t row = static_cast<uint32_t>(first_row + i / CHUNKS);
      const Words numbers = philox(seed, row, static_cast<uint32_t>(column / CHUNK + i % CHUNKS));
      Words* at = reinterpret_cast<Words*>(tile + chunk_at<Tile::COLUMNS>(i / CHUNKS, i % CHUNKS));
      Words elements = *at;
#pragma unroll
      for (int j = 0; j < 4; ++j) elements.word[j] &= kept(numbers.word[j], dropout.threshold);
      *at = elements;
    });
  };

  float acc[Tile::WARP_ROWS / 16][Tile::WARP_RANKS / 8][4] = {};
  for (int next = 0; next < steps + Tile::STAGES - 1; ++next) {
    const int step = next - (Tile::STAGES - 1);  // below 0 the ring is being filled
    if (step >= 0) {
      wait_copies<Tile::STAGES - 2>();
      if (dropout.seed) drop(step);
      __syncthreads();
    }
    copy(next);  // over the tile of the last step, which all have read
    if (step < 0) continue;
    const T* x_tile = tile_of(step);
    const T* a_tile = x_tile + Tile::X;
#pragma unroll Tile::UNROLL
    for (int k = 0; k < Tile::COLUMNS; k += 32) {
      uint32_t left[2][Tile::WARP_ROWS / 16][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int m = 0; m < Tile::WARP_ROWS / 16; ++m) {
          const Place at = block_row(lane);
          load_matrices(left[half][m],
                        x_tile + chunk_at<Tile::COLUMNS>(warp_row + m * 16 + at.row,
                                                         (k + half * 16 + at.column) / CHUNK));
        }
      }
#pragma unroll
      for (int n = 0; n < Tile::WARP_RANKS / 8; ++n) {
        const Place at = right_row(lane);
        uint32_t right[4];
        load_matrices(right, a_tile + chunk_at<Tile::COLUMNS>(warp_rank + n * 8 + at.row,
                                                              (k + at.column) / CHUNK));
#pragma unroll
        for (int m = 0; m < Tile::WARP_ROWS / 16; ++m) {
          multiply<T>(acc[m][n], left[0][m], right[0], right[1]);
          multiply<T>(acc[m][n], left[1][m], right[2], right[3]);
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < Tile::WARP_ROWS / 16; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::WARP_RANKS / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Place at = product_element(lane, i);
        const int64_t row = first_row + warp_row + m * 16 + at.row;
        const int64_t rank = first_rank + warp_rank + n * 8 + at.column;
        if (row >= x.rows || rank >= a.rows) continue;
        const float sum = acc[m][n][i] * dropout.kept_scale;
        if (s_parts) {
          s_parts[(blockIdx.y * x.rows + row) * a.rows + rank] = sum;
        } else {
          s[row * a.rows + rank] = from_float<T>(sum);
        }
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------
// Backward
// ------------------------------------------------------------------------------------------------

template <int RANKS_, int WARP_OUTS_, int BLOCKS_PER_SM_>
struct DyTile {
  static constexpr int RANKS = RANKS_, WARP_OUTS = WARP_OUTS_, BLOCKS_PER_SM = BLOCKS_PER_SM_;
  static constexpr int STAGES = 4, ROWS = 16, OUTS = WARPS * WARP_OUTS;
  static constexpr int DY = ROWS * OUTS, STAGE = DY + ROWS * RANKS;  // elements
  static constexpr int SHARED_ROW = RANKS + 8;  // floats: eight more, and no two banks meet
  static constexpr int SHARED = WARPS * ROWS * SHARED_ROW;
  static constexpr int BYTES = 2 * STAGES * STAGE + 4 * SHARED;
};

// One block: OUTS outputs, `piece` rows from blockIdx.y * piece on, RANKS ranks. A warp has its own
// outputs: their b and their db stay in its registers, and what it adds to a row's ds is shared.
template <typename T, typename Tile>
__global__ void __launch_bounds__(THREADS, Tile::BLOCKS_PER_SM) ds_db_kernel(
    const Matrix<T> dy,  // (N, O)
    const Matrix<T> b,   // (O, R)
    const Matrix<T> s,   // (N, R)
    float scale, int64_t piece,
    float* __restrict__ ds_parts,  // (blocks of outputs, N, R)
    float* __restrict__ db_parts)  // (pieces, O, R), or null when only ds is wanted
{
  T* const ring = reinterpret_cast<T*>(shared_memory());
  float* const shared = reinterpret_cast<float*>(ring + Tile::STAGES * Tile::STAGE);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first_out = static_cast<int64_t>(blockIdx.x) * Tile::OUTS;
  const int64_t warp_out = first_out + warp * Tile::WARP_OUTS;
  const int64_t first_row = blockIdx.y * piece;
  const int64_t first_rank = static_cast<int64_t>(blockIdx.z) * Tile::RANKS;
  const int64_t rows = dy.rows - first_row < piece ? dy.rows - first_row : piece;
  const int steps = static_cast<int>(ceil_div(rows, Tile::ROWS));

  auto tile_of = [&](int step) { return ring + step % Tile::STAGES * Tile::STAGE; };
  auto copy = [&](int step) {
    if (step < steps) {
      T* tile = tile_of(step);
      const int64_t row = first_row + static_cast<int64_t>(step) * Tile::ROWS;
      copy_tile<Tile::ROWS, Tile::OUTS>(tile, dy, row, first_out);
      if (db_parts) copy_tile<Tile::ROWS, Tile::RANKS>(tile + Tile::DY, s, row, first_rank);
    }
    commit_copies();
  };

  uint32_t right[Tile::WARP_OUTS / 16][Tile::RANKS / 8][2];  // b of this warp's outputs
#pragma unroll
  for (int k = 0; k < Tile::WARP_OUTS / 16; ++k) {
#pragma unroll
    for (int n = 0; n < Tile::RANKS / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Place at = right_element(lane, i);
        const int64_t out = warp_out + k * 16 + at.row, rank = first_rank + n * 8 + at.column;
        union {
          T value[2];
          uint32_t word;
        } pair{};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (out + j < b.rows && rank < b.columns) {
            pair.value[j] = b.data[(out + j) * b.row_stride + rank * b.column_stride];
          }
        }
        right[k][n][i] = pair.word;
      }
    }
  }

  float db[Tile::WARP_OUTS / 16][Tile::RANKS / 8][4] = {};
  for (int next = 0; next < steps + Tile::STAGES - 1; ++next) {
    const int step = next - (Tile::STAGES - 1);  // below 0 the ring is being filled
    if (step >= 0) {
      wait_copies<Tile::STAGES - 2>();
      __syncthreads();
    }
    copy(next);  // over the tile of the last step, which all have read
    if (step < 0) continue;
    const T* dy_tile = tile_of(step);
    const T* s_tile = dy_tile + Tile::DY;
    float ds[Tile::RANKS / 8][4] = {};
#pragma unroll
    for (int k = 0; k < Tile::WARP_OUTS / 16; ++k) {
      const Place at = block_row(lane);
      uint32_t left[4];
      load_matrices(left, dy_tile + chunk_at<Tile::OUTS>(at.row, (warp * Tile::WARP_OUTS + k * 16 +
                                                                  at.column) / CHUNK));
#pragma unroll
      for (int n = 0; n < Tile::RANKS / 8; ++n) {
        multiply<T>(ds[n], left, right[k][n][0], right[k][n][1]);
      }
    }
#pragma unroll
    for (int n = 0; n < Tile::RANKS / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const Place at = product_element(lane, i);
        float* to = shared + (warp * Tile::ROWS + at.row) * Tile::SHARED_ROW + n * 8 + at.column;
        *reinterpret_cast<Pair*>(to) = {ds[n][i], ds[n][i + 1]};
      }
    }
    if (db_parts) {
      uint32_t of_s[Tile::RANKS / 16][4];
#pragma unroll
      for (int n = 0; n < Tile::RANKS / 16; ++n) {
        const Place at = block_row(lane);
        load_matrices_turned(
            of_s[n], s_tile + chunk_at<Tile::RANKS>(at.row, (n * 16 + at.column) / CHUNK));
      }
#pragma unroll
      for (int m = 0; m < Tile::WARP_OUTS / 16; ++m) {
        const Place at = turned_block_row(lane);
        uint32_t left[4];
        load_matrices_turned(left, dy_tile + chunk_at<Tile::OUTS>(
            at.row, (warp * Tile::WARP_OUTS + m * 16 + at.column) / CHUNK));
#pragma unroll
        for (int n = 0; n < Tile::RANKS / 16; ++n) {
          multiply<T>(db[m][2 * n], left, of_s[n][0], of_s[n][1]);
          multiply<T>(db[m][2 * n + 1], left, of_s[n][2], of_s[n][3]);
        }
      }
    }
    __syncthreads();
    for_own<Tile::ROWS * Tile::RANKS>([&](int i) {
      const int64_t row = first_row + static_cast<int64_t>(step) * Tile::ROWS + i / Tile::RANKS;
      const int64_t rank = first_rank + i % Tile::RANKS;
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        sum += shared[(w * Tile::ROWS + i / Tile::RANKS) * Tile::SHARED_ROW + i % Tile::RANKS];
      }
      if (row < dy.rows && rank < b.columns) {
        ds_parts[(blockIdx.x * dy.rows + row) * b.columns + rank] = scale * sum;
      }
    });
  }
  if (!db_parts) return;
#pragma unroll
  for (int m = 0; m < Tile::WARP_OUTS / 16; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::RANKS / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Place at = product_element(lane, i);
        const int64_t out = warp_out + m * 16 + at.row, rank = first_rank + n * 8 + at.column;
        if (out < b.rows && rank < b.columns) {
          db_parts[(blockIdx.y * b.rows + out) * b.columns + rank] = scale * db[m][n][i];
        }
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------
// Both
// ------------------------------------------------------------------------------------------------

// out = sum of the parts, in their order
template <typename T>
__global__ void __launch_bounds__(THREADS) sum_parts_kernel(
    const float* __restrict__ parts,  // (count, rows, columns)
    int64_t count, int64_t rows, int64_t columns,
    T* __restrict__ out, int64_t out_stride)  // (rows, columns), rows out_stride apart
{
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= rows * columns) return;
  float sum = 0.f;
#pragma unroll 16
  for (int64_t part = 0; part < count; ++part) sum += parts[part * rows * columns + i];
  const bool dense = out_stride == columns;  // nothing to divide then
  out[dense ? i : i / columns * out_stride + i % columns] = from_float<T>(sum);
}

// ------------------------------------------------------------------------------------------------
// Launches. A Machine has `multiprocessors`, `shared_bytes` (the most that a block may have),
// `floats(count)` (memory that lasts until the launches are done) and `launch(kernel, grid x, y, z,
// bytes of shared memory, arguments...)`. The ring of one block keeps as many bytes on the way as a
// multiprocessor's share of the memory needs, so work is cut for one block on each.
// ------------------------------------------------------------------------------------------------

template <typename T, typename Machine>
void sum_parts(Machine& machine, const float* parts, int64_t count, int64_t rows, int64_t columns,
               T* out, int64_t out_stride) {
  machine.launch(sum_parts_kernel<T>, ceil_div(rows * columns, THREADS), 1, 1, 0, parts, count,
                 rows, columns, out, out_stride);
}

template <typename Tile, typename T, typename Machine>
void shrink_with(Machine& machine, const Matrix<T>& x, const Matrix<T>& a, const Dropout& dropout,
                 T* s) {
  const int64_t blocks = ceil_div(x.rows, Tile::ROWS);
  const int64_t rank_blocks = ceil_div(a.rows, Tile::RANKS);
  const int64_t steps = std::max<int64_t>(1, ceil_div(x.columns, Tile::COLUMNS));
  // a row's part, written and read again, is as much memory as R / 16 of its steps
  const int64_t each = steps_of_a_piece(blocks * rank_blocks, steps, machine.multiprocessors,
                                        Tile::RANKS / 16);
  const int64_t pieces = ceil_div(steps, each);
  float* parts = pieces > 1 ? machine.floats(pieces * x.rows * a.rows) : nullptr;
  machine.launch(shrink_kernel<T, Tile>, blocks, pieces, rank_blocks, Tile::BYTES, x, a, dropout,
                 each * Tile::COLUMNS, s, parts);
  if (parts) sum_parts(machine, parts, pieces, x.rows, a.rows, s, a.rows);
}

// s (N, R) = drop(x) a^T. Ranks beyond one block's, 256 or 128, read x again.
template <typename T, typename Machine>
void shrink(Machine& machine, const Matrix<T>& x, const Matrix<T>& a, const Dropout& dropout,
            T* s) {
  if (x.rows == 0) return;
  // As many tiles on the way as the 99 KiB hold that every architecture has; the widest has more.
  // Many ranks want many rows, or a comes from the L2 more slowly than x from memory.
  using Widest = ShrinkTile<256, 128, 4>;
  if (a.rows <= 16) return shrink_with<ShrinkTile<16, 64, 8>>(machine, x, a, dropout, s);
  if (a.rows <= 64) return shrink_with<ShrinkTile<64, 64, 6>>(machine, x, a, dropout, s);
  if (a.rows <= 128 || Widest::BYTES > machine.shared_bytes) {
    return shrink_with<ShrinkTile<128, 128, 3>>(machine, x, a, dropout, s);
  }
  shrink_with<Widest>(machine, x, a, dropout, s);
}

template <typename Tile, typename T, typename DB, typename Machine>
void ds_db_with(Machine& machine, const Matrix<T>& dy, const Matrix<T>& b, const Matrix<T>& s,
                float scale, T* ds, int64_t ds_stride, DB* db) {
  const int64_t blocks = ceil_div(dy.columns, Tile::OUTS);
  const int64_t rank_blocks = ceil_div(b.columns, Tile::RANKS);
  const int64_t steps = ceil_div(dy.rows, Tile::ROWS);
  int64_t pieces = 0;
  float *ds_parts = nullptr, *db_parts = nullptr;
  if (blocks > 0 && steps > 0) {
    // an output's part, written and read again, is as much memory as R / 4 of its steps
    const int64_t each = steps_of_a_piece(blocks * rank_blocks, steps, machine.multiprocessors,
                                          Tile::RANKS / 4);
    pieces = ceil_div(steps, each);
    ds_parts = machine.floats(blocks * dy.rows * b.columns);
    if (db) db_parts = machine.floats(pieces * b.rows * b.columns);
    machine.launch(ds_db_kernel<T, Tile>, blocks, pieces, rank_blocks, Tile::BYTES, dy, b, s,
                   scale, each * Tile::ROWS, ds_parts, db_parts);
  }
  if (dy.rows > 0) {
    sum_parts(machine, ds_parts, blocks, dy.rows, b.columns, ds, ds_stride);
  }
  if (db && b.rows > 0) {
    sum_parts(machine, db_parts, pieces, b.rows, b.columns, db, b.columns);
  }
}

// ds (N, R) = scale * dy b, rows ds_stride apart; db (O, R) = scale * dy^T s unless db is null.
// More than 64 ranks read dy again for each 64 of them.
template <typename T, typename DB, typename Machine>
void ds_db(Machine& machine, const Matrix<T>& dy, const Matrix<T>& b, const Matrix<T>& s,
           float scale, T* ds, int64_t ds_stride, DB* db) {
  if (b.columns <= 16) {
    ds_db_with<DyTile<16, 64, 2>>(machine, dy, b, s, scale, ds, ds_stride, db);
  } else if (b.columns <= 32) {
    ds_db_with<DyTile<32, 64, 1>>(machine, dy, b, s, scale, ds, ds_stride, db);
  } else {
    ds_db_with<DyTile<64, 32, 1>>(machine, dy, b, s, scale, ds, ds_stride, db);
  }
}

}  // namespace perl_kernels
