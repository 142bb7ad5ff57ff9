// y = x weight^T + bias + scale * dropout(x) a^T b^T for n projections that share x; and its
// gradients. How the products are made stands in lora.h.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "few_rows.h"
#include "lora.h"

namespace perl_kernels::cpu {
namespace {

using at::Tensor;
using at::TensorList;

std::tuple<std::vector<Tensor>, Tensor> forward_by_aten(
    const Tensor& x, const Projections& p, const Dropout& dropout) {
  Tensor s = s_by_aten(x, p, dropout);
  std::vector<Tensor> y;
  for (int64_t i = 0; i < p.count(); ++i) {
    y.push_back(at::empty({x.size(0), p.weight[i].size(0)}, x.options()));
    y_by_aten(x, s, p, i, y[i]);
  }
  return {y, s};
}

// (ds, dx)
std::tuple<Tensor, Tensor> backward_by_aten(
    TensorList dy, const Tensor& x, const Projections& p, const Dropout& dropout, bool need_dx) {
  Tensor ds = at::empty({x.size(0), p.rank()}, x.options());
  ds_by_aten(dy, p, ds);
  if (!need_dx) return {ds, at::empty({0}, x.options())};
  Tensor dx = at::empty(x.sizes(), x.options());
  dx_by_aten(dy, ds, p, dropout, dx);
  return {ds, dx};
}

std::tuple<std::vector<Tensor>, Tensor> forward_by_tiles(
    const Tensor& x, const Projections& p, const Dropout& dropout) {
  const int64_t N = x.size(0);
  const Operands o(p, Panels({x, p.weight}));
  std::vector<Tensor> y;
  for (const Tensor& w : p.weight) y.push_back(at::empty({N, w.size(0)}, x.options()));
  Tensor s = at::empty({N, p.rank()}, x.options());

  const ColumnsOfS columns_of_s(o);
  const int64_t bytes = (o.x_length() + o.s.back()) * sizeof(float);
  const int64_t at_once = rows_at_once(N, bytes, PACKED_BYTES);
  PackedRows rows(at_once, o.x_length(), o.s.back());
  for (int64_t group = 0; group < N; group += at_once) {
    const Blocks blocks(std::min(at_once, N - group));
    pack_x(o, x, dropout, columns_of_s, blocks, group, rows, s);
    write_y(o, rows, blocks, group, y);
  }
  return {y, s};
}

// (ds, dx)
std::tuple<Tensor, Tensor> backward_by_tiles(
    TensorList dy, const Tensor& x, const Projections& p, const Dropout& dropout, bool need_dx) {
  const int64_t N = x.size(0);
  const Operands o(p, Panels({dy, p.weight}));
  Tensor dx = at::empty(need_dx ? x.sizes() : at::IntArrayRef{0}, x.options());
  Tensor ds = at::empty({N, p.rank()}, x.options().dtype(at::kFloat));

  const ColumnsOfDs columns_of_ds(o);
  const int64_t bytes = (o.dy.back() + o.ds_length()) * sizeof(float);
  const int64_t at_once = rows_at_once(N, bytes, PACKED_BYTES);
  PackedRows rows(at_once, o.dy.back(), o.ds_length());
  for (int64_t group = 0; group < N; group += at_once) {
    const Blocks blocks(std::min(at_once, N - group));
    pack_dy(o, dy, dropout, columns_of_ds, blocks, group, rows, ds);
    if (need_dx) write_dx(o, dropout, rows, blocks, group, dx);
  }
  return {ds, dx};
}

std::tuple<std::vector<Tensor>, Tensor> forward_by_rows(
    const Tensor& x, const Projections& p, const Dropout& dropout) {
  const int64_t N = x.size(0);
  Tensor s = at::empty({N, p.rank()}, x.options());
  const ProjectedRows rows(x, p, dropout, s);
  std::vector<Tensor> y;
  for (int64_t i = 0; i < p.count(); ++i) {
    const int64_t O = p.weight[i].size(0);
    y.push_back(at::empty({N, O}, x.options()));
    parallel_by_few_columns(O, x.numel(), [&](int64_t first, int64_t count) {
      Buffer tile(N * FEW_COLUMNS);
      rows.columns(i, first, count, tile.data());
      store_tile(tile.data(), FEW_COLUMNS, N, count, y[i], 0, first);
    });
  }
  return {y, s};
}

std::tuple<std::vector<Tensor>, Tensor> lora_linear(
    const Tensor& x,     // (N, D)
    TensorList weight,   // (O_i, D)
    TensorList bias,     // (O_i,), or no bias at all
    TensorList a,        // (R_i, D)
    TensorList b,        // (O_i, R_i)
    at::ArrayRef<double> scale,
    double dropout_p,
    const std::optional<Tensor>& seed) {
  const PlainOperators plain;
  const Projections p(weight, bias, a, b, scale);
  auto* forward = better_by_rows(x, p) ? forward_by_rows
      : better_by_aten(x)              ? forward_by_aten
                                       : forward_by_tiles;
  return forward(x, p, Dropout(dropout_p, seed));
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> lora_linear_backward(
    TensorList dy,       // (N, O_i)
    const Tensor& x,     // (N, D)
    TensorList weight,   // (O_i, D)
    TensorList a,        // (R_i, D)
    TensorList b,        // (O_i, R_i)
    at::ArrayRef<double> scale,
    double dropout_p,
    const std::optional<Tensor>& seed,
    const Tensor& s,     // (N, sum of R)
    bool need_dx,
    bool need_dab) {
  const PlainOperators plain;
  const Projections p(weight, {}, a, b, scale);
  const Dropout dropout(dropout_p, seed);
  const auto [ds, dx] = (better_by_aten(x) ? backward_by_aten : backward_by_tiles)(
      dy, x, p, dropout, need_dx);
  if (!need_dab) return {dx, {}, {}};
  return {dx, gradients_of_a(ds, x, p, dropout), gradients_of_b(dy, s, p)};
}

}  // namespace

TORCH_LIBRARY_IMPL(perl_kernels, CPU, m) {
  m.impl("lora_linear_cpu", lora_linear);
  m.impl("lora_linear_backward_cpu", lora_linear_backward);
}

}  // namespace perl_kernels::cpu
