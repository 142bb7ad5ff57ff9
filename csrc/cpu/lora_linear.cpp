// y = x weight^T + bias + scale * dropout(x) a^T b^T for n projections that share x; and its
// gradients.
//
// The adapter is not a second product over y: its rank extends the inner dimension. Packed rows
// are [x | s_0 | s_1 | ...], packed columns [weight_i | scale_i b_i], and one accumulator runs over
// D and then over R_i. Backward likewise: rows [dy_0 | dy_1 | ... | ds], columns
// [weight_0^T | weight_1^T | ... | a^T], the adapter's part first, so that the dropout mask can be
// applied to it before the rest is added.
//
// Where packing does not pay (few rows) or the processor multiplies bfloat16 itself, the products
// go to ATen instead, with the adapter added to its result in place.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "matrix.h"

namespace perl_kernels::cpu {
namespace {

using at::Tensor;
using at::TensorList;

constexpr int64_t PACKED_BYTES = int64_t{8} << 20;  // of rows at once

// Where each tensor of a list starts when their sizes along `dim` are laid end to end.
std::vector<int64_t> offsets_of(TensorList tensors, int64_t dim) {
  std::vector<int64_t> offsets = {0};
  for (const Tensor& t : tensors) offsets.push_back(offsets.back() + t.size(dim));
  return offsets;
}

// The adapters' a, stacked to (sum of R, D).
Tensor stacked(TensorList a) { return a.size() == 1 ? a[0] : at::cat(a); }

// Whether ATen's products are the faster ones. For a few rows, always: nothing is packed. Its
// float32 products come from MKL, which uses AVX-512 on Intel's processors alone; its bfloat16
// products are slow without instructions for them, faster than ours with AMX, and with AVX-512 as
// long as there are too few rows to pay for packing the weight.
bool better_by_aten(const Tensor& x) {
  if (x.size(0) < 4) return true;
  if (x.scalar_type() == at::kFloat) return !beats_library_in_float32();
  if (x.scalar_type() != at::kBFloat16) return false;
  return has_bfloat16_tiles() || (kernels().multiply_pairs != nullptr && x.size(0) < 192);
}

// x with dropped elements 0 and the others times the gain.
Tensor dropped(const Tensor& x, const Dropout& dropout) {
  const Kernels& table = kernels();
  const int64_t D = x.size(1);
  Tensor out = at::empty(x.sizes(), x.options());
  const Matrix view(x);
  at::parallel_for(0, x.size(0), 16, [&](int64_t begin, int64_t end) {
    Buffer row(D);
    for (int64_t n = begin; n < end; ++n) {
      table.to_float(view.at(n, 0), view.dtype, view.column_stride, D, row.data());
      table.drop(row.data(), D, dropout.seed, dropout.threshold, n, 0);
      for (int64_t i = 0; i < D; ++i) row.data()[i] *= dropout.gain();
      store_tile(row.data(), D, 1, D, out, n, 0);
    }
  });
  return out;
}

std::tuple<std::vector<Tensor>, Tensor> forward_by_aten(
    const Tensor& x, TensorList weight, TensorList bias, TensorList a, TensorList b,
    at::ArrayRef<double> scale, const Dropout& dropout) {
  const std::vector<int64_t> r = offsets_of(a, 0);
  const Tensor input = dropout.active() ? dropped(x, dropout) : x;
  Tensor s = at::mm(input, stacked(a).to(x.scalar_type()).t());
  std::vector<Tensor> y;
  for (size_t i = 0; i < weight.size(); ++i) {
    const Tensor s_i = s.slice(1, r[i], r[i + 1]), b_t = b[i].to(x.scalar_type()).t();
    if (x.scalar_type() == at::kFloat) {
      // Short sums are added to long ones: a BLAS may start a sum from what is there already.
      y.push_back(at::linear(x, weight[i], bias.empty() ? std::optional<Tensor>() : bias[i]));
      y[i].addmm_(s_i, b_t, 1, scale[i]);
    } else {
      // In 16 bits sums are longer than results anyway, and the short product is the cheaper one
      // to write first and read again.
      Tensor y_i = at::empty({x.size(0), weight[i].size(0)}, x.options());
      at::addmm_out(y_i, bias.empty() ? y_i : bias[i], s_i, b_t, bias.empty() ? 0 : 1, scale[i]);
      y.push_back(y_i.addmm_(x, weight[i].t()));
    }
  }
  return {y, s};
}

// (ds, dx)
std::tuple<Tensor, Tensor> backward_by_aten(
    TensorList dy, const Tensor& x, TensorList weight, TensorList a, TensorList b,
    at::ArrayRef<double> scale, const Dropout& dropout, bool need_dx) {
  const std::vector<int64_t> r = offsets_of(a, 0);
  Tensor ds = at::empty({x.size(0), r.back()}, x.options());
  for (size_t i = 0; i < dy.size(); ++i) {
    Tensor ds_i = ds.slice(1, r[i], r[i + 1]);
    at::addmm_out(ds_i, ds_i, dy[i], b[i].to(x.scalar_type()), 0, scale[i]);
  }
  if (!need_dx) return {ds, at::empty({0}, x.options())};
  Tensor dx = at::mm(dy[0], weight[0]);  // long sums first, as in forward
  for (size_t i = 1; i < dy.size(); ++i) dx.addmm_(dy[i], weight[i]);
  const Tensor a_all = stacked(a).to(x.scalar_type());
  if (dropout.active()) {
    dx.add_(dropped(at::mm(ds, a_all), dropout));
  } else {
    dx.addmm_(ds, a_all);
  }
  return {ds, dx};
}

// ATen's operators inside ours are neither recorded nor cast again.
struct PlainOperators {
  c10::impl::ExcludeDispatchKeyGuard guard{
      c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset};
};

struct Tile {
  int64_t item, first, count;  // which projection; which of its columns
};

// Even tiles of `size` columns.
void add_tiles(int64_t item, int64_t size, std::vector<Tile>& tiles) {
  const int64_t width = even_share(size, TILE_COLUMNS, kernels().column_panel);
  for (int64_t j = 0; j < size; j += width) {
    tiles.push_back({item, j, std::min(width, size - j)});
  }
}

// Rows of a group in even blocks. Panels of packed rows follow each other through all blocks.
struct Blocks {
  const int64_t rows, size, count;

