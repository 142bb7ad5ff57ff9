#include "few_rows.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace perl_kernels::cpu {
namespace {

using at::Tensor;

// Up to here sums across the lanes are worth less than lanes that stay empty.
constexpr int64_t VERY_FEW = 4;

constexpr int64_t NARROW = 16;           // columns of s, an item of work
constexpr int64_t PACKED_AT_ONCE = 128;  // elements of each row, by one thread

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
    const float* first = reinterpret_cast<const float*>(floats.at(n, 0));
    groups.emplace_back(Matrix(first, std::min(most, N - n), H, floats.row_stride));
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

// Rows of every tensor lie whole in memory, one element after the other.
bool in_rows(at::TensorList tensors) {
  return std::all_of(
      tensors.begin(), tensors.end(), [](const Tensor& t) { return t.stride(1) == 1; });
}

// bfloat16 rows that Kernels::dots multiplies as they are.
bool multiplies_as_pairs(const Tensor& x) {
  return x.scalar_type() == at::kBFloat16 && x.stride(1) == 1 &&
      kernels().multiply_pairs != nullptr;
}

// dropout of rows of floats, in memory that `room` keeps.
Matrix dropped_in_floats(const Matrix& x, const Dropout& dropout, Buffer& room) {
  for (int64_t n = 0; n < x.rows; ++n) {
    const float* row = reinterpret_cast<const float*>(x.at(n, 0));
    float* to = room.data() + n * x.columns;
    for (int64_t k = 0; k < x.columns; ++k) to[k] = row[k] * dropout.gain();
    dropout.apply(to, Dtype::float32, x.columns, n, 0);
  }
  return Matrix(room.data(), x.rows, x.columns, x.columns);
}

}  // namespace

FewRows::FewRows(const Matrix& rows)
    : rows_(rows), packed_(rows.dtype == Dtype::float32 && rows.rows > VERY_FEW),
      panel_(packed_ ? rows.columns * kernels().column_panel : 0) {
  if (!packed_) return;
  const int64_t panel = kernels().column_panel;
  at::parallel_for(0, rows.columns, PACKED_AT_ONCE, [&](int64_t begin, int64_t end) {
    pack(
        rows, 0, rows.rows, begin, end - begin, panel, panel_.data() + begin * panel,
        rows.columns * panel);
  });
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
  if (x.dtype == Dtype::float32 && x.column_stride == 1) return x;
  for (int64_t n = 0; n < x.rows; ++n) {
    kernels().to_float(
        x.at(n, 0), x.dtype, x.column_stride, x.columns, room.data() + n * x.columns);
  }
  return Matrix(room.data(), x.rows, x.columns, x.columns);
}

bool better_by_rows(const Tensor& x, const Projections& p) {
  // where the processor has instructions for bfloat16, the library's products are soon faster
  const bool pairs = x.scalar_type() == at::kBFloat16 && kernels().multiply_pairs != nullptr;
  const int64_t most = kernels().column_panel == 32 && !pairs ? 32 : 8;
  return x.size(0) <= most && in_rows(p.weight) && in_rows(p.a) && in_rows(p.b);
}

ProjectedRows::ProjectedRows(
    const Tensor& x, const Projections& p, const Dropout& dropout, Tensor& s)
    : x_room_(x.numel()), s_room_(x.size(0) * round_up(p.rank(), NARROW)) {
  const int64_t N = x.size(0), ld = round_up(p.rank(), NARROW);
  const Matrix a(p.a_all), floats = in_floats(Matrix(x), x_room_);
  const bool pairs = multiplies_as_pairs(x);
  rows_.emplace(pairs ? Matrix(x) : floats);
  Buffer dropped_room(dropout.active() ? x.numel() : 0);
  std::optional<FewRows> other;  // what a is multiplied with, where that is not the same
  if (dropout.active()) other.emplace(dropped_in_floats(floats, dropout, dropped_room));
  else if (pairs) other.emplace(floats);
  const FewRows& input = other ? *other : *rows_;
  parallel_by_few_columns(p.rank(), x.numel(), [&](int64_t first, int64_t count) {
    input.times(a, first, count, s_room_.data() + first, ld, false);
  }, NARROW);
  store_tile(s_room_.data(), ld, N, p.rank(), s, 0, 0);
  scaled_.reserve(p.count());
  for (int64_t i = 0; i < p.count(); ++i) {
    float* s_i = s_room_.data() + p.r[i];
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t r = 0; r < p.rank(i); ++r) s_i[n * ld + r] *= static_cast<float>(p.scale[i]);
    }
    scaled_.emplace_back(Matrix(s_i, N, p.rank(i), ld));
    weight_.emplace_back(p.weight[i]);
    b_.emplace_back(p.b[i]);
    if (p.bias.empty()) continue;
    bias_.emplace_back(weight_[i].rows);
    vector_to_float(p.bias[i], 0, weight_[i].rows, bias_[i].data());
  }
}

void ProjectedRows::columns(int64_t i, int64_t first, int64_t count, float* tile) const {
  rows_->times(weight_[i], first, count, tile, FEW_COLUMNS, false);
  scaled_[i].times(b_[i], first, count, tile, FEW_COLUMNS, true);
  for (int64_t n = 0; !bias_.empty() && n < rows_->count(); ++n) {
    kernels().accumulate(bias_[i].data() + first, count, tile + n * FEW_COLUMNS);
  }
}

TORCH_LIBRARY_IMPL(perl_kernels, CPU, m) { m.impl("head_logits_cpu", head_logits); }

}  // namespace perl_kernels::cpu
