// y = x weight^T + bias, to which each row's own adapter g adds scale_g dropout(x) a_g^T b_g^T; and
// its gradients.
//
// The base is the op lora_linear over all rows at once, with an adapter of rank 0, so it goes the
// way that is the fastest for its size. The rows of each adapter are then gathered, and blocks of
// them go through two thin products without leaving the cache in between: forward x' a_g^T b_g^T,
// backward dy b_g a_g. Both are `add_parts`. The mask is that of a row's place in x.
#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <numeric>

#include "lora.h"

namespace perl_kernels::cpu {
namespace {

using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;

// The rows that have an adapter, by adapter, and where each adapter's rows start among them.
struct Segments {
  Tensor order;
  std::vector<int64_t> start;

  Segments(const Tensor& adapter, int64_t count) : start(count + 1) {
    const Tensor numbers = adapter.contiguous();
    const int64_t* g = numbers.const_data_ptr<int64_t>();
    const int64_t N = numbers.numel();
    for (int64_t n = 0; n < N; ++n) {
      TORCH_CHECK_VALUE(
          -1 <= g[n] && g[n] < count, "adapter has ", g[n], "; wanted -1, or the number of one of ",
          count, " adapters");
      if (g[n] >= 0) ++start[g[n] + 1];
    }
    std::partial_sum(start.begin(), start.end(), start.begin());
    order = at::empty({start.back()}, numbers.options());
    int64_t* to = order.mutable_data_ptr<int64_t>();
    std::vector<int64_t> next = start;
    for (int64_t n = 0; n < N; ++n) {
      if (g[n] >= 0) to[next[g[n]]++] = n;
    }
  }
  int64_t row(int64_t place) const { return order.const_data_ptr<int64_t>()[place]; }
  // The rows of `sorted` that are adapter g's.
  Tensor part(const Tensor& sorted, int64_t g) const {
    return sorted.slice(0, start[g], start[g + 1]);
  }
};

// The rows of t by adapter, dropped elements 0.
Tensor gathered(const Tensor& t, const Segments& segments, const Dropout& dropout) {
  Tensor sorted = t.index_select(0, segments.order);
  if (!dropout.active()) return sorted;
  char* data = static_cast<char*>(sorted.mutable_data_ptr());
  const int64_t columns = t.size(1), bytes = columns * t.element_size();
  at::parallel_for(0, sorted.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      dropout.apply(data + i * bytes, dtype_of(t), columns, segments.row(i), 0);
    }
  });
  return sorted;
}

// Rows first .. first + count among the sorted ones, all of adapter g.
struct Block {
  int64_t g, first, count;
};

// Blocks of at most a tile's rows, and of at most a thread's share of all.
std::vector<Block> blocks_of(const Segments& segments) {
  const int64_t panel = kernels().row_panel, rows = segments.start.back();
  const int64_t share = std::max(panel, round_up(ceil_div(rows, at::get_num_threads()), panel));
  std::vector<Block> blocks;
  for (size_t g = 0; g + 1 < segments.start.size(); ++g) {
    const int64_t begin = segments.start[g], end = segments.start[g + 1];
    const int64_t size = even_share(end - begin, std::min(TILE_ROWS, share), panel);
    for (int64_t first = begin; first < end; first += size) {
      blocks.push_back({static_cast<int64_t>(g), first, std::min(size, end - first)});
    }
  }
  return blocks;
}

// out's elements from `column` on in row `row` += addend, which is overwritten.
void add_to_row(float* addend, int64_t n, Tensor& out, int64_t row, int64_t column) {
  const Kernels& table = kernels();
  const Dtype dtype = dtype_of(out);
  char* to = static_cast<char*>(out.mutable_data_ptr()) +
      (row * out.stride(0) + column) * out.element_size();
  if (dtype == Dtype::float32) return table.accumulate(addend, n, reinterpret_cast<float*>(to));
  alignas(64) float there[TILE_COLUMNS];
  table.to_float(to, dtype, 1, n, there);
  table.accumulate(there, n, addend);
  table.from_float(addend, n, dtype, to);
}

// Two thin products for the rows of each adapter.
struct ThinProducts {
  const Segments& segments;
  TensorList narrow;  // of adapter g, (R_g, K), or (K, R_g) backward
  TensorList wide;    // (C, R_g), or (R_g, C) backward
  bool backward;
  at::ArrayRef<double> scale;
  const Dropout& dropout;