  explicit Blocks(int64_t rows)
      : rows(rows), size(even_share(rows, TILE_ROWS, kernels().row_panel)),
        count(ceil_div(rows, size)) {}
  int64_t rows_of(int64_t block) const { return std::min(size, rows - block * size); }

  // Calls work(first row, rows) for stretches of at most `size` rows that begin at a panel.
  template <class Work>
  void stretches(const Work& work) const {
    const int64_t panel = kernels().row_panel;
    at::parallel_for(0, ceil_div(rows, panel), 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * panel; row < std::min(end * panel, rows); row += size) {
        work(row, std::min({size, end * panel - row, rows - row}));
      }
    });
  }

  // Calls work(begin, end) on runs of (tile, block) items, numbered tile * count + block.
  template <class Work>
  void items(const std::vector<Tile>& tiles, const Work& work) const {
    std::vector<int64_t> weights;
    for (const Tile& tile : tiles) {
      for (int64_t block = 0; block < count; ++block) {
        weights.push_back(
            round_up(tile.count, kernels().column_panel) *
            round_up(rows_of(block), kernels().row_panel));
      }
    }
    parallel_by_weight(weights, work);
  }
};

// The wide products of one call, over D or O: float32 panels, or pairs of bfloat16 where the
// processor multiplies those and the tensors can be read in pairs. The adapter's part is float32.
struct Wide {
  const bool pairs;

  static bool can_pair(const Tensor& t) { return paired(Matrix(t)); }

  // Floats that `k` inner elements take in a panel.
  int64_t length(int64_t k) const { return pairs ? ceil_div(k, 2) : k; }
  Matrix view(const Tensor& t) const { return pairs ? pairs_of(Matrix(t)) : Matrix(t); }

  // Columns first .. first + count of w (K, columns) as a right operand.
  void pack_columns(
      const Tensor& w, int64_t first, int64_t count, float* to, int64_t panel_stride) const {
    const int64_t width = kernels().column_panel;
    if (pairs) {
      pack_pairs_of_rows(Matrix(w), first, count, 0, w.size(0), width, to, panel_stride);
    } else {
      pack(Matrix(w).t(), first, count, 0, w.size(0), width, to, panel_stride);
    }
  }

  void multiply(
      const float* rows, int64_t row_panels, int64_t row_panel_stride, const float* columns,
      int64_t column_panels, int64_t column_panel_stride, int64_t length, float* c, int64_t ldc,
      bool add) const {
    const Kernels& table = kernels();
    (pairs ? table.multiply_pairs : table.multiply)(
        rows, row_panels, row_panel_stride, columns, column_panels, column_panel_stride,
        length, c, ldc, add);
  }
};

