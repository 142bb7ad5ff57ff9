#include "few_rows.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace perl_kernels::cpu {
namespace {

using at::Tensor;

// Up to here sums across the lanes are worth less than lanes that stay empty.
constexpr int64_t VERY_FEW = 4;

// hidden weight^T in float32, whatever their type: logits are never rounded to 16 bits.
Tensor head_logits(
    const Tensor& hidden,  // (N, H)
    const Tensor& weight) {  // (V, H)
  const int64_t N = hidden.size(0), H = hidden.size(1), V = weight.size(0);
  const int64_t most = kernels().column_panel;
  const Tensor rows = weight.stride(1) == 1 ? weight : weight.contiguous();
  const Matrix right(rows), left(hidden);
  Buffer room(N * H);
  const Matrix floats = in_floats(left, room);
  std::vector<FewRows> groups;
  for (int64_t n = 0; n < N; n += most) {
    groups.emplace_back(
        Matrix(room.data() + n * H, std::min(most, N - n), H, floats.row_stride));
  }
  Tensor logits = at::empty({N, V}, hidden.options().dtype(at::kFloat));
  parallel_by_few_columns(V, N * H, [&](int64_t first, int64_t count) {
    Buffer tile(most * FEW_COLUMNS);
    for (int64_t n = 0; n < N; n += most) {
      groups[n / most].times(right, first, count, tile.data(), FEW_COLUMNS, false);
      store_tile(tile.data(), FEW_COLUMNS, std::min(most, N - n), count, logits, n, first);
    }
  });
  return logits;
}

}  // namespace

FewRows::FewRows(const Matrix& rows)
    : rows_(rows), packed_(rows.dtype == Dtype::float32 && rows.rows > VERY_FEW),
      panel_(packed_ ? rows.columns * kernels().column_panel : 0) {
  if (!packed_) return;
  const int64_t panel = kernels().column_panel;
  pack(rows, 0, rows.rows, 0, rows.columns, panel, panel_.data(), rows.columns * panel);
}

void FewRows::times(
    const Matrix& right, int64_t first, int64_t count, float* out, int64_t ld_out,
    bool add) const {
  const char* from = right.at(first, 0);
  const int64_t length = rows_.columns;
  if (packed_) {
    return kernels().spread(
        panel_.data(), rows_.rows, from, right.dtype, right.row_stride, count, length, out, ld_out,
        add);
  }
  kernels().dots(
      rows_.data, rows_.dtype, rows_.row_stride, rows_.rows, from, right.dtype, right.row_stride,
      count, length, out, ld_out, add);
}

Matrix in_floats(const Matrix& x, Buffer& room) {
  for (int64_t n = 0; n < x.rows; ++n) {
    kernels().to_float(
        x.at(n, 0), x.dtype, x.column_stride, x.columns, room.data() + n * x.columns);
  }
  return Matrix(room.data(), x.rows, x.columns, x.columns);
}

TORCH_LIBRARY_IMPL(perl_kernels, CPU, m) { m.impl("head_logits_cpu", head_logits); }

}  // namespace perl_kernels::cpu