  int64_t rank(int64_t g) const { return narrow[g].size(backward ? 1 : 0); }

  // middle = f left narrow_g^T ; out += f' middle wide_g^T, in rows of x. Forward f is the
  // dropout's gain and f' the scale; backward the other way round, and the mask is put over what
  // is added. left and middle have their rows sorted. Without `out` the second is left out.
  void add_parts(const Tensor& left, Tensor& middle, Tensor* out) const {
    const Kernels& table = kernels();
    const Panels panels({left});
    const int64_t width = table.column_panel, height = table.row_panel;
    const int64_t K = panels.length(left.size(1)), C = out != nullptr ? out->size(1) : 0;
    const int64_t R = middle.size(1);
    const std::vector<Block> blocks = blocks_of(segments);
    std::vector<int64_t> weights;
    for (const Block& block : blocks) weights.push_back(block.count);

    parallel_by_weight(weights, [&](int64_t begin, int64_t end) {
      Buffer columns_of_middle(round_up(R, width) * K);
      Buffer columns_of_out(round_up(C, width) * panels.length(R));
      Buffer rows(TILE_ROWS * K), middle_rows(TILE_ROWS * panels.length(R));
      Buffer thin(TILE_ROWS * round_up(R, width)), tile(TILE_ROWS * TILE_COLUMNS);
      int64_t packed = -1;
      for (int64_t i = begin; i < end; ++i) {
        const auto [g, first, count] = blocks[i];
        const int64_t R_g = rank(g), ld = round_up(R_g, width), k = panels.length(R_g);
        if (packed != g) {
          packed = g;
          pack_columns(panels, narrow[g], columns_of_middle.data());
          if (C > 0) pack_columns(panels, wide[g], columns_of_out.data());
        }
        const double factors[] = {dropout.gain(), scale[g]};
        auto times = [&](double factor) {
          for (int64_t j = 0; j < count * ld; ++j) thin.data()[j] *= static_cast<float>(factor);
        };
        pack(panels.view(left), first, count, 0, K, height, rows.data(), K * height);
        panels.multiply(
            rows.data(), ceil_div(count, height), K * height, columns_of_middle.data(), ld / width,
            K * width, K, thin.data(), ld, false);
        times(factors[backward]);
        store_tile(thin.data(), ld, count, R_g, middle, first, 0);
        if (C == 0) continue;
        times(factors[!backward]);
        panels.pack_tile(thin.data(), ld, count, R_g, middle_rows.data(), k * height);
        for (int64_t column = 0; column < C; column += TILE_COLUMNS) {
          const int64_t n = std::min(TILE_COLUMNS, C - column);
          panels.multiply(
              middle_rows.data(), ceil_div(count, height), k * height,
              columns_of_out.data() + column * k, ceil_div(n, width), k * width, k, tile.data(),
              TILE_COLUMNS, false);
          for (int64_t j = 0; j < count; ++j) {
            float* values = tile.data() + j * TILE_COLUMNS;
            const int64_t row = segments.row(first + j);
            if (backward && dropout.active()) {
              dropout.apply(values, Dtype::float32, n, row, column);
            }
            add_to_row(values, n, *out, row, column);
          }
        }
      }
    });
  }

 private:
  // All of a right operand.
  void pack_columns(const Panels& panels, const Tensor& operand, float* to) const {
    const Tensor t = panels.readable(operand);
    const int64_t width = kernels().column_panel;
    if (backward) {
      return panels.pack_columns(t, 0, operand.size(1), to, panels.length(t.size(0)) * width);
    }
    const int64_t k = panels.length(operand.size(1));
    pack(panels.view(t), 0, t.size(0), 0, k, width, to, k * width);
  }
};

// ------------------------------------------------------------------------------------------------
// The base alone
// ------------------------------------------------------------------------------------------------

using Forward = std::tuple<std::vector<Tensor>, Tensor>(
    const Tensor&, TensorList, TensorList, TensorList, TensorList, at::ArrayRef<double>, double,
    const OptionalTensor&);
using Backward = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>>(
    TensorList, const Tensor&, TensorList, TensorList, TensorList, at::ArrayRef<double>, double,
    const OptionalTensor&, const Tensor&, bool, bool);