// Rows first .. first + count of x with dropped elements 0, in x's dtype.
void drop_rows(
    const Matrix& x, const Dropout& dropout, int64_t first, int64_t count, at::Tensor& out) {
  const Kernels& table = kernels();
  std::vector<float> row(x.columns);
  for (int64_t n = 0; n < count; ++n) {
    table.to_float(x.at(first + n, 0), x.dtype, x.column_stride, x.columns, row.data());
    table.drop(row.data(), x.columns, dropout.seed, dropout.threshold, first + n, 0);
    store_tile(row.data(), x.columns, 1, x.columns, out, n, 0);
  }
}

std::tuple<std::vector<Tensor>, Tensor> forward_by_tiles(
    const Tensor& x, TensorList weight, TensorList bias, TensorList a, TensorList b,
    at::ArrayRef<double> scale, const Dropout& dropout) {
  const Kernels& table = kernels();
  const int64_t N = x.size(0), D = x.size(1);
  const std::vector<int64_t> r = offsets_of(a, 0);
  const int64_t R = r.back();
  const Wide wide{
      table.multiply_pairs != nullptr && Wide::can_pair(x) &&
      std::all_of(weight.begin(), weight.end(), Wide::can_pair)};
  const int64_t L = wide.length(D), K = L + R;
  std::vector<Tensor> y;
  for (const Tensor& w : weight) y.push_back(at::empty({N, w.size(0)}, x.options()));
  Tensor s = at::empty({N, R}, x.options());

  const Matrix x_view = wide.view(x);
  Tensor a_all = stacked(a);
  if (wide.pairs) a_all = a_all.to(at::kBFloat16).contiguous();
  const int64_t r_panels = ceil_div(R, table.column_panel), r_room = r_panels * table.column_panel;
  Buffer a_packed(r_room * L);
  pack(
      wide.view(a_all), 0, R, 0, L, table.column_panel, a_packed.data(), L * table.column_panel);

  std::vector<Tile> tiles;
  for (size_t i = 0; i < weight.size(); ++i) add_tiles(i, weight[i].size(0), tiles);
  const int64_t at_once = rows_at_once(N, K * sizeof(float), PACKED_BYTES);
  Buffer rows_packed(at_once * K);
  for (int64_t group = 0; group < N; group += at_once) {
    const Blocks blocks(std::min(at_once, N - group));

    // s = dropout(x) a^T
    blocks.stretches([&](int64_t first, int64_t count) {
      Buffer s_tile(TILE_ROWS * r_room), dropped_packed(dropout.active() ? TILE_ROWS * L : 0);
      const int64_t row = group + first, stride = K * table.row_panel;
      float* packed = rows_packed.data() + first * K;
      pack(x_view, row, count, 0, L, table.row_panel, packed, stride);
      const float* input = packed;
      int64_t input_stride = stride;
      if (dropout.active()) {
        input_stride = L * table.row_panel;
        Tensor dropped_rows = at::empty({count, D}, x.options());
        drop_rows(Matrix(x), dropout, row, count, dropped_rows);
        pack(
            wide.view(dropped_rows), 0, count, 0, L, table.row_panel, dropped_packed.data(),
            input_stride);
        input = dropped_packed.data();
      }
      wide.multiply(
          input, ceil_div(count, table.row_panel), input_stride, a_packed.data(), r_panels,
          L * table.column_panel, L, s_tile.data(), r_room, false);
      if (dropout.active()) {
        for (int64_t i = 0; i < count * r_room; ++i) s_tile.data()[i] *= dropout.gain();
      }
      store_tile(s_tile.data(), r_room, count, R, s, row, 0);
      pack(
          Matrix(s_tile.data(), count, R, r_room), 0, count, 0, R, table.row_panel,
          packed + L * table.row_panel, stride);
    });

    // y_i = [x | s_i] [weight_i | scale_i b_i]^T + bias_i
    blocks.items(tiles, [&](int64_t begin, int64_t end) {
      Buffer columns_packed(TILE_COLUMNS * K), y_tile(TILE_ROWS * TILE_COLUMNS);
      Buffer bias_tile(TILE_COLUMNS);
      int64_t packed_tile = -1;
      for (int64_t item = begin; item < end; ++item) {
        const auto [i, first, count] = tiles[item / blocks.count];
        const int64_t R_i = r[i + 1] - r[i];
        const int64_t stride = (L + R_i) * table.column_panel;
        float* columns = columns_packed.data();
        float* columns_s = columns + L * table.column_panel;
        if (packed_tile != item / blocks.count) {
          packed_tile = item / blocks.count;
          pack(wide.view(weight[i]), first, count, 0, L, table.column_panel, columns, stride);
          pack(
              Matrix(b[i]).scaled(static_cast<float>(scale[i])), first, count, 0, R_i,
              table.column_panel, columns_s, stride);
          if (!bias.empty()) vector_to_float(bias[i], first, count, bias_tile.data());
        }
        const int64_t block = item % blocks.count, rows = blocks.rows_of(block);
        const int64_t row_panels = ceil_div(rows, table.row_panel);
        const int64_t column_panels = ceil_div(count, table.column_panel);
        const float* packed = rows_packed.data() + block * blocks.size * K;
        wide.multiply(
            packed, row_panels, K * table.row_panel, columns, column_panels, stride, L,
            y_tile.data(), TILE_COLUMNS, false);
        table.multiply(
            packed + (L + r[i]) * table.row_panel, row_panels, K * table.row_panel, columns_s,
            column_panels, stride, R_i, y_tile.data(), TILE_COLUMNS, true);
        if (!bias.empty()) {
          for (int64_t n = 0; n < rows; ++n) {
            table.accumulate(bias_tile.data(), count, y_tile.data() + n * TILE_COLUMNS);
          }
        }
        store_tile(
            y_tile.data(), TILE_COLUMNS, rows, count, y[i], group + block * blocks.size, first);
      }
    });
  }
  return {y, s};
}

