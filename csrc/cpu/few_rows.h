// Products of a few rows with the rows of a weight, of which nothing is packed: the weight is read
// once, as it lies, each thread its share.
#pragma once

#include "matrix.h"

namespace perl_kernels::cpu {

constexpr int64_t FEW_COLUMNS = 64;  // of a product, an item of work

// Left rows, at most kernels().column_panel, for products with rows of other matrices.
class FewRows {
 public:
  // Rows that Kernels::dots can read as they lie (float32, or bfloat16 for a right side of it) have
  // to outlive this: where they are very few it does.
  explicit FewRows(const Matrix& rows);
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

// Calls work(first, count) on items of `columns` columns; `cost` is the inner length times the rows.
template <class Work>
void parallel_by_few_columns(int64_t columns, int64_t cost, const Work& work) {
  constexpr int64_t SERIAL = 32768;  // products worth no thread
  const int64_t grain = std::max<int64_t>(1, SERIAL / std::max<int64_t>(1, FEW_COLUMNS * cost));
  at::parallel_for(0, ceil_div(columns, FEW_COLUMNS), grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item * FEW_COLUMNS;
      work(first, std::min(FEW_COLUMNS, columns - first));
    }
  });
}

// x in float32, row after row, in memory that `room` keeps.
Matrix in_floats(const Matrix& x, Buffer& room);

}  // namespace perl_kernels::cpu