template <class Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
}

Tensor y_of_base(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  static const auto lora_linear = op<Forward>("perl_kernels::lora_linear_cpu");
  const Tensor a = at::empty({0, x.size(1)}, x.options());
  const Tensor b = at::empty({weight.size(0), 0}, x.options());
  const TensorList biases = bias.has_value() ? TensorList(*bias) : TensorList();
  return std::get<0>(lora_linear.call(x, weight, biases, a, b, 1.0, 0.0, std::nullopt))[0];
}

Tensor dx_of_base(const Tensor& dy, const Tensor& x, const Tensor& weight) {
  static const auto lora_linear_backward = op<Backward>("perl_kernels::lora_linear_backward_cpu");
  const Tensor a = at::empty({0, x.size(1)}, x.options());
  const Tensor b = at::empty({weight.size(0), 0}, x.options());
  const Tensor s = at::empty({x.size(0), 0}, x.options());
  return std::get<0>(lora_linear_backward.call(
      dy, x, weight, a, b, 1.0, 0.0, std::nullopt, s, /*need_dx=*/true, /*need_dab=*/false));
}

// ------------------------------------------------------------------------------------------------
// The op
// ------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> multi_lora_linear(
    const Tensor& x,        // (N, D)
    const Tensor& weight,   // (O, D)
    const OptionalTensor& bias,  // (O,)
    TensorList a,           // (R_g, D)
    TensorList b,           // (O, R_g)
    at::ArrayRef<double> scale,
    const Tensor& adapter,  // (N,)
    double dropout_p,
    const OptionalTensor& seed) {
  const PlainOperators plain;
  const Segments segments(adapter, a.size());
  const Dropout dropout(dropout_p, seed);
  int64_t R = 0;
  for (const Tensor& t : a) R = std::max(R, t.size(0));
  Tensor y = y_of_base(x, weight, bias), s = at::zeros({x.size(0), R}, x.options());
  ThinProducts{segments, a, b, false, scale, dropout}.add_parts(
      gathered(x, segments, dropout), s, &y);
  return {y, s};
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> multi_lora_linear_backward(
    const Tensor& dy,       // (N, O)
    const Tensor& x,        // (N, D)
    const Tensor& weight,   // (O, D)
    TensorList a,           // (R_g, D)
    TensorList b,           // (O, R_g)
    at::ArrayRef<double> scale,
    const Tensor& adapter,  // (N,)
    double dropout_p,
    const OptionalTensor& seed,
    const Tensor& s,        // (N, largest R), rows sorted
    bool need_dx,
    bool need_dab) {
  const PlainOperators plain;
  const Segments segments(adapter, a.size());
  const Dropout dropout(dropout_p, seed), none(0.0, std::nullopt);
  const Tensor sorted_dy = gathered(dy, segments, none);
  Tensor ds = at::empty({sorted_dy.size(0), s.size(1)}, x.options().dtype(at::kFloat));
  Tensor dx = need_dx ? dx_of_base(dy, x, weight) : at::empty({0}, x.options());
  ThinProducts{segments, b, a, true, scale, dropout}.add_parts(
      sorted_dy, ds, need_dx ? &dx : nullptr);
  if (!need_dab) return {dx, {}, {}};
  const Tensor sorted_x = gathered(x, segments, dropout);
  if (dropout.active()) ds.mul_(dropout.gain());  // and x stays as it was rounded
  std::vector<Tensor> da, db;
  for (int64_t g = 0; g < static_cast<int64_t>(a.size()); ++g) {
    const Projections p(weight, {}, a[g], b[g], scale[g]);
    const int64_t R_g = p.rank();
    const Tensor ds_g = segments.part(ds, g).slice(1, 0, R_g);
    const Tensor s_g = segments.part(s, g).slice(1, 0, R_g);
    da.push_back(gradients_of_a(ds_g, segments.part(sorted_x, g), p, none)[0]);
    db.push_back(gradients_of_b(segments.part(sorted_dy, g), s_g, p)[0]);
  }
  return {dx, da, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(perl_kernels, CPU, m) {
  m.impl("multi_lora_linear_cpu", multi_lora_linear);
  m.impl("multi_lora_linear_backward_cpu", multi_lora_linear_backward);
}

}  // namespace perl_kernels::cpu