// (ds, dx)
std::tuple<Tensor, Tensor> backward_by_tiles(
    TensorList dy, const Tensor& x, TensorList weight, TensorList a, TensorList b,
    at::ArrayRef<double> scale, const Dropout& dropout, bool need_dx) {
  const Kernels& table = kernels();
  const int64_t N = x.size(0), D = x.size(1);
  const int64_t n = static_cast<int64_t>(weight.size());
  const std::vector<int64_t> r = offsets_of(a, 0);
  const Wide wide{
      table.multiply_pairs != nullptr &&
      std::all_of(dy.begin(), dy.end(), Wide::can_pair) &&
      std::all_of(weight.begin(), weight.end(), Wide::can_pair)};
  std::vector<int64_t> l = {0};  // where each dy_i starts among a row's floats
  for (const Tensor& w : weight) l.push_back(l.back() + wide.length(w.size(0)));
  const int64_t R = r.back(), L = l.back(), K = L + R;
  Tensor dx = at::empty(need_dx ? at::IntArrayRef{N, D} : at::IntArrayRef{0}, x.options());
  Tensor ds = at::empty({N, R}, x.options().dtype(at::kFloat));

  // columns of ds_i = scale_i dy_i b_i
  std::vector<Buffer> b_packed;
  int64_t widest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t R_i = r[i + 1] - r[i], room = round_up(R_i, table.column_panel);
    widest = std::max(widest, room);
    const int64_t length = l[i + 1] - l[i];
    b_packed.emplace_back(room * length);
    const Tensor b_i = wide.pairs ? b[i].to(at::kBFloat16).contiguous() : b[i];
    wide.pack_columns(b_i, 0, R_i, b_packed.back().data(), length * table.column_panel);
  }

  const Tensor a_all = stacked(a);
  std::vector<Tile> tiles;
  add_tiles(0, D, tiles);
  const int64_t at_once = rows_at_once(N, K * sizeof(float), PACKED_BYTES);
  Buffer rows_packed(at_once * K);
  for (int64_t group = 0; group < N; group += at_once) {
    const Blocks blocks(std::min(at_once, N - group));
    const int64_t row_stride = K * table.row_panel;

    blocks.stretches([&](int64_t first, int64_t count) {
      Buffer tile(TILE_ROWS * widest);
      const int64_t row = group + first;
      float* packed = rows_packed.data() + first * K;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t R_i = r[i + 1] - r[i], length = l[i + 1] - l[i];
        const int64_t panels = ceil_div(R_i, table.column_panel);
        const int64_t ldc = panels * table.column_panel;
        float* packed_i = packed + l[i] * table.row_panel;
        pack(wide.view(dy[i]), row, count, 0, length, table.row_panel, packed_i, row_stride);
        wide.multiply(
            packed_i, ceil_div(count, table.row_panel), row_stride, b_packed[i].data(), panels,
            length * table.column_panel, length, tile.data(), ldc, false);
        const float factor = static_cast<float>(scale[i]);
        for (int64_t j = 0; j < count * ldc; ++j) tile.data()[j] *= factor;
        store_tile(tile.data(), ldc, count, R_i, ds, row, r[i]);
      }
      pack(
          Matrix(ds), row, count, 0, R, table.row_panel, packed + L * table.row_panel,
          row_stride);
    });

    if (!need_dx) continue;
    // dx = dropout'(ds a) + sum of dy_i weight_i
    blocks.items(tiles, [&](int64_t begin, int64_t end) {
      Buffer columns(TILE_COLUMNS * K), tile(TILE_ROWS * TILE_COLUMNS);
      const int64_t stride = K * table.column_panel;
      int64_t packed_tile = -1;
      for (int64_t item = begin; item < end; ++item) {
        const auto [_, first, count] = tiles[item / blocks.count];
        if (packed_tile != item / blocks.count) {
          packed_tile = item / blocks.count;
          for (int64_t i = 0; i < n; ++i) {
            wide.pack_columns(
                weight[i], first, count, columns.data() + l[i] * table.column_panel, stride);
          }
          pack(
              Matrix(a_all).t().scaled(dropout.gain()), first, count, 0, R, table.column_panel,
              columns.data() + L * table.column_panel, stride);
        }
        const int64_t block = item % blocks.count, rows = blocks.rows_of(block);
        const int64_t row = group + block * blocks.size;
        const int64_t row_panels = ceil_div(rows, table.row_panel);
        const int64_t column_panels = ceil_div(count, table.column_panel);
        const float* packed = rows_packed.data() + block * blocks.size * K;
        table.multiply(
            packed + L * table.row_panel, row_panels, row_stride,
            columns.data() + L * table.column_panel, column_panels, stride, R, tile.data(),
            TILE_COLUMNS, false);
        if (dropout.active()) {
          for (int64_t i = 0; i < rows; ++i) {
            table.drop(
                tile.data() + i * TILE_COLUMNS, count, dropout.seed, dropout.threshold, row + i,
                first);
          }
        }
        wide.multiply(
            packed, row_panels, row_stride, columns.data(), column_panels, stride, L,
            tile.data(), TILE_COLUMNS, true);
        store_tile(tile.data(), TILE_COLUMNS, rows, count, dx, row, first);
      }
    });
  }
  return {ds, dx};
}

