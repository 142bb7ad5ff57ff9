// Products of a few rows with the rows of a weight, of which nothing is packed: the weight is read
// once, as it lies, each thread its share.
#pragma once

#include <optional>
#include <vector>

#include "lora.h"

namespace perl_kernels::cpu {

constexpr int64_t FEW_COLUMNS = 64;  // of a product, an item of work

// Left rows, at most kernels().column_panel, for products with rows of other matrices.
class FewRows {
 public:
  // Rows that Kernels::dots can read as they lie (float32, or bfloat16 for a right side of it) have
  // to outlive this: where they are very few it does.
  explicit FewRows(const Matrix& rows);
  int64_t count() const { return rows_.rows; }
  // out (rows, count) = or += rows times rows first .. first + count of `right`, transposed; `out`
  // has room for count rounded up to 16.
  void times(
      const Matrix& right, int64_t first, int64_t count, float* out, int64_t ld_out,
      bool add) const;

 private:
  const Matrix rows_;
  const bool packed_;
  Buffer panel_;
};

// Calls work(first, count) on items of at most `width` of `columns` columns; `cost` is the inner
// length times the rows.
template <class Work>
void parallel_by_few_columns(
    int64_t columns, int64_t cost, const Work& work, int64_t width = FEW_COLUMNS) {
  constexpr int64_t SERIAL = 32768;  // products worth no thread
  const int64_t grain = std::max<int64_t>(1, SERIAL / std::max<int64_t>(1, width * cost));
  at::parallel_for(0, ceil_div(columns, width), grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      work(item * width, std::min(width, columns - item * width));
    }
  });
}

// x in float32: itself, or row after row in memory that `room` keeps.
Matrix in_floats(const Matrix& x, Buffer& room);

// Whether x has so few rows that those of the weights are better multiplied as they lie.
bool better_by_rows(const at::Tensor& x, const Projections& p);

// Few rows x on their way through projections.
class ProjectedRows {
 public:
  // s (N, R) becomes dropout(x) a^T of all projections. x and their tensors have to outlive this.
  ProjectedRows(const at::Tensor& x, const Projections& p, const Dropout& dropout, at::Tensor& s);
  // Columns first .. first + count, at most FEW_COLUMNS, of y_i = x weight_i^T + bias_i + scale_i s_i
  // b_i^T, with FEW_COLUMNS between the rows of `tile`.
  void columns(int64_t i, int64_t first, int64_t count, float* tile) const;

 private:
  Buffer x_room_, s_room_;
  std::vector<Matrix> weight_, b_;
  std::optional<FewRows> rows_;
  std::vector<FewRows> scaled_;  // scale_i s_i
  std::vector<Buffer> bias_;     // or none
};

}  // namespace perl_kernels::cpu
