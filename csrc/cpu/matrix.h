// Matrix views of any dtype and strides, and packing them for Kernels::multiply.
//
// Every product here is rows (P, K) times columns (Q, K)^T. Both operands are packed to float32
// panels tile by tile, which is where dtype, strides, transposes, scaling and dropout end: no
// tensor is copied whole.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "kernels.h"

namespace perl_kernels::cpu {

// Tile sizes, multiples of every table's panels (6 and 12 rows; 8, 16 and 32 columns). A block of
// packed rows, a block of packed columns and their tile of results fit in the second cache.
constexpr int64_t TILE_ROWS = 120;
constexpr int64_t TILE_COLUMNS = 192;

inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
inline int64_t round_up(int64_t n, int64_t d) { return ceil_div(n, d) * d; }

// The size, a multiple of `unit`, of even shares of n that are no larger than `most`.
inline int64_t even_share(int64_t n, int64_t most, int64_t unit) {
  return std::max(unit, round_up(ceil_div(n, std::max<int64_t>(ceil_div(n, most), 1)), unit));
}

struct Dropout {
  double p = 0.0;
  uint64_t seed = 0;
  uint16_t threshold = 0;
  int64_t first_row = 0;  // the mask's row of row 0

  Dropout(double p, const std::optional<at::Tensor>& seed_tensor) : p(p) {
    if (p == 0.0) return;
    TORCH_CHECK_VALUE(seed_tensor.has_value(), "dropout_p is ", p, " and there is no seed");
    seed = static_cast<uint64_t>(seed_tensor->item<int64_t>());
    threshold = static_cast<uint16_t>(p * 65536.0);
  }
  bool active() const { return p > 0.0; }
  // What the kept elements are multiplied by.
  float gain() const { return static_cast<float>(1.0 / (1.0 - p)); }
  // The same mask for rows that begin at `row`.
  Dropout from(int64_t row) const {
    Dropout other = *this;
    other.first_row += row;
    return other;
  }
  // Zeros dropped elements; see Kernels::drop.
  void apply(void* values, Dtype dtype, int64_t n, int64_t row, int64_t column) const {
    kernels().drop(values, dtype, n, seed, threshold, first_row + row, column);
  }
};

// A view: element (p, k) lies at data + p * row_stride + k * column_stride, times `scale`.
struct Matrix {
  const char* data;
  Dtype dtype;
  int64_t rows, columns, row_stride, column_stride;
  float scale = 1.0f;
  const Dropout* dropout = nullptr;  // of element (p, k), or (k, p) after t()
  bool transposed = false;

  Matrix(const float* values, int64_t rows, int64_t columns, int64_t row_stride)
      : data(reinterpret_cast<const char*>(values)), dtype(Dtype::float32), rows(rows),
        columns(columns), row_stride(row_stride), column_stride(1) {}
  Matrix(const at::BFloat16* values, int64_t rows, int64_t columns)
      : data(reinterpret_cast<const char*>(values)), dtype(Dtype::bfloat16), rows(rows),
        columns(columns), row_stride(columns), column_stride(1) {}
  explicit Matrix(const at::Tensor& tensor);

  Matrix t() const;
  Matrix scaled(float factor) const;
  Matrix dropped(const Dropout& dropout) const;  // without the gain

  int64_t element_size() const { return dtype == Dtype::float32 ? 4 : 2; }
  const char* at(int64_t row, int64_t column) const {
    return data + (row * row_stride + column * column_stride) * element_size();
  }
};

Dtype dtype_of(const at::Tensor& tensor);

// A view of bfloat16 whose columns can be read in pairs, as Kernels::multiply_pairs wants them.
bool paired(const Matrix& m);

// The same memory, a pair of bfloat16 as one float: its packed panels [K / 2][width] of floats are
// panels of pairs, which is also how oneDNN's brgemm wants its right operand.
Matrix pairs_of(const Matrix& m);

// Packs a right operand in pairs whose inner dimension is m's rows: columns p .. p + p_count of m,
// inner k .. k + k_count, panels [ceil(k_count / 2)][width]. m is bfloat16, contiguous in columns.
void pack_pairs_of_rows(
    const Matrix& m, int64_t p, int64_t p_count, int64_t k, int64_t k_count, int64_t width,
    float* to, int64_t panel_stride);

// Float scratch, aligned to a cache line; not initialized. Each thread keeps what it gave back, up
// to KEPT_BYTES, for its next call: memory that is fresh from the system costs a page fault every
// 4 KiB, a third of a small layer's time.
class Buffer {
 public:
  static constexpr int64_t KEPT_BYTES = int64_t{16} << 20;

  explicit Buffer(int64_t floats);
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer();
  float* data() { return data_; }
  const float* data() const { return data_; }

 private:
  float* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Pack rows p .. p + p_count, inner k .. k + k_count of m into panels of `width`: panel i starts at
// to + i * panel_stride and is [k_count][width]. A last panel is filled up with zeros.
void pack(
    const Matrix& m, int64_t p, int64_t p_count, int64_t k, int64_t k_count, int64_t width,
    float* to, int64_t panel_stride);

// small (N, R), rounded to bfloat16, as the left operand of small^T big in pairs of rows: panels of
// R of ceil(N / 2) pairs, `length_of_left_pairs` floats.
int64_t length_of_left_pairs(int64_t rows, int64_t columns);
void pack_left_pairs(const Matrix& small, float* to);

// out (R, C) = alpha * small (N, R)^T big (N, C), rounded once; big is read once. In pairs, small is
// rounded to bfloat16 first.
void transposed_product(const Matrix& small, const Matrix& big, float alpha, at::Tensor& out);

// Write rows of c (float, ldc) to `out`'s rows from `row` and columns from `column`; out is
// contiguous in its columns.
void store_tile(
    const float* c, int64_t ldc, int64_t rows, int64_t columns, at::Tensor& out, int64_t row,
    int64_t column);

// A vector as floats.
void vector_to_float(const at::Tensor& vector, int64_t first, int64_t count, float* to);

// Runs work(begin, end) on each thread's run of items 0 .. weights.size(), of even total weight.
template <class Work>
void parallel_by_weight(const std::vector<int64_t>& weights, const Work& work) {
  std::vector<int64_t> before = {0};
  for (int64_t weight : weights) before.push_back(before.back() + weight);
  const int64_t threads = at::get_num_threads(), items = static_cast<int64_t>(weights.size());
  // the first item whose middle is not before the thread's share
  auto start_of = [&](int64_t thread) {
    int64_t item = 0;
    while (item < items && before[item] + before[item + 1] < 2 * before.back() * thread / threads) {
      ++item;
    }
    return thread == threads ? items : item;
  };
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    const int64_t begin = start_of(first), end = start_of(last);
    if (begin < end) work(begin, end);
  });
}

// How many rows to work on at once, at most max_bytes of packed operands, in even shares.
int64_t rows_at_once(int64_t rows, int64_t bytes_per_row, int64_t max_bytes);

}  // namespace perl_kernels::cpu