// Up to how many rows each row of the weight is better multiplied as it lies.
int64_t few_rows(const Tensor& x) {
  const bool wide = kernels().column_panel == 32;
  return x.scalar_type() == at::kFloat && wide ? 32 : 8;
}

// Rows of every tensor lie whole in memory, one element after the other.
bool in_rows(TensorList tensors) {
  return std::all_of(
      tensors.begin(), tensors.end(), [](const Tensor& t) { return t.stride(1) == 1; });
}

// bfloat16 rows that Kernels::dots multiplies as they are.
bool multiplies_as_pairs(const Tensor& x) {
  return x.scalar_type() == at::kBFloat16 && x.stride(1) == 1 &&
      kernels().multiply_pairs != nullptr;
}

// x in float32, row after row, in memory that `room` keeps.
Matrix in_floats(const Tensor& x, Buffer& room) {
  const Matrix from(x);
  for (int64_t n = 0; n < from.rows; ++n) {
    kernels().to_float(
        from.at(n, 0), from.dtype, from.column_stride, from.columns,
        room.data() + n * from.columns);
  }
  return Matrix(room.data(), from.rows, from.columns, from.columns);
}

// out = or += left times rows first .. first + count of `right`, transposed
void times_rows(
    const Matrix& left, const Tensor& right, int64_t first, int64_t count, float* out,
    int64_t ld_out, bool add) {
  const Matrix other(right);
  kernels().dots(
      left.data, left.dtype, left.row_stride, left.rows, other.at(first, 0), other.dtype,
      other.row_stride, count, left.columns, out, ld_out, add);
}

// For a few rows nothing is packed: the weight is read once, as it lies, each thread its share.
std::tuple<std::vector<Tensor>, Tensor> forward_by_rows(
    const Tensor& x, TensorList weight, TensorList bias, TensorList a, TensorList b,
    at::ArrayRef<double> scale, const Dropout& dropout) {
  constexpr int64_t WIDTH = 64, SERIAL = 32768;  // outputs of an item; products worth no thread
  const Kernels& table = kernels();
  const int64_t N = x.size(0), D = x.size(1);
  const int64_t grain = std::max<int64_t>(1, SERIAL / std::max<int64_t>(1, WIDTH * D * N));
  const std::vector<int64_t> r = offsets_of(a, 0);
  Tensor s = at::empty({N, r.back()}, x.options());
  std::vector<Tensor> y;

  Buffer room(N * D), input_room(dropout.active() ? N * D : 0);
  const Matrix floats = in_floats(x, room);
  const Matrix input =
      dropout.active() ? in_floats(dropped(x, dropout), input_room) : floats;
  const Matrix rows = multiplies_as_pairs(x) ? Matrix(x) : floats;
  for (size_t i = 0; i < weight.size(); ++i) {
    const int64_t R = r[i + 1] - r[i], O = weight[i].size(0), ld = round_up(R, WIDTH);
    Buffer s_room(N * ld), bias_row(bias.empty() ? 0 : O);
    float* s_i = s_room.data();
    at::parallel_for(0, ld / WIDTH, grain, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * WIDTH;
      times_rows(input, a[i], first, std::min(end * WIDTH, R) - first, s_i + first, ld, false);
    });
    store_tile(s_i, ld, N, R, s, 0, r[i]);
    for (int64_t j = 0; j < N * ld; ++j) s_i[j] *= static_cast<float>(scale[i]);
    if (!bias.empty()) vector_to_float(bias[i], 0, O, bias_row.data());

    y.push_back(at::empty({N, O}, x.options()));
    at::parallel_for(0, ceil_div(O, WIDTH), grain, [&](int64_t begin, int64_t end) {
      Buffer tile(N * WIDTH);
      for (int64_t first = begin * WIDTH; first < std::min(end * WIDTH, O); first += WIDTH) {
        const int64_t count = std::min(WIDTH, O - first);
        times_rows(rows, weight[i], first, count, tile.data(), WIDTH, false);
        times_rows(Matrix(s_i, N, R, ld), b[i], first, count, tile.data(), WIDTH, true);
        for (int64_t n = 0; !bias.empty() && n < N; ++n) {
          table.accumulate(bias_row.data() + first, count, tile.data() + n * WIDTH);
        }
        store_tile(tile.data(), WIDTH, N, count, y[i], 0, first);
      }
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
  const bool by_rows =
      x.size(0) <= few_rows(x) && in_rows(weight) && in_rows(a) && in_rows(b);
  return (by_rows ? forward_by_rows : better_by_aten(x) ? forward_by_aten : forward_by_tiles)(
      x, weight, bias, a, b, scale, Dropout(dropout_p, seed));
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
  const Dropout dropout(dropout_p, seed);
  const auto [ds, dx] = (better_by_aten(x) ? backward_by_aten : backward_by_tiles)(
      dy, x, weight, a, b, scale, dropout, need_dx);
  std::vector<Tensor> da, db;
  if (need_dab) {
    // da = ds^T dropout(x) ; db_i^T = scale_i s_i^T dy_i
    const std::vector<int64_t> r = offsets_of(a, 0);
    Tensor da_all = at::empty({r.back(), x.size(1)}, stacked(a).options());
    transposed_product(
        Matrix(ds), Matrix(x).dropped(dropout), dropout.gain(), da_all);
    for (size_t i = 0; i < dy.size(); ++i) {
      const Tensor da_i = da_all.slice(0, r[i], r[i + 1]);
      da.push_back(a.size() == 1 ? da_all : da_i.to(a[i].scalar_type(), false, /*copy=*/true));
      Tensor db_t = at::empty({r[i + 1] - r[i], weight[i].size(0)}, b[i].options());
      transposed_product(
          Matrix(s.slice(1, r[i], r[i + 1])), Matrix(dy[i]), static_cast<float>(scale[i]), db_t);
      db.push_back(db_t.t().contiguous());
    }
  }
  return {dx, da, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(perl_kernels, CPU, m) {
  m.impl("lora_linear_cpu", lora_linear);
  m.impl("lora_linear_backward_cpu", lora_linear_backward);
}

}  // namespace perl_kernels::cpu
